"""Which of torch's operators a stranger's program may use: those that only compute.

An operator of the ``aten`` namespace computes on tensors and numbers in torch's own code.
The few that do more than that, such as reading and writing files, need a text to say where;
so an operator may take no text but the harmless ones named here.
"""

from __future__ import annotations

from typing import Any

import torch

HARMLESS_TEXTS = frozenset(
    {
        "activation", "approximate", "assert_msg", "driver", "equation", "indexing",
        "interpolation", "mode", "norm", "ord", "p", "pad_mode", "padding", "padding_side",
        "reduce", "rounding_mode", "side", "UPLO",
    }
)  # fmt: skip


def only_computes(schema: Any) -> bool:
    """Whether an operator's schema takes no text that could name a file, a device or code."""
    return all(
        argument.name in HARMLESS_TEXTS
        for argument in schema.arguments
        if "str" in str(argument.type)
    )


def aten_schemas(name: str) -> list[Any]:
    """Schemas of all overloads of ``aten::name``; none where there is no such operator."""
    return list(torch._C._jit_get_schemas_for_operator(f"aten::{name}"))
