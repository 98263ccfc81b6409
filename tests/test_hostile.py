"""Files made to harm: nothing runs, memory stays bounded, one line says what is wrong."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import CARTPOLE, LAVA
from torch import nn

import raypatch
from raypatch.errors import AgentError

pytestmark = pytest.mark.filterwarnings("ignore")


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


@pytest.fixture
def flag(tmp_path):
    """A file that exists only if something was executed; looked for again at the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def test_the_payload_does_harm_where_it_is_unpickled(tmp_path):
    for name, protocol in (("one", 0), ("two", 4)):
        pickle.loads(pickle.dumps(Payload(tmp_path / name), protocol))
        assert (tmp_path / name).exists()
    torch.save(Payload(tmp_path / "three"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "three").exists()


def repacked(source: Path, target: Path, changes: dict[str, bytes], **kwargs) -> Path:
    """A copy of an archive with some members replaced or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **kwargs) as new:
        for name in old.namelist():
            new.writestr(name, changes.pop(name, old.read(name)))
        for name, content in changes.items():
            new.writestr(name, content)
    return target


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "agent"
    path.mkdir()
    return path


def assert_refused(folder, match="", **options) -> str:
    with pytest.raises(AgentError, match=match) as caught:
        raypatch.load_agent(folder, **options)
    text = str(caught.value)
    assert text and len(text.splitlines()) == 1 and len(text) < 1500
    return text


MEMBERS = [
    "data", "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "system_info.txt",
    "_stable_baselines3_version",
]  # fmt: skip


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_payload_in_any_member_of_an_sb3_zip_never_runs(folder, flag, member, form):
    stream = io.BytesIO()
    if form == "torch":
        torch.save({"q_net.q_net.0.weight": Payload(flag)}, stream)
    else:
        pickle.dump(Payload(flag), stream)
    repacked(CARTPOLE / "agent.zip", folder / "agent.zip", {member: stream.getvalue()})
    if member in ("data", "policy.pth"):
        assert_refused(folder)
    else:  # nothing else is read
        raypatch.load_agent(folder)
    assert not flag.exists()


@pytest.mark.parametrize(
    "key", ["policy_class", "observation_space", "action_space", "policy_kwargs", "lr_schedule"]
)
def test_a_payload_in_any_serialised_value_of_data_never_runs(folder, flag, key):
    data = json.loads(zipfile.ZipFile(CARTPOLE / "agent.zip").read("data"))
    entry = data.get(key) if isinstance(data.get(key), dict) else {}
    payload = base64.b64encode(pickle.dumps(Payload(flag))).decode()
    data[key] = {**entry, ":serialized:": payload}
    repacked(CARTPOLE / "agent.zip", folder / "agent.zip", {"data": json.dumps(data).encode()})
    if key == "policy_class":
        assert_refused(folder)
    else:
        raypatch.load_agent(folder)
    assert not flag.exists()


@pytest.mark.parametrize("suffix", ["pt", "pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_payload_in_a_torch_file_never_runs(folder, flag, suffix, legacy):
    content = {"0.weight": torch.zeros(2, 2), "x": Payload(flag)}
    torch.save(content, folder / f"a.{suffix}", _use_new_zipfile_serialization=not legacy)
    assert_refused(folder, "pickled objects|not a readable", activation="relu")
    assert not flag.exists()


def test_a_bare_pickle_under_any_suffix_never_runs(folder, flag):
    for suffix in ("pt", "pth", "ts", "pt2", "zip", "safetensors"):
        path = folder / f"a.{suffix}"
        path.write_bytes(pickle.dumps(Payload(flag)))
        assert_refused(folder, activation="relu")
        path.unlink()
    assert not flag.exists()


def exported(path):
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    free = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(module, (torch.randn(2, 4),), dynamic_shapes=free)
    torch.export.save(program, path)


def test_a_payload_in_any_member_of_an_exported_program_never_runs(folder, flag, tmp_path):
    good = tmp_path / "good.pt2"
    exported(good)
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
    exported(good)
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
    exported(good)
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
    exported(good)

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
    exported(good)
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
    exported(good)

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


def test_results_from_elsewhere_cannot_consent_to_running_code(folder, flag, command, tmp_path):
    """A directory of results names its agent and its options; code needs the user's own word."""
    (folder / "mine.py").write_text(
        "import os\nfrom torch import nn\n"
        f"def make():\n    os.system('touch {flag}')\n    return nn.Linear(4, 2)\n"
    )
    torch.save(nn.Linear(4, 2).state_dict(), folder / "policy.pt")
    (folder / "agent.json").write_text('{"file": "policy.pt", "factory": "mine:make"}')
    (folder / "activation_inputs").mkdir()
    for side in ("clean", "corrupted"):
        path = folder / "activation_inputs" / f"{side}_inputs.json"
        path.write_text('{"a": {"input": [1, 2, 3, 4]}}')
    (tmp_path / "d.json").write_text('[{"output_logits": [0]}]')
    ended = command(
        "run", "--agent_path", folder, "--definition_file", tmp_path / "d.json", "--output_dir",
        tmp_path / "out", "--backend", "inline", "--quiet", "--trust_agent_code",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    flag.unlink()
    ended = command("verify", tmp_path / "out")
    assert ended.code == 2 and "give it again to allow that" in ended.err
    assert not flag.exists()
    assert command("verify", tmp_path / "out", "--trust_agent_code").code == 0
    flag.unlink()


def test_a_zip_bomb_is_refused_before_it_unpacks(folder):
    with zipfile.ZipFile(folder / "agent.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", b"{}")
        with archive.open("policy.pth", "w", force_zip64=True) as member:
            for _ in range(512):
                member.write(bytes(1 << 20))
    assert (folder / "agent.zip").stat().st_size < 1 << 20
    assert_refused(folder, "zip bomb")


def test_a_bomb_inside_policy_pth_is_refused_before_it_unpacks(folder):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(256 << 20))
    repacked(CARTPOLE / "agent.zip", folder / "agent.zip", {"policy.pth": inner.getvalue()})
    assert_refused(folder, "zip bomb")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("../../evil.py", "leads out"), ("/etc/cron.d/evil", "absolute"), ("a/../../b", "leads out"),
     ("C:\\evil", "absolute"), ("..\\evil", "leads out"), ("a\nb", "unprintable")],
)  # fmt: skip
def test_names_that_leave_the_archive_are_refused(folder, name, reason):
    repacked(CARTPOLE / "agent.zip", folder / "agent.zip", {name: b"x"})
    assert_refused(folder, reason)


