"""The engine on policies that are no plain chain: residual, recurrent, quantile, attention,
entities, depthwise convolutions.

    (b) one forward per experiment on all inputs, with a hook
    (c) hooks on stacked batches, at the best of several batch sizes
    (e) raypatch, with both unpatched runs in its time

Every neuron and channel, 8 pairs, one direction, one thread. Methods take turns; medians of the
repeats; every result is compared with plain hooks in float64 before its time counts.

    python benchmarks/policies.py [--repeats 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from engine import STACKED_SIZES, check, interleaved, seconds
from torch import Tensor, nn

from raypatch.engine.layers import find_layers
from raypatch.engine.patch_run import Limits, PatchRun
from raypatch.engine.patcher import Patcher
from raypatch.engine.plan import Plan
from raypatch.engine.reference import reference_outputs
from raypatch.engine.stacked import Stacked
from raypatch.engine.structure import Savings

N_INPUTS = 8
FURTHER = "(e) further items"


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class Impala(nn.Module):
    """Residual convolutions with pooling (Espeholt et al. 2018), its first two stages."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for n_in, width in ((3, 16), (16, 32)):
            stages += [nn.Conv2d(n_in, width, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
            stages += [Residual(width), Residual(width)]
        self.stages = nn.Sequential(*stages)
        self.wide, self.head = nn.Linear(32 * 8 * 8, 256), nn.Linear(256, 15)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stages(x)).flatten(1)
        return self.head(F.relu(self.wide(h)))


class FrameLstm(nn.Module):
    """Convolutions on every frame, inputs and frames in one axis, an LSTM over the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 8, 4), nn.Conv2d(16, 32, 4, 2)
        self.lstm, self.head = nn.LSTM(288, 64, batch_first=True), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        n_inputs, n_frames = x.shape[:2]
        h = F.relu(self.conv2(F.relu(self.conv1(x.flatten(0, 1)))))
        return self.head(self.lstm(h.view(n_inputs, n_frames, -1))[0][:, -1])


class Quantiles(nn.Module):
    """Implicit quantiles (Dabney et al. 2018): inputs and quantiles in one axis."""

    def __init__(self, n_quantiles: int = 32) -> None:
        super().__init__()
        self.state, self.cosine = nn.Linear(64, 128), nn.Linear(64, 128)
        self.wide, self.head = nn.Linear(128, 128), nn.Linear(128, 6)
        fractions = (torch.arange(n_quantiles) + 0.5) / n_quantiles
        self.register_buffer("basis", torch.cos(torch.pi * fractions[:, None] * torch.arange(64)))

    def forward(self, x: Tensor) -> Tensor:
        state, fraction = F.relu(self.state(x)), F.relu(self.cosine(self.basis))
        merged = (state[:, None] * fraction).flatten(0, 1)
        values = self.head(F.relu(self.wide(merged)))
        return values.view(x.shape[0], -1, 6).mean(1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        n_inputs, n_steps, width = h.shape
        parts = self.mixed(self.norm1(h)).split(width, 2)
        q, k, v = (p.view(n_inputs, n_steps, self.heads, -1).transpose(1, 2) for p in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.project(seen.transpose(1, 2).reshape(n_inputs, n_steps, width))
        return h + self.narrow(F.gelu(self.wide(self.norm2(h))))


class DecisionTransformer(nn.Module):
    """Causal attention over steps (Chen et al. 2021), three blocks."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(17, width)
        self.positions = nn.Parameter(torch.randn(1, 20, width))
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(3)])
        self.head = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(self.blocks(h + self.positions[:, : h.shape[1]])[:, -1])


class Entities(nn.Module):
    """Every entity by itself, then the largest of each feature (Qi et al. 2017, PointNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 128), nn.Linear(128, 128)
        self.wide, self.head = nn.Linear(128, 128), nn.Linear(128, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.wide(h.max(dim=1).values)))


class Depthwise(nn.Sequential):
    """Depthwise separable convolutions (Howard et al. 2017), then the average of each map."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU6()]
        for n_in, width, step in ((32, 64, 1), (64, 64, 2)):
            layers += [nn.Conv2d(n_in, n_in, 3, step, 1, groups=n_in), nn.ReLU6()]
            layers += [nn.Conv2d(n_in, width, 1), nn.BatchNorm2d(width), nn.ReLU6()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 6))


