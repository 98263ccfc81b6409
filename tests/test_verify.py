"""``raypatch verify`` finds damage and wrong numbers, and nothing else."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import CARTPOLE, LAVA
from torch import nn

from raypatch.engine.identity import network_digest
from raypatch.engine.patcher import Patcher
from raypatch.engine.structure import Savings
from raypatch.errors import RunError
from raypatch.results import layout
from raypatch.sweeps import driver
from raypatch.sweeps.inline import InlineBackend
from raypatch.sweeps.rechecking import _close
from raypatch.sweeps.worker import Worker


@pytest.mark.parametrize("save", ["full", "metrics", "summary"])
def test_an_undamaged_run_is_verified(command, run_inline, single_neurons, save):
    out = run_inline(LAVA, single_neurons(LAVA), "--save", save)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}
    ended = command("verify", out)
    assert ended.code == 0, ended.err
    n_files = 15 if save == "summary" else 30
    assert f"15 parts in {n_files} files as committed; 8 experiments" in ended.out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"} == before


def test_a_flipped_bit_is_found_and_named(command, run_inline, single_neurons):
    out = run_inline(LAVA, single_neurons(LAVA))
    victim = sorted((out / "shards").iterdir())[3]
    content = bytearray(victim.read_bytes())
    content[1000] ^= 4
    victim.write_bytes(content)
    ended = command("verify", out)
    assert ended.code == 1
    assert f"{victim.name}: shards/{victim.name} is not what was committed" in ended.err
    assert "1 of 15 parts are damaged" in ended.err


@pytest.mark.parametrize("name", ["experiments.arrow", "baselines.arrow"])
@pytest.mark.parametrize("damage", ["gone", "empty", "another order"])
def test_what_describes_a_run_is_checked_and_restored(
    command, run_inline, single_neurons, name, damage
):
    out = run_inline(LAVA, single_neurons(LAVA))
    before = (out / name).read_bytes()
    if damage == "gone":
        (out / name).unlink()
    elif damage == "empty":
        (out / name).write_bytes(b"")
    else:
        table = pa.ipc.open_file(out / name).read_all()
        with pa.ipc.new_file(out / name, table.schema) as writer:
            writer.write_table(table.take(list(range(len(table)))[::-1]))
    ended = command("verify", out)
    assert ended.code == 1
    assert f"{name} is " in ended.err and "run the sweep's own command again" in ended.err
    run_inline(LAVA, single_neurons(LAVA), out=out)
    assert (out / name).read_bytes() == before
    assert command("verify", out).code == 0


def test_damaged_files_are_one_line_wherever_they_are_read(
    command, run_inline, single_neurons, tmp_path
):
    out = run_inline(LAVA, single_neurons(LAVA))
    victim = sorted((out / "shards").iterdir())[0]
    content = bytearray(victim.read_bytes())
    readings = [
        ("rank", out), ("report", out, "--output", tmp_path / "r.html"),
        *[("export", out, "--format", kind, "--output", tmp_path / kind)
          for kind in ("csv", "json", "parquet")],
    ]  # fmt: skip
    for damaged in (content[:500], content[:600] + bytes(len(content) - 1400) + content[-800:]):
        victim.write_bytes(damaged)
        for reading in readings[1:]:
            ended = command(*reading)
            assert ended.code == 2, reading
            assert f"shards/{victim.name} is damaged (" in ended.err
            assert ended.err.count("\n") == 1
    (out / "experiments.arrow").write_bytes(b"")
    assert "experiments.arrow is damaged (" in command(*readings[0]).err
    assert not list(tmp_path.glob("r.html")) + list(tmp_path.glob("csv"))


@pytest.mark.parametrize("save", ["full", "metrics", "summary"])
def test_wrong_numbers_under_a_right_hash_are_found(command, run_inline, single_neurons, save):
    out = run_inline(LAVA, single_neurons(LAVA), "--save", save)
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    folder, prefix = ("summary", "summary_") if save == "summary" else ("shards", "")
    for line in lines:
        path = out / folder / layout.part_name(line["first"], line["last"])
        table = pa.ipc.open_file(path).read_all()
        name = table.column_names[-3]
        wrong = pa.array([0.25] * len(table), pa.float32())
        table = table.set_column(table.column_names.index(name), table.field(name), wrong)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        line[f"{prefix}sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = command("verify", out)
    assert ended.code == 1
    assert "is not what the agent gives now" in ended.err


def test_a_run_is_verified_where_outputs_round_differently(
    command, run_inline, single_neurons, monkeypatch
):
    out = run_inline(LAVA, single_neurons(LAVA), "--metrics", "all")
    real = Patcher.__init__

    def another_way(self, *args, **settings):
        real(self, *args, **{**settings, "savings": Savings(low_rank=False)})

    monkeypatch.setattr(Patcher, "__init__", another_way)
    ended = command("verify", out, "--sample", 30)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("held", "moved", "is_close"),
    [
        ([1.0, 0.5], [], True),
        ([1.0005, 0.5], [], True),
        ([1.1, 0.5], [], False),
        ([1.1, 0.5], [[1.03, 0.5], [0.99, 0.5]], True),  # as near as the moved ones are
        ([1.2, 0.5], [[1.03, 0.5], [0.99, 0.5]], False),
        ([None, 0.5], [[1.01, 0.5]], False),
        ([None, 0.5], [[1.01, 0.5], [None, 0.5]], True),
        ([True, False], [[True, False]], True),
        ([True, False], [[False, True]], False),
    ],
)
def test_a_number_that_hangs_on_rounding_may_be_what_moved_outputs_give(held, moved, is_close):
    def column(values):
        return pa.chunked_array([values])

    expected = [True, True] if isinstance(held[0], bool) else [1.0, 0.5]
    assert _close(column(held), column(expected), list(map(column, moved))) is is_close


@pytest.mark.parametrize("more", [[], ["--cpu_actors", 1]], ids=["a GPU", "a GPU and a core"])
def test_a_run_on_a_gpu_is_verified_where_there_is_none(
    command, run_inline, single_neurons, monkeypatch, more
):
    def on_cpu(self, spec):
        real(self, replace(spec, device="cpu"))

    real = Worker.__init__
    with monkeypatch.context() as patched:
        # Said to be a GPU: the numbers are computed on the CPU.
        patched.setattr(Worker, "__init__", on_cpu)
        patched.setattr(InlineBackend, "wait_started", lambda self: setattr(self, "device", "cuda"))
        patched.setattr(driver, "check_config", lambda _: None)
        out = run_inline(LAVA, single_neurons(LAVA), *more)
    sweep = json.loads((out / "sweep.json").read_text())
    assert sweep["identity"]["device_class"] == ("cuda+cpu" if more else "cuda")
    ended = command("verify", out)
    assert ended.code == 0, ended.err


def test_an_agent_that_has_changed_is_named_as_what_differs(
    command, run_inline, single_neurons, lava_copy
):
    out = run_inline(lava_copy, single_neurons(lava_copy))
    (lava_copy / "agent.json").write_text('{"file": "policy.pt", "activation": "tanh"}')
    (lava_copy / "policy.pt").write_bytes((lava_copy / "policy.pt").read_bytes() + b"\0")
    ended = command("verify", out)
    assert ended.code == 2 and "different: agent" in ended.err


def test_a_moved_agent_and_its_inputs_are_found_with_the_option(
    command, run_inline, single_neurons, lava_copy
):
    out = run_inline(lava_copy, single_neurons(lava_copy))
    moved = lava_copy.rename(lava_copy.with_name("elsewhere"))
    ended = command("verify", out, "--agent_path", moved)
    assert ended.code == 0, ended.err


def test_a_run_with_continuous_or_two_actions_verifies_too(command, run_inline, single_neurons):
    out = run_inline(CARTPOLE, single_neurons(CARTPOLE), "--source", "mean")
    assert command("verify", out, "--sample", 3).code == 0


@pytest.fixture
def wrong_engine(monkeypatch):
    """Every patched output is off by 0.1, as if the engine had a bug."""
    right = Worker._outputs
    monkeypatch.setattr(Worker, "_outputs", lambda self, e: [o + 0.1 for o in right(self, e)])


def test_a_run_whose_verification_failed_is_never_gone_on_with(
    command, run_inline, single_neurons, tmp_path, wrong_engine, monkeypatch
):
    words = (
        "run", "--agent_path", LAVA, "--definition_file", single_neurons(LAVA),
        "--output_dir", tmp_path / "out", "--backend", "inline", "--quiet",
    )  # fmt: skip
    ended = command(*words)
    assert ended.code == 1 and "verification failed: experiment" in ended.err
    monkeypatch.undo()
    ended = command(*words)
    assert ended.code == 2 and "failed its verification" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert command("verify", tmp_path / "out").code == 1
    assert "not to be trusted" in command("status", tmp_path / "out").out
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert command(*words, "--overwrite").code == 0
    assert command("verify", tmp_path / "out").code == 0


def test_parts_kept_from_a_run_that_died_before_checking_them_are_checked(
    command, run_inline, single_neurons, wrong_engine, monkeypatch
):
    out = run_inline(LAVA, single_neurons(LAVA), "--verify", 0)
    (out / "manifest.jsonl").unlink()
    (out / "_SUCCESS").unlink()
    monkeypatch.undo()
    ended = command(
        "run", "--agent_path", LAVA, "--definition_file", single_neurons(LAVA),
        "--output_dir", out, "--backend", "inline", "--verify", 2,
    )  # fmt: skip
    assert ended.code == 1 and "is not what the agent gives now" in ended.err
    assert not (out / "_SUCCESS").exists()


def test_a_manifest_or_a_factory_that_means_another_network_makes_another_sweep(
    command, run_inline, single_neurons, lava_copy
):
    definition = single_neurons(lava_copy)
    out = run_inline(lava_copy, definition)
    manifest = json.loads((lava_copy / "agent.json").read_text())
    (lava_copy / "agent.json").write_text(json.dumps({**manifest, "activation": "tanh"}))
    words = (
        "run", "--agent_path", lava_copy, "--definition_file", definition, "--output_dir", out,
        "--backend", "inline",
    )  # fmt: skip
    ended = command(*words)
    assert ended.code == 2 and "another sweep; different: network;" in ended.err


def test_verifying_leaves_the_processs_signals_as_they_were(run_inline, single_neurons):
    from raypatch.commands.verifying import verify_run

    out = run_inline(LAVA, single_neurons(LAVA))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    verify_run(str(out), sample=1, seed=0)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Holds(nn.Module):
    """Goes by hooks, so that its digest is of what it holds."""

    def __init__(self, **held):
        super().__init__()
        self.a = nn.Linear(4, 2)
        vars(self).update(held)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"act": torch.relu}, {"act": torch.tanh}),
        ({"act": lambda h: h * 2}, {"act": lambda h: h * 3}),
        ({"act": partial(torch.clamp, min=0)}, {"act": partial(torch.clamp, min=1)}),
        ({"options": {"gain": 1.0}}, {"options": {"gain": 5.0}}),
        ({"scale": np.ones(3)}, {"scale": np.zeros(3)}),
        ({"scale": torch.ones(3)}, {"scale": torch.zeros(3)}),
        ({"sizes": [(1, 2)]}, {"sizes": [(1, 3)]}),
    ],
    ids=["function", "lambda", "partial", "dict", "array", "tensor", "list"],
)
def test_networks_that_hold_something_else_have_other_digests(one, other):
    def digest(held):
        torch.manual_seed(0)
        return network_digest(Holds(**held), None)

    assert digest(one) == digest(one) != digest(other)


LEAF = """
import torch
from torch import nn
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.ones(4, 4)), GAIN
        self.register_buffer("noise", torch.randn(4), persistent=False)
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.gain * torch.FUNCTION(x @ self.weight.T)
def make():
    torch.manual_seed(0)
    net = nn.Sequential(Own(), nn.Linear(4, 2))
    torch.seed()
    net[0].noise.normal_()
    return net
