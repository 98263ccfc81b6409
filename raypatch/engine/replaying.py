"""Small calls that come again on a GPU, recorded as CUDA graphs: launching their operations one by
one takes many times as long as computing them."""

from __future__ import annotations

import marshal
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from raypatch.definitions import Experiments
from raypatch.engine.arguments import count_inputs
from raypatch.engine.incremental import Incremental
from raypatch.engine.layers import Args, map_tensors, tensors_in
from raypatch.engine.patch_run import Limits, empty_outputs
from raypatch.engine.plan import Plan
from raypatch.engine.precision import exact_math
from raypatch.engine.prepared import Prepared, Unassumed
from raypatch.engine.scratch import Scratch
from raypatch.engine.two_sides import TwoSides

RECORDED_ON = "cuda"
# Rows of a call above which a GPU computes longer than it takes to launch.
MOST_ROWS = 1 << 18
# Calls with the same experiments on inputs of one form before they are recorded, as recording
# takes as long as several; recordings kept, and which part of the memory each may take.
CALLS_BEFORE = 2
MOST_KEPT = 4
PARTS = 2 * MOST_KEPT


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

    ``sides`` hold some such inputs. Raises RuntimeError or Unassumed where the CPU
    would have to look at numbers in between, or what is assumed is not so for these.
    """

    def __init__(self, engine: Incremental, limits: Limits, plan: Plan, sides: TwoSides) -> None:
        with exact_math(), torch.no_grad(), torch.cuda.device(limits.device):
            self._inputs: tuple[Args, Args] = map_tensors(torch.clone, sides[:2])
            # All that is read and written in a replay stays as long as the recording.
            plan = plan.to(limits.device)
            scratch = engine.scratch.apart()
            self._run = partial(outputs_unseen, engine, scratch, limits, plan, *self._inputs)
            with _aside():
                self._run()  # libraries start, and what follows from shapes is found
                with waits_are_errors():
                    _, as_assumed = self._run()
            if not bool(as_assumed):
                raise Unassumed("something is not as it is as a rule")
            self._recorded = torch.cuda.CUDAGraph()
            self._outputs, self._as_assumed = _recorded(self._recorded, self._run)

    def __call__(self, sides: TwoSides) -> Tensor | None:
        """Patched outputs ``[experiments, inputs, outputs]`` of these inputs; None where something
        is not as it is as a rule."""
        with torch.inference_mode(False), torch.no_grad():
            given = tensors_in(sides[:2])
            for mine, other in zip(tensors_in(self._inputs), given, strict=True):
                mine.copy_(other)
            self._recorded.replay()
            return self._outputs.clone() if bool(self._as_assumed) else None


@contextmanager
def _aside() -> Iterator[None]:
    """In a stream of its own, as is asked for before a recording."""
    current = torch.cuda.current_stream()
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(current)
    try:
        with torch.cuda.stream(aside):
            yield
    finally:
        current.wait_stream(aside)
        _forget_workspaces()


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """What would wait for the GPU raises RuntimeError: in a recording it would leave torch's
    memory and streams in the middle of it."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_mode("error")
        yield
    finally:
        _set_sync_mode(before)


def _set_sync_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it may see less than there is
        torch.cuda.set_sync_debug_mode(mode)


