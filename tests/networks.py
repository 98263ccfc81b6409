"""Random networks of every kind the engine knows, and some that it does not; what is patched in
them, and how close to the truth it must come."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from raypatch.definitions import OUTPUT_LOGITS
from raypatch.engine.layers import find_layers
from raypatch.engine.patcher import Patcher
from raypatch.engine.reference import reference_outputs

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
ACTIVATIONS = [
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Softplus, nn.Mish,
    nn.SELU, nn.CELU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softsign,
    nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.LogSigmoid, nn.Identity, nn.Dropout, nn.PReLU,
]  # fmt: skip


class NotTraced:
    """Mixed into a network: Python that symbolic tracing cannot follow, but an export can."""

    def forward(self, x):
        return super().forward(x[None] if x.dim() < 2 else x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        h = h + F.relu(self.b(h), inplace=True)
        h += 0.5
        return self.c(h)


class DuelingCnn(nn.Module):
    def __init__(self, padding=1, stride=1, dilation=1, groups=1, pool=nn.MaxPool2d):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=padding)
        self.norm = nn.BatchNorm2d(4)
        self.pool = pool(2)
        self.second = nn.Conv2d(4, 6, 3, stride=stride, padding=1, dilation=dilation, groups=groups)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        features = self.features(torch.zeros(1, 3, 10, 10)).shape[1]
        self.value, self.advantage = nn.Linear(features, 1), nn.Linear(features, 4)

    def features(self, x):
        h = self.pool(F.relu_(self.norm(self.first(x / 255.0))))
        h = torch.relu(self.second(h))
        return h.view(h.size(0), -1)

    def forward(self, x):
        h = self.features(x)
        value, advantage = self.value(h), self.advantage(h)
        return value + advantage - advantage.mean(1, keepdim=True)


class QuantileHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.q = nn.Linear(6, 8), nn.Linear(8, 12)

    def forward(self, x):
        return self.q(torch.tanh(self.a(x))).view(-1, 4, 3).mean(dim=1)


class NormAndConcatenate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(16, 6)
        self.c = nn.Linear(6, 3)

    def forward(self, x):
        a = self.a(x)
        h = self.b(torch.cat([F.gelu(self.norm(a)), F.silu(a)], dim=1))
        left, right = h.chunk(2, dim=1)
        return self.c(torch.stack([left * 2.0, -right], dim=1).flatten(1)[:, [5, 4, 3, 2, 1, 0]])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x.view(x.shape[0], 3, 2))
        h = h + torch.softmax(h @ h.transpose(1, 2), dim=-1) @ torch.relu(self.mix(h))
        return self.head(h.mean(dim=1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Linear(2, 5), nn.GRU(5, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        steps, _ = self.gru(torch.relu(self.embed(x.view(-1, 3, 2))))
        return self.head(steps[:, -1])


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gru, self.head = nn.Linear(2, 5), nn.GRU(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        steps, _ = self.gru(torch.relu(self.embed(x.view(-1, 3, 2))).transpose(0, 1))
        return self.head(steps[-1])


class LastState(nn.Module):
    """What a recurrent layer gives at every step is not read, and states lie along axis 1."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(2, 5), nn.LSTM(5, 7, 2), nn.Linear(7, 3)
        self.again = nn.LSTM(5, 7, 2)

    def forward(self, x):
        steps = torch.tanh(self.embed(x.view(-1, 3, 2))).transpose(0, 1)
        _, state = self.lstm(steps)
        _, (hidden, _) = self.again(steps, state)
        return self.head(hidden[-1])


class Transformer(nn.Module):
    """torch's own encoder and decoder, with learned positions and a causal mask."""

    def __init__(self, batch_first=True, norm_first=False, activation="relu"):
        super().__init__()
        kind = {"batch_first": batch_first, "norm_first": norm_first, "activation": activation}
        self.batch_first = batch_first
        self.embed, self.positions = nn.Linear(2, 8), nn.Embedding(5, 8)
        encoder = nn.TransformerEncoderLayer(8, 2, 12, **kind)
        self.encoder = nn.TransformerEncoder(
            encoder, 2, nn.LayerNorm(8), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, **kind), 1)
        self.query, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x.view(x.shape[0], -1, 2))
        n_steps = h.shape[1]
        h = h + self.positions(torch.arange(n_steps, device=x.device))
        mask = torch.triu(torch.full((n_steps, n_steps), -torch.inf, device=x.device), 1)
        query = self.query.expand(x.shape[0], -1, -1)
        if not self.batch_first:
            h, query = h.transpose(0, 1), query.transpose(0, 1)
        out = self.decoder(query, self.encoder(h, mask=mask))
        return self.head(out[:, 0] if self.batch_first else out[0])


