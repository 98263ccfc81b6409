"""Engine, metrics and worker on a pretend GPU: CPU tensors that say they lie on a device, and
refuse what a GPU refuses. A script of its own, because the pretended device stays with the process.

    python tests/pretend_gpu.py NETWORK ...
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from networks import AS_IF_LARGE, build, check_equal, counts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from raypatch.definitions import Experiments
from raypatch.engine import overwriting, prepared
from raypatch.engine.patch_run import Limits
from raypatch.engine.patcher import Patcher
from raypatch.engine.prepared import Unassumed
from raypatch.engine.reference import reference_outputs
from raypatch.engine.replaying import Replays, outputs_unseen
from raypatch.engine.scratch import Scratch
from raypatch.metrics import table as metric_table
from raypatch.metrics.formulas import METRICS
from raypatch.metrics.table import MetricTable
from raypatch.metrics.terms import Baselines
from raypatch.results import schema
from raypatch.sweeps.shipping import pack
from raypatch.sweeps.sides import Sides
from raypatch.sweeps.work import Item
from raypatch.sweeps.worker import Worker, WorkerSpec

NAME = "pretended"
aten = torch.ops.aten
# Those that take indices or masks from the CPU too, as on a GPU.
INDEXING = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip


def lstm_cell(from_input, from_state, state, *biases):
    i, f, g, o = sum(biases, from_input + from_state).chunk(4, 1)
    gates = [i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()]
    state = gates[1] * state + gates[0] * gates[2]
    return gates[3] * state.tanh(), state, torch.cat(gates, 1)


def gru_cell(from_input, from_state, state, *biases):
    if biases:
        from_input, from_state = from_input + biases[0], from_state + biases[1]
    (r, z, n), (r_state, z_state, n_state) = from_input.chunk(3, 1), from_state.chunk(3, 1)
    r, z = (r + r_state).sigmoid(), (z + z_state).sigmoid()
    n = (n + r * n_state).tanh()
    return n + z * (state - n), torch.cat([r, z, n, state, n_state], 1)


# What torch computes in one piece on every device but the CPU.
FUSED = {
    aten._thnn_fused_lstm_cell.default: lstm_cell, aten._thnn_fused_gru_cell.default: gru_cell,
}  # fmt: skip

# What a real GPU's host would have waited for.
waits: list[object] = []


class OnDevice(torch.Tensor):
    """A tensor whose numbers are those of ``held``, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, _, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __getitem__(self, index):
        # Of a list torch itself makes an index, past all dispatching.
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(
            tuple(
                torch.tensor(part, device="cpu") if isinstance(part, list) else part
                for part in parts
            )
        )

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("numpy() on a tensor of a device")
        waits.append("numpy")
        return self.held.numpy()


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def held(value):
    return value.held if isinstance(value, OnDevice) else value


def compute(function, args, kwargs):
    """The operation on the CPU, its results where they would be on a machine with a device."""
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnDevice)]
    goes_there = device.type == NAME if device is not None else bool(there)
    if there and function not in {aten.copy_.default, aten._to_copy.default}:
        for x in tensors:
            may_mix = x.dim() == 0 or (function in INDEXING and isinstance(args[0], OnDevice))
            if not isinstance(x, OnDevice) and not may_mix:
                raise RuntimeError(f"{function}: {list(x.shape)} lies on the CPU, others do not")
    own = {id(x.held): x for x in there}
    copied = function in (aten.copy_.default, aten._to_copy.default) and goes_there != bool(there)
    if copied or (there and function in (aten._local_scalar_dense.default, aten.nonzero.default)):
        waits.append(function)
    on_cpu = FUSED.get(function, function)
    result = on_cpu(*tree_map(held, args), **tree_map(held, kwargs))
    if function is aten.copy_.default:
        return args[0]
    if function is aten._to_copy.default:
        return OnDevice(result.clone()) if goes_there else result
    if function is aten._local_scalar_dense.default:
        return result

    def placed(x):
        if not isinstance(x, torch.Tensor):
            return x
        return own.get(id(x)) if id(x) in own else OnDevice(x) if goes_there else x

    return tree_map(placed, result)


@contextmanager
def device_present():
    storage_of = overwriting.storage_of
    # The pretended tensors have no storage of their own.
    with patch.object(overwriting, "storage_of", lambda x: storage_of(held(x))), Device():
        yield


def check(name: str) -> None:
    """Single neurons, several at once and whole layers of a network equal plain hooks."""
    network, source, target = build(name, 0)
    for one, other in zip(source, target):
        one[:2] = other[:2]  # nothing changes there
    counts = counts_of(network, target)
    experiments = [{layer: [i]} for layer, n in counts.items() for i in range(n)]
    experiments += [{layer: "all"} for layer in counts]
    experiments += [
        {one: [0], other: [n - 1, 0] if n > 1 else [0]}
        for one in counts for other, n in counts.items() if one != other
    ]  # fmt: skip
    expected = reference_outputs(network, experiments, source, target)
    patcher = Patcher(network)
    patcher.prepare(source, target)
    for large in (False, True):
        with ExitStack() as stack:
            if large:
                stack.enter_context(patch.multiple(prepared, **AS_IF_LARGE))
            stack.enter_context(device_present())
            found = patcher.to(NAME)(experiments, source, target)
            assert isinstance(found, OnDevice)
        check_equal(found.held, expected, torch.float32)
    check_unseen(patcher, experiments, source, target, expected)
    if patcher.graph is None or patcher.graph.how != "torch.fx":
        return  # an export wants tensors of torch's own class
    with device_present():
        captured_there = Patcher(network, device=NAME)
        found = captured_there(experiments[::3], source, target)
    check_equal(found.held, expected[::3], torch.float32)
    assert captured_there.path == patcher.path


