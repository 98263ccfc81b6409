"""Activation functions by the names users and saved policies give them."""

from __future__ import annotations

import re

from torch import nn

from raypatch.errors import AgentError, InputError, offer

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "selu": nn.SELU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "hardtanh": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "identity": nn.Identity,
}


def activation_by_name(name: str, origin: str) -> type[nn.Module]:
    """``relu``, ``ReLU`` or ``leaky_relu`` to its torch class."""
    key = name.lower().replace("-", "_")
    for known, kind in ACTIVATIONS.items():
        if key in (known, kind.__name__.lower()):
            return kind
    raise InputError(f"{origin}: unknown activation {name!r}; {offer(name, list(ACTIVATIONS))}")


def activation_by_text(text: str, origin: str) -> type[nn.Module]:
    """``<class 'torch.nn.modules.activation.Tanh'>``, as Stable-Baselines3 writes it."""
    match = re.fullmatch(r"<class 'torch\.nn\.modules\.\w+\.(\w+)'>", text)
    if not match:
        raise AgentError(
            f"{origin}: activation_fn {text!r} is not one of torch's; "
            "a class of your own needs --trust_agent_code"
        )
    try:
        return activation_by_name(match.group(1), origin)
    except InputError as error:
        raise AgentError(str(error)) from None
