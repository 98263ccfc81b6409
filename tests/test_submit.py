"""Submission to a real local head with its dashboard's job server."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import LAVA
from kill_points import state_of

import raypatch

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def job_server():
    """Address of a head's job server with a token; only what was started here is stopped."""
    pytest.importorskip("aiohttp", reason="ray[default] is not installed")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    held = {name: os.environ.get(name) for name in token}
    os.environ.update(token)
    port, dashboard = free_port(), free_port()
    head = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
         f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats",
         "--include-dashboard=true", f"--dashboard-agent-listen-port={free_port()}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        # Jobs run the cluster's own "python": here that of these tests.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 60
        while True:
            request = urllib.request.Request(f"{address}/api/version")
            request.add_header("Authorization", f"Bearer {token['RAY_AUTH_TOKEN']}")
            try:
                urllib.request.urlopen(request, timeout=5).read()
                break
            except OSError:
                assert time.monotonic() < deadline and head.poll() is None, "no job server"
                time.sleep(1)
        yield address
    finally:  # also where the server did not come up
        head.terminate()
        head.wait(timeout=60)
        for name, value in held.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def submit(address, *words, **environment) -> subprocess.CompletedProcess:
    """The command as a process of its own: Ray keeps a process's first token for good."""
    return subprocess.run(
        [sys.executable, "-m", "raypatch.cli", "submit", "--address", address, "--",
         *map(str, words)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
        timeout=200,
    )  # fmt: skip


def test_a_submitted_run_is_followed_and_gives_the_bytes_of_a_local_one(
    job_server, single_neurons, run_inline, tmp_path
):
    out, definition = tmp_path / "out", single_neurons(LAVA)
    ended = submit(
        job_server, "--agent_path", LAVA, "--definition_file", definition, "--output_dir", out,
        "--num_actors", 1,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "submitted to" in ended.stderr and "ended: succeeded" in ended.stderr
    assert "complete" in ended.stdout
    assert state_of(out) == state_of(run_inline(LAVA, definition, out=tmp_path / "local"))
    assert raypatch.open_results(out).sweep["agent"]["loaded_as"].startswith("state dict")


def test_a_job_whose_input_is_bad_ends_with_the_runs_own_code(job_server, tmp_path):
    (tmp_path / "d.json").write_text('[{"q_net.9": [1]}]')
    ended = submit(
        job_server, "--agent_path", LAVA, "--definition_file", tmp_path / "d.json",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert ended.returncode == 2 and "unknown layer 'q_net.9'" in ended.stderr


def test_a_wrong_token_is_refused_with_where_tokens_come_from(job_server, single_neurons, tmp_path):
    ended = submit(
        job_server, "--agent_path", LAVA, "--definition_file", single_neurons(LAVA),
        "--output_dir", tmp_path / "out", RAY_AUTH_TOKEN=secrets.token_hex(16),
    )  # fmt: skip
    assert ended.returncode == 1 and "RAY_AUTH_TOKEN" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("address", "output", "message", "code"),
    [("http://127.0.0.1:1", "/tmp/out", "no job server answers", 1),
     ("127.0.0.1:8265", "/tmp/out", "starts with http://", 2),
     ("http://127.0.0.1:1", "out", "give a URI", 2),
     ("http://127.0.0.1:1", "/tmp/out --direction up", "--direction: 'up' is not one of", 2)],
)  # fmt: skip
def test_what_cannot_be_submitted_is_one_line(
    command, single_neurons, address, output, message, code
):
    ended = command(
        "submit", "--address", address, "--", "--agent_path", LAVA, "--definition_file",
        single_neurons(LAVA), "--output_dir", *output.split(),
    )  # fmt: skip
    assert ended.code == code and message in ended.err
    assert len(ended.err.strip().splitlines()) == 1


class OldCluster(BaseHTTPRequestHandler):
    """A job server that speaks a version of its interface from before ours."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        old = {"version": "1", "ray_version": "1.9.0", "ray_commit": "0", "session_name": "s"}
        self.wfile.write(json.dumps(old).encode())

    def log_message(self, *_):
        pass


def test_a_cluster_of_another_version_is_one_line_that_says_what_to_install(
    command, single_neurons
):
    with HTTPServer(("127.0.0.1", 0), OldCluster) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ended = command(
            "submit", "--address", f"http://127.0.0.1:{server.server_port}", "--", "--agent_path",
            LAVA, "--definition_file", single_neurons(LAVA), "--output_dir", "/tmp/out",
        )  # fmt: skip
        server.shutdown()
    assert ended.code == 1 and "install the cluster's version of Ray here" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
