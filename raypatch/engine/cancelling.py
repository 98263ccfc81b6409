"""Rows of which a low-rank update would leave little but rounding errors.

An update takes away from a node's base output what patched neurons gave to it. Where that was
nearly all of some number, what is left holds the rounding errors of what was there, and the next
operation may make anything of them: a quotient, a root, a comparison. Such rows are computed whole.

They are found by making the same update of magnitudes: absolute values through absolute weights
give, for every number of the output, the sizes of all terms of its sum, before a patch and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raypatch.engine.from_weights import convolution_of, linear_of
from raypatch.engine.graph import Node, Ref
from raypatch.engine.layers import tensors_in
from raypatch.engine.plan import Selection
from raypatch.engine.spread_rules import Context, SpreadRule
from raypatch.engine.values import Batch, Sparse

# A sum is left with its rounding errors where less than one part in so many of its terms is left.
LEFT = 4
# Errors of sums of terms up to this size, all together, are small by themselves, as long as what
# follows makes no more of them.
LARGE = 64.0
# Elements of a batch of single neurons, for which magnitudes are updated at a time.
ELEMENTS = 1 << 20
# What makes of a small error no large one, by its name without underscores.
GENTLE = set(
    """
    abs adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d add addmm alphadropout amax amin
    avgpool1d avgpool2d avgpool3d baddbmm batchnorm batchnorm1d batchnorm2d batchnorm3d bmm cat
    celu chunk clamp clampmax clampmin clip clone concat concatenate contiguous conv1d conv2d
    conv3d cos detach double dropout dropout1d dropout2d dropout3d elu expand expandas flatten
    flip float gelu getitem gru grucell hardsigmoid hardswish hardtanh hstack identity
    indexselect leakyrelu lerp linear logsigmoid logsoftmax logsumexp lstm lstmcell maskedfill
    matmul max maximum maxpool1d maxpool2d maxpool3d mean min minimum mish mm movedim mul
    multiheadattention narrow neg permute prelu ravel relu relu6 repeat reshape reshapeas rnn
    rnncell roll rsub scaleddotproductattention select selu sigmoid silu sin slice softmax
    softplus softsign split square squeeze stack sub sum swapaxes t tanh tanhshrink tile to
    tocopy transpose type unbind unflatten unsqueeze view viewas vstack
    """.split()
)
DIVISIONS = {"div", "truediv", "truedivide"}
PRODUCTS = set("addmm baddbmm bmm conv1d conv2d conv3d linear matmul mm prelu".split())
# What takes a factor after its argument.
SCALED = {"celu", "elu", "leakyrelu", "lerp"}


def divides_by(node: Node, asked: Callable[[int], bool]) -> bool:
    """Whether a division's divisor is a value that is ``asked`` for."""
    divisor = node.option(1, "other")
    return isinstance(divisor, Ref) and asked(divisor.node)


def gain_of(
    nodes: Iterable[Node],
    is_dense: Callable[[int], bool],
    value_of: Callable[[int], Any],
    of_modules: dict[int, float],
) -> float:
    """By how much these operations on dense rows may enlarge an error, all together and at least 1;
    infinity or NaN where one divides or jumps, or that cannot be told. ``value_of`` is a node's
    value for some input; ``of_modules`` keeps what was found of modules, by their nodes."""
    gain = 1.0
    for node in nodes:
        name = node.name.replace("_", "").lower()
        values = tensors_in(value_of(node.index))
        if node.is_torchs and not values:
            continue  # a size
        by_what_is_given = name in DIVISIONS and not divides_by(node, is_dense)
        # Places and truths jump.
        jumps = not all(value.is_floating_point() for value in values)
        jumps |= node.kwargs.get("rounding_mode") is not None
        if jumps or not node.is_torchs or not (name in GENTLE or by_what_is_given):
            return torch.inf
        if node.op != "module":
            own = _gain(node, name, is_dense, value_of)
        elif node.index in of_modules:
            own = of_modules[node.index]
        else:
            own = of_modules[node.index] = _gain_of_module(node.target)
        gain *= 1.0 if own <= 1 else own
    return gain


def _gain_of_module(module: nn.Module) -> float:
    if isinstance(module, _NormBase):
        if module.running_var is None:
            return torch.inf
        scale = (module.running_var + module.eps).rsqrt()
        return float((scale if module.weight is None else scale * module.weight).abs().max())
    slope = max(abs(vars(module).get(name, 1.0)) for name in ("alpha", "negative_slope"))
    slopes = isinstance(module, nn.PReLU)
    return slope * _longest(p for p in module.parameters() if p.dim() > 1 or slopes)


def _gain(
    node: Node, name: str, is_dense: Callable[[int], bool], value_of: Callable[[int], Any]
) -> float:
    """Of a function or method; NaN passes."""
    if name == "batchnorm":
        return torch.inf
    given = [*node.args, *node.kwargs.values()]

    def value(arg: Any) -> Any:
        return value_of(arg.node) if isinstance(arg, Ref) else arg

    dense = [isinstance(arg, Ref) and is_dense(arg.node) for arg in given]
    if name in DIVISIONS:
        return float(_sizes(value(node.option(1, "other"))).reciprocal().max())
    if name == "mul":
        others = [given[1 - i] for i, is_one in enumerate(dense[:2]) if is_one]
        return max((float(_sizes(value(other)).max()) for other in others), default=1.0)
    if name == "sum":
        before, after = (tensors_in(value_of(i))[0] for i in (node.inputs[0], node.index))
        return before.numel() / max(1, after.numel())  # errors may be the same
    scales = [node.kwargs.get(scale) for scale in ("alpha", "beta")]
    scales += given[1:] if name in SCALED else []
    largest = max([1.0, *(abs(float(x)) for x in scales if isinstance(x, (int, float)))])
    fixed = [value(arg) for arg, is_one in zip(given, dense) if name in PRODUCTS and not is_one]
    vectors = name in ("matmul", "prelu")  # elsewhere they are biases
    return largest * _longest(
        x for x in fixed if isinstance(x, Tensor) and (x.dim() > 1 or vectors)
    )