"""


def digest_of(folder, **words) -> str:
    """The network's digest in a process of its own."""
    text = LEAF
    for word, value in words.items():
        text = text.replace(word, value)
    (folder / "own.py").write_text(text)
    program = (
        "import own, torch\n"
        "from raypatch.engine.identity import network_digest\n"
        "from raypatch.engine.patcher import Patcher\n"
        "net = own.make().eval()\n"
        "p = Patcher(net); p.prepare(torch.randn(2, 4), torch.randn(2, 4))\n"
        "print(network_digest(net, p.graph))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_a_networks_digest_is_the_same_in_two_processes_and_another_for_other_code(tmp_path):
    first = digest_of(tmp_path, GAIN="2.0", FUNCTION="tanh")
    assert digest_of(tmp_path, GAIN="2.0", FUNCTION="tanh") == first
    assert digest_of(tmp_path, GAIN="2.0", FUNCTION="sin") != first
    assert digest_of(tmp_path, GAIN="3.0", FUNCTION="tanh") != first


def test_a_disk_that_cannot_be_read_while_parts_are_checked_marks_nothing(
    command, run_inline, single_neurons, monkeypatch
):
    out = run_inline(LAVA, single_neurons(LAVA))
    (out / "manifest.jsonl").unlink()
    (out / "_SUCCESS").unlink()

    def unreadable(*_):
        raise RunError("shards: cannot be read: Input/output error")

    monkeypatch.setattr("raypatch.sweeps.committing.recheck", unreadable)
    words = (
        "run", "--agent_path", LAVA, "--definition_file", single_neurons(LAVA),
        "--output_dir", out, "--backend", "inline", "--quiet",
    )  # fmt: skip
    assert command(*words).code == 1
    monkeypatch.undo()
    assert command(*words).code == 0
