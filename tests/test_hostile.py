"""Files made to harm: nothing runs, memory stays bounded, one line says what is wrong."""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from agent_files import Payload, assert_refused, options_of, repacked, small_program
from conftest import CARTPOLE, LAVA
from torch import nn

import raypatch
from raypatch.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_payload_does_harm_where_it_is_unpickled(tmp_path):
    for name, protocol in (("one", 0), ("two", 4)):
        pickle.loads(pickle.dumps(Payload(tmp_path / name), protocol))
        assert (tmp_path / name).exists()
    torch.save(Payload(tmp_path / "three"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "three").exists()


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
        assert_refused(folder, **options_of(suffix))
        path.unlink()
    assert not flag.exists()


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
    assert_refused(folder, "appears twice")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not an archive", b"\x1f\x8b" * 50])
def test_wrong_magic_is_one_line(folder, content):
    for suffix in ("zip", "pt", "pt2", "ts", "safetensors"):
        path = folder / f"a.{suffix}"
        path.write_bytes(content)
        assert_refused(folder, **options_of(suffix))
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
        "from raypatch.errors import InputError\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        raypatch.load_agent(path, activation=None if path.endswith('/1') else 'relu')\n"
        "    except InputError:\n"
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
        small_program(path)
    good = path.read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for _ in range(n_cases):
        path.write_bytes(mutated(draw, good))
        try:
            raypatch.load_agent(folder, **options_of(suffix))
            outcomes["read"] += 1
        except InputError as error:
            assert len(str(error).splitlines()) == 1
            outcomes["refused"] += 1
    assert outcomes["refused"] > n_cases // 4
