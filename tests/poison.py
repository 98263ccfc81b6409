"""An agent whose network cannot bear one experiment: neurons of both layers at zero at once.

Lives in an agent's directory in the tests, so that actors get it by value.
"""

from __future__ import annotations

import os
import signal
import time

import torch
from torch import nn

POISON = {"first": [3], "second": [1]}


class Fragile(nn.Module):
    def __init__(self, harm):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
        self.last = nn.Linear(6, 3)
        self.harm = harm

    def forward(self, obs):
        one = self.first(obs)
        two = self.second(torch.tanh(one))
        poisoned = (one[:, 3] == 0) & (two[:, 1] == 0)
        output = self.last(torch.tanh(two))
        if bool(poisoned.any()):
            if self.harm is None:
                return output.masked_fill(poisoned[:, None], float("inf"))
            self.harm()
        return output


def raises():
    raise ValueError("this neuron bites")


def hangs():
    time.sleep(3600)


def kills():
    os.kill(os.getpid(), signal.SIGKILL)


def eats():
    held = []
    while True:
        held.append(torch.ones(1 << 24))
        time.sleep(0.005)


def asks():
    torch.empty(1 << 50)


def exits():
    raise SystemExit(3)


def asking():
    return Fragile(asks)


def exiting():
    return Fragile(exits)


def raising():
    return Fragile(raises)


def hanging():
    return Fragile(hangs)


def killing():
    return Fragile(kills)


def eating():
    return Fragile(eats)


def overflowing():
    return Fragile(None)


class Steep(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, obs):
        return self.last(self.first(obs) * 1e25)


def steep():
    return Steep()
