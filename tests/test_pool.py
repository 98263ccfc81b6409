"""The dispatch state: pure, so tested without a cluster."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypatch.sweeps import pool
from raypatch.sweeps.pool import Dispatch, Failed, TooManyLosses
from raypatch.sweeps.sweep import ITEM_LOGITS, ITEM_ROWS, Range, cut, item_length, remaining


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


def test_a_single_experiment_is_given_up_after_its_last_try_and_its_item_goes_on_without_it():
    dispatch = Dispatch(iter("a"), without=lambda item, bad: f"{item} without {bad}")
    for number, verdict in enumerate([None, None, Failed("a", 3)]):
        dispatch.add_actor(number)
        dispatch.sends()
        assert dispatch.actor_died(number) == verdict
    dispatch.add_actor(9)
    assert [(s.item, s.probe) for s in dispatch.sends()] == [("a without ['a']", False)]


def test_an_item_that_fails_with_nothing_left_to_leave_out_is_hopeless():
    dispatch = Dispatch(iter("a"))
    dispatch.add_actor(0)
    verdicts = []
    for _ in range(6):
        dispatch.sends()
        verdicts.append(dispatch.item_failed(0))
    assert verdicts == [None, None, Failed("a", 3), None, None, Failed("a", 3, hopeless=True)]


def test_node_losses_charge_no_item_and_have_a_budget(monkeypatch):
    monkeypatch.setattr(pool, "MAX_NODE_LOSSES", 2)
    dispatch = Dispatch(iter("ab"))
    for number in range(2):
        dispatch.add_actor(number)
        assert [(s.item, s.tries) for s in dispatch.sends()] == [("a", 1), ("b", 1)]
        dispatch.actor_lost(number)
    dispatch.add_actor(2)
    with pytest.raises(TooManyLosses):
        dispatch.actor_lost(2)


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


class Piece:
    """Experiments ``first`` to ``last`` without some; equal by what it holds."""

    def __init__(self, first, last, skip=frozenset()):
        self.key = (first, last, frozenset(skip))

    def __eq__(self, other):
        return self.key == other.key

    def __hash__(self):
        return hash(self.key)

    @property
    def experiments(self):
        return set(range(*self.key[:2])) - self.key[2]


def halve(piece):
    first, last, _ = piece.key
    middle = (first + last) // 2
    return None if last - first < 2 else (Piece(first, middle), Piece(middle, last))


def without(piece, pieces):
    first, last, skip = piece.key
    return Piece(first, last, skip.union(*(p.experiments for p in pieces)))


@settings(max_examples=400, deadline=None)
@given(
    n_items=st.integers(0, 12),
    length=st.integers(1, 9),
    n_actors=st.integers(1, 4),
    poison=st.sets(st.integers(0, 60), max_size=4),
    random=st.randoms(use_true_random=False),
)
def test_any_interleaving_commits_every_item_once_and_quarantines_exactly_the_poison(
    n_items, length, n_actors, poison, random
):
    items = [Piece(i * length, (i + 1) * length) for i in range(n_items)]
    dispatch = Dispatch(iter(items), halve=halve, without=without)
    numbers = iter(range(10**6))
    alive = {next(numbers) for _ in range(n_actors)}
    for actor in sorted(alive):
        dispatch.add_actor(actor)
    committed, quarantined, queues, chaos = [], [], {a: [] for a in alive}, 6
    waiting_tries = {}
    while not dispatch.done:
        for send in dispatch.sends():
            queues[send.actor].append(send)
            # A bystander's count of tries is what it was when it was last sent.
            held = waiting_tries.pop(send.item, None)
            assert held is None or held == send.tries
        assert all(len(q) <= 2 for q in queues.values())
        assert dispatch.n_in_flight == sum(map(len, queues.values()))
        busy = [a for a in sorted(alive) if queues[a]]
        if not busy:
            break
        actor = random.choice(busy)
        head = queues[actor][0]
        event, verdict = random.random(), None
        if (event < 0.15 and chaos) or (event < 0.3 and chaos > 1):
            chaos -= 1
            for bystander in queues[actor][0 if event < 0.15 else 1 :]:
                waiting_tries[bystander.item] = bystander.tries
            if event < 0.15:
                dispatch.actor_lost(actor)
            else:
                verdict = dispatch.actor_died(actor)
            alive.remove(actor)
            del queues[actor]
            fresh = next(n for n in numbers if n not in alive)
            alive.add(fresh)
            queues[fresh] = []
            dispatch.add_actor(fresh)
        elif head.item.experiments & poison:
            verdict = dispatch.item_failed(actor)
            queues[actor].pop(0)
        else:
            dispatch.item_completed(actor)
            queues[actor].pop(0)
            if not head.probe:
                committed.append(head.item)
        if verdict is not None:
            # Deaths by chance may add up on one experiment; poison is not to blame then.
            assert not verdict.hopeless or not head.item.experiments & poison
            if verdict.hopeless:
                return
            quarantined += sorted(verdict.item.experiments)
    assert dispatch.done
    assert [p.key[:2] for p in sorted(committed, key=lambda p: p.key[0])] == [
        p.key[:2] for p in items
    ]
    present = poison & set(range(n_items * length))
    assert present <= set(quarantined) and len(quarantined) == len(set(quarantined))
    assert set().union(set(), *(p.key[2] for p in committed)) == set(quarantined)
    # Six deaths by chance can fail two single experiments at most.
    assert len(set(quarantined) - present) <= 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.data())
def test_probing_one_poison_costs_a_logarithm_of_tries(length, data):
    poison = data.draw(st.integers(0, length - 1))
    dispatch = Dispatch(iter([Piece(0, length)]), halve=halve, without=without)
    dispatch.add_actor(0)
    tries = 0
    while not dispatch.done:
        tries += len(dispatch.sends())
        if dispatch.done:
            break
        if poison in dispatch.head(0).experiments:
            dispatch.item_failed(0)
        else:
            dispatch.item_completed(0)
    assert tries <= 3 + 2 * length.bit_length() + 3 + 1


@settings(max_examples=200, deadline=None)
@given(
    n_experiments=st.integers(1, 120),
    length=st.integers(1, 17),
    n_actors=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_however_often_a_driver_dies_and_resumes_every_item_is_committed_exactly_once(
    n_experiments, length, n_actors, seed
):
    random = Random(seed)
    whole, committed = Range(0, n_experiments), []
    for life in range(200):
        left = remaining(whole, [Range(first, last) for first, last in committed])
        dispatch = Dispatch(iter(cut(left, length)), max_tries=1 << 30)
        numbers = iter(range(10**6))
        for _ in range(n_actors):
            dispatch.add_actor(next(numbers))
        while not dispatch.done and (life == 199 or random.random() > 0.08):
            dispatch.sends()
            busy = dispatch.busy_actors()
            if not busy:
                break
            actor = random.choice(busy)
            if random.random() < 0.2:
                random.choice([dispatch.actor_died, dispatch.actor_lost])(actor)
                dispatch.add_actor(100 + next(numbers))
            else:
                committed.append(dispatch.item_completed(actor)[1:])
        if dispatch.done:
            break
    expected = [part[1:] for part in cut([whole], length)]
    assert sorted(committed) == expected


@given(
    n_experiments=st.integers(1, 10**8),
    passes_each=st.integers(1, 10**5),
    operations=st.integers(0, 10**9),
    n_outputs=st.integers(1, 5000),
    device_class=st.sampled_from(["cpu", "cuda", "cuda+cpu"]),
)
def test_an_item_is_an_experiment_or_fits_in_a_file_and_in_memory(
    passes_each, n_outputs, device_class, **sweep
):
    length = item_length(
        passes_each=passes_each, n_outputs=n_outputs, device_class=device_class, **sweep
    )
    assert length >= 1
    rows = (length - 1) * passes_each
    assert rows < ITEM_ROWS[device_class] and rows * n_outputs < ITEM_LOGITS


def test_items_are_small_enough_for_several_actors_and_for_a_slow_network():
    small = {
        "n_experiments": 10**8, "passes_each": 16, "operations": 1000, "n_outputs": 4,
        "device_class": "cpu",
    }  # fmt: skip
    slow = {**small, "operations": 10**9}
    assert item_length(**small) == ITEM_ROWS["cpu"] / 16
    assert item_length(**{**small, "device_class": "cuda"}) == ITEM_ROWS["cuda"] / 16
    assert item_length(**{**small, "n_experiments": 16000}) == 1000
    assert item_length(**{**small, "n_outputs": 4096}) == 256
    assert item_length(**slow) == 2  # a second of 20 GFLOP/s
    assert item_length(**{**slow, "device_class": "cuda"}) == 1250
