"""Archives with classes of the user's own, unpickled by Stable-Baselines3 with consent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raypatch.agents.factories import importable
from raypatch.agents.preprocessing import preprocessing
from raypatch.agents.sb3_networks import ActionNetwork, MeanOverQuantiles, PolicyExtractor
from raypatch.agents.spaces import Space
from raypatch.errors import AgentError, missing_package


class ForwardActor(nn.Module):
    """A custom ``mlp_extractor`` on the path to actions."""

    def __init__(self, mlp_extractor: Any) -> None:
        super().__init__()
        self.mlp_extractor = mlp_extractor

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp_extractor.forward_actor(features)


def load_trusted_network(file: Path, space: Space) -> tuple[ActionNetwork, str]:
    """Unpickle the archive as Stable-Baselines3 does; runs code the user has allowed."""
    try:
        from stable_baselines3.common.save_util import load_from_zip_file
    except ImportError:
        what = f"{file}: a custom class inside a zip"
        raise AgentError(missing_package(what, "stable-baselines3", "sb3")) from None
    with importable(file.parent, Path.cwd()):
        try:
            loaded, params, _ = load_from_zip_file(str(file), device="cpu")
            assert loaded is not None
            policy = loaded["policy_class"](
                loaded["observation_space"],
                loaded["action_space"],
                lambda _: 0.0,
                **loaded.get("policy_kwargs", {}),
            )
            policy.load_state_dict(params["policy"])
        except Exception as error:  # whatever the user's code raises
            newer = str(getattr(error, "name", "")).startswith("numpy._core")
            raise AgentError(
                f"{file}: the agent's own code failed to load: {type(error).__name__}: {error}"
                + ("; it was saved with NumPy 2: pip install 'numpy>=2'" if newer else "")
            ) from None
    scale = bool(getattr(policy, "normalize_images", True))
    features, head, kind = _parts(policy, file)
    return ActionNetwork(preprocessing(space, scale_images=scale), features, head), kind


def _parts(policy: Any, file: Path) -> tuple[nn.Module, dict[str, nn.Module], str]:
    """Features extractor, the modules that follow it, and what the outputs are."""
    if hasattr(policy, "q_net"):
        return policy.q_net.features_extractor, {"q_net": policy.q_net.q_net}, "Q-values"
    if hasattr(policy, "quantile_net"):
        net = policy.quantile_net
        head = {"quantile_net": net.quantile_net, "quantiles": MeanOverQuantiles(net.n_quantiles)}
        return net.features_extractor, head, "Q-values"
    if hasattr(policy, "actor") and hasattr(policy.actor, "latent_pi"):
        actor = policy.actor
        return actor.features_extractor, {"latent_pi": actor.latent_pi, "mu": actor.mu}, "mean"
    if hasattr(policy, "actor") and isinstance(getattr(policy.actor, "mu", None), nn.Sequential):
        mu = policy.actor.mu
        return policy.actor.features_extractor, {"mu": mu[:-1] if _squashes(mu) else mu}, "mean"
    if hasattr(policy, "mlp_extractor") and hasattr(policy, "action_net"):
        extractor = policy.mlp_extractor
        if not hasattr(extractor, "policy_net"):
            first: nn.Module = ForwardActor(extractor)
        else:
            first = PolicyExtractor(extractor.policy_net)
        head = {"mlp_extractor": first, "action_net": policy.action_net}
        return policy.pi_features_extractor, head, "logits"
    raise AgentError(f"{file}: policy class {type(policy).__name__!r} is not supported")


def _squashes(mu: nn.Sequential) -> bool:
    return isinstance(mu[-1], nn.Tanh)
