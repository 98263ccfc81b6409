"""Experiments grouped by signature, so that each group runs as stacked batches.

A signature is the layers an experiment patches and how many neurons in each (-1: all).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from raypatch.definitions import Experiments

ALL = -1
Signature = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Selection:
    """Neurons ``[E, k]`` of one layer in each of E experiments.

    ``start`` is set where they are one each and follow one another, as in a sweep over all
    neurons: then tables are sliced instead of copied.
    """

    neurons: Tensor
    start: int | None = None

    @classmethod
    def of(cls, table: np.ndarray) -> Selection:
        """Of neurons int64 ``[E, k]``; finds out whether they follow one another."""
        start = _start_of_run(table[:, 0]) if table.shape[1] == 1 else None
        return cls(torch.from_numpy(np.ascontiguousarray(table)), start)

    @property
    def shape(self) -> torch.Size:
        return self.neurons.shape

    def to(self, device: torch.device) -> Selection:
        """The same on a device; where tables are sliced nothing need be there."""
        return self if self.start is not None else Selection(self.neurons.to(device))

    def part(self, first: int, last: int) -> Selection:
        """Experiments ``first`` to ``last`` (exclusive)."""
        if first == 0 and last == self.neurons.shape[0]:
            return self
        start = None if self.start is None else self.start + first
        return Selection(self.neurons[first:last], start)

    def take(self, table: Tensor) -> Tensor:
        """Rows of a table ``[J, ...]``, ``[E * k, ...]``; a view where that is possible."""
        if self.start is not None:
            last = self.start + self.neurons.shape[0]
            return table if last - self.start == table.shape[0] else table[self.start : last]
        return table.index_select(0, self.neurons.flatten().to(table.device))

    def take_each(self, table: Tensor) -> Tensor:
        """The same rows by experiment, ``[E, k, ...]``."""
        return self.take(table).view(*self.shape, *table.shape[1:])


@dataclass(frozen=True)
class Group:
    """Experiments of one signature.

    ``experiments`` int64 ``[E]`` are their places in the definition's order, and ``start`` the
    first of them where they follow one another; ``index`` maps a layer to the neurons patched
    there, or None for all of them.
    """

    signature: Signature
    experiments: Tensor
    index: dict[str, Selection | None]
    start: int | None = None

    def places(self, first: int, last: int) -> Tensor | slice:
        """Where the results of experiments ``first`` to ``last`` (exclusive) of the group go."""
        if self.start is None:
            return self.experiments[first:last]
        return slice(self.start + first, self.start + last)

    def to(self, device: torch.device) -> Group:
        """The same with all numbers on a device."""
        index = {name: chosen and chosen.to(device) for name, chosen in self.index.items()}
        return replace(self, experiments=self.experiments.to(device), index=index)

    def where(self, mask: Tensor) -> Group:
        """The experiments that a mask ``[E]`` picks."""
        index = {
            layer: None if chosen is None else Selection(chosen.neurons[mask])
            for layer, chosen in self.index.items()
        }
        return Group(self.signature, self.experiments[mask.cpu()], index)


@dataclass(frozen=True)
class Plan:
    """Groups that cover a run of experiments; ``copies`` are (copy, original) places."""

    n_experiments: int
    groups: tuple[Group, ...]
    copies: tuple[tuple[Tensor, Tensor], ...]

    @property
    def tables(self) -> list[Tensor]:
        """All numbers in it, in one order."""
        chosen = [s.neurons for g in self.groups for s in g.index.values() if s is not None]
        places = [group.experiments for group in self.groups]
        return [*places, *chosen, *(ids for pair in self.copies for ids in pair)]

    def to(self, device: torch.device) -> Plan:
        """The same with all numbers on a device."""
        copies = tuple((these.to(device), those.to(device)) for these, those in self.copies)
        return Plan(self.n_experiments, tuple(group.to(device) for group in self.groups), copies)


def plan_experiments(experiments: Experiments, *, deduplicate: bool = True) -> Plan:
    """Group experiments and find those that are the same; costs no loop for one layer each."""
    n_entries = np.diff(experiments.entry_offsets)
    groups: list[Group] = []
    copies: list[tuple[Tensor, Tensor]] = []

    def add(ids: np.ndarray, names: list[str], tables: list[np.ndarray | None]) -> None:
        if deduplicate:
            ids, tables, copied = _distinct(ids, tables)
            if copied is not None:
                copies.append(copied)
        signature = tuple(
            (name, ALL if table is None else table.shape[1]) for name, table in zip(names, tables)
        )
        index = {
            name: None if table is None else Selection.of(table)
            for name, table in zip(names, tables)
        }
        groups.append(Group(signature, torch.from_numpy(ids), index, _start_of_run(ids)))

    for entries_each in np.unique(n_entries):
        ids = np.flatnonzero(n_entries == entries_each)
        entries = experiments.entry_offsets[ids][:, None] + np.arange(entries_each)
        layers = experiments.layers[entries].astype(np.int64)
        # Entries in the order of layers, so that spelling order makes no new signature.
        if (layers[:, 1:] < layers[:, :-1]).any():
            order = np.argsort(layers, axis=1, kind="stable")
            layers = np.take_along_axis(layers, order, 1)
            entries = np.take_along_axis(entries, order, 1)
        starts = experiments.neuron_offsets[entries]
        counts = experiments.neuron_offsets[entries + 1] - starts
        for members in _same_rows(np.concatenate([layers, counts], axis=1)):
            names = [experiments.layer_names[i] for i in layers[members[0]]]
            tables = [
                _neuron_table(experiments.neurons, starts[members, j], int(k))
                for j, k in enumerate(counts[members[0]])
            ]
            add(ids[members], names, tables)
    return Plan(len(experiments), tuple(groups), tuple(copies))


def _start_of_run(numbers: np.ndarray) -> int | None:
    """The first of numbers that follow one another; None where they do not."""
    if not len(numbers) or int(numbers[-1]) - int(numbers[0]) != len(numbers) - 1:
        return None
    return int(numbers[0]) if bool((np.diff(numbers) == 1).all()) else None


def _same_rows(keys: np.ndarray) -> list[np.ndarray]:
    """Row numbers of each distinct row, ascending."""
    if len(keys) == 1 or (keys == keys[0]).all():
        return [np.arange(len(keys))]
    first, inverse = _distinct_rows(keys)
    # Of 16 bits NumPy sorts by radix.
    inverse = inverse.astype(np.uint16) if len(first) < 1 << 16 else inverse
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)


def _distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As ``np.unique(rows, axis=0)`` finds them, in any order: the first row number of each
    distinct row, and for every row which of these it equals."""
    # Sorting numbers is many times faster than sorting rows; different rows may have the same
    # number by chance only, which is looked for.
    _, first, inverse = np.unique(_numbers(rows), return_index=True, return_inverse=True)
    if not np.array_equal(rows[first[inverse]], rows):
        _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _numbers(rows: np.ndarray) -> np.ndarray:
    """One int64 a row: a sum with fixed odd weights, modulo 2**64."""
    weights = np.random.default_rng(0).integers(1 << 62, size=rows.shape[1]) * 2 + 1
    return rows @ weights


