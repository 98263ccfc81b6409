"""What a run refuses, and hears, before its Ray stands."""

from __future__ import annotations

import signal
import socket
import sys
from types import SimpleNamespace

import pytest

from raypatch.actors import PoolOptions, RayBackend
from raypatch.errors import InputError, Interrupted
from raypatch.sweeps.interruption import Interruption


def test_a_second_signal_within_an_import_waits_for_its_end(tmp_path, monkeypatch):
    """What is raised there may leave the import's locks held: another thread would wait for ever."""
    interruption = Interruption()
    interruption.handle(signal.SIGINT, sys._getframe())
    monkeypatch.setitem(globals(), "interruption", interruption)
    (tmp_path / "long_import.py").write_text(
        "import signal, sys\n"
        "import test_before_ray\n"
        "test_before_ray.interruption.handle(signal.SIGINT, sys._getframe())\n"
        "ended = True\n"
    )
    monkeypatch.setitem(sys.modules, "test_before_ray", sys.modules[__name__])
    monkeypatch.syspath_prepend(tmp_path)
    assert __import__("long_import").ended
    with pytest.raises(Interrupted, match="stopped before anything was computed"):
        interruption.check()
    with pytest.raises(Interrupted, match="stopped at once"):
        interruption.handle(signal.SIGINT, None)


def test_an_address_where_nothing_answers_is_one_line_at_once(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    # What a file remembers of a cluster that is no more.
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: nobody)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    for address in (nobody, f"ray://{nobody}", "auto"):
        # This machine is called by its own address there.
        named = rf"\S+{nobody[-6:]}" if address == "auto" else address
        with (
            RayBackend(PoolOptions(address)) as backend,
            pytest.raises(InputError, match=f"--address {named} .*: nothing answers there"),
        ):
            backend.wait_started()


def test_a_ray_that_the_user_has_initialised_is_left_alone(monkeypatch):
    """No second one is started in the process, and that one is not shut down."""
    fake = SimpleNamespace(is_initialized=lambda: True, shutdown=lambda: pytest.fail("shut down"))
    monkeypatch.setitem(sys.modules, "ray", fake)
    with RayBackend(PoolOptions()) as backend, pytest.raises(InputError, match="initialised in"):
        backend.wait_started()


def test_two_sweeps_of_one_process_do_not_start_ray_at_once(monkeypatch):
    """The second is refused, and leaves the first one's Ray and turn alone."""
    started = []
    fake = SimpleNamespace(is_initialized=lambda: bool(started), shutdown=started.clear)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(RayBackend, "_init", lambda self: started.append(self))
    monkeypatch.setattr(RayBackend, "_dead_daemons", lambda _: [])
    crew = SimpleNamespace(early=[], actor_class=SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(RayBackend, "_choose_actors", lambda self: setattr(self, "_crews", [crew]))
    for _ in range(2):  # one after the other is no matter
        with RayBackend(PoolOptions()) as first:
            first.wait_started()
            with (
                RayBackend(PoolOptions()) as second,
                pytest.raises(InputError, match="another sweep of this process runs on Ray"),
            ):
                second.wait_started()
            assert started == [first]
        assert not started
