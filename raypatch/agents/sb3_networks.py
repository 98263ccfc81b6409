"""Action networks of Stable-Baselines3's policies, rebuilt from the shapes of their weights.

Modules keep the names they have inside the policy's network, so that a layer is called what
the user sees in the state dict: ``features_extractor.cnn.0``, ``q_net.0``, ``latent_pi.2``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raypatch.agents.preprocessing import preprocessing
from raypatch.agents.spaces import Space
from raypatch.agents.state_dict import finite, linear_from, weight_layers
from raypatch.engine.from_weights import convolution_of
from raypatch.errors import AgentError

NATURE_KERNELS, NATURE_STRIDES = (8, 4, 3), (4, 2, 1)


class ActionNetwork(nn.Module):
    """Observation to outputs: preprocessing, features, then the head's modules in order."""

    def __init__(
        self, observation: nn.Module, features_extractor: nn.Module, head: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.observation = observation
        self.features_extractor = features_extractor
        self.head = tuple(head)
        for name, module in head.items():
            self.add_module(name, module)

    def forward(self, obs: Tensor) -> Tensor:
        x = self.features_extractor(self.observation(obs))
        for name in self.head:
            x = getattr(self, name)(x)
        return x


class PolicyExtractor(nn.Module):
    """The half of an ``MlpExtractor`` that leads to actions; old ones share their first layers."""

    def __init__(self, policy_net: nn.Module, shared_net: nn.Module | None = None) -> None:
        super().__init__()
        if shared_net is not None:
            self.shared_net = shared_net
        self.policy_net = policy_net

    def forward(self, features: Tensor) -> Tensor:
        if hasattr(self, "shared_net"):
            features = self.shared_net(features)
        return self.policy_net(features)


class MeanOverQuantiles(nn.Module):
    """``[inputs, quantiles * actions]`` to Q-values: the mean over the quantiles."""

    def __init__(self, n_quantiles: int) -> None:
        super().__init__()
        self.n_quantiles = n_quantiles

    def forward(self, quantiles: Tensor) -> Tensor:
        n_actions = quantiles.shape[1] // self.n_quantiles
        return quantiles.reshape(-1, self.n_quantiles, n_actions).mean(1)


class NatureCNN(nn.Module):
    """The library's image encoder: three convolutions and a linear layer, ReLU after each."""

    def __init__(self, cnn: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.cnn, self.linear = cnn, linear

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.cnn(images))


class CombinedExtractor(nn.Module):
    """Features of each key of a Dict observation, side by side."""

    def __init__(self, extractors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        try:
            self.extractors = nn.ModuleDict(extractors)
        except KeyError as error:
            raise AgentError(f"a key of the observation cannot name a module: {error}") from None

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        return torch.cat([one(obs[key]) for key, one in self.extractors.items()], 1)


@dataclass(frozen=True)
class PolicyFacts:
    """What is known of a policy besides its weights."""

    observation_space: Space
    activation: type[nn.Module]
    n_quantiles: int
    clip_mean: float
    normalize_images: bool
    origin: str


@dataclass(frozen=True)
class Family:
    """A kind of policy: where its features come from, what its outputs are, and the modules after
    the features, by name."""

    features: str
    output_kind: str
    head: Callable[[Weights, PolicyFacts], dict[str, nn.Module]]


def rebuild(family: Family, state: dict[str, Tensor], facts: PolicyFacts) -> ActionNetwork:
    """The action network of a policy; raises AgentError naming the tensor that does not fit."""
    weights = Weights(state, facts)
    return ActionNetwork(
        preprocessing(facts.observation_space, scale_images=facts.normalize_images),
        weights.features(_features_prefix(family, state)),
        family.head(weights, facts),
    )


def _features_prefix(family: Family, state: Mapping[str, Tensor]) -> str:
    """Actor and critic may have feature extractors of their own."""
    own = "pi_features_extractor"
    separate = family is ACTOR_CRITIC and any(name.startswith(f"{own}.") for name in state)
    return own if separate else family.features


def _value_head(weights: Weights, facts: PolicyFacts) -> dict[str, nn.Module]:
    return {"q_net": weights.mlp("q_net.q_net")}


def _quantile_head(weights: Weights, facts: PolicyFacts) -> dict[str, nn.Module]:
    quantiles = weights.mlp("quantile_net.quantile_net")
    n_outputs = [m for m in quantiles if isinstance(m, nn.Linear)][-1].out_features
    if facts.n_quantiles < 1 or n_outputs % facts.n_quantiles:
        raise AgentError(
            f"{facts.origin}: {n_outputs} outputs are no multiple of {facts.n_quantiles} quantiles"
        )
    return {"quantile_net": quantiles, "quantiles": MeanOverQuantiles(facts.n_quantiles)}


def _actor_critic_head(weights: Weights, facts: PolicyFacts) -> dict[str, nn.Module]:
    policy_net = weights.mlp("mlp_extractor.policy_net", ends_in_activation=True)
    shared, shared_net = "mlp_extractor.shared_net", None
    if weights.has(f"{shared}.0"):
        shared_net = weights.mlp(shared, ends_in_activation=True)
    return {
        "mlp_extractor": PolicyExtractor(policy_net, shared_net),
        "action_net": weights.linear("action_net"),
    }


def _gaussian_head(weights: Weights, facts: PolicyFacts) -> dict[str, nn.Module]:
    latent = weights.mlp("actor.latent_pi", ends_in_activation=True)
    if not weights.has("actor.mu.0"):
        return {"latent_pi": latent, "mu": weights.linear("actor.mu")}
    # Generalised state-dependent exploration clips the mean.
    mu, clip = nn.Sequential(weights.linear("actor.mu.0")), facts.clip_mean
    if clip > 0:
        mu.append(nn.Hardtanh(-clip, clip))
    return {"latent_pi": latent, "mu": mu}


def _deterministic_head(weights: Weights, facts: PolicyFacts) -> dict[str, nn.Module]:
    return {"mu": weights.mlp("actor.mu")}  # without the Tanh that squashes the mean


VALUE = Family("q_net.features_extractor", "Q-values", _value_head)
QUANTILE = Family("quantile_net.features_extractor", "Q-values", _quantile_head)
ACTOR_CRITIC = Family("features_extractor", "logits", _actor_critic_head)
GAUSSIAN = Family("actor.features_extractor", "mean", _gaussian_head)
DETERMINISTIC = Family("actor.features_extractor", "mean", _deterministic_head)


class Weights:
    """Modules built around the tensors of a state dict."""

    def __init__(self, state: dict[str, Tensor], facts: PolicyFacts) -> None:
        self.state, self.facts = state, facts

    def has(self, path: str) -> bool:
        return f"{path}.weight" in self.state

    def _tensors(self, path: str, n_dimensions: int) -> tuple[Tensor, Tensor | None]:
        weight, bias = (self.state.get(f"{path}.{part}") for part in ("weight", "bias"))
        if weight is None or weight.dim() != n_dimensions:
            raise AgentError(
                f"{self.facts.origin}: {path}.weight is missing or not of {n_dimensions} dimensions"
            )
        for part, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                finite(tensor, f"{self.facts.origin}: {path}.{part}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise AgentError(
                f"{self.facts.origin}: {path}.bias has shape {list(bias.shape)}, its weight "
                f"{list(weight.shape)}"
            )
        return weight, bias

    def linear(self, path: str) -> nn.Linear:
        return linear_from(*self._tensors(path, 2))

    def mlp(self, prefix: str, *, ends_in_activation: bool = False) -> nn.Sequential:
        """Linear layers at the even positions below ``prefix``, an activation between them."""
        known = (path for path in weight_layers(self.state) if path.startswith(f"{prefix}."))
        paths = sorted(known, key=lambda path: (len(path), path))
        if paths != [f"{prefix}.{2 * i}" for i in range(len(paths))]:
            raise AgentError(
                f"{self.facts.origin}: {prefix} is not a plain MLP: its layers are "
                f"{', '.join(paths)[:200]}"
            )
        modules: list[nn.Module] = []
        for path in paths:
            modules += [self.linear(path), self.facts.activation()]
        if not ends_in_activation:
            if not paths:
                raise AgentError(f"{self.facts.origin}: no layers below {prefix}")
            modules.pop()
        return nn.Sequential(*modules)

    def features(self, prefix: str) -> nn.Module:
        """The features extractor whose weights lie below ``prefix``; none means flattening."""
        names = {
            name.removeprefix(f"{prefix}.") for name in self.state if name.startswith(f"{prefix}.")
        }
        parts = self.facts.observation_space.parts
        if parts:
            return CombinedExtractor(
                {key: self._one_extractor(f"{prefix}.extractors.{key}") for key in parts}
            )
        if any(name.startswith("extractors.") for name in names):
            raise AgentError(f"{self.facts.origin}: {prefix} has keys, its observations have none")
        return self._one_extractor(prefix)

    def _one_extractor(self, prefix: str) -> nn.Module:
        inside = [name for name in self.state if name.startswith(f"{prefix}.")]
        if not inside:
            return nn.Flatten()
        expected = {f"{prefix}.{part}" for part in ("cnn.0", "cnn.2", "cnn.4", "linear.0")}
        if {name.rpartition(".")[0] for name in inside} != expected:
            raise AgentError(
                f"{self.facts.origin}: {prefix} is not one of the library's feature extractors "
                f"(it holds {', '.join(inside)[:150]})"
            )
        modules: list[nn.Module] = []
        for place, (kernel, stride) in enumerate(zip(NATURE_KERNELS, NATURE_STRIDES)):
            path = f"{prefix}.cnn.{2 * place}"
            weight, bias = self._tensors(path, 4)
            if tuple(weight.shape[2:]) != (kernel, kernel):
                raise AgentError(
                    f"{self.facts.origin}: {path} has a kernel of {list(weight.shape[2:])}, the "
                    f"library's NatureCNN one of {kernel}"
                )
            given = None if bias is None else bias.float()
            modules += [convolution_of(weight.float(), given, stride=stride), nn.ReLU()]
        linear = nn.Sequential(self.linear(f"{prefix}.linear.0"), nn.ReLU())
        return NatureCNN(nn.Sequential(*modules, nn.Flatten()), linear)
