"""Of a sequence only the places are computed that the output depends on; the numbers stay."""

from __future__ import annotations

import pytest
import torch
from networks import check_equal
from torch import fx, nn
from torch.nn import functional as F

from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs
from raypatch.engine.sources import Places
from raypatch.engine.structure import Savings

N_STEPS = 6


class Encoder(nn.Module):
    """torch's encoder, of which one step is read."""

    def __init__(self, batch_first=True, norm_first=False, at=-1):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=norm_first)
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first, self.at = batch_first, at

    def forward(self, x):
        h = self.embed(x)
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.encoder(h, mask=nn.Transformer.generate_square_subsequent_mask(N_STEPS))
        return self.head(self.read(h))

    def read(self, h):
        return h[:, self.at] if self.batch_first else h[self.at]


class Written(nn.Module):
    """Attention written out, twice; ``attend`` says how, ``read`` what of the steps."""

    def __init__(self, attend, read):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.mixed = nn.ModuleList([nn.Linear(8, 24), nn.Linear(8, 24)])
        self.project = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm, self.positions = nn.LayerNorm(8), nn.Parameter(torch.randn(1, 9, 8))
        self.register_buffer("mask", torch.ones(9, 9).tril().bool())
        self.attend, self.read = attend, read

    def forward(self, x):
        n_inputs, n_steps = x.shape[0], x.shape[1]
        h = self.embed(x) + self.positions[:, :n_steps]
        for mixed, project in zip(self.mixed, self.project):
            q, k, v = mixed(self.norm(h)).chunk(3, -1)
            q, k, v = (p.reshape(n_inputs, n_steps, 2, 4).transpose(1, 2) for p in (q, k, v))
            seen = self.attend(q, k, v, self.mask[:n_steps, :n_steps])
            h = h + F.gelu(project(seen.transpose(1, 2).reshape(n_inputs, n_steps, 8)))
        return self.head(self.read(h))


def _by_products(q, k, v, mask):
    weight = (q @ k.transpose(-2, -1) / 2).masked_fill(~mask, -1e9)
    return torch.matmul(F.softmax(weight, dim=-1), v)


def _by_where(q, k, v, mask):
    weight = torch.where(mask, torch.matmul(q, k.permute(0, 1, 3, 2)), torch.tensor(-1e9))
    return weight.softmax(-1) @ v


ATTENDS = {
    "products": _by_products,
    "where": _by_where,
    "sdpa": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v),
    "sdpa with a mask": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask),
    "sdpa, causal": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "sdpa, all by name": lambda q, k, v, mask: F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=mask, scale=0.3
    ),
}


def compared(network, n_steps=N_STEPS, *, kind="pair", savings=None):
    """Every other neuron of all layers against plain hooks; the patcher."""
    torch.manual_seed(1)
    source, target = torch.randn(5, n_steps, 4), torch.randn(5, n_steps, 4)
    patcher = Patcher(network, dtype=torch.float64, savings=savings)
    patcher.prepare(target, target)
    counts = patcher.neuron_counts
    experiments = [{layer: [i]} for layer, n in counts.items() for i in range(0, n, 2)]
    experiments += [{layer: "all"} for layer in counts]
    experiments += [{one: [0], other: [1]} for one, other in zip(counts, list(counts)[1:])]
    if kind == "given":
        shapes = {name: patcher.layers[name].neurons for name in counts if name != "output_logits"}
        source = {name: torch.randn(5, n_steps, n) for name, n in shapes.items()}
        source["head"] = torch.randn(5, 3)
        source["output_logits"] = torch.randn(5, 3)
    found = patcher(experiments, source, target, kind=kind)
    expected = reference_outputs(network, experiments, source, target, kind=kind)
    check_equal(found, expected, torch.float64)
    return patcher


@pytest.mark.parametrize("at", [-1, 0, 2])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_last_block_of_an_encoder_is_computed_at_the_step_that_is_read(
    batch_first, norm_first, at
):
    torch.manual_seed(0)
    patcher = compared(Encoder(batch_first, norm_first, at).eval())
    assert patcher.path == "incremental (torch.fx)"
    last = {f"encoder.layers.1.{name}" for name in ("self_attn", "linear1", "linear2")}
    assert {name for name, _ in patcher._engine.kept} == last
    assert set(patcher._engine.kept.values()) == {Places(1, at % N_STEPS, 1, N_STEPS)}