class Gated(nn.Module):
    """Activations written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 256)
        self.head = nn.Linear(256, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.second(h * (h > 0))
        return self.head(torch.where(h > 0, h, 0.01 * h))


class Noisy(nn.Module):
    """A noisy layer (Fortunato et al. 2018) as it is in evaluation."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(n_out, n_in) / n_in**0.5)
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mean, self.bias)


class Rainbow(nn.Module):
    """Dueling, distributional, noisy (Hessel et al. 2018)."""

    def __init__(self, n_actions: int = 6, n_atoms: int = 51) -> None:
        super().__init__()
        self.shape = -1, n_actions, n_atoms
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten()),
        )
        self.value = nn.Sequential(Noisy(3136, 512), nn.ReLU(), Noisy(512, n_atoms))
        self.advantage = nn.Sequential(Noisy(3136, 512), nn.ReLU(), Noisy(512, n_actions * n_atoms))
        self.register_buffer("atoms", torch.linspace(-10, 10, n_atoms))

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolutions(x)
        advantage = self.advantage(h).view(self.shape)
        logits = self.value(h)[:, None] + advantage - advantage.mean(1, keepdim=True)
        return (logits.softmax(2) * self.atoms).sum(2)


POLICIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual convolutions": (Impala, (3, 32, 32)),
    "frames and an LSTM": (FrameLstm, (4, 1, 42, 42)),
    "implicit quantiles": (Quantiles, (64,)),
    "decision transformer": (DecisionTransformer, (20, 17)),
    "entities": (Entities, (32, 12)),
    "depthwise convolutions": (Depthwise, (3, 32, 32)),
    "activations by hand": (Gated, (64,)),
    "noisy and dueling": (Rainbow, (4, 84, 84)),
}


def by_hooks(
    network: nn.Module, plan: Plan, source: Tensor, target: Tensor, size: int
) -> Callable[[], Tensor]:
    """``size`` experiments stacked in a forward."""
    stacked = Stacked(network, find_layers(network, (target,)), limit=size)
    limits = Limits(torch.device("cpu"), batch_rows=size * len(target))
    return lambda: PatchRun(stacked, limits, (source,), (target,), None)(plan)


def compare(name: str, repeats: int) -> None:
    build, shape = POLICIES[name]
    torch.manual_seed(0)
    network = build().eval().requires_grad_(False)
    source, target = torch.randn(N_INPUTS, *shape), torch.randn(N_INPUTS, *shape)
    patcher = Patcher(network)
    run = patcher.prepare(source, target)
    experiments = [{layer: [i]} for layer, n in patcher.neuron_counts.items() for i in range(n)]
    plan = run.plan(experiments)
    whole = Patcher(network, savings=Savings(needed_places=False)).prepare(source, target)
    sizes = {size: by_hooks(network, plan, source, target, size) for size in STACKED_SIZES["cpu"]}
    best = min(sizes, key=lambda size: seconds(sizes[size]))
    methods = {
        "(b) forward per experiment": by_hooks(network, plan, source, target, 1),
        f"(c) stacked hooks, {best} a batch": sizes[best],
        "(e) raypatch": lambda: patcher.prepare(source, target)(plan),
        FURTHER: lambda: run(plan),
        "    without needed_places": lambda: whole(plan),
    }
    expected = reference_outputs(network, experiments, source, target)
    for method, compute in methods.items():
        check(f"{name}: {method}", compute(), expected)
    taken = interleaved(methods, repeats)
    print(f"\n{name}: {len(experiments)} experiments x {N_INPUTS} inputs; {patcher.path}")
    for method, took in taken.items():
        speed = len(experiments) * N_INPUTS / took
        print(f"  {method:<34} {speed:>12,.0f} passes/s {took / taken[FURTHER]:>10.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in POLICIES:
        compare(name, options.repeats)


if __name__ == "__main__":
    main()
