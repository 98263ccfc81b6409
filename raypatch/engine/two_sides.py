"""What is patched into what in one call: a source and a target as people give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raypatch.engine.arguments import chosen_inputs, count_inputs, described
from raypatch.engine.layers import Args, as_args, map_tensors, tensors_in
from raypatch.engine.reference import cast
from raypatch.engine.sources import SOURCE_KINDS, SourceKind, resample_order
from raypatch.errors import InputError


class TwoSides(NamedTuple):
    """Inputs as the network takes them; ``source`` is None where patched values are no run's own,
    and ``given`` holds recorded activations by layer where the kind is "given"."""

    source: Args | None
    target: Args
    kind: SourceKind
    given: Mapping[str, Tensor]


def two_sides(
    source: Any,
    target: Any,
    kind: SourceKind,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> TwoSides:
    """Both sides, checked. Raises InputError where they do not fit together."""
    if kind not in SOURCE_KINDS:
        raise InputError(f"source kind {kind!r}: valid: {', '.join(SOURCE_KINDS)}")
    if target is None or (kind in ("pair", "given") and source is None):
        raise InputError("patching needs a target, and for kind 'pair' or 'given' a source too")
    # Tensors are used after the user's inference mode, too.
    with torch.inference_mode(False), torch.no_grad():
        targets = _taken(target, dtype, device)
        n_inputs = count_inputs(targets)
        if kind == "pair":
            sources = _taken(source, dtype, device)
            _check_alike(sources, targets)
            return TwoSides(sources, targets, kind, {})
        if kind == "given":
            return TwoSides(None, targets, kind, _activations(source))
        if kind == "resample":
            if n_inputs == 1:
                raise InputError("source kind 'resample' takes another input; there is only one")
            order = resample_order(n_inputs, seed).to(device)
            return TwoSides(chosen_inputs(targets, order), targets, kind, {})
    return TwoSides(None, targets, kind, {})


def _taken(inputs: Any, dtype: torch.dtype, device: torch.device) -> Args:
    args = as_args(inputs)
    for x in tensors_in(args):
        if x.is_meta or x.layout is not torch.strided:
            kind = "on the meta device" if x.is_meta else f"of layout {x.layout}"
            raise InputError(f"inputs are dense tensors with values, not {kind}")
    taken: Args = map_tensors(_plain_tensor, cast(args, dtype, device))
    return taken


def _plain_tensor(x: Tensor) -> Tensor:
    """Not one of inference mode, which counts no changes; outside of that mode."""
    return x.clone() if x.is_inference() else x


def _check_alike(source: Args, target: Args) -> None:
    forms = [(count_inputs(args), described(args)) for args in (source, target)]
    if forms[0] != forms[1]:
        raise InputError(
            "source and target need the same number of inputs, of the same shapes: got {} of {} "
            "as source, {} of {} as target".format(*forms[0], *forms[1])
        )


def _activations(given: Any) -> Mapping[str, Tensor]:
    if not isinstance(given, Mapping):
        raise InputError(
            "source of kind 'given': maps layers to recorded activations, like "
            f"{{'q_net.0': tensor}}; got {type(given).__name__}"
        )
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.dim():
            kind = "number" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"source of kind 'given': activations of {name!r} are a {kind}; it takes tensors "
                "[inputs, ...]"
            )
    return {name: _plain_tensor(value) for name, value in given.items()}