@pytest.mark.parametrize("kind", ["zero", "mean", "resample", "given"])
def test_every_source_of_values_is_cut_to_the_steps_that_are_computed(kind):
    torch.manual_seed(0)
    patcher = compared(Written(_by_products, lambda h: h[:, 3]).eval(), kind=kind)
    assert ("project.1", 0) in patcher._engine.kept


@pytest.mark.parametrize("attend", ATTENDS)
def test_attention_in_any_form_is_computed_for_the_queries_that_are_read(attend):
    torch.manual_seed(0)
    patcher = compared(Written(ATTENDS[attend], lambda h: h[:, -1]).eval())
    assert patcher.path.startswith("incremental")
    assert patcher._engine.kept == {("project.1", 0): Places(1, 5, 1, 6)}


READS = {
    "first": (lambda h: h[:, 0], True),
    "some": (lambda h: h[:, 2:4].flatten(1)[:, :8], True),
    "with dots": (lambda h: h[..., 1, :], True),
    "by select": (lambda h: h.transpose(0, 1)[-2], True),
    "after an operation": (lambda h: torch.tanh(h * 2)[:, -1], True),
    "twice the same": (lambda h: h[:, 1] + torch.sin(h[:, 1]), True),
    "two": (lambda h: h[:, 0] + h[:, -1], False),
    "the mean": (lambda h: h.mean(1), False),
    "one beside the mean": (lambda h: h[:, 0] * h.mean(1), False),
    "by an index": (lambda h: h[:, torch.tensor([1, 1])].mean(1), False),
    "a numbers' part": (lambda h: h[:, :, 1:3].repeat(1, 1, 4).mean(1), False),
    "merged with the inputs on the way": (
        lambda h: torch.tanh(h.reshape(-1, 8) * 2).view(h.shape)[:, -1],
        False,
    ),
    "its size": (lambda h: h[:, -1] / h.shape[1], True),
}


@pytest.mark.parametrize("read", READS)
def test_whatever_is_read_of_the_steps_the_numbers_are_those_of_plain_hooks(read):
    torch.manual_seed(0)
    take, is_less = READS[read]
    patcher = compared(Written(_by_products, take).eval())
    assert patcher.path.startswith("incremental")
    assert bool(patcher._engine.kept) == is_less


@pytest.mark.parametrize(
    "size, is_less", [(lambda h: h.shape[1], True), (lambda h: h.numel() / h.shape[0], False)]
)
def test_only_what_tells_a_size_that_depends_on_the_inputs_is_left_whole(size, is_less):
    class Scaled(Encoder):
        def read(self, h):
            return h[:, self.at] / size(h)

    torch.manual_seed(0)
    patcher = compared(Scaled().eval())
    assert patcher.path == "incremental (torch.fx)" and bool(patcher._engine.kept) == is_less


class Attends(nn.Module):
    """torch's attention, called in one way or another."""

    def __init__(self, call):
        super().__init__()
        self.embed, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide, self.head, self.call = nn.Linear(8, 8), nn.Linear(8, 3), call

    def forward(self, x):
        h = torch.sin(self.embed(x))
        seen, more = self.call(self.attention, h, x)
        h = h + seen
        return self.head((h + torch.relu(self.wide(h)))[:, -1]) + more


CALLS = {
    "plain": (lambda m, h, x: (m(h, h, h)[0], 0), True),
    "padding, by place": (lambda m, h, x: (m(h, h, h, x[:, :, 0] > 1.5)[0], 0), False),
    "padding": (lambda m, h, x: (m(h, h, h, key_padding_mask=x[:, :, 0] > 1.5)[0], 0), True),
    "by name": (lambda m, h, x: (m(query=h, key=h, value=h)[0], 0), False),
    "partly by name": (lambda m, h, x: (m(h, key=h, value=h)[0], 0), False),
    "one query": (lambda m, h, x: (m(h[:, -1:], h, h)[0], 0), False),
}


