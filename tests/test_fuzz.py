"""Damaged and hostile text files: one clear error or a good run, never a traceback.

Cases are drawn from a seed; each mutates a file that is good. The readers take most of them
directly, the whole command a share: there nothing may be written when the exit code is 2.
"""

from __future__ import annotations

import json
import random
import shutil

import pytest
from conftest import LAVA

import raypatch
from raypatch.definition_files import read_definition
from raypatch.errors import InputError, RaypatchError
from raypatch.inputs import ObservationShape, read_inputs

STRANGE = [
    None, True, False, 0, -1, 1.5, 1e308, 10**30, "", "all", "x", "\ud800", "\0", [], {}, [[]], [{}],
    {"q_net.0": []}, {"input": None}, float("nan"), float("inf"), ["a"] * 5, -(10**30), "9" * 400,
]  # fmt: skip


def mutated_value(draw: random.Random, value):
    """The value with one thing in it changed, removed, repeated or replaced."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, changed = draw.choice(list(keys)), value.copy()
        action = draw.random()
        if action < 0.6:
            changed[key] = mutated_value(draw, value[key])
        elif action < 0.7:
            del changed[key]
        elif isinstance(value, dict):
            changed[draw.choice(["q_net.0", "", "x" * 300, str(draw.random())])] = value[key]
        else:
            changed.insert(draw.randrange(len(value) + 1), draw.choice(STRANGE))
        return changed
    return draw.choice(STRANGE)


def mutated_text(draw: random.Random, text: str) -> bytes:
    """The bytes of a text, cut, flipped, repeated or filled in somewhere."""
    content = bytearray(text.encode())
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content) + 1)
        action = draw.randrange(5)
        if action == 0:
            del content[at:]
        elif action == 1 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif action == 2:
            content[at:at] = content[at : at + draw.randrange(50)] * draw.randint(1, 3)
        elif action == 3:
            content[at:at] = draw.choice([b"[" * 5000, b"\xff\xfe", b"\0", b'"', b"}", b"1e999"])
        else:
            del content[at : at + draw.randrange(1, 20)]
    return bytes(content)


def mutated(draw: random.Random, good) -> bytes:
    if draw.random() < 0.5:
        return json.dumps(mutated_value(draw, good)).encode()
    return mutated_text(draw, json.dumps(good))


DEFINITION = [
    {"q_net.0": [0, 5]}, {"q_net.2": "all"}, {"q_net.0": [1], "q_net.4": [2]},
    {"output_logits": [0, 3]},
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_mutated_definitions_are_read_or_refused_in_short_lines(tmp_path, seed):
    draw, path = random.Random(seed), tmp_path / "definition.json"
    layers = {"q_net.0": 64, "q_net.2": 64, "q_net.4": 5, "output_logits": 5}
    refused = 0
    for _ in range(700):
        path.write_bytes(mutated(draw, DEFINITION))
        try:
            read = read_definition(path, layers)
        except InputError as error:
            refused += 1
            assert str(error) and len(str(error).splitlines()) <= 12
            assert max(map(len, str(error).splitlines())) < 1000
        else:
            assert len(read) >= 1
    assert refused > 300


@pytest.mark.parametrize("seed", range(4))
def test_mutated_inputs_are_read_or_refused_in_one_line(tmp_path, seed):
    draw = random.Random(seed)
    good = {f"obs_{i}": {"input": [0.5 * i, -1.0, 2.0, 0.0]} for i in range(3)}
    paths = {side: tmp_path / f"{side}.json" for side in ("clean", "corrupted")}
    refused = 0
    for _ in range(500):
        for side, path in paths.items():
            content = mutated(draw, good) if side == "clean" else json.dumps(good).encode()
            path.write_bytes(content)
        try:
            assert read_inputs(paths, ObservationShape((4,))).sides["clean"].shape[1:] == (4,)
        except InputError as error:
            refused += 1
            assert str(error) and len(str(error).splitlines()) == 1
    assert refused > 200


@pytest.fixture(scope="module")
def partial_run(tmp_path_factory):
    """A run that stopped after one of three items."""
    folder = tmp_path_factory.mktemp("fuzz")
    definition = folder / "definition.json"
    definition.write_text(json.dumps([{"q_net.0": [i]} for i in range(33)]))
    raypatch.run(
        agent_path=str(LAVA), definition_file=str(definition), output_dir=str(folder / "out"),
        backend="inline", end_index=11,
    )  # fmt: skip
    return definition, folder / "out"


@pytest.mark.parametrize("name", ["manifest.jsonl", "sweep.json"])
def test_mutated_records_are_read_or_refused_by_every_reader(partial_run, tmp_path, name):
    _, good = partial_run
    out, draw = tmp_path / "out", random.Random(name)
    shutil.copytree(good, out)
    record = json.loads((good / name).read_text())
    refused = 0
    for _ in range(700):
        text = mutated(draw, record)
        (out / name).write_bytes(text if draw.random() < 0.5 else text + b"\n")
        try:
            results = raypatch.open_results(out)
            assert isinstance(results.failures, tuple) and results.complete in (True, False)
            if results.receipts and "kl_divergence" in results.metrics:
                results.rank("kl_divergence")
        except RaypatchError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 100


def snapshot(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["definition", "inputs", "manifest.jsonl", "sweep.json"])
def test_the_command_ends_with_two_and_writes_nothing_or_completes(
    command, partial_run, lava_copy, tmp_path, target
):
    definition, good = partial_run
    draw, completed = random.Random(target), 0
    out, changed = tmp_path / "out", tmp_path / "definition.json"
    inputs = lava_copy / "activation_inputs" / "clean_inputs.json"
    fresh = target in ("definition", "inputs")
    record = {
        "definition": lambda: json.loads(definition.read_text()),
        "inputs": lambda: json.loads(inputs.read_text()),
    }.get(target, lambda: json.loads((good / target).read_text()))()
    for _ in range(100):
        shutil.rmtree(out, ignore_errors=True)
        changed.write_bytes(definition.read_bytes())
        if not fresh:
            shutil.copytree(good, out)
        place = {"definition": changed, "inputs": inputs}.get(target, out / target)
        # Without its end a manifest's only line is a torn one, which is no fault.
        place.write_bytes(mutated(draw, record) + (b"\n" if target == "manifest.jsonl" else b""))
        before = snapshot(out)
        ended = command(
            "run", "--agent_path", lava_copy if target == "inputs" else LAVA, "--definition_file",
            changed, "--output_dir", out, "--backend", "inline", "--quiet", "--verify", 0,
        )  # fmt: skip
        assert ended.code in (0, 2), ended.err
        if ended.code == 2:
            assert ended.err.startswith("raypatch: ") and "Traceback" not in ended.err
            assert snapshot(out) == before
        else:
            completed += 1
            assert (out / "_SUCCESS").exists()
    assert completed < 100