def test_symbolic_links_and_names_given_twice_are_refused(folder):
    link = zipfile.ZipInfo("policy.pth")
    link.external_attr = 0o120777 << 16
    shutil.copy(CARTPOLE / "agent.zip", folder / "agent.zip")
    with zipfile.ZipFile(folder / "agent.zip", "a") as archive, pytest.warns(UserWarning):
        archive.writestr(link, "/etc/passwd")
    assert_refused(folder, "symbolic link")
    shutil.copy(CARTPOLE / "agent.zip", folder / "agent.zip")
    with zipfile.ZipFile(folder / "agent.zip", "a") as archive, pytest.warns(UserWarning):
        archive.writestr("data", b"{}")
    assert_refused(folder, "there twice")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not an archive", b"\x1f\x8b" * 50])
def test_wrong_magic_is_one_line(folder, content):
    for suffix in ("zip", "pt", "pt2", "ts", "safetensors"):
        path = folder / f"a.{suffix}"
        path.write_bytes(content)
        assert_refused(folder, activation="relu")
        path.unlink()


def test_a_tensor_that_claims_more_than_it_holds_is_refused(folder):
    huge = torch.zeros(1).expand(1 << 20, 1 << 14)  # 64 GiB by its shape, four bytes held
    torch.save({"0.weight": huge, "0.bias": torch.zeros(1 << 20)}, folder / "a.pt")
    assert_refused(folder, "claims shape", activation="relu")


def test_a_huge_header_in_safetensors_is_refused(folder):
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert_refused(folder, "safetensors", activation="relu")
    header = json.dumps(
        {"0.weight": {"dtype": "F32", "shape": [1 << 30, 1 << 30], "data_offsets": [0, 4]}}
    ).encode()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert_refused(folder, "safetensors", activation="relu")


