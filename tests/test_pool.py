"""The dispatch state: pure, so tested without a cluster."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypatch.pool import Dispatch


def test_two_items_are_in_flight_per_actor_and_no_more():
    dispatch = Dispatch(iter(range(10)))
    dispatch.add_actor(0)
    dispatch.add_actor(1)
    sends = dispatch.sends()
    assert [(s.actor, s.item) for s in sends] == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert dispatch.sends() == []
    assert dispatch.item_completed(0) == 0
    assert [(s.actor, s.item) for s in dispatch.sends()] == [(0, 4)]


def test_only_the_head_of_a_dead_actors_queue_is_charged():
    dispatch = Dispatch(iter("ab"))
    dispatch.add_actor(0)
    dispatch.sends()
    assert dispatch.head(0) == "a"
    assert dispatch.actor_died(0) is None
    dispatch.add_actor(1)
    assert [(s.item, s.tries) for s in dispatch.sends()] == [("a", 2), ("b", 1)]


def test_an_item_is_given_up_after_its_last_try():
    dispatch = Dispatch(iter("a"))
    for number, given_up in enumerate([None, None, "a"]):
        dispatch.add_actor(number)
        dispatch.sends()
        assert dispatch.actor_died(number) == given_up


def test_after_stop_nothing_is_sent_and_what_is_in_flight_ends_the_run():
    dispatch = Dispatch(iter(range(9)))
    dispatch.add_actor(0)
    dispatch.sends()
    dispatch.stop()
    assert dispatch.sends() == [] and not dispatch.done
    dispatch.item_completed(0)
    dispatch.item_completed(0)
    assert dispatch.done


def test_an_actor_joins_once():
    dispatch = Dispatch(iter(()))
    dispatch.add_actor(0)
    with pytest.raises(ValueError, match="in the pool already"):
        dispatch.add_actor(0)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_item_is_completed_exactly_once_whatever_dies(n_items, n_actors, random):
    dispatch = Dispatch(iter(range(n_items)), max_tries=1 << 30)
    alive, next_actor = [], 0
    for _ in range(n_actors):
        dispatch.add_actor(next_actor)
        alive.append(next_actor)
        next_actor += 1
    completed = []
    while not dispatch.done:
        dispatch.sends()
        assert dispatch.n_in_flight <= 2 * dispatch.n_actors
        busy = [a for a in alive if dispatch.head(a) is not None]
        if not busy:
            break
        actor = random.choice(busy)
        if random.random() < 0.3:
            dispatch.actor_died(actor)
            alive.remove(actor)
            dispatch.add_actor(next_actor)
            alive.append(next_actor)
            next_actor += 1
        else:
            completed.append(dispatch.item_completed(actor))
    assert sorted(completed) == list(range(n_items))
    assert dispatch.completed == n_items
