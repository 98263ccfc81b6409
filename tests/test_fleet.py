"""What Ray reports, in any order, to what the dispatch state is told; with a Ray of our own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from raypatch.actors import PoolOptions, RayBackend
from raypatch.sweeps.fleet import Crew, Fleet
from raypatch.sweeps.pool import Dispatch
from raypatch.sweeps.work import Item


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Reference:
    """An answer that arrives after so many looks."""

    def __init__(self, value, delay=0):
        self.value, self.delay = value, delay


class LateRay:
    """The first answer of an actor is large and on its way while the next is here already."""

    exceptions = SimpleNamespace(RayTaskError=RayTaskError, RayError=RayError)

    def wait(self, references, num_returns, timeout):
        ready = [r for r in references if r.delay == 0][:num_returns]
        for reference in references:
            reference.delay = max(0, reference.delay - 1)
        return ready, [r for r in references if r not in ready]

    def get(self, reference):
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, handle):
        pass


def actor():
    answers = iter([lambda i: Reference(i, 2), lambda i: Reference(RayTaskError(ValueError("x")))])

    def compute(item, experiments, tries, probe):
        return next(answers, lambda i: Reference(i))(item.number)

    return SimpleNamespace(
        setup=SimpleNamespace(remote=lambda spec, device: Reference(None)),
        compute=SimpleNamespace(remote=compute),
    )


def test_an_answer_that_overtakes_an_earlier_one_is_not_taken_for_it():
    items = (Item(i, 8 * i, 8 * i + 8) for i in range(3))
    dispatch = Dispatch(items, halve=Item.halves, without=Item.without)
    fleet = Fleet(LateRay(), [Crew(SimpleNamespace(remote=actor), "cpu")], None)
    fleet.grow([1])
    committed = []
    for _ in range(50):
        for send in dispatch.sends():
            fleet.send(send, None)
        for event in fleet.events():
            if event.kind == "ready":
                dispatch.add_actor(event.actor)
            elif event.kind == "done":
                assert dispatch.item_completed(event.actor).number == event.outcome
                committed.append(event.outcome)
            else:
                dispatch.item_failed(event.actor)
        if dispatch.done:
            break
    assert sorted(committed) == [0, 1, 2]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), "died"),
        (MemoryError(), "died"),
        (RuntimeError("a value of the wrong shape"), "failed"),
    ],
    ids=str,
)
def test_an_actor_whose_gpu_or_memory_failed_is_replaced_and_another_error_is_the_items(
    error, kind
):
    answers = iter([Reference(None), Reference(RayTaskError(error))])
    handle = SimpleNamespace(
        setup=SimpleNamespace(remote=lambda *_: next(answers)),
        compute=SimpleNamespace(remote=lambda *_: next(answers)),
    )
    crew = Crew(SimpleNamespace(remote=lambda: handle), "cuda")
    fleet = Fleet(LateRay(), [crew], None)
    fleet.grow([1])
    fleet.events()
    fleet.send(SimpleNamespace(actor=0, item=Item(0, 0, 8), tries=1, probe=False), None)
    assert [event.kind for event in fleet.events()] == [kind]
    assert crew.size == (kind == "failed")


@pytest.mark.parametrize(("sees", "device"), [(True, "cuda"), (False, "cpu")])
def test_a_gpu_that_torch_cannot_use_is_none_by_default(monkeypatch, sees, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    backend = RayBackend(PoolOptions())
    backend._ray = SimpleNamespace(
        cluster_resources=lambda: {"GPU": 1.0, "CPU": 2.0}, remote=lambda **_: lambda made: made
    )
    backend._choose_actors()
    assert backend.device == device and backend._limit == (1 if sees else 2)


def test_each_crew_grows_to_its_own_size_on_its_own_device():
    started = []

    def made(kind):
        def setup(spec, device):
            started.append((kind, device))
            return Reference(RayError("gone") if len(started) == 1 else None)

        return SimpleNamespace(remote=lambda: SimpleNamespace(setup=SimpleNamespace(remote=setup)))

    crews = [Crew(made("gpu"), "cuda"), Crew(made("core"), "cpu")]
    fleet = Fleet(LateRay(), crews, None)
    fleet.grow([1, 2])
    fleet.grow([1, 2])
    assert started == [("gpu", "cuda"), ("core", "cpu"), ("core", "cpu")]
    for _ in range(3):
        fleet.events()
    # The first did not start: only its own crew has a place to fill.
    fleet.grow([1, 2])
    assert started[3:] == [("gpu", "cuda")] and [crew.size for crew in crews] == [1, 2]
