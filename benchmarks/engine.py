"""The engine against every way people do it today, in one run, one thread.

    (a) a loop: one forward per experiment and input, with a hook
    (b) one forward per experiment on all inputs, with a hook
    (c) hooks on stacked batches, at its best batch size
    (d) torch.func.vmap over experiments from the patched layer on, at its best chunk
    (e) raypatch

Every neuron and channel of three networks, one direction. Methods take turns; medians of
the repeats; every result is compared with (b) in float64 before its time counts. The floor
is counted operations at this machine's measured product rate and copy bandwidth.

    python benchmarks/engine.py [--repeats 5] [--networks dqn_mlp,wide_mlp,nature_cnn]
                                [--savings] [--agents] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from raypatch.agents import load_agent
from raypatch.definitions import Experiments, generate
from raypatch.engine.patcher import Patcher
from raypatch.engine.structure import Savings
from raypatch.sweeps.sweep import ITEM_ROWS

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-5
ITEM = "(e) raypatch, an item of a sweep"


def mlp(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def nature_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(),
        nn.Linear(512, 6),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], int]] = {
    "dqn_mlp": (lambda: mlp([106, 64, 64, 64, 5], nn.ReLU), (106,), 64),
    "wide_mlp": (lambda: mlp([256, 1024, 1024, 18], nn.Tanh), (256,), 32),
    "nature_cnn": (nature_cnn, (4, 84, 84), 8),
}
# Stacked experiments a batch, tried for (c), and experiments a chunk, tried for (d).
STACKED_SIZES = {"cpu": (4, 16, 64, 256), "cuda": (64, 256, 1024)}
VMAP_CHUNKS = {"cpu": (2, 8, 32, 128), "cuda": (32, 128, 512, 2048)}
# Side of the measured product, elements of the measured copy: in a CPU's cache, a GPU's memory.
RATES_OF = {"cpu": (1024, 1 << 16), "cuda": (8192, 1 << 28)}


@dataclasses.dataclass
class Case:
    """A network with its inputs and single-neuron experiments (layer, neuron)."""

    name: str
    network: nn.Sequential
    source: Tensor
    target: Tensor
    experiments: list[tuple[int, int]]

    @property
    def passes(self) -> int:
        return len(self.experiments) * len(self.target)


def make_case(name: str, device: str) -> Case:
    build, shape, n_inputs = NETWORKS[name]
    torch.manual_seed(0)
    network = build().to(device).eval().requires_grad_(False)
    source, target = (torch.rand(n_inputs, *shape, device=device) for _ in range(2))
    if name != "nature_cnn":
        source, target = 2 * source - 1, 2 * target - 1
    return Case(name, network, source, target, all_neurons(network, target))


def all_neurons(network: nn.Sequential, x: Tensor) -> list[tuple[int, int]]:
    found = []
    for number, module in enumerate(network):
        x = module(x)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            found += [(number, neuron) for neuron in range(x.shape[1])]
    return found


# ---------------------------------------------------------------------------- the methods


def with_hook(case: Case, layer: int, neuron: int, x: Tensor, values: Tensor) -> Tensor:
    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, neuron] = values[:, neuron]
        return output

    handle = case.network[layer].register_forward_hook(hook)
    try:
        return case.network(x)
    finally:
        handle.remove()


def source_values(case: Case) -> dict[int, Tensor]:
    values, x = {}, case.source
    for number, module in enumerate(case.network):
        x = module(x)
        values[number] = x
    return values


def loop_each(case: Case) -> Tensor:
    """(a), on a seventh of the experiments: the loop costs the same for each."""
    values = source_values(case)
    outputs = [
        torch.cat([
            with_hook(case, layer, neuron, case.target[i : i + 1], values[layer][i : i + 1])
            for i in range(len(case.target))
        ])
        for layer, neuron in case.experiments[::7]
    ]  # fmt: skip
    return torch.stack(outputs)


def loop_batch(case: Case) -> Tensor:
    """(b)"""
    values = source_values(case)
    return torch.stack(
        [with_hook(case, layer, n, case.target, values[layer]) for layer, n in case.experiments]
    )


def by_layer(case: Case) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, neuron in case.experiments:
        found.setdefault(layer, []).append(neuron)
    return found


def stacked(case: Case, size: int) -> Tensor:
    """(c)"""
    values, outputs = source_values(case), []
    n_inputs = len(case.target)
    for layer, neurons in by_layer(case).items():
        for start in range(0, len(neurons), size):
            part = torch.tensor(neurons[start : start + size], device=case.target.device)
            x = case.target.repeat(len(part), *[1] * (case.target.dim() - 1))

            def hook(
                _: nn.Module, __: object, out: Tensor, part: Tensor = part, layer: int = layer
            ) -> Tensor:
                view = out.clone().view(len(part), n_inputs, *out.shape[1:])
                chosen = values[layer].transpose(0, 1)[part]
                view[torch.arange(len(part), device=part.device), :, part] = chosen
                return view.view(out.shape)

            handle = case.network[layer].register_forward_hook(hook)
            outputs.append(case.network(x).view(len(part), n_inputs, -1))
            handle.remove()
    return torch.cat(outputs)


def vmapped(case: Case, chunk: int) -> Tensor:
    """(d)"""
    values, x, outputs = source_values(case), case.target, []
    groups = by_layer(case)
    for number, module in enumerate(case.network):
        x = module(x)
        if number not in groups:
            continue
        rest, base, source = case.network[number + 1 :], x, values[number]

        def one(
            neuron: Tensor, rest: nn.Module = rest, base: Tensor = base, source: Tensor = source
        ) -> Tensor:
            mask = torch.arange(base.shape[1], device=base.device) == neuron
            mask = mask.view(1, -1, *[1] * (base.dim() - 2))
            return rest(torch.where(mask, source, base))

        neurons = torch.tensor(groups[number], device=x.device)
        outputs.append(torch.func.vmap(one, chunk_size=chunk)(neurons))
    return torch.cat(outputs)


def raypatch_methods(
    case: Case, savings: Savings | None = None
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(e) with both unpatched runs in the time, as in the other methods, and on inputs
    already prepared, as every further item of a sweep is. Captured and planned before."""
    patcher = Patcher(case.network, savings=savings)
    run = patcher.prepare(case.source, case.target)
    plan = run.plan(experiments_of(case))
    return lambda: patcher(plan, case.source, case.target), lambda: run(plan)


