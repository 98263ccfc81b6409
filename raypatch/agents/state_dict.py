"""State dicts (``.pt``, ``.pth``, ``.safetensors``), read safely.

Plain MLPs are rebuilt from them where nothing is guessed; a factory builds anything else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from raypatch.agents.activations import activation_by_name
from raypatch.agents.agent import Agent, AgentOptions, make_agent
from raypatch.agents.archives import check_torch_file, is_archive
from raypatch.agents.factories import action_network, build_with_factory, importable
from raypatch.agents.observations import trial_observation
from raypatch.engine.from_weights import linear_of
from raypatch.errors import AgentError, InputError, few

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_state_dict_agent(file: Path, options: AgentOptions) -> Agent:
    """An agent from a state dict: built by the user's factory, or, without one, of linear
    layers that chain by shape in the file's order."""
    if options.agent_factory is None and options.trust_agent_code:
        module = _pickled_module(file)
        if module is not None:
            return _module_agent(file, module, options, f"pickled module {file.name}, its code run")
    state = read_state_dict(file)
    if options.agent_factory is not None:
        return _built_agent(file, state, options)
    state = _below(state, options.agent_output, file)
    if options.activation is None:
        raise AgentError(
            f"{file}: a state dict does not say its activation function; give --activation relu "
            '(or tanh, ...), or an agent.json with "activation"'
        )
    activation = activation_by_name(options.activation, "--activation")
    if file.suffix == ".safetensors":
        state = _in_order(state, str(file))
    network = chained_mlp(state, activation, str(file))
    return make_agent(
        network,
        torch.zeros(1, network.in_features),
        output_kind="logits",
        loaded_as=f"state dict {file.name}, plain MLP, {activation.__name__} between layers",
        files=(file,),
    )


def _below(
    state: dict[str, torch.Tensor], output: str | None, file: Path
) -> dict[str, torch.Tensor]:
    """The tensors of the submodule that is the action network, under its own names."""
    if output is None:
        return state
    inside = {
        name.removeprefix(f"{output}."): tensor
        for name, tensor in state.items()
        if name.startswith(f"{output}.")
    }
    if not inside:
        roots = ", ".join(dict.fromkeys(name.partition(".")[0] for name in state))
        raise InputError(f"{file}: --agent_output {output!r} is not in it; there are: {roots}")
    return inside


def _pickled_module(file: Path) -> nn.Module | None:
    """A whole module saved by ``torch.save``, unpickled with the user's consent; None for a
    state dict."""
    if file.suffix == ".safetensors":
        return None
    with importable(file.parent, Path.cwd()):
        try:
            content = torch.load(file, map_location="cpu", weights_only=False)
        except Exception as error:  # whatever the user's code raises
            hint = "; its class was made in a script: put it into a module beside the agent, or "
            hint = f"{hint}save the state dict" if "__main__" in str(error) else ""
            raise AgentError(
                f"{file}: unpickling it failed: {type(error).__name__}: {error}{hint}"
            ) from None
    return content if isinstance(content, nn.Module) else None


def _module_agent(file: Path, module: nn.Module, options: AgentOptions, loaded_as: str) -> Agent:
    network = action_network(module, options.agent_output, str(file)).float()
    return make_agent(
        network,
        trial_observation(network, file.parent, options.inputs),
        output_kind="logits",
        loaded_as=loaded_as,
        files=(file,),
    )


def _built_agent(file: Path, state: dict[str, torch.Tensor], options: AgentOptions) -> Agent:
    assert options.agent_factory is not None
    module = build_with_factory(options.agent_factory, file.parent)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise AgentError(f"{file}: does not fit --agent_factory's module: {first[:300]}") from None
    return _module_agent(
        file, module, options, f"state dict {file.name}, module by {options.agent_factory}"
    )


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """A file's tensors by name; a pickled object is refused, never executed."""
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    check_torch_file(file, str(file))
    return load_tensors(file, str(file))


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Tensors in the order of their layers' numbers: the format keeps no order of its own."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise AgentError(f"{file}: not a readable safetensors file: {error}") from None
    return {name: state[name] for name in sorted(state, key=_natural)}


