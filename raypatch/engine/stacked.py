"""The path for networks that cannot be captured: hooks on stacked batches, never wrong."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine.arguments import inputs_between
from raypatch.engine.input_axes import for_each_input
from raypatch.engine.layers import (
    Args,
    Hook,
    Layer,
    forward,
    hooked,
    map_tensors,
    record_activations,
)
from raypatch.engine.plan import Group, Selection
from raypatch.engine.sources import Fill
from raypatch.errors import InputError, gpu_failed, out_of_memory


class Stacked:
    """Experiments stacked on the batch dimension, every forward run whole.

    ``limit`` 1 runs one experiment at a time: right for networks that do not treat stacked
    inputs one by one. ``routes``: which inputs a layer gets may depend on their values.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: dict[str, Layer],
        limit: int | None,
        routes: bool = False,
    ) -> None:
        self.network = network
        self.layers = layers
        self.limit = limit
        self.routes = routes

    def prepare(self, source: Args | None, target: Args, fill: Fill | None) -> StackedPrepared:
        """Record both sides' activations; see :meth:`Incremental.prepare`."""
        return StackedPrepared(self, source, target, fill)

    def layer_values(self, args: Args) -> dict[str, list[Tensor]]:
        """Outputs of every layer, one a call, in an unpatched run."""
        return record_activations(self.network, args, [*self.layers, OUTPUT_LOGITS])

    def run_bytes(self, target: Args) -> int:
        """Bytes of all layers' outputs in a run on one input."""
        values = self.layer_values(inputs_between(target, 0, 1))
        return sum(v.numel() * v.element_size() for calls in values.values() for v in calls)


class StackedPrepared:
    """Source activations by layer and call, and the unpatched outputs ``[inputs, outputs]``."""

    def __init__(
        self, engine: Stacked, source: Args | None, target: Args, fill: Fill | None
    ) -> None:
        self.engine = engine
        self.target = target
        own = engine.layer_values(target)
        self.baseline = own[OUTPUT_LOGITS][0]
        self.n_inputs = len(self.baseline)
        self.source_baseline: Tensor | None = None
        if source is not None:
            self.values = engine.layer_values(source)
            self.source_baseline = self.values[OUTPUT_LOGITS][0]
        else:
            assert fill is not None
            self.values = {
                name: [fill(name, number, call) for number, call in enumerate(calls)]
                for name, calls in own.items()
            }
        self._of_first: dict[str, list[Tensor]] = {}  # by layer, what it gives for the first target
        if source is not None and self.n_inputs > 1 and engine.routes:
            with suppress(Exception):  # a network's own code, which may want several
                self._of_first = engine.layer_values(inputs_between(target, 0, 1))
        self._row_bytes = self.baseline.element_size() * sum(
            call[:1].numel() for calls in own.values() for call in calls if call.dim()
        )

    def row_bytes(self, _: Group) -> int:
        """Bytes of the layers' outputs of one row."""
        return self._row_bytes

    def evaluate(self, group: Group, out: Tensor, batch_rows: int) -> int:
        """Fill ``out[group.experiments]`` and return the rows computed."""
        step = max(1, batch_rows // self.n_inputs)
        step = min(step, self.engine.limit or step)
        for start in range(0, len(group.experiments), step):
            ids = group.experiments[start : start + step]
            index = {
                layer: None if chosen is None else chosen.part(start, start + step)
                for layer, chosen in group.index.items()
            }
            values = self._together(index, len(ids))
            out.index_copy_(0, ids.to(out.device), values.reshape(len(ids), *out.shape[1:]))
        return len(group.experiments) * self.n_inputs

    def _together(self, index: dict[str, Selection | None], n_experiments: int) -> Tensor:
        """Outputs of several experiments stacked; of each by itself where an operation fails on
        them, even if the network goes on from there: that one may do so for others."""
        if n_experiments > 1:
            errors = _Errors()
            try:
                with errors:
                    values = self._forward(index, n_experiments)
                if not errors.seen:
                    return values
            except Exception as error:  # anything that a network's own code may raise
                if out_of_memory(error) or gpu_failed(error):
                    raise
        each = [
            {name: None if s is None else s.part(i, i + 1) for name, s in index.items()}
            for i in range(n_experiments)
        ]
        return torch.cat([self._forward(one, 1) for one in each])

    def _forward(self, index: dict[str, Selection | None], n_experiments: int) -> Tensor:
        def patcher(name: str) -> Hook:
            def patch(call: int, output: Tensor) -> Tensor:
                source = self._source_of(name, call, output, n_experiments)
                if n_experiments > 1 and output.shape == source.shape:
                    # It sees no input, so that nothing of it is stacked.
                    output = for_each_input(output, n_experiments * self.n_inputs)
                    source = for_each_input(source, self.n_inputs)
                return _patched(
                    output, source, self._axis(name, source), index[name], n_experiments
                )

            return patch

        def stacked(x: Tensor) -> Tensor:
            return x.repeat(n_experiments, *[1] * (x.dim() - 1)) if n_experiments > 1 else x

        args = map_tensors(stacked, self.target)
        hooks = {name: patcher(name) for name in index if name != OUTPUT_LOGITS}
        with torch.no_grad(), hooked(self.engine.network, hooks):
            output: Tensor = forward(self.engine.network, args)
        if OUTPUT_LOGITS in index:
            patched = patcher(OUTPUT_LOGITS)(0, output)
            assert patched is not None
            return patched
        return output

    def _source_of(self, name: str, call: int, output: Tensor, n_experiments: int) -> Tensor:
        source = next(iter(self.values[name][call : call + 1]), None)
        sizes = () if source is None else (n_experiments * source.numel(), source.numel())
        if source is None or output.numel() not in sizes or self._is_routed(name, call, source):
            other = "nothing" if source is None else list(source.shape)
            raise InputError(
                f"layer {name!r} gives {list(output.shape)} for these targets and {other} for the "
                "sources: which inputs reach it depends on their values, so source and target "
                "cannot be matched"
            )
        return source

    def _is_routed(self, name: str, call: int, value: Tensor) -> bool:
        """Whether a layer gets some of the inputs only, of which those of source and target may be
        others: then what it gives for one is not its share of what it gives for all."""
        if (calls := self._of_first.get(name)) is None:
            return False
        if not calls:
            return True
        share = calls[min(call, len(calls) - 1)].numel()
        return value.numel() not in (share, share * self.n_inputs)  # the first: it sees no input

    def _axis(self, name: str, output: Tensor) -> int:
        layer = self.engine.layers.get(name)
        return output.dim() - 1 if layer is None else layer.axis_of(output)


class _Errors(TorchFunctionMode):
    """Notes whether an operation has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.seen = True
            raise


def _patched(
    output: Tensor, source: Tensor, axis: int, chosen: Selection | None, n_experiments: int
) -> Tensor:
    """``output`` ``[E * N, ...]`` with the chosen neurons' source values along ``axis``."""
    stacked = output.reshape(n_experiments, *source.shape).clone()
    if chosen is None:
        stacked[:] = source
    else:
        last = stacked.movedim(axis + 1, 1)  # [E, J, N, ...]
        values = source.movedim(axis, 0)[chosen.neurons]  # [E, k, N, ...]
        last[torch.arange(n_experiments)[:, None], chosen.neurons] = values
    return stacked.reshape(output.shape)
