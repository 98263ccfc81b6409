"""Programs made to harm: exported ones and TorchScript never run a stranger's code."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from agent_files import Payload, assert_refused, repacked, small_program
from torch import nn

import raypatch
from raypatch.errors import AgentError

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_payload_in_any_member_of_an_exported_program_never_runs(folder, flag, tmp_path):
    good = tmp_path / "good.pt2"
    small_program(good)
    stream = io.BytesIO()
    torch.save(Payload(flag), stream)
    for name in zipfile.ZipFile(good).namelist():
        for payload in (
            stream.getvalue(),
            pickle.dumps(Payload(flag)),
            pickle.dumps(Payload(flag), 0),
        ):
            repacked(good, folder / "agent.pt2", {name: payload})
            try:
                raypatch.load_agent(folder)  # a member that nothing reads does no harm
            except AgentError as error:
                assert len(str(error).splitlines()) == 1
            assert not flag.exists()


# A pickle whose readers disagree on where it ends, or on what is at the top of its stack.
def short_text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def popped(command: str) -> bytes:
    decoy = short_text("collections") + short_text("OrderedDict") + b"00"
    return (
        b"\x80\x04" + short_text("posix") + short_text("system") + decoy + b"\x93"
        + short_text(command) + b"\x85R."
    )  # fmt: skip


def unended(command: str) -> bytes:
    call = short_text("posix") + short_text("system") + b"\x93" + short_text(command)
    return b"\x80\x04" + call + b"\x85R" + b"\xff\xff"


def behind_a_legacy_header(command: str) -> bytes:
    header = (0x1950A86A20F9469CFC6C, 1001, {})
    return b"".join(pickle.dumps(part, 2) for part in header) + popped(command)


@pytest.mark.parametrize("payload", [popped, unended, behind_a_legacy_header])
def test_a_disguised_pickle_in_any_member_of_an_exported_program_never_runs(
    folder, flag, tmp_path, payload
):
    good = tmp_path / "good.pt2"
    small_program(good)
    for name in zipfile.ZipFile(good).namelist():
        repacked(good, folder / "agent.pt2", {name: payload(f"touch {flag}")})
        try:
            raypatch.load_agent(folder)
        except AgentError as error:
            assert len(str(error).splitlines()) == 1
        assert not flag.exists(), name


def changed_program(good: Path, target: Path, change) -> None:
    """The program with its JSON graph changed by a function."""
    name = next(n for n in zipfile.ZipFile(good).namelist() if n.endswith("models/model.json"))
    model = json.loads(zipfile.ZipFile(good).read(name))
    change(model)
    repacked(good, target, {name: json.dumps(model).encode()})


def test_texts_that_torch_would_evaluate_are_only_texts(folder, flag, tmp_path):
    good = tmp_path / "good.pt2"
    small_program(good)
    code = f"__import__('os').system('touch {flag}')"

    def expressions(part):
        if isinstance(part, dict):
            for key, value in part.items():
                if key == "expr_str":
                    part[key] = code
                expressions(value)
        elif isinstance(part, list):
            for value in part:
                expressions(value)

    def everywhere(model):
        expressions(model)
        model["guards_code"] = [code]
        model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = code

    changed_program(good, folder / "agent.pt2", everywhere)
    agent = raypatch.load_agent(folder)
    assert not flag.exists()
    assert list(agent.layers) == ["0", "2"]


@pytest.mark.parametrize(
    "target",
    ["torch.os.system", "torch.hub.load", "torch.ops.aten.from_file.default", "_operator.attrgetter",
     "torch.ops.aten.save.default", "torch.ops.profiler._record_function_enter_new.default",
     "builtins.eval", "math.sin", "#x", "torch.ops.aten.linear.default.__class__"],
)  # fmt: skip
def test_a_program_may_only_compute(folder, flag, tmp_path, target):
    good = tmp_path / "good.pt2"
    small_program(good)

    def call(model):
        node = model["graph_module"]["graph"]["nodes"][1]
        node["target"] = target
        node["inputs"] = [{"name": "x", "arg": {"as_string": f"touch {flag}"}, "kind": 1}]

    changed_program(good, folder / "agent.pt2", call)
    assert_refused(folder, "known to only compute|not a readable exported program")


@pytest.mark.parametrize(
    "name", ['0");import os;os.system("touch FLAG")#', "forward.__globals__", "0.weight\n", "", "."]
)
def test_a_tensors_name_never_becomes_code(folder, flag, tmp_path, name):
    good = tmp_path / "good.pt2"
    small_program(good)
    name = name.replace("FLAG", str(flag))

    def rename(model):
        spec = model["graph_module"]["signature"]["input_specs"][0]
        spec["parameter"]["parameter_name"] = name

    changed_program(good, folder / "agent.pt2", rename)
    assert_refused(folder, "no name of a tensor|not a readable")


@pytest.mark.parametrize(
    "name",
    ["x=1)\r__import__('os').system('touch FLAG')\rdef forward(self, a):\r    z = dict", "y", ""],
)
def test_a_keywords_name_never_becomes_code(folder, flag, tmp_path, name):
    good = tmp_path / "good.pt2"
    small_program(good)

    def add(model):
        node = model["graph_module"]["graph"]["nodes"][1]
        extra = {"name": name.replace("FLAG", str(flag)), "arg": {"as_int": 1}, "kind": 2}
        node["inputs"].append(extra)

    changed_program(good, folder / "agent.pt2", add)
    assert_refused(folder, "takes no ")


@pytest.mark.parametrize(
    "operator",
    ["_sparse_coo_tensor_unsafe", "set_", "manual_seed", "resize_", "_nested_view_from_buffer"],
)
def test_operators_that_touch_memory_or_state_are_not_known(operator):
    from raypatch.agents.operators import only_computes

    assert not only_computes(operator)
    assert only_computes("linear") and only_computes("relu_")


class Saves(nn.Module):
    """A script of this writes a file wherever it is run."""

    def __init__(self, path):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.path: str = str(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.path)
        return self.linear(x)


class Maps(Saves):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.from_file(self.path, True, 2)[0]


@pytest.mark.parametrize("kind", [Saves, Maps])
def test_a_script_that_opens_files_does_harm_where_it_runs_and_is_refused_here(
    folder, flag, tmp_path, kind
):
    script = torch.jit.script(kind(tmp_path / "harm"))
    script(torch.zeros(1, 4))
    assert (tmp_path / "harm").exists()
    torch.jit.script(kind(flag)).save(folder / "agent.ts")
    assert_refused(folder, "may do more than compute")


def rewritten_script(folder: Path, old: str, new: str) -> None:
    """A chain of layers whose stored code is changed."""
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    good = folder / "good"
    torch.jit.script(module).save(good)
    changes, found = {}, 0
    for name in zipfile.ZipFile(good).namelist():
        if name.endswith(".py"):
            text = zipfile.ZipFile(good).read(name).decode()
            found += text.count(old)
            changes[name] = text.replace(old, new).encode()
    assert found
    repacked(good, folder / "agent.ts", changes)
    good.unlink()


@pytest.mark.parametrize(
    "code",
    [
        'torch.save(input, "FLAG")',
        'input.save("FLAG")',
        '_f = torch.save\n    _f(input, "FLAG")',
        '_f = __torch__.x\n    _f = torch.save\n    _f(input, "FLAG")',
        'getattr(input, "save")("FLAG")',
        'ops.aten.save(input, "FLAG")',
        'ops.image.write_file("FLAG", input)',
        'fork(self.forward, input)',
        'torch.classes.dist_rpc.WorkerInfo("FLAG", 1)',
        '__torch__.torch.classes.dist_rpc.WorkerInfo("FLAG", 1)',
        'torch.cuda.set_device(1)',
        'float = torch.save\n    float(input, "FLAG")',
        '__torch__ = torch\n    __torch__.save(input, "FLAG")',
        '__torch__ = ops\n    __torch__.aten.save(input, "FLAG")',
        '_f = __torch__.x\n    _f : Any = torch.save\n    _f(input, "FLAG")',
        'for _f in [torch.save]:\n      _f(input, "FLAG")',
        '_t = torch\n    _t.save(input, "FLAG")',
        'print(input)',
    ],
)  # fmt: skip
def test_calls_in_a_scripts_code_are_of_operators_that_compute(folder, flag, code):
    code = code.replace("FLAG", str(flag))
    rewritten_script(folder, "    return torch.linear(", f"    {code}\n    return torch.linear(")
    assert_refused(folder, "may do more than compute")


def test_code_that_runs_while_a_script_is_loaded_is_refused(folder, flag):
    method = f'  def __setstate__(self, state: bool) -> NoneType:\n    torch.save(1, "{flag}")\n'
    rewritten_script(folder, "  def forward(", f"{method}  def forward(")
    assert_refused(folder, "__setstate__ calls torch.save")
    rewritten_script(folder, "  training : bool\n", "  training : Final[int] = torch.len([1])\n")
    assert_refused(folder, "outside of its functions")
