"""Stable-Baselines3 archives, read without unpickling anything.

``policy.pth`` is loaded as tensors only, ``data`` is JSON text, and the policy's class name
comes from pickle opcodes that are never executed. The action network is rebuilt from the
shapes of the weights, under the names it has inside the policy. Only a custom features
extractor needs the user's code, and then ``--trust_agent_code`` loads the policy with
Stable-Baselines3 itself.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raypatch.agents.activations import activation_by_text
from raypatch.agents.agent import Agent, AgentOptions, make_agent
from raypatch.agents.factories import importable
from raypatch.agents.pickles import pickled_class
from raypatch.agents.state_dict import linear_from, load_tensors, weight_layers
from raypatch.errors import AgentError

# One archive member may unpack to this much: the largest real policies are far smaller,
# and a zip bomb stops here.
MEMBER_LIMIT = 4 << 30
Q_POLICIES = {"DQNPolicy"}
ACTOR_CRITIC_POLICIES = {"ActorCriticPolicy"}


def load_zip(file: Path, options: AgentOptions) -> Agent:
    """The action network of a DQN, PPO or A2C saved by Stable-Baselines3."""
    data = _read_data(file)
    policy_class = _class_name(data, file)
    kwargs = data.get("policy_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise AgentError(f"{file}: policy_kwargs is {type(kwargs).__name__}, not an object")
    if custom := _custom_class(kwargs):
        if not options.trust_agent_code:
            raise AgentError(
                f"{file}: needs your class {custom!r}; allow running code from "
                f"{file.parent} with --trust_agent_code, or export the policy's state dict"
            )
        return _load_trusted(file)
    known = Q_POLICIES | ACTOR_CRITIC_POLICIES
    if policy_class not in known:
        raise AgentError(
            f"{file}: policy class {policy_class!r} is not supported; "
            f"supported: {', '.join(sorted(known))}"
        )
    state = load_tensors(io.BytesIO(_read_member(file, "policy.pth")), f"{file}: policy.pth")
    shape = _observation_shape(data, file)
    activation = _activation(kwargs, policy_class, file)
    discrete = _is_discrete(data)
    if policy_class in Q_POLICIES:
        network: nn.Module = ValueNetwork(_sequential(state, "q_net.q_net", activation, file))
        kind = "Q-values"
    else:
        network = ActorNetwork(
            _sequential(state, "mlp_extractor.policy_net", activation, file, output=False),
            _linear(state, "action_net", file),
        )
        kind = "logits" if discrete else "mean"
    return make_agent(
        network,
        torch.zeros(1, *shape),
        output_kind=kind,
        discrete=discrete,
        loaded_as=f"Stable-Baselines3 {policy_class}, {file.name}, no code run",
        files=(file,),
    )


# --------------------------------------------------------------------- rebuilt networks


class ValueNetwork(nn.Module):
    """``policy.q_net``: observation to Q-values."""

    def __init__(self, q_net: nn.Module, features_extractor: nn.Module | None = None) -> None:
        super().__init__()
        self.features_extractor = features_extractor or nn.Flatten()
        self.q_net = q_net

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.q_net(self.features_extractor(obs))


class PolicyExtractor(nn.Module):
    """The half of an ``MlpExtractor`` that leads to actions."""

    def __init__(self, policy_net: nn.Module) -> None:
        super().__init__()
        self.policy_net = policy_net

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.policy_net(features)


class ActorNetwork(nn.Module):
    """``policy`` of an actor-critic on the path to its action logits."""

    def __init__(
        self,
        policy_net: nn.Module,
        action_net: nn.Module,
        features_extractor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.features_extractor = features_extractor or nn.Flatten()
        self.mlp_extractor = PolicyExtractor(policy_net)
        self.action_net = action_net

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.action_net(self.mlp_extractor(self.features_extractor(obs)))


def _linear(state: dict[str, torch.Tensor], path: str, file: Path) -> nn.Linear:
    weight = state.get(f"{path}.weight")
    if weight is None or weight.ndim != 2:
        raise AgentError(f"{file}: policy.pth has no linear layer {path!r}")
    if not bool(torch.isfinite(weight).all()):
        raise AgentError(f"{file}: {path}.weight holds NaN or infinity")
    return linear_from(weight, state.get(f"{path}.bias"))


def _sequential(
    state: dict[str, torch.Tensor],
    prefix: str,
    activation: type[nn.Module],
    file: Path,
    *,
    output: bool = True,
) -> nn.Sequential:
    """Linear layers at the even positions below ``prefix``, an activation after each.

    With ``output`` the last layer gives the outputs and has no activation after it.
    """
    paths = [path for path in weight_layers(state) if path.startswith(f"{prefix}.")]
    if [path.removeprefix(f"{prefix}.") for path in paths] != [
        str(2 * i) for i in range(len(paths))
    ]:
        raise AgentError(f"{file}: {prefix} is not a plain MLP: its layers are {', '.join(paths)}")
    modules: list[nn.Module] = []
    for path in paths:
        modules += [_linear(state, path, file), activation()]
    return nn.Sequential(*(modules[:-1] if output else modules))


# -------------------------------------------------------------------- reading the archive


def _read_member(file: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            info = archive.getinfo(name)
            if info.file_size > MEMBER_LIMIT:
                raise AgentError(f"{file}: {name} claims {info.file_size} bytes; refused")
            with archive.open(info) as member:
                return member.read(info.file_size)
    except KeyError:
        raise AgentError(f"{file}: no {name} inside; not a Stable-Baselines3 archive") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise AgentError(f"{file}: {name}: damaged archive ({error})") from None


def _read_data(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_member(file, "data"))
    except (ValueError, RecursionError) as error:
        raise AgentError(f"{file}: data is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise AgentError(f"{file}: data is not a JSON object")
    return data


def _class_name(data: dict[str, Any], file: Path) -> str:
    entry = data.get("policy_class")
    if not isinstance(entry, dict) or not isinstance(entry.get(":serialized:"), str):
        raise AgentError(f"{file}: data names no policy_class")
    return pickled_class(entry[":serialized:"], f"{file}: policy_class")[1]


def _custom_class(kwargs: dict[str, Any]) -> str | None:
    """The first class in ``policy_kwargs`` that is neither torch's nor the library's."""
    for key, value in kwargs.items():
        if key.startswith(":") or not isinstance(value, str) or not value.startswith("<class '"):
            continue
        name = value.removeprefix("<class '").removesuffix("'>")
        if not name.startswith(("torch.", "stable_baselines3.", "sb3_contrib.", "builtins.")):
            return name
    return None


def _activation(kwargs: dict[str, Any], policy_class: str, file: Path) -> type[nn.Module]:
    text = kwargs.get("activation_fn")
    if text is not None:
        return activation_by_text(str(text), str(file))
    return nn.Tanh if policy_class in ACTOR_CRITIC_POLICIES else nn.ReLU


def _observation_shape(data: dict[str, Any], file: Path) -> tuple[int, ...]:
    space = data.get("observation_space")
    shape = space.get("_shape") if isinstance(space, dict) else None
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise AgentError(f"{file}: the observation space is not a Box with a readable shape")
    return tuple(shape)


def _is_discrete(data: dict[str, Any]) -> bool:
    space = data.get("action_space")
    return not (isinstance(space, dict) and "spaces.box" in str(space.get(":type:")))


# ----------------------------------------------------------------- with the user's consent


def _load_trusted(file: Path) -> Agent:
    """Unpickle the archive as Stable-Baselines3 does; runs code the user has allowed."""
    try:
        from stable_baselines3.common.save_util import load_from_zip_file
    except ImportError:
        raise AgentError(
            f"{file}: a custom class inside a zip needs Stable-Baselines3; "
            "install it with: pip install 'raypatch[sb3]'"
        ) from None
    with importable(file.parent, Path.cwd()):
        try:
            data, params, _ = load_from_zip_file(str(file), device="cpu")
            assert data is not None
            policy = data["policy_class"](
                data["observation_space"],
                data["action_space"],
                lambda _: 0.0,
                **data.get("policy_kwargs", {}),
            )
            policy.load_state_dict(params["policy"])
        except Exception as error:
            raise AgentError(
                f"{file}: the agent's own code failed to load: {type(error).__name__}: {error}"
            ) from None
    shape = data["observation_space"].shape
    network, kind = _trusted_network(policy, file)
    return make_agent(
        network,
        torch.zeros(1, *shape),
        output_kind=kind,
        discrete=hasattr(data["action_space"], "n"),
        loaded_as=f"Stable-Baselines3 {type(policy).__name__}, {file.name}, with the agent's code",
        files=(file,),
    )


def _trusted_network(policy: Any, file: Path) -> tuple[nn.Module, str]:
    name = type(policy).__name__
    if name in Q_POLICIES:
        return ValueNetwork(policy.q_net.q_net, policy.q_net.features_extractor), "Q-values"
    if name in ACTOR_CRITIC_POLICIES:
        network = ActorNetwork(
            policy.mlp_extractor.policy_net, policy.action_net, policy.pi_features_extractor
        )
        return network, "logits"
    raise AgentError(f"{file}: policy class {name!r} is not supported")
