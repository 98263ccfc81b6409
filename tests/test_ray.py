"""Runs on real Ray actors: the same numbers, the same bytes, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import CARTPOLE, LAVA, expected_outputs, outputs_of

import raypatch
from raypatch.errors import RunError
from raypatch.sweeps.committing import Committer

pytestmark = pytest.mark.slow


def ray_processes() -> set[int]:
    """Daemons and workers of any Ray on this machine."""
    names = ("raylet", "gcs_server", "ray::")
    found = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        words = " ".join([process.info["name"] or "", *(process.info["cmdline"] or [])[:1]])
        if any(name in words for name in names):
            found.add(process.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = ray_processes()
    yield
    deadline = time.monotonic() + 20
    while ray_processes() - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ray_processes() - before


def arguments(agent, definition, out, *more) -> list[str]:
    return [str(a) for a in (
        "run", "--agent_path", agent, "--definition_file", definition, "--output_dir", out, *more,
    )]  # fmt: skip


def start(*words, **more) -> subprocess.Popen:
    """The command as a process of its own, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "raypatch.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **more,
    )  # fmt: skip


def files(out) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes()
        for folder in ("shards", "summary")
        for p in sorted((out / folder).iterdir())
    }


def test_both_agents_on_ray_equal_the_independent_truth(command, single_neurons, tmp_path):
    for agent in (LAVA, CARTPOLE):
        out = tmp_path / agent.name
        ended = command(*arguments(agent, single_neurons(agent), out, "--num_actors", 2))
        assert ended.code == 0, ended.err
        assert "Strongest neurons" in ended.out and "Next: raypatch rank" in ended.out
        results = raypatch.open_results(out)
        np.testing.assert_allclose(outputs_of(results), expected_outputs(agent), atol=1e-5)


def test_one_two_and_three_actors_and_inline_give_the_same_bytes(
    command, single_neurons, run_inline, tmp_path
):
    definition = single_neurons(LAVA)
    expected = files(run_inline(LAVA, definition, out=tmp_path / "inline"))
    for n_actors in (1, 2, 3):
        out = tmp_path / str(n_actors)
        words = arguments(LAVA, definition, out, "--num_actors", n_actors, "--quiet")
        assert command(*words).code == 0
        assert files(out) == expected


def test_actors_need_neither_the_agents_files_nor_its_code(command, single_neurons, tmp_path):
    # The trusted zip's extractor class lives in features.py beside it, on no actor's path.
    out = tmp_path / "out"
    words = arguments(
        LAVA, single_neurons(LAVA), out, "--num_actors", 1, "--quiet", "--trust_agent_code",
        "--agent_file", "agent.zip",
    )  # fmt: skip
    assert command(*words).code == 0
    results = raypatch.open_results(out)
    np.testing.assert_allclose(outputs_of(results), expected_outputs(LAVA), atol=1e-5)


@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_a_daemon_of_ray_that_dies_while_nothing_is_computed_is_named(daemon):
    code = """
from time import sleep
from raypatch.actors import PoolOptions, RayBackend
with RayBackend(PoolOptions(num_actors=1)) as backend:
    backend.wait_started()
    print("stands", flush=True)
    sleep(2)
    backend.wait_started()"""
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert driver.stdout.readline() == "stands\n"
    next(
        process for process in psutil.Process(driver.pid).children(recursive=True)
        if daemon in " ".join(process.cmdline()[:1])
    ).kill()  # fmt: skip
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert f"raypatch: Ray's {daemon} died; committed results are kept" in err
    assert f"RunError: Ray's {daemon} died" in err


def long_definition(tmp_path, repeats=8):
    """Enough work for several seconds, without a large file."""
    import json

    pairs = [{"q_net.0": [i], "q_net.2": [j]} for i in range(64) for j in range(64)]
    path = tmp_path / "long.json"
    path.write_text(json.dumps(pairs * repeats))
    return path


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def committed(out) -> int:
    manifest = out / "manifest.jsonl"
    return len(manifest.read_text().splitlines()) if manifest.exists() else 0


def worker_pids(driver) -> list[int]:
    return [
        p.pid for p in psutil.Process(driver).children(recursive=True)
        if "ray::WorkerActor" in " ".join(p.cmdline()[:1])
    ]  # fmt: skip


