"""The engine on a captured graph: exact incremental evaluation of patched forwards (design 6)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from raypatch.engine.apart import OneByOne, with_inputs_in
from raypatch.engine.graph import Graph
from raypatch.engine.input_axes import inputs_first, place_of
from raypatch.engine.layers import Args, Layer
from raypatch.engine.narrowing import narrowed
from raypatch.engine.prepared import Prepared
from raypatch.engine.scratch import Scratch
from raypatch.engine.sizes import settle_squeezes, with_sizes
from raypatch.engine.sources import Fill, GivenFill, Places
from raypatch.engine.structure import Savings, Structure
from raypatch.engine.written_out import with_modules


class Incremental:
    """The engine on one captured graph. Not thread-safe: scratch memory is shared."""

    def __init__(
        self, graph: Graph, layers: dict[str, Layer], savings: Savings, inputs: Args
    ) -> None:
        settle_squeezes(graph, inputs)
        graph = with_modules(graph)
        structure = Structure(graph, layers, savings, inputs)
        settled = with_sizes(graph, structure.following, structure.sample)
        if settled is not None:
            graph, structure = settled, Structure(settled, layers, savings, inputs)
        if structure.apart:
            graph = with_inputs_in(structure.apart, graph, structure.following, structure.sample)
            structure = Structure(graph, layers, savings, inputs)
        # Of which layers' calls only some places are computed, along an axis after the inputs'.
        self.kept: dict[tuple[str, int], Places] = {}
        if savings.needed_places and (less := narrowed(graph, structure.for_narrowing())):
            graph, kept = less
            for entry in kept.keys() & structure.layer_of.keys():
                places, axis = kept[entry], structure.axes[entry]
                self.kept[structure.layer_at(entry)] = places.along(place_of(places.axis, axis))
            structure = Structure(graph, layers, savings, inputs)
        self.graph = graph
        self.layers = layers
        self.savings = savings
        self.structure = structure
        self.scratch = Scratch()

    def prepare(self, source: Args | None, target: Args, fill: Fill | None) -> Prepared:
        """Run both sides once, unpatched, and keep every node's value.

        Patched values are the source run's, or where ``source`` is None those of ``fill``.
        """
        if isinstance(fill, GivenFill):
            fill = replace(fill, kept=self.kept)
        return Prepared(self.graph, self.structure, self.scratch, source, target, fill)

    def to(self, device: torch.device, inputs: Args) -> None:
        """Move weights and constants; everything derived is made anew."""
        own = self.graph.nodes
        for node in [*own, *(n.target.node for n in own if isinstance(n.target, OneByOne))]:
            node.move(device)
        self.scratch = Scratch()
        self.structure = Structure(self.graph, self.layers, self.savings, inputs)

    def layer_values(self, args: Args) -> dict[str, list[Tensor]]:
        """Outputs ``[inputs, ...]`` of every layer, one a call, in an unpatched run."""
        values, structure = self.graph.run(args), self.structure
        return {
            name: [
                inputs_first(values[i], structure.axes[i])
                for i in (min(call, structure.output) for call in calls)
            ]
            for name, calls in structure.calls.items()
        }

    def run_bytes(self, _: Args) -> int:
        """Bytes of all values in a run on one input."""
        return self.structure.sample_bytes