def _recorded(
    graph: torch.cuda.CUDAGraph, run: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What ``run`` gives, recorded in a stream of this device: torch's own belongs to the device
    of the first recording."""
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    _forget_workspaces()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            return run()
    finally:
        torch.cuda.set_stream(current)  # a recording that fails stays in its own
        _forget_workspaces()


def _forget_workspaces() -> None:
    """Memory that products work in lies in a recording where it is first asked for there, and must
    serve no other, as it ends with it. What torch's compiler does around its own recordings."""
    torch._C._cuda_clearCublasWorkspaces()


@dataclass
class Asked:
    """Calls with the same experiments on inputs of one form: how many were computed, and their
    recording."""

    calls: int = 0
    replay: Replay | None = None


class Replays:
    """What was asked of one engine, the last few of it."""

    def __init__(self, engine: Incremental, limits: Limits) -> None:
        self._engine, self._limits = engine, limits.part(PARTS)
        self._asked: OrderedDict[Hashable, Asked] = OrderedDict()

    @classmethod
    def of(cls, engine: Any, limits: Limits) -> Replays | None:
        """None where nothing can be recorded: code of the network's own may do more than compute,
        and what each run must look at is not looked at in a replay."""
        if not isinstance(engine, Incremental):
            return None
        graph, following = engine.graph, engine.structure.following
        if graph.guarded or graph.how != "torch.fx" or following.possible:
            return None
        if not engine.savings.replay or any(node.is_networks for node in graph.nodes):
            return None
        return cls(engine, limits)

    def outputs(self, key: Hashable, sides: TwoSides) -> Tensor | None:
        """Patched outputs ``[experiments, inputs, outputs]`` where such a call is recorded."""
        asked = self._asked.get(key)
        if asked is None or asked.replay is None:
            return None
        self._asked.move_to_end(key)
        outputs = asked.replay(sides)
        if outputs is None:
            asked.replay = None  # it would be computed twice ever after
        return outputs

    def count(self, key: Hashable, plan: Plan, sides: TwoSides, outputs: Tensor) -> None:
        """Count a call that gave these outputs, and record it when it is worth it and possible."""
        n_inputs = count_inputs(sides.target)
        # Outputs are held twice, as they are computed and in order.
        if 2 * outputs.nbytes > (self._limits.memory_bytes or 0):
            return
        if self._limits.inputs_at_a_time(self._engine, sides.target, n_inputs) < n_inputs:
            return
        asked = self._asked.setdefault(key, Asked())
        self._asked.move_to_end(key)
        if len(self._asked) > MOST_KEPT:
            self._asked.popitem(last=False)
        asked.calls += 1
        if asked.calls == CALLS_BEFORE:
            # The outputs are there: whatever is in the way of a recording is no harm.
            with suppress(Exception):
                asked.replay = Replay(self._engine, self._limits, plan, sides)


def key_of(device: torch.device, experiments: Any, sides: TwoSides) -> Hashable:
    """What calls have in common that one recording serves; None where that could not be told, on a
    CPU, and for calls that a GPU computes longer than it takes to launch them."""
    if device.type != RECORDED_ON or sides.source is None:
        return None
    if isinstance(experiments, Plan):
        size = experiments.n_experiments
    elif isinstance(experiments, (list, Experiments)):
        size = len(experiments)
    else:
        return None
    if size * count_inputs(sides.target) > MOST_ROWS:
        return None
    form, content = _form(sides[:2]), _content(experiments)
    return None if form is None or content is None else (form, content)


def _form(args: Any) -> Hashable:
    """Shapes and types of tensors and the values of everything else, in their order: all that a
    recording has in it, where a capture needs less."""
    leaves, tree = tree_flatten(args)
    found: list[Hashable] = [repr(tree)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append((leaf.shape, leaf.dtype))
        elif leaf is None or type(leaf) in (bool, int, float, str):
            found.append((type(leaf), repr(leaf)))
        else:
            return None
    return tuple(found)


def _content(experiments: Any) -> Hashable:
    """Experiments as bytes, whoever may write over them."""
    if isinstance(experiments, Plan):
        numbers = [table.numpy() for table in experiments.tables]
        signatures = tuple(group.signature for group in experiments.groups)
        return signatures, *(table.tobytes() for table in numbers)
    if isinstance(experiments, Experiments):
        columns = [one for one in vars(experiments).values() if isinstance(one, np.ndarray)]
        content = ((str(column.dtype), column.tobytes()) for column in columns)
        return tuple(experiments.layer_names), *content
    if not all(type(one) is dict for one in experiments):
        return None
    # Arrays would be bytes without their type.
    plain = all(type(neurons) in (list, str) for one in experiments for neurons in one.values())
    try:
        return marshal.dumps(experiments, 2) if plain else None
    except ValueError:  # numbers and names of types of one's own
        return None