def test_a_killed_actor_does_not_lose_the_run(run_inline, tmp_path):
    # So long that both actors have started after a quarter, and either has more to do.
    definition = long_definition(tmp_path, repeats=32)
    out = tmp_path / "out"
    process = start(*arguments(LAVA, definition, out, "--num_actors", 2, "--save", "metrics"))
    wait_for(lambda: committed(out) > 6)
    os.kill(worker_pids(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    results = raypatch.open_results(out)
    assert results.complete and results.sweep["runs"][-1]["retries"] == 1
    undisturbed = run_inline(LAVA, definition, "--save", "metrics", out=tmp_path / "inline")
    assert files(out) == files(undisturbed)


def test_ctrl_c_keeps_what_is_done_says_how_to_resume_and_resuming_completes(
    command, tmp_path, run_inline
):
    definition = long_definition(tmp_path)
    out = tmp_path / "out"
    words = arguments(LAVA, definition, out, "--num_actors", 2, "--save", "metrics")
    process = start(*words)
    wait_for(lambda: committed(out) > 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in err
    done = committed(out)
    assert done and not raypatch.open_results(out).complete
    assert command(*words, "--quiet").code == 0
    assert raypatch.open_results(out).complete
    undisturbed = run_inline(LAVA, definition, "--save", "metrics", out=tmp_path / "inline")
    assert files(out) == files(undisturbed)


def test_a_second_signal_stops_at_once_and_nothing_committed_is_lost(command, tmp_path, run_inline):
    definition, out = long_definition(tmp_path), tmp_path / "out"
    words = arguments(LAVA, definition, out, "--num_actors", 2, "--save", "metrics")
    process = start(*words)
    wait_for(lambda: committed(out) > 0)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 143), err
    assert "run the same command again to resume" in err and "Traceback" not in err
    assert command(*words, "--quiet").code == 0
    undisturbed = run_inline(LAVA, definition, "--save", "metrics", out=tmp_path / "inline")
    assert files(out) == files(undisturbed)


def test_the_second_signal_raises_at_once_with_its_own_code():
    from raypatch.errors import Interrupted
    from raypatch.sweeps.interruption import Interruption

    interruption = Interruption()
    assert not interruption
    interruption.handle(signal.SIGTERM, None)
    assert interruption and interruption.signal_number == signal.SIGTERM
    with pytest.raises(Interrupted, match="stopped at once") as caught:
        interruption.handle(signal.SIGINT, None)
    assert caught.value.exit_code == 130


def test_a_second_signal_inside_of_compiled_code_raises_the_same():
    from raypatch.errors import Interrupted
    from raypatch.sweeps.interruption import signals_caught

    with pytest.raises(Interrupted, match="stopped at once"), signals_caught() as interruption:
        interruption.handle(signal.SIGTERM, None)
        try:
            interruption.handle(signal.SIGINT, None)
        except Interrupted as cause:  # as Cython does where a result is already there
            raise SystemError("returned a result with an exception set") from cause
    with pytest.raises(SystemError, match="other"), signals_caught():
        raise SystemError("other")


def test_bad_input_ends_with_one_line_and_no_ray(command, tmp_path):
    (tmp_path / "d.json").write_text('[{"q_net.9": [1]}]')
    ended = command(*arguments(LAVA, tmp_path / "d.json", tmp_path / "out"))
    assert ended.code == 2
    assert len(ended.err.strip().splitlines()) == 1 and "q_net.9" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_log_file_shows_plain_lines(tmp_path):
    out = tmp_path / "out"
    process = start(*arguments(LAVA, long_definition(tmp_path), out, "--save", "metrics"),
                    env={**os.environ, "COLUMNS": "120"})  # fmt: skip
    stdout, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "\x1b" not in stdout + err
    assert "experiments x 48 pairs x 2 directions" in err
    assert "verified" in stdout


def test_an_actor_that_cannot_start_ends_the_run_at_once_in_one_line():
    from raypatch.actors import PoolOptions, RayBackend
    from raypatch.errors import RunError
    from raypatch.results.schema import Columns
    from raypatch.sweeps.shipping import Shipment
    from raypatch.sweeps.sides import Sides
    from raypatch.sweeps.work import Item, Work
    from raypatch.sweeps.worker import WorkerSpec

    spec = WorkerSpec(
        patcher=Shipment(b"not a pickle", []), sides=Sides({}, ("denoising",), "zero"),
        discrete=True, columns=Columns(2, (), "summary"), metadata={}, compression="lz4",
        output_dir="/nowhere",
    )  # fmt: skip
    with RayBackend(PoolOptions(num_actors=1)) as backend:
        work = Work(spec, iter([Item(0, 0, 1)]), 1, lambda item: None, lambda: False)
        outcomes = backend.outcomes(work)
        with pytest.raises(RunError, match="an actor could not start: ") as caught:
            list(outcomes)
    assert len(str(caught.value).splitlines()) == 1


def test_an_agent_too_large_for_the_object_store_ends_with_what_to_do():
    from types import SimpleNamespace

    from raypatch.actors import PoolOptions, RayBackend
    from raypatch.errors import RunError

    class Full(Exception):
        pass

    def put(_):
        raise Full("The object store is full")

    backend = RayBackend(PoolOptions())
    backend._ray = SimpleNamespace(put=put, exceptions=SimpleNamespace(RayError=Full))
    with pytest.raises(RunError, match="larger object store"):
        backend._put(None)


def test_the_command_runs_from_a_folder_that_its_own_script_lies_in(single_neurons, tmp_path):
    # As with a virtual environment in the working directory.
    script = tmp_path / "raypatch_script.py"
    script.write_text("import sys\nfrom raypatch.cli import main\nsys.exit(main())\n")
    words = arguments(LAVA, single_neurons(LAVA), tmp_path / "out", "--num_actors", 1, "--quiet")
    ended = subprocess.run(
        [sys.executable, str(script), *words], cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert raypatch.open_results(tmp_path / "out").complete


def test_an_error_in_the_driver_ends_the_run_and_starts_no_ray_afterwards(
    command, single_neurons, tmp_path, monkeypatch
):
    import ray

    def full(*_):
        raise RunError("no space left")

    monkeypatch.setattr(Committer, "_take", full)
    started = time.monotonic()
    ended = command(*arguments(LAVA, single_neurons(LAVA), tmp_path / "out", "--num_actors", 1))
    assert ended.code == 1 and ended.err.splitlines()[-1] == "raypatch: no space left"
    assert not ray.is_initialized()
    assert time.monotonic() - started < 60
