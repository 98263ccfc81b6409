"""Seeded kills of actors, daemons and drivers at random moments; see docs/reliability.md.

The bounded form runs with the other tests; the full one is
``pytest -m chaos --chaos_runs 20 --chaos_kills 6``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import LAVA
from kill_points import state_of

import raypatch

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

VICTIMS = ("actor", "actor", "raylet", "gcs_server", "driver")
PATIENCE_S = 150.0


@pytest.fixture(scope="module")
def chaos_options(request):
    return request.config.getoption("chaos_runs"), request.config.getoption("chaos_kills")


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("chaos_runs")))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, chaos_options):
    """A definition of some seconds of work, its undisturbed result and the command."""
    folder = tmp_path_factory.mktemp("chaos")
    definition = folder / "definition.json"
    pairs = [{"q_net.0": [i], "q_net.2": [j]} for i in range(64) for j in range(64)]
    definition.write_text(json.dumps(pairs * chaos_options[1]))
    undisturbed = folder / "undisturbed"
    code = subprocess.run(
        command(definition, undisturbed, "--backend", "inline"), check=False, timeout=200
    ).returncode
    assert code == 0
    return definition, state_of(undisturbed), raypatch.open_results(undisturbed).summary()


def command(definition, out, *more) -> list[str]:
    return [
        sys.executable, "-m", "raypatch.cli", "run", "--agent_path", str(LAVA),
        "--definition_file", str(definition), "--output_dir", str(out), "--quiet", *more,
    ]  # fmt: skip


def processes_of(driver: int, kind: str) -> list[psutil.Process]:
    if kind == "driver":
        return [psutil.Process(driver)]
    word = "ray::WorkerActor" if kind == "actor" else kind
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if word in " ".join(process.cmdline()[:1]):
                    found.append(process)
    return found


def kill_one(draw: random.Random, driver: int) -> str | None:
    """SIGKILL one process of the run; what it was, None where there was none to kill."""
    kind = draw.choice(VICTIMS)
    victims = processes_of(driver, kind)
    if not victims:
        return None
    with contextlib.suppress(psutil.Error):
        draw.choice(victims).kill()
        return kind
    return None


def test_whatever_is_killed_the_resumed_run_ends_as_if_nothing_had_happened(
    sweep, tmp_path, seed, chaos_options, record_property
):
    definition, expected, summary = sweep
    draw, out, killed = random.Random(seed), tmp_path / "out", []
    for _ in range(60):
        driver = subprocess.Popen(
            command(definition, out, "--num_actors", "2"), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while len(killed) < chaos_options[1]:
            time.sleep(draw.uniform(0.2, 4.0))
            if driver.poll() is not None:
                break
            kind = kill_one(draw, driver.pid)
            killed += [kind] if kind else []
        try:
            _, err = driver.communicate(timeout=PATIENCE_S)
        finally:
            if driver.poll() is None:
                driver.kill()
        assert "Traceback" not in err, err
        if driver.returncode == 0:
            break
    assert driver.returncode == 0, err
    record_property("killed", killed)
    print("killed:", *killed)
    assert state_of(out) == expected
    results = raypatch.open_results(out)
    assert results.complete and results.summary().equals(summary)


def test_a_terminated_driver_keeps_what_it_has_and_its_code_says_so(sweep, tmp_path):
    definition, expected, _ = sweep
    out = tmp_path / "out"
    driver = subprocess.Popen(command(definition, out), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "manifest.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGTERM)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 143, err
    assert "run the same command again to resume" in err
    assert subprocess.run(command(definition, out), check=False, timeout=120).returncode == 0
    assert state_of(out) == expected


ENDING = """
import os, signal, time
from raypatch.actors import PoolOptions, RayBackend
from raypatch.sweeps.interruption import signals_caught

options = PoolOptions(num_actors=1, device="cpu")
with signals_caught() as interruption, RayBackend(options) as backend:
    backend.wait_started()
    {again}
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)
    print("signal", interruption.signal_number)
"""


@pytest.mark.parametrize("again", ["pass", "interruption.catch()"])
def test_an_orderly_end_may_take_longer_than_rays_own_handler_allows(again):
    """Ray's has the process aborted after three seconds, and prints where it was."""
    code = [sys.executable, "-c", ENDING.format(again=again)]
    ended = subprocess.run(code, check=False, timeout=100, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "signal 15\n"), ended.stderr
    assert ("*** SIGTERM" in ended.stderr) == (again == "pass")
