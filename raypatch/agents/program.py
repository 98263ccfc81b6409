"""A program saved by ``torch.export``, read from its archive as plain data.

``torch.export.load`` unpickles parts of an archive and evaluates texts in it, so it is never
used. What is read here is the JSON graph, whose operations must be ones that only compute,
and the weights' raw bytes. Two layouts of the archive are known: today's (``models/model.json``
and a file a weight) and the one before it (one file of each kind).
"""

from __future__ import annotations

import json
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from raypatch.agents.archives import check_archive, check_torch_file, read_member
from raypatch.agents.operators import checked_attention, only_computes
from raypatch.agents.state_dict import add_tensor, finite, load_tensors
from raypatch.errors import AgentError

# The schema's major version: another one means that something has changed its meaning.
SCHEMA_VERSION = 8
# Numbers of the schema's enumerations.
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
MEMORY_FORMATS = {
    1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d,
    4: torch.preserve_format,
}  # fmt: skip
STRIDED = 7
KEYWORD = 2
# Names of tensors become names of modules and attributes.
NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
ON_NUMBERS = {
    **{f"_operator.{name}": getattr(operator, name) for name in (
        "add", "and_", "eq", "floordiv", "ge", "gt", "le", "lt", "mod", "mul", "ne", "neg", "or_",
        "pos", "pow", "sub", "truediv",
    )},
    **{f"torch.{name}": getattr(torch, name) for name in (
        "sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not",
    )},
    "math.trunc": math.trunc,
}  # fmt: skip
DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError)