def _neuron_table(neurons: np.ndarray, starts: np.ndarray, k: int) -> np.ndarray | None:
    if k == 0:
        return None
    table = neurons[starts[:, None] + np.arange(k)].astype(np.int64)
    in_order = bool((table[:, 1:] > table[:, :-1]).all())
    return table if in_order else np.sort(table, axis=1)


def _distinct(
    ids: np.ndarray, tables: list[np.ndarray | None]
) -> tuple[np.ndarray, list[np.ndarray | None], tuple[Tensor, Tensor] | None]:
    """Drop repeated rows; also the (copy, original) ids of what was dropped."""
    given = [table for table in tables if table is not None]
    rows = np.concatenate(given, axis=1) if given else np.zeros((len(ids), 1), np.int64)
    numbers = np.sort(_numbers(rows))
    if len(ids) == 1 or bool((numbers[1:] != numbers[:-1]).all()):
        return ids, tables, None
    first, inverse = _distinct_rows(rows)
    original = first[inverse]
    repeated = original != np.arange(len(ids))
    if not repeated.any():
        return ids, tables, None
    kept = ~repeated
    pair = (torch.from_numpy(ids[repeated]), torch.from_numpy(ids[original[repeated]]))
    return ids[kept], [None if t is None else t[kept] for t in tables], pair