class Frames(nn.Module):
    """Convolutions on every frame, a recurrent layer over them: inputs and frames in one axis."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.again, self.lstm = nn.Conv2d(4, 3, 2), nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        n_inputs, n_frames = x.shape[:2]
        h = torch.relu(self.norm(self.conv(x.flatten(0, 1))))
        h = torch.relu(self.again(h)).view(n_inputs, n_frames, -1)
        return self.head(self.lstm(h)[0][:, -1])


class HeadsMerged(nn.Module):
    """Attention with inputs and heads in one axis, then places before the inputs in one."""

    def __init__(self):
        super().__init__()
        self.embed, self.mixed, self.out = nn.Linear(2, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x.view(x.shape[0], -1, 2))
        n_inputs, n_steps = h.shape[:2]
        parts = self.mixed(h).view(n_inputs, n_steps, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = parts.reshape(3, n_inputs * 2, n_steps, 4)
        seen = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        seen = seen.view(n_inputs, 2, n_steps, 4).permute(2, 0, 1, 3)
        out = torch.tanh(self.out(seen.reshape(n_steps * n_inputs, 8)))
        return self.head(out.view(n_steps, n_inputs, 8).mean(0))


class Gpt(nn.Module):
    """A decision transformer's block, written out; positions are cut from a table."""

    def __init__(self):
        super().__init__()
        self.embed, self.table = nn.Linear(2, 8), nn.Parameter(torch.randn(1, 9, 8))
        self.norm, self.mixed = nn.LayerNorm(8), nn.Linear(8, 24)
        self.project, self.wide, self.narrow = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x.view(x.size(0), -1, 2))
        n_inputs, n_steps, width = h.shape
        h = h + self.table[:, :n_steps]
        parts = self.mixed(self.norm(h)).split(width, dim=2)
        q, k, v = (p.view(n_inputs, n_steps, 2, width // 2).transpose(1, 2) for p in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.project(seen.transpose(1, 2).reshape(n_inputs, n_steps, width))
        h = h + self.narrow(F.gelu(self.wide(h)))
        return self.head(h[:, -1])


class OwnTensors(nn.Module):
    """Numbers of its own making, on no device in particular."""

    def __init__(self):
        super().__init__()
        self.embed, self.place, self.head = nn.Linear(2, 5), nn.Embedding(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        steps = self.embed(x.view(-1, 3, 2)) + self.place(torch.arange(3))
        state = torch.zeros(len(x), 5)
        for step in range(3):
            state = torch.tanh(steps[:, step] + state / 2)
        last = (x[:, 0] > 0).long()
        return self.head(state + steps[torch.arange(len(x)), last] * torch.linspace(0, 1, 5))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x, y, scale=None):
        assert scale is None
        return self.c(torch.tanh(self.a(x)) * torch.sigmoid(self.b(y)))


class Untraceable(nn.Module):
    """What it selects depends on values; how, does not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x)
        on = h > 0
        out = torch.zeros_like(h)
        out[on] = h[on]
        return self.b(out)


class Deciding(Untraceable):
    """Python that looks at values: one branch for the whole batch."""

    def forward(self, x):
        h = self.a(x)
        if x.shape[0] > 10**6 or h.sum() > 10**9:
            return self.b(h)
        return self.b(torch.relu(h))


class ShapeDependent(nn.Module):
    """Python that symbolic tracing cannot follow, but that depends on shapes only."""

    def __init__(self):
        super().__init__()
        self.a, self.conv, self.b = nn.Linear(6, 8), nn.Conv1d(1, 2, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu_(self.a(x if x.dim() == 2 else x[None]))
        for _ in range(x.shape[1] // 3):
            h = h * 0.9
        h = F.max_pool1d(torch.tanh(self.conv(h.unsqueeze(1))), 2)
        return self.b(h.reshape(x.shape[0], -1))


class PooledOutsideTracing(nn.Module):
    """Only torch.export can follow; it writes down the device of the padding."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Linear(10, 3)

    def forward(self, x):
        x = x if x.dim() == 4 else x[None]
        pooled = torch.relu(self.first(x)).mean((2, 3))
        padding = torch.ones(x.shape[0], 2, device=x.device)
        return self.last(torch.cat([pooled, padding], 1))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.b(torch.tanh(self.a(x)))))))