def test_nan_weights_name_the_tensor(folder):
    good = zipfile.ZipFile(LAVA / "agent.zip")
    assert good.namelist()
    state = torch.load(LAVA / "policy.pt", weights_only=True)
    name = [n for n in state if n.endswith("weight")][1]
    state[name][0, 0] = float("nan")
    torch.save(state, folder / "a.pt")
    assert name in assert_refused(folder, "NaN or infinity", activation="relu")


def test_deep_json_and_strange_values_in_data_are_one_line(folder):
    data = json.loads(zipfile.ZipFile(CARTPOLE / "agent.zip").read("data"))
    for key, value in [
        ("policy_kwargs", [1]), ("policy_kwargs", {"net_arch": "x", "activation_fn": 5}),
        ("observation_space", None), ("observation_space", {":type:": "x"}),
        ("observation_space", {**data["observation_space"], "_shape": [1 << 40]}),
        ("observation_space", {**data["observation_space"], "_shape": [7]}),
        ("action_space", 3), ("policy_class", {}), ("policy_class", {":serialized:": "!!"}),
    ]:  # fmt: skip
        content = json.dumps({**data, key: value}).encode()
        repacked(CARTPOLE / "agent.zip", folder / "agent.zip", {"data": content})
        assert_refused(folder)
    repacked(CARTPOLE / "agent.zip", folder / "agent.zip", {"data": b"[" * 100_000})
    assert_refused(folder, "not JSON")


def test_memory_stays_bounded_whatever_is_claimed(folder, tmp_path):
    """The largest process size while three hostile files are refused, against a good load."""
    huge = torch.zeros(1).expand(1 << 20, 1 << 14)
    bombs = [tmp_path / str(i) for i in range(3)]
    for bomb in bombs:
        bomb.mkdir()
    torch.save({"0.weight": huge}, bombs[0] / "a.pt")
    with zipfile.ZipFile(bombs[1] / "agent.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(1 << 30))
    header = json.dumps(
        {"0.weight": {"dtype": "F32", "shape": [1 << 33], "data_offsets": [0, 1 << 35]}}
    )
    (bombs[2] / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    program = (
        "import resource, sys, raypatch\n"
        "from raypatch.errors import AgentError\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        raypatch.load_agent(path, activation='relu')\n"
        "    except AgentError:\n"
        "        pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", program, *map(str, paths)], check=True,
                           capture_output=True, text=True).stdout)
        for paths in ([LAVA], bombs)
    ]  # fmt: skip
    assert peaks[1] < peaks[0] + (200 << 10)  # KiB


def mutated(draw: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        action, at = draw.randrange(6), draw.randrange(len(changed) or 1)
        if action == 0:
            del changed[at:]
        elif action in (1, 2) and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << draw.randrange(8)
        elif action == 3:
            changed[at : at + draw.randrange(1, 64)] = draw.randbytes(draw.randrange(64))
        elif action == 4 and len(changed) > 80:  # the directory at the end says what there is
            place = len(changed) - draw.randrange(1, 80)
            changed[place] = draw.randrange(256)
        else:
            other = draw.randrange(len(changed) or 1)
            changed[at : at + 16] = changed[other : other + 16]
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "n_cases"),
    [("sb3", 900), ("pt", 600), ("ts", 250), ("safetensors", 250), ("pt2", 400)],
)
def test_mutated_archives_are_read_or_refused_and_nothing_runs(
    folder, flag, tmp_path, kind, n_cases
):
    suffix = "zip" if kind == "sb3" else kind
    path, draw = folder / f"agent.{suffix}", random.Random(kind)
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    if kind == "sb3":
        # Small, so that mutations hit what is read.
        members = zipfile.ZipFile(CARTPOLE / "agent.zip")
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("data", "policy.pth"):
                archive.writestr(name, members.read(name))
    elif kind == "pt":
        torch.save(module.state_dict(), path)
    elif kind == "ts":
        torch.jit.script(module).save(path)
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file(module.state_dict(), path)
    else:
        exported(path)
    good = path.read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for _ in range(n_cases):
        path.write_bytes(mutated(draw, good))
        try:
            raypatch.load_agent(folder, activation="relu")
            outcomes["read"] += 1
        except AgentError as error:
            assert len(str(error).splitlines()) == 1
            outcomes["refused"] += 1
    assert outcomes["refused"] > n_cases // 4
