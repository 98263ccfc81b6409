"""``raypatch submit``: the same run as a job on a Ray cluster, through its job server.

What travels is what the run reads: the agent's directory, the definition, the inputs, and
this package. Results go where ``--output_dir`` says, which the cluster must be able to write.
"""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypatch.errors import InputError, RunError, missing_package

# Options of run that name a file to take along.
FILES = ("definition_file", "clean_inputs", "corrupted_inputs", "source_activations")
POLL_S = 1.0
PACKAGE = Path(__file__).parent.parent
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Submitted:
    """A job, and how it ended where it was waited for: the run's own exit code."""

    job_id: str
    status: str
    exit_code: int | None


def submit(
    address: str, options: dict[str, Any], *, wait: bool, say: Callable[[str], None]
) -> Submitted:
    """Submit a run; ``options`` are those of ``raypatch run`` the user gave.

    Raises InputError for what cannot be packed, RunError where the cluster does not answer.
    """
    _check(options)
    client = _client(address)
    with tempfile.TemporaryDirectory() as folder:
        words = _packed(options, Path(folder))
        entrypoint = shlex.join(["python", "-m", "raypatch.cli", "run", *words])
        environment = {"working_dir": folder, "py_modules": [str(PACKAGE)]}
        try:
            job_id = client.submit_job(entrypoint=entrypoint, runtime_env=environment)
        except Exception as error:  # the client raises RuntimeError for anything the server says
            raise RunError(f"--address {address}: the job was refused: {_hint(error)}") from None
    say(f"job {job_id} submitted to {address}; results go to {options['output_dir']}")
    if not wait:
        return Submitted(job_id, "PENDING", None)
    try:
        return _follow(client, job_id, say)
    except Exception as error:  # whatever the client raises where the head has gone
        raise RunError(
            f"--address {address}: job {job_id} cannot be followed any more: {_hint(error)}"
        ) from None


def _check(options: dict[str, Any]) -> None:
    output = str(options["output_dir"])
    if "://" not in output and not Path(output).is_absolute():
        raise InputError(
            f"--output_dir {output}: a job runs in a folder of its own on the cluster; give a URI "
            "(s3://...) or the full path of a disk the cluster shares"
        )
    for name in ("agent_path", *FILES):
        place = options.get(name)
        if place is not None and "://" not in str(place) and not Path(place).exists():
            raise InputError(f"--{name} {place}: no such file or directory")


def _client(address: str) -> Any:
    if not address.startswith(("http://", "https://")):
        raise InputError(
            f"--address {address}: a job server's address starts with http:// or https://, as in "
            "http://127.0.0.1:8265"
        )
    try:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)
    except ImportError:
        raise InputError(missing_package("raypatch submit", "'ray[default]'", "cluster")) from None
    except Exception as error:  # no server, another version, no right to talk to it
        raise RunError(f"--address {address}: {_hint(error)}") from None


def _hint(error: BaseException) -> str:
    """The client's words in one line, and what to do."""
    text = " ".join(str(error).split())[:300]
    low = text.lower()
    if "401" in text or "403" in text or "auth" in low:
        return f"{text}; Ray's token is taken from RAY_AUTH_TOKEN or ~/.ray/auth_token"
    if "version" in low:
        return f"{text}; install the cluster's version of Ray here"
    if "connect" in low or "404" in text or "max retries" in low:
        return (
            f"no job server answers ({type(error).__name__}); start the cluster with its dashboard "
            "(pip install 'ray[default]') and give the dashboard's address, port 8265 by default"
        )
    return text


def _packed(options: dict[str, Any], folder: Path) -> list[str]:
    """Copy what the run reads into the folder; the run's options with paths inside it."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        if name == "agent_path":
            shutil.copytree(value, folder / "agent", ignore=shutil.ignore_patterns("__pycache__"))
            value = "agent"
        elif name in FILES and "://" not in str(value):
            target = folder / name / Path(value).name
            target.parent.mkdir()
            shutil.copy(value, target)
            value = str(target.relative_to(folder))
        words += [f"--{name}"] if value is True else [f"--{name}={value}"]
    return words


def _follow(client: Any, job_id: str, say: Callable[[str], None]) -> Submitted:
    """Show the job's log as it grows, until it ends."""
    shown = 0
    while True:
        status = str(client.get_job_status(job_id).value)
        log = str(client.get_job_logs(job_id) or "")
        sys.stderr.write(log[shown:])
        sys.stderr.flush()
        shown = len(log)
        if status in ENDED:
            break
        time.sleep(POLL_S)
    info = client.get_job_info(job_id)
    code = getattr(info, "driver_exit_code", None)
    say(f"job {job_id} ended: {status.lower()}")
    if code is None:
        code = 0 if status == "SUCCEEDED" else 1
    return Submitted(job_id, status, int(code))