class MixesInputs(nn.Module):
    """What it gives for one input depends on the others of the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h - h.mean(0, keepdim=True))


def mlp(sizes, activation):
    layers = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def cnn1d():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.AvgPool1d(2),
        nn.Conv1d(4, 5, 2), nn.ELU(), nn.Flatten(), nn.Linear(10, 3),
    )  # fmt: skip


def cnn3d():
    return nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.ReLU(inplace=True), nn.Conv3d(3, 4, 2), nn.Tanh(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


# Name to (builder, shapes of the inputs of one row).
ZOO = {
    "residual": (Residual, [(6,)]),
    "dueling_cnn": (DuelingCnn, [(3, 10, 10)]),
    "strided_cnn": (lambda: DuelingCnn(stride=2, padding=0), [(3, 10, 10)]),
    "dilated_grouped_cnn": (
        lambda: DuelingCnn(dilation=2, groups=2, pool=nn.AvgPool2d), [(3, 10, 10)]
    ),
    "cnn1d": (cnn1d, [(2, 6)]),
    "cnn3d": (cnn3d, [(1, 4, 4, 4)]),
    "quantile_head": (QuantileHead, [(6,)]),
    "norm_and_concatenate": (NormAndConcatenate, [(6,)]),
    "attention": (Attention, [(6,)]),
    "recurrent": (Recurrent, [(6,)]),
    "sequence_first": (SequenceFirst, [(6,)]),
    "last_state": (LastState, [(6,)]),
    "transformer": (Transformer, [(6,)]),
    "transformer_sequence_first": (
        lambda: Transformer(batch_first=False, norm_first=True, activation="gelu"), [(6,)]
    ),
    "gpt": (Gpt, [(6,)]),
    "frames": (Frames, [(3, 1, 4, 5)]),
    "heads_merged": (HeadsMerged, [(6,)]),
    "own_tensors": (OwnTensors, [(6,)]),
    "two_inputs": (TwoInputs, [(6,), (3,)]),
    "untraceable": (Untraceable, [(6,)]),
    "deciding": (Deciding, [(6,)]),
    "shape_dependent": (ShapeDependent, [(6,)]),
    "pooled_outside_tracing": (PooledOutsideTracing, [(1, 6, 6)]),
    "called_twice": (CalledTwice, [(6,)]),
}  # fmt: skip


# The engine's thresholds where small networks take the ways that only pay for large ones.
AS_IF_LARGE = {"LEAVE_OUT_ELEMENTS": 0, "COMPACT_WORK": 0, "COMPACT_SHARE": 2}


def build(name, seed):
    """The network in evaluation mode with reproducible weights, and two sets of inputs."""
    torch.manual_seed(seed)
    builder, shapes = ZOO[name]
    network = builder().eval()
    source, target = (tuple(torch.randn(4, *shape) for shape in shapes) for _ in range(2))
    return network, source, target


def check_equal(found, expected, dtype):
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.max()) <= TOLERANCE[dtype]


def counts_of(network, args):
    """Neurons by layer, the output logits among them."""
    counts = {name: layer.neurons for name, layer in find_layers(network, args).items()}
    with torch.no_grad():
        return {**counts, OUTPUT_LOGITS: network(*args).shape[1]}


def changed_by(prepared, layer):
    """``[neurons, inputs]`` bool: for which inputs patching each neuron alone changes anything."""
    program = prepared.structure.program(((layer, 1),), source_runs=True)
    return prepared.changes(prepared.structure.calls[layer][0], program).active


PATHS = {"fx": "incremental (torch.fx)", "export": "incremental (torch.export"}


def checked_by(how, kind, *args):
    """The path of a checked patcher of a network that is captured in one of the ways of ``PATHS``;
    inputs are five steps of four numbers."""
    torch.manual_seed(0)
    kinds = {"fx": kind, "export": type("NotTracedKind", (NotTraced, kind), {})}
    return checked_patcher(kinds[how](*args), (5, 4)).path


def checked_patcher(network, shape, dtype=torch.float64, kind="pair"):
    """A patcher of a network with inputs of ``shape`` after its numbers were compared with those of
    plain hooks, for every neuron alone and some together."""
    return checked_on(network, torch.randn(4, *shape), torch.randn(4, *shape), dtype, kind)


def checked_on(network, source, target, dtype=torch.float64, kind="pair"):
    """The same on given inputs."""
    network, given = network.eval(), source if kind == "pair" else None
    counts = counts_of(network, (target,))
    first, *_, last = counts
    experiments = [{name: [i]} for name, n in counts.items() for i in range(n)]
    experiments += [{name: "all"} for name in counts]
    experiments += [{first: [0, 2]}, {first: [1, counts[first] // 2], last: [0]}]
    patcher = Patcher(network, dtype=dtype)
    outputs = patcher(experiments, given, target, kind=kind)
    expected = reference_outputs(network, experiments, given, target, kind=kind)
    check_equal(outputs, expected, dtype)
    return patcher


class BetweenTwo(nn.Module):
    """Two layers with something between them that the first inputs, being small, do not show."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.b(self.between(torch.relu(self.a(x))))


def checked_on_small_then_large(between):
    """The path after both calls gave what plain hooks do."""
    torch.manual_seed(0)
    network = BetweenTwo(between).eval()
    patcher = Patcher(network, dtype=torch.float64)
    experiments = [{"a": [i]} for i in range(8)] + [{"b": [0]}, {"a": "all"}]
    for scale in (1, 40):
        source, target = torch.randn(4, 6) * scale, torch.randn(4, 6) * scale
        expected = reference_outputs(network, experiments, source, target)
        check_equal(patcher(experiments, source, target), expected, torch.float64)
    return patcher.path
