"""Guards for ``test_guards.py``, in a module in which pytest does not rewrite what is asserted."""

import torch
from networks import NotTraced
from torch import nn
from torch.nn import functional as F


def asserts(x):
    assert x
    assert not x, "no"
    assert x > 0 and x > 1, f"got {x}"


def raises(x):
    if x:
        raise ValueError("yes")
    if not x or x > 1:
        text = "either " + str(x)
        raise ValueError(text)
    while x:
        raise ValueError


def raises_otherwise(x):
    if x > 3:
        return 1
    raise ValueError("small")


def decides(x):
    return 1 if x else 2


def either(x):
    return x or 3


def catches(x):
    try:
        if x:
            raise KeyError
    except KeyError:
        return 2
    return 1


def raises_by_another_decision(x):
    if x:
        raise ValueError("one" if decides(3) else "another")


def is_caught_by_its_caller(x):
    try:
        asserts(x)
    except AssertionError:
        return 1
    return 2


def calls_what_raises(x):
    def check(value):
        if value:
            raise ValueError

    check(x)


class Steps:
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return self

    def __next__(self):
        if self.x:
            raise ValueError
        raise StopIteration

    @property
    def size(self):
        if self.x:
            raise AttributeError
        return 1


def ends_a_loop(x):
    return list(Steps(x))


def has_no_such_attribute(x):
    return getattr(Steps(x), "size", 2)


def asked_by_another(x):
    if max(3, x, key=bool):
        raise ValueError


class Guarded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        assert x.shape[-1] == 6 and x.dim() == 2, "rows of six"
        assert (x > -20).all(), "inputs are above -20"
        if torch.isnan(x).any():
            raise ValueError(f"no number in {x}")
        h = torch.relu(self.a(x))
        if not h.isfinite().all():
            raise ValueError
        return self.c(torch.relu(self.b(h)))


class CountsPlaces(NotTraced, Guarded):
    def forward(self, x):
        assert (x > -20).all()
        h = self.a(x)
        on = h > 0
        out = torch.zeros_like(h)
        out[on] = h[on]
        return self.c(F.relu(self.b(out)))


class Catches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(6, 6), nn.Linear(6, 3)
        self.a.weight.data, self.a.bias.data = torch.eye(6), torch.zeros(6)

    def check(self, h):
        if h.sum(-1).max() > 120:
            raise ValueError

    def forward(self, x):
        h = self.a(x)
        try:
            self.check(h)
        except ValueError:
            h = h.clamp(max=10)
        return self.c(h)


class AsksForm(Guarded):
    def forward(self, x):
        assert x.dim() == 2 and x.shape[1] == 6 and len(x) > 0
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))
