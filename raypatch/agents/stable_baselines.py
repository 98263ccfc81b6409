"""Stable-Baselines3 archives, read without unpickling anything.

``policy.pth`` is loaded as tensors only, ``data`` is JSON text, and the policy's class name
comes from pickle opcodes that are never executed. Which networks there are:
:mod:`raypatch.agents.sb3_networks`. Only a class of the user's own needs code, and then
``--trust_agent_code`` lets :mod:`raypatch.agents.sb3_trusted` load it with the library itself.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raypatch.agents import sb3_networks as networks
from raypatch.agents.activations import activation_by_text
from raypatch.agents.agent import Agent, AgentOptions, make_agent
from raypatch.agents.archives import check_archive, check_torch_file, read_member
from raypatch.agents.normalisation import normalised
from raypatch.agents.pickles import pickled_class
from raypatch.agents.spaces import Space, read_space
from raypatch.agents.state_dict import load_tensors
from raypatch.errors import AgentError

# The library's policies by the module their class lives in.
FAMILIES = {
    "stable_baselines3.dqn.policies": networks.VALUE,
    "stable_baselines3.common.policies": networks.ACTOR_CRITIC,
    "stable_baselines3.sac.policies": networks.GAUSSIAN,
    "stable_baselines3.td3.policies": networks.DETERMINISTIC,
    "sb3_contrib.qrdqn.policies": networks.QUANTILE,
    "sb3_contrib.tqc.policies": networks.GAUSSIAN,
    "sb3_contrib.common.maskable.policies": networks.ACTOR_CRITIC,
}
SUPPORTED = "DQN, QRDQN, PPO, A2C, MaskablePPO, TRPO, SAC, TD3, DDPG, TQC"
RECURRENT = "sb3_contrib.common.recurrent.policies"
LIBRARIES = ("torch.", "stable_baselines3.", "sb3_contrib.", "builtins.")
DEFAULT_QUANTILES, DEFAULT_CLIP_MEAN = 200, 2.0


def load_zip(file: Path, options: AgentOptions) -> Agent:
    """The action network of an agent saved by Stable-Baselines3 or its contrib package."""
    check_archive(file, str(file))
    data = _read_data(file)
    module, policy_class = _policy_class(data, file)
    if module == RECURRENT:
        raise AgentError(
            f"{file}: {policy_class} keeps a hidden state between steps, and what patching means "
            "for it is not settled; recurrent policies are not supported"
        )
    kwargs = data.get("policy_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise AgentError(f"{file}: policy_kwargs is {type(kwargs).__name__}, not an object")
    own_policy = None if module.startswith(LIBRARIES) else f"{module}.{policy_class}"
    custom = own_policy or _custom_class(kwargs)
    if custom and not options.trust_agent_code:
        raise AgentError(
            f"{file}: needs your class {custom!r}; allow running code from {file.parent} with "
            "--trust_agent_code, or export the policy's state dict"
        )
    family = FAMILIES.get(module)
    if family is None and not custom:
        raise AgentError(
            f"{file}: policy class {module}.{policy_class} is not supported; supported are "
            f"{SUPPORTED}"
        )
    space = read_space(data.get("observation_space"), f"{file}: observation_space")
    if custom:
        from raypatch.agents.sb3_trusted import load_trusted_network

        network, kind = load_trusted_network(file, space)
    else:
        assert family is not None
        network, kind = _rebuilt(file, family, space, kwargs), family.output_kind
    discrete, actions = _actions(data, file)
    network, notes = normalised(network, file.parent, space)
    with_code = "with the agent's code" if custom else "no code run"
    return make_agent(
        network,
        torch.zeros(1, *(space.shape or (space.size,))),
        output_kind="mean" if kind == "logits" and actions == "Box" else kind,
        discrete=discrete,
        squashed=kind == "mean" and actions == "Box",
        loaded_as=f"Stable-Baselines3 {policy_class}, {file.name}, {with_code}",
        files=(file,),
        observation_parts={key: part.shape for key, part in space.parts.items()} or None,
        notes=notes,
    )


def _rebuilt(
    file: Path,
    family: networks.Family,
    space: Space,
    kwargs: dict[str, Any],
) -> networks.ActionNetwork:
    content = read_member(file, "policy.pth")
    origin = f"{file}: policy.pth"
    check_torch_file(content, origin)
    state = load_tensors(io.BytesIO(content), origin)
    facts = networks.PolicyFacts(
        observation_space=space,
        activation=_activation(kwargs, family, file),
        n_quantiles=_number(kwargs, "n_quantiles", DEFAULT_QUANTILES, file),
        clip_mean=_number(kwargs, "clip_mean", DEFAULT_CLIP_MEAN, file),
        normalize_images=bool(kwargs.get("normalize_images", True)),
        origin=origin,
    )
    return networks.rebuild(family, state, facts)


def _number(kwargs: dict[str, Any], key: str, default: Any, file: Path) -> Any:
    value = kwargs.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AgentError(f"{file}: policy_kwargs: {key} is {value!r}, not a number")
    try:
        return type(default)(value)
    except (ValueError, OverflowError):
        raise AgentError(f"{file}: policy_kwargs: {key} is {value!r}") from None


def _read_data(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_member(file, "data"))
    except (ValueError, RecursionError) as error:
        raise AgentError(f"{file}: data is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise AgentError(f"{file}: data is not a JSON object")
    return data


def _policy_class(data: dict[str, Any], file: Path) -> tuple[str, str]:
    entry = data.get("policy_class")
    if not isinstance(entry, dict) or not isinstance(entry.get(":serialized:"), str):
        raise AgentError(f"{file}: data names no policy_class")
    return pickled_class(entry[":serialized:"], f"{file}: policy_class")


def _custom_class(kwargs: dict[str, Any]) -> str | None:
    """The first class in ``policy_kwargs`` that is neither torch's nor the library's."""
    for key, value in kwargs.items():
        if key.startswith(":") or not isinstance(value, str) or not value.startswith("<class '"):
            continue
        name = value.removeprefix("<class '").removesuffix("'>")
        if not name.startswith(LIBRARIES):
            return name
    return None


def _activation(kwargs: dict[str, Any], family: networks.Family, file: Path) -> type[nn.Module]:
    text = kwargs.get("activation_fn")
    if text is not None:
        return activation_by_text(str(text), str(file))
    return nn.Tanh if family is networks.ACTOR_CRITIC else nn.ReLU


def _actions(data: dict[str, Any], file: Path) -> tuple[bool, str]:
    """Whether the greedy action is the argmax of the outputs, and the kind of action space."""
    space = read_space(data.get("action_space"), f"{file}: action_space")
    return space.kind == "Discrete", space.kind
