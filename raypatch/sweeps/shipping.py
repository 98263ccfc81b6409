"""An object as bytes and arrays: the weights of a network are shared, not copied, by actors.

Tensors inside the object leave the pickle and become numpy arrays. Ray keeps arrays in its
object store, where every actor of a machine sees the same memory, read only.
"""

from __future__ import annotations

import io
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raypatch.inputs import ALIGNMENT


@dataclass(frozen=True)
class Shipment:
    """What :func:`pack` made: the pickle, and the tensors' numbers in order."""

    content: bytes
    arrays: list[np.ndarray]


def pack(value: Any, pickler: type[Any] = pickle.Pickler) -> Shipment:
    """Pickle with a class like :class:`pickle.Pickler`; CPU tensors go beside the bytes."""
    arrays: list[np.ndarray] = []
    places: dict[int, tuple[int, bool]] = {}
    kept: list[torch.Tensor] = []

    class Shipper(pickler):  # type: ignore[misc]
        def persistent_id(self, found: Any) -> tuple[int, bool] | None:
            kinds = (torch.Tensor, torch.nn.Parameter)
            if type(found) not in kinds or found.device.type != "cpu" or found.is_sparse:
                return None
            if id(found) not in places:
                try:
                    array = found.detach().numpy()
                except (TypeError, RuntimeError):  # a dtype numpy does not have
                    return None
                places[id(found)] = (len(arrays), isinstance(found, torch.nn.Parameter))
                arrays.append(array)
                kept.append(found)  # an id is only good while its object lives
            return places[id(found)]

    stream = io.BytesIO()
    Shipper(stream, protocol=5).dump(value)
    return Shipment(stream.getvalue(), arrays)


def tensor_on(array: np.ndarray) -> torch.Tensor:
    """A tensor on an array's own memory where that begins as torch's own does, else on a copy:
    products of what lies otherwise are rounded otherwise. Ray lays small arrays anywhere."""
    with warnings.catch_warnings():
        # Arrays of Ray's are read only; the engine writes into none.
        warnings.simplefilter("ignore")
        tensor = torch.from_numpy(array)
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def unpack(shipment: Shipment) -> Any:
    """The object again, its tensors on the arrays' own memory."""
    tensors: dict[int, torch.Tensor] = {}

    class Receiver(pickle.Unpickler):
        def persistent_load(self, place: tuple[int, bool]) -> torch.Tensor:
            number, is_parameter = place
            if number not in tensors:
                tensor = tensor_on(shipment.arrays[number])
                tensors[number] = (
                    torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
                )
            return tensors[number]

    return Receiver(io.BytesIO(shipment.content)).load()
