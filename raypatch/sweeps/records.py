"""The files that describe a sweep: ``sweep.json`` and ``experiments.arrow``."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from raypatch.definitions import Experiments
from raypatch.results import layout
from raypatch.results.store import Store, digest_of
from raypatch.sweeps import recovery

if TYPE_CHECKING:
    from raypatch.agents.agent import Agent


def agent_record(agent: Agent, path: str, engine: str) -> dict[str, Any]:
    """What ``sweep.json`` says of the agent."""
    return {
        "path": path,
        "loaded_as": agent.loaded_as,
        "output_kind": agent.output_kind,
        "discrete": agent.discrete,
        "engine": engine,
    }


def software_versions() -> dict[str, str]:
    import numpy
    import pyarrow
    import torch

    import raypatch

    return {
        "raypatch": raypatch.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pyarrow": pyarrow.__version__,
        "python": platform.python_version(),
    }


def local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def write_sweep(store: Store, record: Mapping[str, Any]) -> None:
    store.write(layout.SWEEP, json.dumps(record, indent=2).encode())


def describe(
    store: Store, record: Mapping[str, Any], writers: Mapping[str, Callable[[], None]]
) -> None:
    """Write ``sweep.json`` and, each by its writer, the files that describe a sweep beside it; what
    an earlier run has left of these whole stays."""
    with store.changing():
        content = store.read(layout.SWEEP)
        held = None if content is None else layout.parse_sweep(content)
        digests = {}
        for name, write in writers.items():
            if held is None or recovery.description_fault(store, held, name) is not None:
                write()
            digests[name] = digest_of(store, name)
        if held is None or held.get(layout.DIGESTS) != digests:
            write_sweep(store, {**(held or record), layout.DIGESTS: digests})


def add_run(store: Store, ending: Mapping[str, Any]) -> None:
    """Note how a run ended, beside the runs before it."""
    with store.changing():
        content = store.read(layout.SWEEP)
        assert content is not None
        record = layout.parse_sweep(content)
        record["runs"].append(dict(ending))
        write_sweep(store, record)


def distrust(store: Store, reason: str) -> None:
    """Note that a verification failed: no run goes on from what lies here."""
    with store.changing():
        content = store.read(layout.SWEEP)
        assert content is not None
        record = layout.parse_sweep(content)
        record.setdefault(layout.DISTRUSTED, reason)
        write_sweep(store, record)
        store.remove(layout.SUCCESS)


def write_experiments(store: Store, experiments: Experiments) -> None:
    """``experiments.arrow``, batch by batch."""
    import pyarrow as pa

    from raypatch.results import schema, tables

    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        store.sink(layout.EXPERIMENTS) as sink,
        pa.ipc.new_file(sink, schema.EXPERIMENTS, options=options) as writer,
    ):
        for first in range(0, len(experiments), schema.BATCH_ROWS):
            last = min(first + schema.BATCH_ROWS, len(experiments))
            writer.write_table(tables.experiments_table(first, experiments.slice(first, last)))
