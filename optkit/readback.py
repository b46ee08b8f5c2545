"""What a built artifact holds, read back from its graph and from what ran."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from optkit.candidate import Built
from optkit.graph import graphs, rank, walk
from optkit.kernels.base import DOMAIN
from optkit.microscaling import format_of, is_call, numbers_of
from optkit.recipe import condition
from optkit.report import Achieved, SaturationRecord
from optkit.saturation import narrowed, products
from optkit.targets import Target

if TYPE_CHECKING:
    from optkit.backends.base import Backend, Executed
    from optkit.placement import Library

# What kernels read in place of floats.
_NARROW = frozenset(ir.DataType[n] for n in ("INT8", "UINT8", "INT4", "UINT4", "FLOAT8E4M3FN"))


def scheme(model: ir.Model) -> str:
    """Signedness, granularity and zero point of the quantized tensors, read from the graph."""
    kinds = {kind for node in walk(model) for kind in _kinds(node)}
    return "; ".join(sorted(kinds, reverse=True)) or "no integers: float throughout"


def _kinds(node: ir.Node) -> Iterator[str]:
    """What ``node`` says of the quantized tensors that it reads."""
    first, second = (*node.inputs, None, None)[:2]
    if node.op_type == "DequantizeLinear" and first is not None and second is not None:
        yield from _dequantized(node, first, second)
    elif node.op_type == "Gather" and first is not None and first.is_initializer():
        if first.dtype == ir.DataType.INT8:
            yield "embeddings int8 per row, symmetric"
        elif rank(first) == 1 and second is not None and second.is_initializer():
            yield "weights in palettes"
    elif node.op_type == "MatMulInteger":
        yield "weights int8 per channel, symmetric"
        yield "activations uint8 per tensor, asymmetric, computed in each run"
    elif (blocks := format_of(node)) is not None:
        role = _role(first)
        how = "" if role == "weights" else ", scales computed in each run"
        yield f"{role} {blocks.name} per block of {blocks.size}, symmetric{how}"
    elif node.domain == DOMAIN and not is_call(node):
        for value in node.inputs:
            # A single number is the zero point of a grid.
            if value is not None and value.dtype in _NARROW and rank(value) != 0:
                yield f"{_role(value)} {value.dtype.name.lower()} in {node.op_type}"


def _dequantized(node: ir.Node, x: ir.Value, scale: ir.Value) -> Iterator[str]:
    stored = x.dtype.name.lower() if x.dtype else "?"
    # Biases are sums of products: they have no format of their own.
    if stored == "int32":
        return
    grain = "per channel" if rank(scale) else "per tensor"
    if "block_size" in node.attributes:
        grain = f"per block of {node.attributes.get_int('block_size')}"
    symmetry = "symmetric" if stored.startswith(("int", "float")) else "asymmetric"
    yield f"{_role(x)} {stored} {grain}, {symmetry}"


def _role(value: ir.Value | None) -> str:
    return "weights" if value is not None and value.is_initializer() else "activations"


def weight_bytes_by_type(model: ir.Model) -> dict[str, int]:
    """Bytes of weights by stored type."""
    found: dict[str, int] = {}
    for graph in graphs(model):
        for value in graph.initializers.values():
            if (tensor := value.const_value) is not None:
                # Numbers of 4 bits are held in 8 where ONNX has to run them.
                own = numbers_of(value)
                size = tensor.nbytes if own is None else math.ceil(tensor.size * own.itemsize)
                kind = (own or tensor.dtype).name.lower()
                found[kind] = found.get(kind, 0) + size
    return found


def saturation(model: ir.Model, target: Target, engine: Backend) -> SaturationRecord | None:
    """Which products of a finished graph can saturate in kernels of ``engine`` on ``target``; None where none ever does."""
    if not target.saturates:
        return None
    # All placements of a backend are for the same kernels.
    library: Library = next((p.library for p in engine.placements.values()), "mlas")
    found = list(products(model, library))
    return SaturationRecord(
        layers=len(found), at_risk=tuple(str(p.node.name) for p in found if p.at_risk.any()),
        narrowed={str(p.node.name): told for p in found if (told := narrowed(p.node)) is not None},
    )  # fmt: skip


def achieved(executed: Sequence[Executed], built: Built) -> Achieved:
    """Summarize what ran or, for a target that is not at hand, what was built."""
    total = sum(e.macs for e in executed)
    formats: dict[str, float] = {}
    for e in executed:
        if e.macs:
            formats[e.format] = formats.get(e.format, 0.0) + e.macs / total
    places: dict[str, int] = {}
    operators: dict[str, int] = {}
    for e in executed:
        places[e.where] = places.get(e.where, 0) + 1
        operators[e.op] = operators.get(e.op, 0) + 1
    return Achieved(
        formats={k: round(v, 4) for k, v in sorted(formats.items())}, placement={k: round(v / len(executed), 4) for k, v in sorted(places.items())},
        operators=dict(sorted(operators.items(), key=lambda kv: (-kv[1], kv[0]))), weights=dict(sorted(built.weights.items())), scheme=built.scheme,
    )  # fmt: skip


_HOLDS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}


def unmet(require: Mapping[str, str], facts: Achieved) -> list[str]:
    """Which requirements the built artifact does not show."""
    found = facts.model_dump()
    reasons = []
    for key, text in require.items():
        group, _, name = key.partition(".")
        comparison, wanted = condition(text)
        value = float(found[group].get(name, 0))
        if not _HOLDS[comparison](value, wanted):
            reasons.append(f"require {key} {text}: the artifact shows {value:g}")
    return reasons
