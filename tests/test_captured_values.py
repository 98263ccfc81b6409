"""What a capture takes for granted on a trial's inputs holds on all, or the capture is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs

EXPERIMENTS = [{"a": [i]} for i in range(8)] + [{"a": "all"}, {"b": [0]}]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.act = nn.Hardtanh(-5, 5, inplace=True)

    def forward(self, x):
        return self.b(self.between(self.a(x)))

    def between(self, h):
        return torch.relu(h)


def compared(network, source, target):
    """The largest difference from plain hooks, of both kinds of patches, and the path."""
    patcher, differences = Patcher(network, dtype=torch.float64), []
    for kind in ("pair", "zero"):
        expected = reference_outputs(network, EXPERIMENTS, source, target, kind=kind)
        found = patcher(EXPERIMENTS, source, target, kind=kind)
        assert found.shape == expected.shape
        differences.append(float((found - expected).abs().max() / expected.abs().max().clamp(1)))
    return max(differences), patcher.path


def _set_through_data(h):
    h.data.clamp_(-5, 5)
    return h


def _old_view(h):
    view = h.view(-1, 2, 4)
    h.clamp_(-5, 5)
    return view.flatten(1)


def _alias(make):
    def change(h):
        make(h).clamp_(-5, 5)
        return h

    return change


def _added_to_itself(h):
    same = h
    same += torch.relu(h - 5)
    return h


def _into(h):
    torch.clamp(h, -5, 5, out=h)
    return h


def _module_on_a_part(h):
    nn.Hardtanh(-5, 5, inplace=True)(h[:, :4])
    return h


def _function_on_a_part(h):
    F.threshold(h[:, 2:], -5, -5, inplace=True)
    return h


def _twice(h):
    return torch.relu_(h.add_(5)).sub_(5)


def _operators(h):
    h *= 2
    h -= 1
    h **= 2
    h /= 3
    h //= 0.01
    return h


IN_PLACE = {
    "part": _alias(lambda h: h[:, :4]),
    "flat view": _alias(lambda h: h.view(-1)),
    "transposed": _alias(lambda h: h.t()),
    "squeezed": _alias(lambda h: h.squeeze(1)),
    "detached": _alias(lambda h: h.detach()),
    "contiguous": _alias(lambda h: h.contiguous()),
    "dropout": _alias(lambda h: F.dropout(h, 0.5, training=False)),
    "chunk": _alias(lambda h: h.chunk(2, 1)[1]),
    "data": _set_through_data,
    "older view": _old_view,
    "operator": _added_to_itself,
    "operators": _operators,
    "out": _into,
    "module": _module_on_a_part,
    "function": _function_on_a_part,
    "chained": _twice,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_values_changed_in_place_are_changed_wherever_they_are_read(name):
    """The bounds are beyond the first inputs' values, so that a trial on these sees no change."""
    torch.manual_seed(0)
    network = Two()
    network.between = IN_PLACE[name]
    source, target = torch.randn(6, 6) * 0.3, torch.randn(6, 6) * 0.3
    source[3:] *= 30
    target[3:] *= 30
    difference, _ = compared(network, source, target)
    assert difference <= 1e-12


def test_usual_in_place_operations_are_captured():
    class Residual(Two):
        def between(self, h):
            h = F.relu(h, inplace=True)
            h += self.act(h * 2)
            h *= 0.5
            return self.act(h.add_(1))

    torch.manual_seed(0)
    difference, path = compared(Residual(), torch.randn(5, 6), torch.randn(5, 6))
    assert difference <= 1e-12 and path == "incremental (torch.fx)"


class Masked(Two):
    def forward(self, x, mask=None, extra=0.0):
        h = torch.relu(self.a(x)) + extra
        return self.b(h if mask is None else h.masked_fill(mask, 0.0))


def test_optional_arguments_that_are_given_are_used():
    torch.manual_seed(0)
    mask, extra = torch.zeros(6, 8, dtype=torch.bool), torch.zeros(6, 8)
    mask[3:, ::2], extra[3:] = True, 1.0  # the first inputs are as if nothing were given
    source, target = torch.randn(6, 6), torch.randn(6, 6)
    for more in ((), (mask,), (mask, extra)):
        difference, path = compared(Masked(), (source, *more), (target, *more))
        assert difference <= 1e-12 and path.startswith("incremental")


class Repeats(Two):
    def forward(self, x, times):
        h = torch.relu(self.a(x))
        for _ in range(times):
            h = h * 0.5
        return self.b(h)


def test_an_argument_that_is_no_tensor_may_change_from_call_to_call_and_from_side_to_side():
    torch.manual_seed(0)
    network = Repeats()
    source, target = torch.randn(5, 6), torch.randn(5, 6)
    patcher = Patcher(network, dtype=torch.float64)
    for sides in ((1, 1), (3, 3), (2, 3)):
        args = (source, sides[0]), (target, sides[1])
        expected = reference_outputs(network, EXPERIMENTS, *args)
        torch.testing.assert_close(patcher(EXPERIMENTS, *args), expected, rtol=1e-9, atol=1e-9)


class Decides(Two):
    def between(self, h):
        h = torch.relu(h)
        return h * 0.1 if h.max() > 20 else h


