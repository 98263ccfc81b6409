"""Inputs that a network chooses by values meet, or each stays by itself."""

import pytest
import torch
from networks import checked_on_small_then_large, checked_patcher
from torch import nn


def mean_of_some(h):
    h = h.clone()
    h[h > 8] = h[h > 8].mean()
    return h


def chosen(f):
    """What becomes of large values by a function of all of them."""

    def between(h):
        h = h.clone()
        h[h > 8] = f(h[h > 8])
        return h

    return between


def attended(h):
    rows = (h[:, 0] > 8).nonzero()[:, 0]
    v = h[rows]
    return h.index_add(0, rows, torch.softmax(v @ v.T / 3, -1) @ v)


def written_elsewhere(h):
    rows = (h[:, 0] > 8).nonzero()[:, 0]
    return h.index_put((rows.flip(0),), h[rows])


MEETINGS = {
    "in order": lambda h: torch.tanh(h).masked_scatter(h > 8, h.flip(1)),
    "mean of some": mean_of_some,
    "largest of some rows": lambda h: h + h[h[:, 0] > 8].sum(dim=0).clamp(max=1),
    "direction": chosen(lambda v: nn.functional.normalize(v, dim=0)),
    "order": chosen(lambda v: v.flip(0)),
    "rolled": chosen(lambda v: v.roll(1)),
    "running": chosen(lambda v: v.cummax(0)[0]),
    "length": chosen(lambda v: v / torch.linalg.norm(v)),
    "several at once": chosen(lambda v: v - v.nanmean()),
    "another axis before": chosen(lambda v: v / v[None].sum(1).clamp(min=1)),
    "an axis before": chosen(lambda v: v / v.unsqueeze(0).sum(1).clamp(min=1)),
    "sorted": chosen(lambda v: torch.msort(v)),
    "product": chosen(lambda v: v / (1 + torch.dot(v, v))),
    "attention": attended,
    "written elsewhere": written_elsewhere,
}


@pytest.mark.parametrize("between", MEETINGS)
def test_inputs_that_are_chosen_by_values_and_meet_go_one_experiment_at_a_time(between):
    assert checked_on_small_then_large(MEETINGS[between]).startswith("single (inputs that it")


def each_by_itself(h):
    h = h.clone()
    some = h[:, 0] > 0.2
    h[some] = h[some] / h[some].sum(-1, keepdim=True)
    return h


def by_rows(f):
    def between(h):
        rows = (h[:, 0] > 0.2).nonzero().flatten()
        return h.index_add(0, rows, f(h[rows]))

    return between


APART = {
    "each by itself": each_by_itself,
    "named": by_rows(lambda v: torch.sum(input=v[:, None].expand(-1, 2, -1), dim=1)),
    "norm": by_rows(lambda v: v / v.norm(2, -1, keepdim=True)),
    "sorted": by_rows(lambda v: v.sort(descending=True)[0]),
    "the larger": by_rows(lambda v: torch.max(v, other=v * v)),
    "another axis": by_rows(lambda v: v.unsqueeze(-1).expand(-1, -1, 2).mean(-1)),
    "heads": by_rows(lambda v: v.view(-1, 2, 4).transpose(1, 2).flatten(1)),
    "activations": by_rows(lambda v: nn.functional.layer_norm(torch.tanh(v), (8,))),
}


@pytest.mark.parametrize("name", APART)
def test_what_is_chosen_by_values_and_stays_apart_is_stacked(name):
    assert checked_on_small_then_large(APART[name]).startswith("stacked (")


class Fixed(nn.Module):
    """What is chosen by a mask that is the same for all inputs."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between
        self.register_buffer("mask", torch.arange(8) % 2 == 0)

    def forward(self, x):
        h = torch.relu(self.a(x))
        self.statistic = 1 - h[h > 0].mean()
        return self.b(self.between(h, self.mask))


@pytest.mark.parametrize("between", [
    lambda h, mask: h.T[mask].mean(0)[:, None] + h,
    lambda h, mask: torch.zeros_like(h).masked_scatter(mask.expand(len(h), 8), h),
    lambda h, mask: h,
])  # fmt: skip
def test_a_mask_of_the_networks_own_and_what_reaches_no_output_are_no_meetings(between):
    assert "meet" not in checked_patcher(Fixed(between), (6,)).path