@pytest.mark.parametrize("call", CALLS)
def test_however_attention_is_called_it_is_captured(call):
    how, is_less = CALLS[call]
    torch.manual_seed(0)
    patcher = compared(Attends(how).eval())
    assert patcher.path == "incremental (torch.fx)"
    assert (("attention", 0) in patcher._engine.kept) == is_less


def test_attention_whose_weights_are_read_too_is_left_whole():
    def both(attention, h, x):
        seen, weights = attention(h, h, h)
        return seen, weights.mean(1)[:, :3]

    torch.manual_seed(0)
    patcher = compared(Attends(both).eval())
    assert patcher.path == "incremental (torch.fx)"
    assert ("attention", 0) not in patcher._engine.kept


def linear(h):
    return h - h.mean(1, keepdim=True)


def select(h, other, number):
    return h - other.mean(1, keepdim=True) * number


fx.wrap("linear")
fx.wrap("select")


class AcrossSteps(nn.Module):
    """A layer whose neurons are steps."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(5, N_STEPS)), nn.Linear(8, 8)

    def forward(self, x):
        return torch.matmul(self.weight[None], self.inner(x)).transpose(1, 2)


class Odd(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.embed, self.wide, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.across, self.queries = AcrossSteps(), nn.Parameter(torch.randn(2, 8, 8))
        self.operation = operation

    def forward(self, x):
        return self.head(self.operation(self, torch.sin(self.embed(x))))


ODD = {
    "a user's function of a known name": lambda self, h: self.wide(linear(h))[:, -1],
    "a user's selection": lambda self, h: select(self.wide(h), h, 0)[:, -1],
    "a norm of its own shape": lambda self, h: self.wide(F.layer_norm(h, h.shape[-1:]))[:, -1],
    "a product by name": lambda self, h: self.wide(torch.matmul(input=h, other=h.mT @ h))[:, -1],
    "learned queries": lambda self, h: self.wide(
        F.scaled_dot_product_attention(self.queries, *[h[:, None].repeat(1, 2, 1, 1)] * 2)
    )[:, :, -1].mean(1),
    "neurons along the steps": lambda self, h: torch.sin(self.across(h))[:, :, 0],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_forms_are_captured_as_they_are_without_this_saving(name):
    torch.manual_seed(0)
    patcher = compared(Odd(ODD[name]).eval())
    assert patcher.path == "incremental (torch.fx)"


def test_a_causal_kernel_is_left_whole_where_another_than_the_last_step_is_read():
    torch.manual_seed(0)
    network = Written(ATTENDS["sdpa, causal"], lambda h: h[:, 2])
    patcher = compared(network.eval())
    assert patcher._engine.kept == {("project.1", 0): Places(1, 2, 1, 6)}
    attentions = [n for n in patcher.graph.nodes if "dot_product" in str(n.target)]
    values = patcher._engine.structure.sample
    assert [values[n.index].shape[2] for n in attentions] == [6, 6]


def test_fewer_places_are_a_saving_that_can_be_switched_off():
    torch.manual_seed(0)
    network = Written(_by_products, lambda h: h[:, -1]).eval()
    assert compared(network, savings=Savings(needed_places=False))._engine.kept == {}


def test_a_longer_sequence_is_read_at_its_own_last_step():
    torch.manual_seed(0)
    network = Written(_by_products, lambda h: h[:, -1]).eval()
    patcher = Patcher(network, dtype=torch.float64)
    for n_steps in (4, 7, 1):
        source, target = torch.randn(3, n_steps, 4), torch.randn(3, n_steps, 4)
        experiments = [{"project.1": [2]}, {"mixed.1": [9]}, {"embed": [0, 3]}]
        found = patcher(experiments, source, target)
        expected = reference_outputs(network, experiments, source, target)
        check_equal(found, expected, torch.float64)


def test_given_activations_of_another_shape_are_named_with_the_layers_own():
    torch.manual_seed(0)
    network = Written(_by_products, lambda h: h[:, -1]).eval()
    with pytest.raises(Exception, match=r"'project.1' are \[5, 8\], the layer's are \[5, 6, 8\]"):
        Patcher(network)(
            [{"project.1": [0]}], {"project.1": torch.randn(5, 8)}, torch.randn(5, 6, 4),
            kind="given",
        )  # fmt: skip