class Program(nn.Module):
    """A graph run operation by operation. An ``fx.GraphModule`` would write it out as Python
    source and execute that, with a stranger's words in it."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self._graph = graph

    def forward(self, observations: torch.Tensor) -> Any:
        return fx.Interpreter(self, graph=self._graph).run(observations)


def read_program(file: Path) -> tuple[Program, tuple[int, ...]]:
    """The program, and the shape of one observation.

    Raises AgentError for an archive that is damaged, takes anything but one batch of
    observations, or does more than compute.
    """
    members = {name: read_member(file, name) for name in check_archive(file, str(file))}
    try:
        model = json.loads(_only(members, "models/model.json", "serialized_exported_program.json"))
        if model["schema_version"]["major"] != SCHEMA_VERSION:
            version = model.get("torch_version", "another version")
            raise AgentError(f"{file}: saved by torch {version}, whose format is not known here")
        tensors = _Tensors(members, file)
        return _Builder(model["graph_module"], tensors, file).build()
    except DAMAGE as error:
        raise AgentError(
            f"{file}: not a readable exported program ({type(error).__name__}: {error})"
        ) from None
    except RecursionError:
        raise AgentError(f"{file}: not a readable exported program (nested too deep)") from None


def _only(members: Mapping[str, bytes], *endings: str) -> bytes:
    found = [name for name in members if name.endswith(endings)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} members named {' or '.join(endings)}")
    return members[found[0]]


class _Tensors:
    """Parameters, buffers and constants of either layout, by name."""

    def __init__(self, members: Mapping[str, bytes], file: Path) -> None:
        self._members = members
        self._file = file
        self._held: dict[str, torch.Tensor] = {}
        for kind in ("weights", "constants"):
            ending = f"data/{kind}/model_{kind}_config.json"
            for name in [n for n in members if n.endswith(ending)]:
                for path, entry in json.loads(members[name])["config"].items():
                    self._held[path] = self._payload(name.rpartition("/")[0], entry)
        for ending in ("serialized_state_dict.pt", "serialized_constants.pt"):
            for name in [n for n in members if n.endswith(ending)]:
                self._held |= self._torch_file(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._held[name]

    def _payload(self, folder: str, entry: Mapping[str, Any]) -> torch.Tensor:
        name = f"{folder}/{entry['path_name']}"
        if entry["use_pickle"]:
            raise ValueError(f"{name} is a pickle")
        meta = entry["tensor_meta"]
        held = torch.frombuffer(bytearray(self._members[name]), dtype=DTYPES[meta["dtype"]])
        sizes, strides = ([_integer(n) for n in meta[key]] for key in ("sizes", "strides"))
        if math.prod(sizes) > held.numel():
            raise ValueError(f"{name} claims shape {sizes} but holds {held.numel()} numbers")
        return held.as_strided(sizes, strides, _integer(meta["storage_offset"]))

    def _torch_file(self, name: str) -> dict[str, torch.Tensor]:
        content, origin = self._members[name], f"{self._file}: {name}"
        check_torch_file(content, origin)
        return load_tensors(BytesIO(content), origin)


def _integer(value: Mapping[str, Any]) -> int:
    return int(value["as_int"])


def _keywords(target: Any) -> set[str]:
    if target is checked_attention:
        target = torch.ops.aten.scaled_dot_product_attention.default
    schema = getattr(target, "_schema", None)
    return {argument.name for argument in schema.arguments} if schema else set()


class _Builder:
    """Writes the graph, operation by operation."""

    def __init__(self, content: Mapping[str, Any], tensors: _Tensors, file: Path) -> None:
        self._graph_data = content["graph"]
        self._signature = content["signature"]
        self._tensors = tensors
        self._file = file
        self._graph = fx.Graph()
        self._program = Program(self._graph)
        self._values: dict[str, Any] = {}

    def build(self) -> tuple[Program, tuple[int, ...]]:
        shapes = [
            self._input(number, *next(iter(spec.items())))
            for number, spec in enumerate(self._signature["input_specs"])
        ]
        observations = [shape for shape in shapes if shape is not None]
        if len(observations) != 1:
            raise AgentError(
                f"{self._file}: takes {len(observations)} inputs; an agent takes one tensor of "
                "observations"
            )
        for node in self._graph_data["nodes"]:
            self._operation(node)
        outputs = [
            spec["user_output"]["arg"]
            for spec in self._signature["output_specs"]
            if "user_output" in spec
        ]
        self._graph.output(self._argument(outputs[0]))
        return self._program, observations[0]

    def _input(self, number: int, kind: str, spec: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Provide an input's value; the shape of an observation where it is the user's."""
        if kind == "user_input":
            name = spec["arg"]["as_tensor"]["name"]
            batch, *shape = self._graph_data["tensor_values"][name]["sizes"]
            if "as_expr" not in batch:
                raise AgentError(
                    f"{self._file}: takes exactly {_integer(batch)} observations at a time; "
                    "export it with a free batch dimension: "
                    "dynamic_shapes=({0: torch.export.Dim.AUTO},)"
                )
            self._values[name] = self._graph.placeholder(f"input_{number}")
            return tuple(map(_integer, shape))
        named = {
            "parameter": "parameter_name", "buffer": "buffer_name",
            "tensor_constant": "tensor_constant_name",
        }  # fmt: skip
        if kind not in named:
            raise AgentError(f"{self._file}: has an input of kind {kind}; not known here")
        path = spec[named[kind]]
        if not NAME.fullmatch(path) or any(map(keyword.iskeyword, path.split("."))):
            raise AgentError(f"{self._file}: {path[:100]!r} is no name of a tensor; refused")
        tensor = self._tensors[path]
        if kind == "parameter":
            finite(tensor, f"{self._file}: {path}")
        add_tensor(self._program, path, tensor)
        self._values[spec["arg"]["name"]] = self._graph.get_attr(path)
        return None

    def _operation(self, node: Mapping[str, Any]) -> None:
        target = self._target(node["target"])
        inputs, outputs = node["inputs"], node["outputs"]
        known = _keywords(target)
        unknown = {one["name"] for one in inputs if one["kind"] == KEYWORD} - known
        if unknown:
            raise ValueError(f"{node['target']} takes no {str(unknown.pop())[:100]!r}")
        args = [self._argument(one["arg"]) for one in inputs if one["kind"] != KEYWORD]
        kwargs = {
            one["name"]: self._argument(one["arg"]) for one in inputs if one["kind"] == KEYWORD
        }
        result = self._graph.call_function(target, tuple(args), kwargs)
        for place, output in enumerate(outputs):
            one = len(outputs) == 1
            self._provide(output, result if one else self._item(result, place))

    def _provide(self, output: Mapping[str, Any], result: fx.Node) -> None:
        kind, content = next(iter(output.items()))
        if kind == "as_tensors":
            for place, part in enumerate(content):
                self._values[part["name"]] = self._item(result, place)
        elif kind == "as_tensor":
            self._values[content["name"]] = result
        elif kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            self._values[content["as_name"]] = result
        elif kind != "as_none":
            raise ValueError(f"an operation gives {kind}")

    def _item(self, result: fx.Node, place: int) -> fx.Node:
        return self._graph.call_function(operator.getitem, (result, place))

    def _target(self, target: str) -> Callable[..., Any]:
        """An operation by name; raises AgentError for one that could do more than compute."""
        match target.split("."):
            case ["torch", "ops", "aten", "scaled_dot_product_attention", "default"]:
                return checked_attention
            case ["torch", "ops", "aten", name, overload]:
                found = getattr(getattr(torch.ops.aten, name), overload)
                if isinstance(found, torch._ops.OpOverload) and only_computes(name):
                    return found
        if target in ON_NUMBERS:
            return ON_NUMBERS[target]
        raise AgentError(
            f"{self._file}: uses {target[:100]!r}, which is not among the operations that are "
            "known to only compute (raypatch/agents/operators.py); give the module by "
            "--agent_factory"
        )

    def _argument(self, argument: Mapping[str, Any]) -> Any:
        kind, content = next(iter(argument.items()))
        match kind:
            case "as_none":
                return None
            case "as_tensor":
                return self._values[content["name"]]
            case "as_tensors":
                return [self._values[part["name"]] for part in content]
            case "as_optional_tensors":
                return [self._argument(part) for part in content]
            case "as_sym_int" | "as_sym_float" | "as_sym_bool":
                return self._number(content)
            case "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
                return [self._number(part) for part in content]
            case "as_int" | "as_bool" | "as_string":
                return {"as_int": int, "as_bool": bool, "as_string": str}[kind](content)
            case "as_float":
                return float(content)
            case "as_ints" | "as_bools":
                return list(content)
            case "as_floats":
                return [float(number) for number in content]
            case "as_scalar_type":
                return DTYPES[content]
            case "as_memory_format":
                return MEMORY_FORMATS[content]
            case "as_layout" if content == STRIDED:
                return torch.strided
            case "as_device":
                return torch.device("cpu")
        raise ValueError(f"an operation takes {kind}")

    def _number(self, content: Mapping[str, Any]) -> Any:
        kind, value = next(iter(content.items()))
        return self._values[value] if kind == "as_name" else value
