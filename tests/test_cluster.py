"""Real clusters of several raylets on this machine, and an object store of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import LAVA
from kill_points import state_of

import raypatch
from raypatch.actors import RayBackend
from raypatch.sweeps import driver

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def cluster():
    """A head without resources; tests add nodes."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield made
    made.shutdown()


def all_couples(path, times):
    """A definition of every couple of neurons of two layers, some times over."""
    couples = [{"q_net.0": [i], "q_net.2": [j]} for i in range(64) for j in range(64)]
    path.write_text(json.dumps(couples * times))
    return path


@pytest.fixture
def definition(tmp_path):
    """Some seconds of work in many items."""
    return all_couples(tmp_path / "long.json", 4)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Enough work that an actor which starts late still finds some, and its rows."""
    folder = tmp_path_factory.mktemp("long")
    definition = all_couples(folder / "longer.json", 50)
    inline = raypatch.run(
        agent_path=str(LAVA), definition_file=str(definition), output_dir=str(folder / "inline"),
        backend="inline", save="metrics",
    )  # fmt: skip
    return definition, inline.dataset().to_table().replace_schema_metadata()


def sweep(cluster, definition, out, **options):
    return raypatch.run(
        agent_path=str(LAVA), definition_file=str(definition), output_dir=str(out),
        address=cluster.address, save="metrics", **options,
    )  # fmt: skip


def raylets_of_actors() -> set[int]:
    """Raylets that have a worker of ours."""
    found = set()
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if "ray::WorkerActor" in " ".join((process.info["cmdline"] or [])[:1]):
            found.add(process.info["ppid"])
    return found


def watched(task, condition):
    """Run a task in this thread while another waits for a condition and then acts."""
    seen = []

    def watch():
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not seen:
            if condition():
                seen.append(True)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = task()
    watcher.join()
    return result, bool(seen)


def committed(out) -> int:
    manifest = out / "manifest.jsonl"
    return len(manifest.read_text().splitlines()) if manifest.exists() else 0


def test_actors_spread_over_nodes_and_give_the_bytes_of_a_local_run(
    cluster, definition, run_inline, tmp_path
):
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    out = tmp_path / "out"
    results, spread = watched(
        lambda: sweep(cluster, definition, out, num_actors=2), lambda: len(raylets_of_actors()) == 2
    )
    assert spread and results.complete
    assert state_of(out) == state_of(run_inline(LAVA, definition, "--save", "metrics"))


def test_a_node_removed_midway_costs_no_item_a_try(cluster, definition, run_inline, tmp_path):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    out = tmp_path / "out"

    def remove():
        if committed(out) < 2:
            return False
        cluster.remove_node(nodes[1], allow_graceful=False)
        return True

    results, removed = watched(lambda: sweep(cluster, definition, out, num_actors=2), remove)
    assert removed and results.complete
    assert state_of(out) == state_of(run_inline(LAVA, definition, "--save", "metrics"))


def test_a_node_added_midway_is_used(cluster, long_run, tmp_path):
    cluster.add_node(num_cpus=1)
    out, ended = tmp_path / "out", []
    # Ray starts nodes in the main thread only.
    run = threading.Thread(
        target=lambda: ended.append(sweep(cluster, long_run[0], out, num_actors=2))
    )
    run.start()
    while committed(out) < 1 and run.is_alive():
        time.sleep(0.05)
    cluster.add_node(num_cpus=1)
    used = False
    while run.is_alive():
        used = used or len(raylets_of_actors()) == 2
        time.sleep(0.05)
    assert used and ended[0].complete and ended[0].sweep["runs"][-1]["actors"] == 2


def test_where_workers_do_not_see_the_output_tables_travel_and_the_driver_writes(
    cluster, definition, run_inline, tmp_path, monkeypatch
):
    cluster.add_node(num_cpus=2)
    real = driver.Job.worker_spec

    def elsewhere(job):
        return dataclasses.replace(real(job), output_dir="/not/mounted/there")

    monkeypatch.setattr(driver.Job, "worker_spec", elsewhere)
    out = tmp_path / "out"
    assert sweep(cluster, definition, out, num_actors=2).complete
    assert state_of(out) == state_of(run_inline(LAVA, definition, "--save", "metrics"))


@pytest.mark.parametrize(
    ("options", "actors", "device_class"),
    [
        ({"gpus_per_actor": 0.5}, 2, "cuda"),
        ({"gpus_per_actor": 1.0}, 1, "cuda"),
        ({"gpus_per_actor": 1.0, "cpu_actors": 1}, 2, "cuda+cpu"),
    ],
    ids=["half a GPU each", "a GPU each", "a core beside the GPU"],
)
def test_one_actor_a_gpu_or_a_share_of_one_and_cores_if_asked(
    cluster, long_run, tmp_path, monkeypatch, options, actors, device_class
):
    cluster.add_node(num_cpus=1, num_gpus=1)
    real, devices = RayBackend._crew, []

    def crew(self, resources, device):
        # The GPU is Ray's word only: the numbers are computed on the CPU.
        devices.append(device)
        return real(self, resources, "cpu")

    monkeypatch.setattr(RayBackend, "_crew", crew)
    definition, rows = long_run
    results = sweep(cluster, definition, tmp_path / "out", **options)
    assert results.complete and results.sweep["device"] == "cuda"
    assert results.sweep["identity"]["device_class"] == device_class
    assert devices == device_class.split("+")
    assert results.sweep["runs"][-1]["actors"] == actors
    assert results.dataset().to_table().replace_schema_metadata().equals(rows)


# ------------------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A local S3 server with a bucket; gives a function from a key to its URI."""
    pytest.importorskip("moto.server", reason="moto's server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    secrets = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    held = {name: os.environ.get(name) for name in secrets}
    os.environ.update(secrets)
    query = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    try:
        import pyarrow.fs

        deadline = time.monotonic() + 60
        while True:
            try:
                s3 = pyarrow.fs.S3FileSystem(
                    endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1",
                    allow_bucket_creation=True,
                )  # fmt: skip
                s3.create_dir("sweeps")
                break
            except OSError:
                assert time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.3)
        yield lambda key: f"s3://sweeps/{key}?{query}"
    finally:
        server.kill()
        server.wait()
        for name, value in held.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def objects(uri) -> dict[str, bytes]:
    """Shards and summaries at a URI."""
    import pyarrow.fs

    system, path = pyarrow.fs.FileSystem.from_uri(uri)
    selector = pyarrow.fs.FileSelector(path, recursive=True)
    return {
        info.path.removeprefix(f"{path}/"): system.open_input_stream(info.path).read()
        for info in system.get_file_info(selector)
        if info.is_file and "/part-" in info.path
    }


