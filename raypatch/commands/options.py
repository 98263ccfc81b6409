"""Options and helpers that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from raypatch.terminal import say

if TYPE_CHECKING:
    from raypatch.results.reader import Results

# Dashes and underscores are the same in option names; values keep what they are.
SETTINGS = {
    "token_normalize_func": lambda token: token.replace("-", "_"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}


class LocalPath(click.ParamType):
    """A file or directory of this machine; an address elsewhere is refused."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if "://" in str(value):
            self.fail(
                f"{value!r} is an address; only a run's --output_dir and --definition_file "
                "may be elsewhere: give a path of this machine",
                param,
                ctx,
            )
        return str(value)


LOCAL_PATH = LocalPath()
AGENT_OPTIONS = [
    click.option("--agent_file", metavar="F", help="Which file of the directory is the agent."),
    click.option("--agent_factory", metavar="M:F", help="Function that builds the module."),
    click.option("--agent_output", metavar="NAME", help="Submodule that is the action network."),
    click.option("--activation", metavar="A", help="Between the layers of a plain MLP: relu, ..."),
    click.option(
        "--trust_agent_code", is_flag=True, help="Allow running code from the agent's directory."
    ),
    click.option("--actions", metavar="KIND", help="discrete or continuous, if no file says."),
]

COMBINE_HELP = "Of the two directions the average, or the maximum (default of signed metrics)."
INPUT_OPTIONS = [
    click.option(name, type=LOCAL_PATH, metavar="FILE", help="Default: in the agent's directory.")
    for name in ("--clean_inputs", "--corrupted_inputs")
]


def with_options(options: list[Any]) -> Callable[[Any], Any]:
    """Attach a list of options to a command."""

    def attach(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return attach


def open_run(output_dir: str) -> Results:
    """The results in a run's output directory."""
    from raypatch.results.reader import open_results

    results = open_results(output_dir)
    if results.distrusted is not None:
        say(f"warning: not to be trusted: {results.distrusted}")
    return results