def item_method(case: Case) -> tuple[Callable[[], Tensor], int]:
    """(e) on one direction of an item as long as a large sweep's, every neuron several times over;
    also how many times."""
    times = max(1, ITEM_ROWS[case.target.device.type] // 2 // case.passes)
    run = Patcher(case.network).prepare(case.source, case.target)
    run.deduplicate = False
    plan = run.plan(experiments_of(case, times))
    return lambda: run(plan), times


def experiments_of(case: Case, times: int = 1) -> Experiments:
    return Experiments.from_list([{str(layer): [n]} for layer, n in case.experiments] * times)


# -------------------------------------------------------------------------------- timing


def seconds(method: Callable[[], Tensor]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = method()
    if result.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def best(case: Case, method: Callable[[Case, int], Tensor], sizes: tuple[int, ...]) -> int:
    return min(sizes, key=lambda size: min(seconds(lambda: method(case, size)) for _ in range(2)))


def truth(case: Case) -> Tensor:
    double = dataclasses.replace(
        case,
        network=copy.deepcopy(case.network).double(),
        source=case.source.double(),
        target=case.target.double(),
    )
    return loop_batch(double)


def check(name: str, found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs() / expected.abs().clamp(min=1)
    if not float(error.max()) <= TOLERANCE:
        raise SystemExit(f"{name} differs from the float64 reference by {float(error.max()):.1e}")


def interleaved(methods: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median seconds of each method, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            taken[name].append(seconds(method))
    return {name: statistics.median(times) for name, times in taken.items()}


# -------------------------------------------------------------------------------- floor


def measured_rates(device: str) -> tuple[float, float]:
    """Multiply-add flops a second of a product, bytes a second of a copy."""
    side, size = RATES_OF[device]
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    product = min(seconds(lambda: a @ b) for _ in range(10))
    source, into = torch.randn(size, device=device), torch.empty(size, device=device)

    def copies() -> Tensor:
        for _ in range(100):
            into.copy_(source)
        return into

    return 2 * side**3 / product, 100 * 2 * source.nbytes / min(seconds(copies) for _ in range(5))


def floor_seconds(case: Case, flops: float, bandwidth: float) -> float:
    """Time of what cannot be avoided: below each patched layer's first linear step, every
    product and one read and write of every value, for the rows that change."""
    _, total = None, 0.0
    changing = changing_rows(case)
    shapes, x = [], case.target[:1]
    for module in case.network:
        x = module(x)
        shapes.append((module, x[0].numel()))
    for layer, rows in changing.items():
        first = True
        for module, size in shapes[layer + 1 :]:
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                work = module.weight.numel() * (size // module.weight.shape[0])
                work = work // module.weight.shape[1] if first else work
                if first and isinstance(module, nn.Linear) and layer + 1 < len(case.network):
                    owned = module.weight.shape[1] // case.network[layer].weight.shape[0]
                    work *= max(1, owned)
                total += rows * (2 * work / flops + 8 * size / bandwidth)
                first = False
            elif not first:
                total += rows * 8 * size / bandwidth
    return total


def changing_rows(case: Case) -> dict[int, int]:
    """Rows by layer whose patch changes the value after the activation."""
    values, x, found = source_values(case), case.target, {}
    for number, module in enumerate(case.network):
        x = module(x)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            after = case.network[number + 1] if number + 1 < len(case.network) else nn.Identity()
            differs = (after(x) != after(values[number])).flatten(2).any(-1) if x.dim() > 2 else (
                after(x) != after(values[number]))  # fmt: skip
            found[number] = int(differs.sum())
    return found


# ------------------------------------------------------------------------------ the tables


def compare(case: Case, repeats: int, rates: tuple[float, float]) -> None:
    expected = truth(case)
    device = case.target.device.type
    c_size = best(case, stacked, STACKED_SIZES[device])
    d_size = best(case, vmapped, VMAP_CHUNKS[device])
    ours, ours_prepared = raypatch_methods(case)
    item, times_over = item_method(case)
    methods = {
        "(a) forward per experiment and input": lambda: loop_each(case),
        "(b) forward per experiment": lambda: loop_batch(case),
        f"(c) stacked hooks, {c_size} a batch": lambda: stacked(case, c_size),
        f"(d) vmap, chunks of {d_size}": lambda: vmapped(case, d_size),
        "(e) raypatch": ours,
        "(e) raypatch, further items": ours_prepared,
        ITEM: item,
    }
    for name, method in methods.items():
        found = method()[: len(expected)]
        check(name, found, expected[::7] if name.startswith("(a)") else expected)
    slow = {name: m for name, m in methods.items() if name[1] in "ab"}
    times = interleaved({n: m for n, m in methods.items() if n not in slow}, repeats)
    times |= interleaved(slow, min(repeats, 2))
    each = dict.fromkeys(methods, case.passes)
    each |= {name: len(case.experiments[::7]) * len(case.target) for name in each if name[1] == "a"}
    each[ITEM] = case.passes * times_over
    speed = {name: each[name] / times[name] for name in methods}
    mine = speed["(e) raypatch"]
    print(f"\n{case.name}: {len(case.experiments)} experiments x {len(case.target)} inputs, "
          f"{sum(changing_rows(case).values()) / case.passes:.0%} of the rows change")  # fmt: skip
    for name in methods:
        print(f"  {name:38} {speed[name]:14,.0f} passes/s   {mine / speed[name]:8.1f}x")
    floor = case.passes / floor_seconds(case, *rates)
    text = "floor from counted operations"
    print(f"  {text:38} {floor:14,.0f} passes/s   {mine / floor:8.0%} reached")


def show_savings(case: Case, repeats: int) -> None:
    """Speed with each saving switched off alone: on prepared inputs, but of whole calls for what is
    replayed (on a GPU)."""
    calls, further = "all savings, a call", "all savings"
    methods = dict(zip((calls, further), raypatch_methods(case)))
    against = {calls: calls, further: further}
    for field in dataclasses.fields(Savings):
        off = dataclasses.replace(Savings(), **{field.name: False})
        of_call, of_further = raypatch_methods(case, off)
        is_replay, name = field.name == "replay", f"without {field.name}"
        methods[name] = of_call if is_replay else of_further
        against[name] = calls if is_replay else further
    for method in methods.values():
        for _ in range(3):  # a third call may be a replay
            method()
    times = interleaved(methods, repeats)
    for name, taken in times.items():
        print(f"  {name:38} {case.passes / taken:14,.0f} passes/s   "
              f"{times[against[name]] / taken:8.2f}x")  # fmt: skip


def example_agents() -> list[Path]:
    """Directories of the example agents that have inputs beside them."""
    return sorted(path.parent for path in (ROOT / "examples").glob("*/activation_inputs"))


def agent_case(path: Path) -> Case:
    """An example agent as a Sequential of its own modules, on its own inputs."""
    from raypatch.inputs import ObservationShape, read_inputs

    agent = load_agent(path)
    folder = path / "activation_inputs"
    paths = {side: folder / f"{side}_inputs.json" for side in ("clean", "corrupted")}
    inputs = read_inputs(paths, ObservationShape(agent.observation_shape))
    kinds = (nn.Linear, nn.ReLU, nn.Tanh)
    linear = [agent.network.get_submodule(name) for name in agent.layers]
    activation = next(m for m in agent.network.modules() if isinstance(m, kinds[1:]))
    modules: list[nn.Module] = [m for layer in linear for m in (layer, type(activation)())]
    network = nn.Sequential(*modules[:-1])
    source, target = (torch.from_numpy(inputs.sides[s]) for s in ("clean", "corrupted"))
    assert len(list(generate("single_neuron", agent.neuron_counts))) > 0
    return Case(path.name, network, source, target, all_neurons(network, target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--savings", action="store_true", help="each saving switched off")
    parser.add_argument("--agents", action="store_true", help="the example agents too")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # as raypatch computes, whatever is allowed
    rates = measured_rates(options.device)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, "
          f"{rates[0] / 1e9:.0f} GFLOP/s, copies {rates[1] / 1e9:.0f} GB/s")  # fmt: skip
    cases = [make_case(name, options.device) for name in options.networks.split(",") if name]
    if options.agents:
        cases += map(agent_case, example_agents())
    with torch.no_grad():
        for case in cases:
            compare(case, options.repeats, rates)
            if options.savings:
                show_savings(case, options.repeats)


if __name__ == "__main__":
    main()