def check_unseen(patcher, experiments, source, target, expected):
    """What a GPU replays keeps its host from waiting: nothing is copied off the device."""
    limits = Limits(torch.device(NAME, 0))
    on_gpu = Limits(torch.device("cuda"), memory_bytes=1 << 30)
    if Replays.of(patcher._engine, on_gpu) is None:
        return
    with device_present():
        plan = patcher.prepare(source, target).plan(experiments).to(limits.device)
        args = [tuple(x.to(NAME) for x in side) for side in (source, target)]
        scratch = Scratch()
        for _ in range(2):
            waits.clear()
            try:
                found, _ = outputs_unseen(patcher._engine, scratch, limits, plan, *args)
            except Unassumed:
                return
    assert not waits, waits
    check_equal(found.held, expected, torch.float32)


def awkward_logits(n_experiments: int, n_inputs: int, n_outputs: int) -> list[torch.Tensor]:
    """Target, source ``[inputs, outputs]`` and patched outputs, with what formulas take apart."""
    generator = torch.Generator().manual_seed(3)
    target, source = torch.randn(2, n_inputs, n_outputs, generator=generator)
    patched = target + torch.randn(n_experiments, n_inputs, n_outputs, generator=generator)
    patched[1] = target  # nothing changes
    patched[2] = target * (1 + 1e-6)  # nearly nothing
    patched[3] *= 1e4  # probabilities leave float64's range
    patched[4] = -target  # the opposite direction
    patched[5] = patched[5, :1]
    patched[6, 0] = 0  # no direction
    source[0] = target[0]  # nothing to recover
    target[1] = 0.25  # all logits the same
    return [target, source, patched]


def check_metrics(n_experiments: int, n_inputs: int, n_outputs: int) -> None:
    """Every metric and statistic is the CPU's, in blocks and in parts of the inputs."""

    def computed(tensors):
        target, source, patched = tensors
        shape = len(METRICS), n_experiments, n_inputs
        found = {
            "values": patched.new_empty(shape, dtype=torch.float64),
            "statistics": patched.new_empty(4, *shape[:2], dtype=torch.float64),
            "changed_rate": patched.new_empty(n_experiments),
            "actions": patched.new_empty(shape[1:], dtype=torch.int32),
        }
        MetricTable(list(METRICS), Baselines(target, source)).compute(patched, **found)
        return found

    tensors = awkward_logits(n_experiments, n_inputs, n_outputs)
    expected = computed(tensors)
    with device_present():
        found = computed([tensor.to(NAME) for tensor in tensors])
    for name, right in expected.items():
        assert isinstance(found[name], OnDevice)
        torch.testing.assert_close(
            found[name].held, right, rtol=1e-9, atol=1e-12, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


# Of an item of three layers, two directions and all metrics; each keeps a GPU idle for some
# microseconds.
MOST_WAITS = 20


def check_worker(save: str) -> None:
    """What a worker computes of an item is what it computes on the CPU."""
    network, (source,), (target,) = build("quantile_head", 0)
    patcher = Patcher(network)
    patcher.prepare(source, target)
    experiments = Experiments.from_list(
        [{layer: [i]} for layer, n in counts_of(network, (target,)).items() for i in range(n)]
    )
    found, inputs = [], {"clean": source.numpy(), "corrupted": target.numpy()}
    for device in ("cpu", NAME):
        with tempfile.TemporaryDirectory() as folder, device_present():
            spec = WorkerSpec(
                patcher=pack(patcher), sides=Sides(inputs, ("denoising", "noising"), "pair"),
                discrete=True,
                columns=schema.Columns(len(network(target)[0]), tuple(METRICS), save), metadata={},
                compression="lz4", output_dir=folder, device=device,
                samples=frozenset({2}),
            )  # fmt: skip
            worker = Worker(spec)
            worker.probe(experiments)
            waits.clear()
            arrays, outputs = worker.arrays(Item(0, 0, len(experiments)), experiments)
            assert outputs[0].device.type == device
            assert len(waits) <= (0 if device == "cpu" else MOST_WAITS), waits
            assert worker.compute(Item(0, 0, len(experiments)), experiments, 1).samples.keys() == {
                2
            }
            found.append(arrays)
    for name in ("outputs", "actions", "changed", "metrics", "statistics", "changed_rate"):
        on_cpu, on_device = (getattr(arrays, name) for arrays in found)
        torch.testing.assert_close(on_device, on_cpu, rtol=1e-5, atol=1e-6, equal_nan=True)


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(NAME)
    torch.set_num_threads(1)
    # The pretended tensors are of another class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    for name in sys.argv[1:]:
        check(name)
        print(name, "equals plain hooks")
    for shape in ((7, 3, 5), (40, 6, 2), (9, 4, 40), (7, 3, 1)):
        check_metrics(*shape)
    with patch.multiple(metric_table, BLOCK_LOGITS=200, GPU_BLOCK_LOGITS=150, MIN_EXPERIMENTS=8):
        check_metrics(30, 40, 4)
    print("metrics are the CPU's")
    for save in schema.SAVE_MODES:
        check_worker(save)
    print("a worker's results are the CPU's")