def test_networks_that_decide_by_values_are_run_one_experiment_at_a_time():
    torch.manual_seed(0)
    difference, path = compared(Decides(), torch.randn(6, 6) * 20, torch.randn(6, 6))
    assert difference <= 1e-12
    assert path.startswith("single") and "Python decides by values" in path


class ScalesSome(Two):
    def forward(self, x):
        h, some = self.a(x), x[:, 0] > -50
        h[some] = h[some] * 2
        return self.b(h)


def test_what_selects_by_values_is_not_captured():
    torch.manual_seed(0)
    source, target = torch.randn(8, 6), torch.randn(8, 6)
    target[5, 0] = source[6, 0] = -100
    difference, path = compared(ScalesSome(), source, target)
    assert difference <= 1e-12 and path.startswith("stacked")


class Deep(nn.Module):
    """The logarithm of zero in a middle layer: a difference of infinities is no number."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(20))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if i == 9:
                x = torch.relu(x).log().sum(1, keepdim=True).exp() + x
        return self.out(x)


def test_middle_layers_of_deep_networks_are_tried_too():
    torch.manual_seed(0)
    network, source, target = Deep(), torch.randn(4, 8), torch.randn(4, 8)
    experiments = [{"layers.9": [i]} for i in range(8)]
    expected = reference_outputs(network, experiments, source, target)
    found = Patcher(network, dtype=torch.float64)(experiments, source, target)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.a, self.encoder = nn.Linear(4, 8), nn.TransformerEncoder(layer, 2)
        self.b = nn.Linear(8, 3)

    def forward(self, x, padding):
        return self.b(self.encoder(self.a(x), src_key_padding_mask=padding).mean(1))


def test_an_encoder_with_padding_is_that_of_training():
    torch.manual_seed(0)
    network, x = Padded().eval(), torch.randn(5, 6, 4)
    padding = torch.zeros(5, 6, dtype=torch.bool)
    padding[2:, 4:] = True
    difference, path = compared(network, (x, padding), (x.flip(1), padding))
    assert difference <= 1e-12 and path.startswith("incremental")
    run = Patcher(network).prepare(target=(x, padding), kind="zero")
    with torch.enable_grad():  # without, torch would leave padded places zero
        torch.testing.assert_close(run.baseline, network(x, padding).detach())


class Extractor(nn.Module):
    """A layer, for its parameters, that has others in it."""

    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Linear(4, 8), nn.GRU(8, 8, batch_first=True)
        self.cls, self.start = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x):
        n_inputs = x.shape[0]
        h = torch.cat([self.cls.expand(n_inputs, -1, -1), self.embed(x)], 1)
        return self.gru(h, self.start.expand(-1, n_inputs, -1).contiguous())


class Extracted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Extractor(), nn.Linear(8, 3)
        self.spread = nn.Linear(8, 3)

    def forward(self, x):
        steps, state = self.a(x)
        h = torch.relu(steps[:, -1]) + state[0]
        self.spread(h)  # a head that nothing reads
        return self.b(h)


def test_a_layer_with_layers_in_it_is_looked_into_and_a_layer_nothing_reads_has_no_effect():
    torch.manual_seed(0)
    network, source, target = Extracted().eval(), torch.randn(4, 5, 4), torch.randn(4, 5, 4)
    experiments = [
        *EXPERIMENTS, {"a.embed": [1]}, {"a.gru": [2, 3]}, {"a": [0], "a.gru": "all"},
        {"spread": "all"}, {"spread": [0], "a": [7]},
    ]  # fmt: skip
    expected = reference_outputs(network, experiments, source, target)
    patcher = Patcher(network, dtype=torch.float64)
    found = patcher(experiments, source, target)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert patcher.path == "incremental (torch.fx)"
    assert list(patcher.neuron_counts) == ["a.embed", "a.gru", "a", "spread", "b"]


class Nested(nn.Module):
    """Inputs in a dict and a tuple, behind Python that symbolic tracing cannot follow."""

    def __init__(self):
        super().__init__()
        self.a, self.other, self.b = nn.Linear(3, 8), nn.Linear(2, 8), nn.Linear(8, 3)

    def forward(self, parts):
        x, (y,) = parts["x"], parts["more"]
        x = x if x.dim() == 2 else x[None]
        return self.b(torch.relu(self.a(x) - self.other(y)))


def test_nested_inputs_are_captured_by_export_in_any_order_of_their_names():
    torch.manual_seed(0)

    def parts():
        return {"x": torch.randn(5, 3), "more": (torch.randn(5, 2),)}

    network, source, target = Nested(), parts(), parts()
    patcher = Patcher(network, dtype=torch.float64)
    expected = reference_outputs(network, EXPERIMENTS, source, target)
    for turned in (source, dict(reversed(source.items()))):
        found = patcher(EXPERIMENTS, turned, target)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert patcher.path.startswith("incremental (torch.export")


class Bytes(Two):
    def forward(self, x):
        h = self.a(x.float() / 255)
        h += torch.ones(8)
        return self.b(torch.relu_(h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_bytes_are_patched_in_any_type(dtype):
    torch.manual_seed(0)
    source, target = (torch.randint(0, 255, (4, 6), dtype=torch.uint8) for _ in range(2))
    network = Bytes()
    patcher = Patcher(network, dtype=dtype)
    found = patcher(EXPERIMENTS, source, target)
    expected = reference_outputs(network, EXPERIMENTS, source, target)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert patcher.path == "incremental (torch.fx)"