def local_parts(out) -> dict[str, bytes]:
    return {
        f"{folder}/{p.name}": p.read_bytes()
        for folder in ("shards", "summary") for p in (out / folder).iterdir()
    }  # fmt: skip


def test_a_killed_run_on_s3_resumes_ranks_exports_and_verifies(
    bucket, command, definition, run_inline, tmp_path
):
    uri = bucket("killed")
    words = ["run", "--agent_path", str(LAVA), "--definition_file", str(definition),
             "--output_dir", uri, "--save", "metrics", "--quiet"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "raypatch.cli", *words, "--num_actors", "2"])
    deadline = time.monotonic() + 90
    while len(objects(uri) if _exists(uri) else {}) < 6:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = objects(uri)
    assert command("status", uri).code in (0, 2)
    # The dead run's lease is younger than its life: nobody else may write yet.
    refused = command(*words, "--backend", "inline")
    assert refused.code == 2 and "another run is writing" in refused.err
    _age_leases(uri)
    ended = command(*words, "--backend", "inline")
    assert ended.code == 0, ended.err
    found = objects(uri)
    assert found.items() >= {k: v for k, v in held.items() if k in found}.items()
    out = run_inline(LAVA, definition, "--save", "metrics")
    assert found == local_parts(out)
    results = raypatch.open_results(uri)
    assert results.complete
    assert json.loads(command("rank", uri, "--json").out) == json.loads(
        command("rank", out, "--json").out
    )
    ended = command("export", uri, "--format", "parquet", "--output", tmp_path / "exported")
    assert ended.code == 0, ended.err
    assert command("verify", uri, "--sample", 2).code == 0


def _exists(uri) -> bool:
    import pyarrow.fs

    system, path = pyarrow.fs.FileSystem.from_uri(uri)
    return bool(system.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True)))


def _age_leases(uri) -> None:
    """As if the time a lease lives had passed."""
    import pyarrow.fs

    system, path = pyarrow.fs.FileSystem.from_uri(uri)
    for info in system.get_file_info(pyarrow.fs.FileSelector(path)):
        if info.base_name.startswith(".lease-"):
            system.delete_file(info.path)


def test_a_definition_on_s3_is_read_and_its_faults_name_the_uri(bucket, command, tmp_path):
    import pyarrow.fs

    for name, content in (("good.json", '[{"q_net.0": [1]}]'), ("bad.json", '[{"q_net.9": [1]}]')):
        uri = bucket(name)
        system, path = pyarrow.fs.FileSystem.from_uri(uri)
        with system.open_output_stream(path) as file:
            file.write(content.encode())
        ended = command("run", "--agent_path", LAVA, "--definition_file", uri, "--output_dir",
                        tmp_path / name, "--backend", "inline", "--quiet")  # fmt: skip
        assert ended.code == (0 if name == "good.json" else 2)
    assert "sweeps/bad.json" in ended.err and "tmp" not in ended.err
    ended = command("run", "--agent_path", LAVA, "--definition_file", bucket("none.json"),
                    "--output_dir", tmp_path / "x", "--backend", "inline")  # fmt: skip
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1


def test_a_bucket_that_is_not_there_is_one_line(bucket, command, tmp_path):
    (tmp_path / "d.json").write_text('[{"q_net.0": [1]}]')
    uri = bucket("x").replace("s3://sweeps/", "s3://nowhere/")
    ended = command("run", "--agent_path", LAVA, "--definition_file", tmp_path / "d.json",
                    "--output_dir", uri, "--backend", "inline", "--quiet")  # fmt: skip
    assert ended.code in (1, 2) and len(ended.err.strip().splitlines()) == 1
    assert "nowhere" in ended.err