def _sizes(value: Any) -> Tensor:
    """Absolute values; of nothing 1."""
    given = torch.as_tensor(value)
    sizes = (given.abs() if given.is_complex() else given.double()).abs()
    return sizes if sizes.numel() else sizes.new_ones(1)


def _longest(weights: Iterable[Tensor]) -> float:
    """The largest length (L2) of a row or column of matrices, or of a vector, and 1 at least: so
    much larger are the errors of sums with these weights, where errors are of either sign."""
    found = [1.0]
    for weight in weights:
        if weight.numel():
            matrix = weight.detach().flatten(1) if weight.dim() > 1 else weight.view(1, -1)
            axes = (0, 1) if weight.dim() > 1 else (1,)
            found += [float(matrix.float().norm(dim=axis).max()) for axis in axes]
    return torch.nan if any(x != x for x in found) else max(found)


class Magnitudes:
    """Sizes of the terms of a linear node's output; what its rule may ask for them.

    ``absolute`` is the node with the absolute values of its weights, see :func:`absolute`.
    """

    def __init__(self, context: Context, absolute: Node) -> None:
        self._context = context
        self._base: Tensor = absolute.call(lambda i: _size(context.base(i)))
        self._columns: Tensor | None = None
        # By the id of a sparse value, which its chain keeps.
        self._sizes: dict[int, Sparse] = {}
        # Of single neurons what was asked for; once that is half of them, all are looked at.
        self._asked: dict[int, int] = {}
        self._of_neurons: dict[int, Tensor | None] = {}

    def base(self, _: int) -> Tensor:
        return self._base

    def buffer(self, node: Node, *shape: int) -> Tensor:
        own = self._context.buffer(node, *shape)
        return own if own.dtype == self._base.dtype else self._base.new_empty(shape)

    def once(self, node: Node, make: Callable[[], Any]) -> Any:
        return self._context.once(node, make)

    @cached_property
    def most(self) -> Tensor:
        """The largest of them, on the device."""
        return self._base.max() if self._base.numel() else self._base.new_zeros(())

    @cached_property
    def largest(self) -> float:
        return float(self.most)

    @cached_property
    def _finite(self) -> Tensor:
        """From what is infinite nothing can be taken: NaN, than which nothing is larger."""
        return self._base.masked_fill(self._base.isinf(), torch.nan)

    def weight_columns(self, node: Node) -> Tensor:
        if self._columns is None:
            self._columns = self._context.weight_columns(node).abs()
        return self._columns

    def emptied(
        self, rule: SpreadRule, node: Node, sparse: Sparse, index: Selection, batch: Batch
    ) -> Tensor | None:
        """``[E, N]`` bool: the rows to compute whole; None where there are none."""
        key = id(sparse)
        if index.shape[1] == 1 and key not in self._of_neurons:
            asked = self._asked[key] = self._asked.get(key, 0) + index.shape[0]
            if 2 * asked >= sparse.of.neurons:
                self._of_neurons[key] = self._by_neuron(rule, node, sparse, batch.n_inputs)
        if index.shape[1] > 1 or key not in self._of_neurons:
            return self._emptied(rule, node, sparse, index, batch)
        of_neurons = self._of_neurons[key]
        return None if of_neurons is None else index.take(of_neurons)

    def _by_neuron(
        self, rule: SpreadRule, node: Node, sparse: Sparse, n_inputs: int
    ) -> Tensor | None:
        """The same for each neuron alone, ``[J, N]``."""
        neurons = torch.arange(sparse.of.neurons, device=self._base.device)[:, None]
        found = []
        for start in range(0, len(neurons), step := max(1, ELEMENTS // self._base.numel())):
            part = neurons[start : start + step]
            index = Selection(part, start)
            of_part = self._emptied(rule, node, sparse, index, Batch(len(part), n_inputs, {}))
            if of_part is None:
                return None
            found.append(of_part)
        emptied = torch.cat(found)
        return emptied if bool(emptied.any()) else None

    def _emptied(
        self, rule: SpreadRule, node: Node, sparse: Sparse, index: Selection, batch: Batch
    ) -> Tensor | None:
        if id(sparse) not in self._sizes:
            self._sizes[id(sparse)] = Sparse(_size(sparse.base), _size(sparse.full), sparse.of)
        left = rule(self, node, self._sizes[id(sparse)], index, batch)
        if left is None:  # the node is run whole anyway
            return None
        emptied = ~(left.mul_(LEFT) >= self._finite).flatten(2).all(-1)
        return emptied.view(batch.n_experiments, batch.n_inputs, -1).any(-1)


def absolute(node: Node) -> Node:
    """A linear node with the absolute values of its weights, where it has any."""
    if node.op != "module":
        return node
    layer = node.target
    weight, bias = layer.weight.detach().abs(), layer.bias
    bias = None if bias is None else bias.detach().abs()
    if isinstance(layer, nn.Linear):
        return replace(node, target=linear_of(weight, bias))
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(layer, name) for name in names}
    return replace(node, target=convolution_of(weight, bias, **options))


def _size(value: Any) -> Any:
    is_number = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return value.abs() if is_number else value
