"""Branches that only raise do not keep a network from being traced, and still refuse inputs."""

import inspect
from contextlib import suppress

import pytest
import torch
from guarded import (
    AsksForm,
    Catches,
    CountsPlaces,
    Guarded,
    asked_by_another,
    asserts,
    calls_what_raises,
    catches,
    decides,
    either,
    ends_a_loop,
    has_no_such_attribute,
    is_caught_by_its_caller,
    raises,
    raises_by_another_decision,
    raises_otherwise,
)
from networks import check_equal, checked_patcher

from raypatch.engine.guards import truth_that_goes_on
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs
from raypatch.errors import InputError


class Asked:
    """Python asks it for its truth, as a value of a trace; it answers so that the code goes on."""

    def __init__(self):
        self.answers = []

    def __gt__(self, other):
        return self

    def __bool__(self):
        truth = truth_that_goes_on(inspect.currentframe().f_back, start.__code__)
        self.answers.append(truth)
        return bool(truth)


def start(function, asked):
    return function(asked)


@pytest.mark.parametrize(
    ("function", "answers"),
    [
        (asserts, [True, False, True, True]), (raises, [False, True, False, False]),
        (raises_otherwise, [True]), (decides, [None]), (either, [None]), (catches, [None]),
        (raises_by_another_decision, [None]), (is_caught_by_its_caller, [None]),
        (ends_a_loop, [None]), (has_no_such_attribute, [None]), (asked_by_another, [None]),
        (calls_what_raises, [False]),
    ],
)  # fmt: skip
def test_only_what_leads_to_a_raise_alone_is_taken_not_to_happen(function, answers):
    asked = Asked()
    with suppress(ValueError):
        start(function, asked)
    assert asked.answers == answers


def test_a_network_that_asserts_is_traced():
    assert checked_patcher(Guarded(), (6,)).path == "incremental (torch.fx)"


def test_inputs_that_a_forward_refuses_are_refused_in_every_call():
    patcher = Patcher(Guarded())
    x = torch.randn(3, 6)
    patcher([{"a": [0]}], x, -x)
    with pytest.raises(InputError, match="AssertionError: inputs are above -20"):
        patcher([{"a": [0]}], x, x - 50)


def test_a_guard_is_no_decision_where_a_network_goes_by_hooks():
    assert checked_patcher(CountsPlaces(), (6,)).path.startswith("stacked")


def test_an_error_that_a_forward_catches_decides_what_it_computes():
    network = Catches()
    source, target = torch.zeros(2, 1, 6)
    source[0, 1] = source[0, 3] = target[0, 5] = 50
    experiments = [{"a": [1, 3]}, {"a": [1]}, {"a": [2]}, {"a": [1, 2]}, {"a": [2, 4]}]
    for dtype in (torch.float32, torch.float64):
        patcher = Patcher(network, dtype=dtype)
        expected = reference_outputs(network, experiments, source, target)
        check_equal(patcher(experiments, source, target), expected, dtype)
        assert patcher.path.startswith("single")


def test_what_is_asked_of_the_form_alone_is_not_asked_of_all_inputs_again():
    asks_values, asks_form = Patcher(Guarded()), Patcher(AsksForm())
    for patcher in (asks_values, asks_form):
        patcher.prepare(torch.randn(3, 6), torch.randn(3, 6))
    assert asks_values.graph.guarded and not asks_form.graph.guarded
