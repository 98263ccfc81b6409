"""The command line: arguments to one config, one call, one exit code.

Help is instant: torch, ray and pyarrow are imported by what a command calls, never here.
"""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from raypatch import __version__
from raypatch.commands import agents, results, running
from raypatch.commands.options import SETTINGS
from raypatch.errors import Interrupted, RaypatchError
from raypatch.sweeps.interruption import termination_raised
from raypatch.terminal import leave_nothing_to_flush, open_standard_streams, say


class _ReaderGone(Exception):
    """Nobody reads the output any more, as behind ``| head -1``."""


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would make it a failure
            raise _ReaderGone from None


@click.group(cls=_Group, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="raypatch")
def cli() -> None:
    """Which neurons of a trained RL agent cause its actions: activation patching on Ray."""


for command in (
    running.generate, running.run, running.submit, results.status, results.verify, results.rank,
    results.export, results.report, results.plot, agents.inspect, agents.collect,
    agents.coalition, agents.screen,
):  # fmt: skip
    cli.add_command(command)


NO_OUTPUT = {errno.ENOSPC, errno.EIO, errno.EBADF}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors are one line on stderr."""
    open_standard_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # What a command ends with through its context comes back as a number.
        with termination_raised():
            code = cli.main(arguments, prog_name="raypatch", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        message = " ".join(error.format_message().split())
        if "unexpected extra argument" in message and isinstance(error, click.UsageError):
            path = error.ctx.command_path if error.ctx else "raypatch"
            message += f": options are written --name value; see {path} --help"
        return _fail(message, 2)
    except Interrupted as error:
        return _fail(str(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped at once; committed results are kept", 130)
    except RaypatchError as error:
        if "--debug" in arguments:
            raise
        return _fail(str(error), error.exit_code)
    except (BrokenPipeError, _ReaderGone):
        return 0  # all is well
    except OSError as error:
        if "--debug" in arguments or not (error.filename or error.errno in NO_OUTPUT):
            raise
        if error.filename is None:  # all files are named
            return _fail(f"standard output cannot be written: {error.strerror}", 1)
        fix = "free some space" if error.errno == errno.ENOSPC else "give another path"
        code = 1 if error.errno == errno.ENOSPC else 2
        return _fail(f"{error.filename}: cannot be used: {error.strerror}; {fix}", code)
    finally:
        leave_nothing_to_flush()


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        say(f"raypatch: {line}")
    return code


if __name__ == "__main__":
    sys.exit(main())
