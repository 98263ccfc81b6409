"""Options of ``raypatch run``, and what of them can be refused without reading a file."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from raypatch.agents.agent import AgentOptions, LoadingOptions
from raypatch.errors import InputError
from raypatch.results.schema import COMPRESSIONS, DIRECTIONS, SAVE_MODES

DTYPES = ("float32", "float64")
MAX_SEED = 1 << 63
SOURCES = ("pair", "zero", "mean", "resample")


@dataclass(frozen=True)
class RunConfig(LoadingOptions):
    """Options of ``raypatch run``, under the names of the command line."""

    agent_path: str
    definition_file: str
    output_dir: str
    start_index: int = 0
    end_index: int | None = None
    clean_inputs: str | None = None
    corrupted_inputs: str | None = None
    input_ids: str | None = None
    direction: str = "both"
    source: str = "pair"
    source_activations: str | None = None
    seed: int = 0
    metrics: str | None = None
    save: str = "full"
    compression: str = "lz4"
    num_actors: int | None = None
    gpus_per_actor: float = 1.0
    cpu_actors: int = 0
    device: str = "auto"
    dtype: str = "float32"
    batch_size: int | None = None
    memory_per_actor: int | None = None
    address: str | None = None
    backend: str = "ray"
    verify: int = 8
    max_failures: int = 100
    watchdog_s: float = 600.0
    overwrite: bool = False
    quiet: bool = False
    debug: bool = False

    def agent_options(self) -> AgentOptions:
        loading = {field.name: getattr(self, field.name) for field in fields(LoadingOptions)}
        return AgentOptions(**loading, inputs=self.clean_inputs or self.corrupted_inputs)


def config_of(options: Mapping[str, Any]) -> RunConfig:
    """The options of a command line or of a script, which may hold sizes as text, paths and lists
    of names. Raises InputError for those that do not exist, are missing, or of another type."""
    types = {field.name: str(field.type).split(" | ")[0] for field in fields(RunConfig)}
    for name in options:
        if name not in types:
            raise InputError(f"{name}: unknown option of run; valid: {', '.join(types)}")
    for name in ("agent_path", "definition_file", "output_dir"):
        if options.get(name) is None:
            raise InputError(f"--{name} is missing; see raypatch run --help")
    given = {name: _converted(name, value, types[name]) for name, value in options.items()}
    # What is None is left to its default.
    return RunConfig(**{name: value for name, value in given.items() if value is not None})


def joined(ids: Iterable[Any]) -> str:
    """Ids as the text of one option, in quotes, which keep their commas and spaces."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerow(ids)
    return text.getvalue().removesuffix("\r\n")


def ids_in(text: str) -> list[str]:
    """Ids in the text of one option, with spaces after the commas or not; see :func:`joined`."""
    try:
        return next(csv.reader([text], skipinitialspace=True), []) or [""]
    except csv.Error as error:
        raise InputError(
            f"--input_ids {text[:60]!r}: write ids in one line, with commas between ({error})"
        ) from None


def _converted(name: str, value: Any, kind: str) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if name in ("metrics", "input_ids") and isinstance(value, (list, tuple)):
        value = joined(value) if name == "input_ids" else ",".join(map(str, value))
    if name == "batch_size" and isinstance(value, str):
        value = None if value == "auto" else _whole(value)
    if name == "memory_per_actor" and isinstance(value, str):
        value = _bytes(value)
    is_right = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": isinstance(value, Integral) and not isinstance(value, bool),
        "float": isinstance(value, Real) and not isinstance(value, bool),
    }
    if value is not None and not is_right[kind]:
        text = f"{value!r:.60}"
        raise InputError(
            f"--{name}: {text} is a {type(value).__name__}; {_EXPECTED[kind]} is expected"
        )
    return int(value) if kind == "int" and value is not None else value  # NumPy's, too


_EXPECTED = {"str": "text", "bool": "True or False", "int": "a whole number", "float": "a number"}


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--batch_size: {text!r} is not auto or a number") from None


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number = text.upper().removesuffix("B").removesuffix("I")
    unit = units.get(number[-1:], 1)
    try:
        return int(float(number.rstrip("KMGT")) * unit)
    except (ValueError, OverflowError):
        raise InputError(f"--memory_per_actor: {text!r} is not a size like 512M or 4G") from None


_CHOICES = {
    "direction": ("both", *DIRECTIONS),
    "source": SOURCES,
    "save": SAVE_MODES,
    "compression": COMPRESSIONS,
    "dtype": DTYPES,
    "backend": ("ray", "inline"),
    "device": ("auto", "cpu", "cuda"),
}
_AT_LEAST = {
    "num_actors": 1, "verify": 0, "max_failures": 0, "batch_size": 1,
    "memory_per_actor": 1 << 20, "start_index": 0, "cpu_actors": 0,
}  # fmt: skip


def check_options(config: RunConfig) -> None:
    """Everything that can be refused on any machine."""
    for name, valid in _CHOICES.items():
        value = getattr(config, name)
        if value not in valid:
            raise InputError(f"--{name}: {value!r} is not one of {', '.join(valid)}")
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"--{name}: {value} is below {least}")
    if not -MAX_SEED <= config.seed < MAX_SEED:
        raise InputError(f"--seed: {config.seed} does not fit into 64 bits")
    for name in ("gpus_per_actor", "watchdog_s"):
        if not getattr(config, name) > 0:
            raise InputError(f"--{name}: {getattr(config, name)} is not above 0")
    if config.gpus_per_actor == math.inf:
        raise InputError(f"--gpus_per_actor: {config.gpus_per_actor} are more than there can be")
    if config.cpu_actors and (config.device == "cpu" or config.backend == "inline"):
        other = "--device cpu" if config.device == "cpu" else "--backend inline"
        raise InputError(
            f"--cpu_actors {config.cpu_actors}: adds CPU actors to those on GPUs; {other} has none"
        )
    for name, own in (("address", None), ("num_actors", 1)):
        if config.backend == "inline" and (value := getattr(config, name)) not in (None, own):
            raise InputError(
                f"--{name} {value}: --backend inline has no actors; leave out one of the two"
            )
    if config.source_activations is not None and config.source != "pair":
        raise InputError(
            f"--source {config.source}: --source_activations says where patched values come from; "
            "leave out one"
        )
    if config.source_activations is not None and config.direction == "both":
        raise InputError(
            "--source_activations holds the activations of one side: add --direction denoising if "
            "they are those of the clean inputs, noising if those of the corrupted ones"
        )


def check_config(config: RunConfig) -> None:
    """Everything that can be refused without reading a file."""
    check_options(config)
    try:
        config.output_dir.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"--output_dir {config.output_dir!r}: is not valid UTF-8; choose another name"
        ) from None
    for name in ("definition_file", "agent_path"):
        place = getattr(config, name)
        if "://" not in place and not Path(place).exists():
            raise InputError(f"--{name} {place}: no such file or directory")
