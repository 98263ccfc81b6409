"""What is decided of a sweep before anything is written: how the network is evaluated, what the
sweep is, how it is cut into items."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raypatch.engine.identity import network_digest
from raypatch.engine.patcher import Patcher
from raypatch.engine.trial import network_output
from raypatch.errors import InputError, RaypatchError
from raypatch.results import layout
from raypatch.sweeps import sweep
from raypatch.sweeps.config import RunConfig
from raypatch.sweeps.reading import Subject
from raypatch.sweeps.shipping import Shipment, tensor_on
from raypatch.sweeps.work import Backend


@dataclass(frozen=True)
class Plan:
    """Decided before anything is written; the same for every run of a sweep but for the patcher."""

    patcher: Patcher
    packed: Shipment  # the patcher, for workers
    outputs_by_side: Mapping[str, np.ndarray]  # unpatched, [inputs, outputs]
    device_class: str  # where passes are computed: what results depend on in their last digits
    identity: dict[str, Any]
    fingerprint: str
    passes_each: int  # passes of one experiment
    item_length: int  # experiments of an item


def plan_sweep(config: RunConfig, subject: Subject, backend: Backend) -> Plan:
    """Capture the network, run it on all inputs and wait for the backend to know its device.

    Raises InputError where the network does not run on an input, or cannot be sent to workers.
    """
    # An actor keeps the runs of every direction, and may have a part of a GPU.
    memory_bytes, share = config.memory_per_actor, 1 / len(subject.directions)
    patcher = Patcher(
        subject.agent.network,
        dtype=getattr(torch, config.dtype),
        device="cpu",
        batch_rows=config.batch_size,
        memory_bytes=None if memory_bytes is None else int(memory_bytes * share),
        gpu_share=share * min(1.0, config.gpus_per_actor),
    )
    outputs_by_side = _baselines(patcher, subject)
    backend.wait_started()
    device_class = backend.device + ("+cpu" if config.cpu_actors else "")
    identity = _identity(config, subject, patcher, device_class)
    passes_each = len(subject.directions) * len(subject.inputs)
    item_length = sweep.item_length(
        n_experiments=len(subject.experiments),
        passes_each=passes_each,
        # One multiplication per weight is the least a forward costs.
        operations=2 * sum(subject.agent.parameters.values()),
        n_outputs=subject.agent.output_size,
        device_class=device_class,
    )
    return Plan(
        patcher, _packed(patcher, config.agent_path, backend), outputs_by_side, device_class,
        identity, sweep.fingerprint(identity), passes_each, item_length,
    )  # fmt: skip


def _baselines(patcher: Patcher, subject: Subject) -> dict[str, np.ndarray]:
    """Unpatched outputs by side; also settles how the network is captured."""
    inputs = subject.inputs
    target, *others = map(tensor_on, inputs.sides.values())
    # Both sides together where there are two: one may be the same throughout and tell little.
    try:
        if others:
            run = patcher.prepare(others[0], target)
        else:
            run = patcher.prepare(target=target, kind="zero")
    except InputError as error:
        raise _blamed_input(error, subject) from error
    baselines = [run.baseline, run.source_baseline][: len(inputs.sides)]
    found = {side: b.numpy() for side, b in zip(inputs.sides, baselines) if b is not None}
    for side, outputs in found.items():
        bad = np.flatnonzero(~np.isfinite(outputs).all(1))
        if len(bad):
            raise InputError(
                f"{side} input {inputs.ids[bad[0]]!r}: the agent's own output holds NaN "
                "or infinity; leave this input out (--input_ids), or check the agent (mask "
                "actions with a large finite number such as -1e8, not with infinity)"
            )
    return found


def _blamed_input(error: InputError, subject: Subject) -> InputError:
    """The error of the first input on which the network fails alone; where it fails on all, or
    on none, that is no input's fault."""
    inputs, faults = subject.inputs, []
    for side, values in inputs.sides.items():
        for i, name in enumerate(inputs.ids):
            try:
                network_output(subject.agent.network, (torch.from_numpy(values[[i]]),))
            except InputError as alone:
                faults.append(f"{side} input {name!r}: {alone}")
    is_all = len(faults) == len(inputs.sides) * len(inputs)
    return InputError(faults[0]) if faults and not is_all else error


def _identity(
    config: RunConfig, subject: Subject, patcher: Patcher, device_class: str
) -> dict[str, Any]:
    """Everything that decides the numbers and files; no time, machine or actor count."""
    inputs, given = subject.inputs, subject.given
    return {
        "format_version": layout.FORMAT_VERSION,
        "agent": sweep.files_digest(subject.agent.files),
        "network": network_digest(subject.agent.network, patcher.graph),
        "inputs": sweep.sha256_of(
            json.dumps(inputs.ids).encode(), *(inputs.sides[s] for s in sorted(inputs.sides))
        ),
        "sides": list(inputs.sides),
        "definition": sweep.definition_digest(subject.experiments),
        "n_experiments": len(subject.experiments),
        "layers": subject.agent.neuron_counts,
        "directions": list(subject.directions),
        "source": subject.source_kind,
        "source_activations": sweep.sha256_of(
            *(part for name in sorted(given) for part in (name.encode(), given[name]))
        ),
        "seed": config.seed,
        "metrics": list(subject.metrics),
        "save": config.save,
        "compression": config.compression,
        "dtype": config.dtype,
        "batch_size": config.batch_size,
        "device_class": device_class,
    }


def _packed(patcher: Patcher, agent_path: str, backend: Backend) -> Shipment:
    """The captured network; what is left of the user's own code in it travels by value."""
    try:
        return backend.packed(patcher, [Path(agent_path).resolve(), Path.cwd()])
    except RaypatchError:
        raise
    except Exception as error:
        raise InputError(
            f"--agent_path {agent_path}: the network cannot be sent to actors "
            f"({type(error).__name__}: {error}); use --backend inline"
        ) from None