def _in_order(state: Mapping[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """The layers as their numbers say, or else in the one order in which they chain.

    Raises AgentError where several orders do: safetensors keeps none of its own.
    """
    weights = weight_layers(state)
    if len({re.sub(r"\d+", "#", path) for path in weights}) > 1 and all(
        weight.ndim == 2 for weight in weights.values()
    ):
        orders = _chains(tuple(weights), weights)
        if len(orders) > 1:
            shown = " or ".join(", ".join(order) for order in orders[:2])
            raise AgentError(
                f"{origin}: keeps no order of its layers, and several fit: {shown}; save the state "
                "dict with torch.save, which keeps it, or give --agent_factory"
            )
        if orders:
            state = {
                name: state[name]
                for path in orders[0]
                for name in (f"{path}.weight", f"{path}.bias")
                if name in state
            } | dict(state)
    return dict(state)


def _chains(
    paths: tuple[str, ...], weights: Mapping[str, torch.Tensor], width: int | None = None
) -> list[tuple[str, ...]]:
    """Up to two orders in which each layer takes what the one before gives."""
    if not paths:
        return [()]
    if not _may_chain([tuple(weights[path].shape[:2]) for path in paths], width):
        return []
    found: list[tuple[str, ...]] = []
    for path in paths:
        if width in (None, weights[path].shape[1]) and len(found) < 2:
            rest = tuple(other for other in paths if other != path)
            found += [(path, *tail) for tail in _chains(rest, weights, weights[path].shape[0])]
    return found[:2]


def _may_chain(shapes: list[tuple[int, ...]], width: int | None) -> bool:
    """Whether there is such an order at all, from ``width`` on where that is given (Euler's
    condition for a path along every edge once: widths are places, layers lead from one to another);
    without it looking for one may take the factorial of the number of layers."""
    starts = Counter(n_in for _, n_in in shapes)
    starts.subtract(n_out for n_out, _ in shapes)
    first = [width] if width is not None else [place for place, more in starts.items() if more > 0]
    if max(map(abs, starts.values())) > 1 or len(first) > 1:
        return False
    if width is not None and any(more > 0 and place != width for place, more in starts.items()):
        return False
    reached, before = {*first} or {shapes[0][1]}, 0
    while len(reached) > before:
        before = len(reached)
        reached |= {n_out for n_out, n_in in shapes if n_in in reached}
    return reached >= {n_in for _, n_in in shapes}


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts = (part for part in re.split(r"(\d+)", name) if part)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def load_tensors(source: Path | BinaryIO, origin: str) -> dict[str, torch.Tensor]:
    """Load a state dict, tensors only; one inside ``{"state_dict": ...}`` or
    ``{"model_state_dict": ...}`` is found too, and names are those before ``torch.compile``.

    A file on disk is mapped into memory rather than read, where its format allows.
    """
    mapped = isinstance(source, Path) and is_archive(source)
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds for a damaged file
        if "Weights only load failed" in str(error):
            raise AgentError(
                f"{origin}: holds pickled objects, not just tensors, and loading them would run "
                "code; save the state dict instead: torch.save(module.state_dict(), ...), or "
                "allow it with --trust_agent_code"
            ) from None
        raise AgentError(f"{origin}: not a readable torch file ({type(error).__name__})") from None
    for key in ("state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise AgentError(
            f"{origin}: holds no state dict (names to tensors) but {_outline(content)}; save only "
            "the agent's state dict"
        )
    return {
        str(name).replace("_orig_mod.", ""): value
        for name, value in content.items()
        if isinstance(value, torch.Tensor)
    }


def _outline(content: object) -> str:
    if isinstance(content, dict):
        return f"a dict of {few(map(str, content))}"
    if isinstance(content, (tuple, list)):
        return f"a {type(content).__name__} of {few(type(part).__name__ for part in content)}"
    return f"a {type(content).__name__}"


def weight_layers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layer name to weight: every ``*.weight`` of more than one dimension, in file order."""
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim > 1
    }


def finite(tensor: torch.Tensor, origin: str) -> None:
    """Raises AgentError for NaN, infinity, and tensors that claim more than they hold."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise AgentError(f"{origin}: is no plain tensor of numbers")
    if tensor.dtype not in FLOATS:
        raise AgentError(f"{origin}: has the type {tensor.dtype}; weights are floating point")
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise AgentError(
            f"{origin}: claims shape {list(tensor.shape)} but holds {held:,} bytes; refused"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise AgentError(f"{origin}: holds NaN or infinity")


class ChainedMLP(nn.Module):
    """Linear layers in a row at the paths the state dict names, an activation between them."""

    def __init__(self, layers: Mapping[str, nn.Linear], activation: type[nn.Module]) -> None:
        super().__init__()
        for path, layer in layers.items():
            add_submodule(self, path, layer)
        self._paths = list(layers)
        self.in_features = layers[self._paths[0]].in_features
        self._between = activation()

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        x = self.get_submodule(self._paths[0])(obs)
        for path in self._paths[1:]:
            x = self.get_submodule(path)(self._between(x))
        return x


def add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at a dotted path, with plain containers on the way."""
    holder, name = _holder(root, path)
    for child_name, child in dict(holder.named_children()).get(name, nn.Module()).named_children():
        module.add_module(child_name, child)  # a container was there for what lies deeper
    holder.add_module(name, module)


def add_tensor(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Put a tensor at a dotted path, as a buffer, with plain containers on the way."""
    holder, name = _holder(root, path)
    holder.register_buffer(name, tensor)


def _holder(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parents, name = path.split(".")
    for parent in parents:
        children = dict(root.named_children())
        if parent not in children:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    return root, name


def linear_from(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer of these tensors, in float32."""
    return linear_of(weight.float(), None if bias is None else bias.float())


def chained_mlp(
    state: Mapping[str, torch.Tensor], activation: type[nn.Module], origin: str
) -> ChainedMLP:
    """Rebuild a plain MLP, or say which tensor shows that it is none."""
    weights = weight_layers(state)
    known = {f"{path}.{part}" for path in weights for part in ("weight", "bias")}
    foreign = next((name for name in state if name not in known), None)
    if not weights or foreign is not None:
        raise AgentError(
            f"{origin}: {foreign or 'no weight'!r} is no linear layer's; only plain MLPs are "
            "rebuilt from weights alone, others need a factory or an exported program"
        )
    layers: dict[str, nn.Linear] = {}
    width, previous = None, ""
    for path, weight in weights.items():
        if weight.ndim != 2:
            raise AgentError(
                f"{origin}: {path}.weight has shape {list(weight.shape)}; only linear layers "
                "are rebuilt from weights alone"
            )
        if width not in (None, weight.shape[1]):
            raise AgentError(
                f"{origin}: {path!r} takes {weight.shape[1]} values but {previous!r} before it "
                f"gives {width}; the layers do not chain, so the network cannot be guessed: name "
                "the part that is the action network with --agent_output, or build it with "
                "--agent_factory"
            )
        bias = state.get(f"{path}.bias")
        finite(weight, f"{origin}: {path}.weight")
        if bias is not None:
            finite(bias, f"{origin}: {path}.bias")
            if bias.shape != weight.shape[:1]:
                raise AgentError(
                    f"{origin}: {path}.bias has shape {list(bias.shape)}, its weight "
                    f"{list(weight.shape)}"
                )
        layers[path] = linear_from(weight, bias)
        width, previous = weight.shape[0], path
    try:
        return ChainedMLP(layers, activation)
    except (KeyError, TypeError) as error:
        raise AgentError(
            f"{origin}: a layer cannot have the name of a part of every module: {error}"
        ) from None
