"""Small calls that come again on a GPU, recorded as CUDA graphs: launching their operations one by
one takes many times as long as computing them."""

from __future__ import annotations

import marshal
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raypatch.definitions import Experiments
from raypatch.engine.arguments import count_inputs, form_of
from raypatch.engine.incremental import Incremental
from raypatch.engine.layers import Args, map_tensors, tensors_in
from raypatch.engine.patch_run import Limits, empty_outputs
from raypatch.engine.plan import Plan
from raypatch.engine.precision import exact_math
from raypatch.engine.prepared import Prepared, Unassumed
from raypatch.engine.scratch import Scratch

# Rows of a call above which a GPU computes longer than it takes to launch.
MOST_ROWS = 1 << 18
# Calls with the same experiments on inputs of one form before they are recorded, as recording
# takes as long as several; recordings kept, each with its memory.
CALLS_BEFORE = 2
MOST_KEPT = 4


def outputs_unseen(
    engine: Incremental, scratch: Scratch, limits: Limits, plan: Plan, source: Args, target: Args
) -> tuple[Tensor, Tensor]:
    """Patched outputs ``[experiments, inputs, outputs]`` without a look at any number on the CPU,
    and whether they are right: what is so as a rule is assumed to be so. The plan's numbers lie
    where the inputs do. Raises Unassumed where that cannot be.
    """
    assumed: list[Tensor] = []
    prepared = Prepared(engine.graph, engine.structure, scratch, source, target, None, assumed)
    outputs = empty_outputs(plan.n_experiments, prepared.baseline)
    for group in plan.groups:
        prepared.evaluate(group, outputs, limits.rows_for(prepared.row_bytes(group)))
    for copies, originals in plan.copies:
        outputs[copies] = outputs[originals]
    true = torch.ones((), dtype=torch.bool, device=outputs.device)
    return outputs.contiguous(), torch.stack([true, *(one.all() for one in assumed)]).all()


class Replay:
    """Both unpatched runs and a plan's experiments on inputs of one form, recorded.

    ``source`` and ``target`` are some such inputs. Raises RuntimeError or Unassumed where the CPU
    would have to look at numbers in between.
    """

    def __init__(
        self, engine: Incremental, limits: Limits, plan: Plan, source: Args, target: Args
    ) -> None:
        self._inputs: tuple[Args, Args] = map_tensors(torch.clone, (source, target))
        # All that is read and written in a replay stays as long as the recording.
        plan = plan.to(limits.device)
        self._run = run = partial(outputs_unseen, engine, Scratch(), limits, plan, *self._inputs)
        with exact_math(), torch.no_grad(), torch.cuda.device(limits.device):
            # Once as it is, so that libraries start and what follows from shapes is found.
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                run()
            current.wait_stream(aside)
            self._recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._recorded, capture_error_mode="thread_local"):
                self._outputs, self._as_assumed = run()

    def __call__(self, source: Args, target: Args) -> Tensor | None:
        """Patched outputs ``[experiments, inputs, outputs]`` of these inputs; None where something
        is not as it is as a rule."""
        with torch.inference_mode(False), torch.no_grad():
            for mine, given in zip(tensors_in(self._inputs), tensors_in((source, target))):
                mine.copy_(given)
            self._recorded.replay()
            return self._outputs.clone() if bool(self._as_assumed) else None


@dataclass
class Asked:
    """Calls with the same experiments on inputs of one form: how many there were, and their
    recording. ``experiments`` are kept, as it may be their identity that they are known by."""

    experiments: Any
    calls: int = 0
    replay: Replay | None = None


class Replays:
    """What was asked of one engine, the last few of it."""

    def __init__(self, engine: Incremental, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._asked: OrderedDict[Hashable, Asked] = OrderedDict()

    @classmethod
    def of(cls, engine: Any, limits: Limits) -> Replays | None:
        """None where nothing can be recorded: code of the network's own may do more than compute,
        and what each run must look at is not looked at in a replay."""
        if limits.device.type != "cuda" or not isinstance(engine, Incremental):
            return None
        graph, following = engine.graph, engine.structure.following
        if graph.guarded or graph.how != "torch.fx" or following.possible:
            return None
        if not engine.savings.replay or any(node.is_networks for node in graph.nodes):
            return None
        return cls(engine, limits)

    def outputs(self, experiments: Any, source: Args | None, target: Args) -> Tensor | None:
        """Patched outputs ``[experiments, inputs, outputs]`` where such a call is recorded."""
        asked = self._asked.get(_key(experiments, source, target))
        if asked is None or asked.replay is None or source is None:
            return None
        return asked.replay(source, target)

    def count(self, experiments: Any, plan: Plan, source: Args | None, target: Args) -> None:
        """Count a call that was computed, and record it when it is worth it and possible."""
        key = _key(experiments, source, target)
        too_long = plan.n_experiments * count_inputs(target) > MOST_ROWS
        if key is None or source is None or too_long:
            return
        asked = self._asked.setdefault(key, Asked(experiments))
        self._asked.move_to_end(key)
        if len(self._asked) > MOST_KEPT:
            self._asked.popitem(last=False)
        asked.calls += 1
        if asked.calls != CALLS_BEFORE:
            return
        # There may be a copy to the CPU in between, or no memory for a second set of everything.
        with suppress(RuntimeError, Unassumed):
            asked.replay = Replay(self._engine, self._limits, plan, source, target)


def _key(experiments: Any, source: Args | None, target: Args) -> Hashable:
    """What calls have in common that one recording serves; None for experiments in no form that
    could be compared."""
    if isinstance(experiments, (Plan, Experiments)):
        name: Hashable = id(experiments)
    else:
        try:
            name = marshal.dumps(experiments)
        except ValueError:
            return None
    return name, count_inputs(target), repr((form_of(source or ()), form_of(target)))
