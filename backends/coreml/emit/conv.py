"""Convolutions and pooling windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optkit.backends.coreml.emit.base import Context, emits, like, refused, through_floats
from optkit.backends.coreml.emit.quant import stored_constant, weight
from optkit.backends.coreml.quiet import mb
from optkit.graph import constant, ints, rank

_SAME = {"VALID": "valid", "SAME_UPPER": "same", "SAME_LOWER": "same_lower"}


def _pads(node: ir.Node, axes: int) -> dict[str, Any]:
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic != "NOTSET":
        return {"pad_type": _SAME[automatic]}
    pads = ints(node, "pads", [0] * 2 * axes)
    if not any(pads):
        return {"pad_type": "valid"}
    return {"pad_type": "custom", "pad": [p for i in range(axes) for p in (pads[i], pads[i + axes])]}


def _refuse_rank(node: ir.Node) -> str | None:
    axes = (rank(node.inputs[0]) or 3) - 2
    if not 1 <= axes <= 3:
        return f"Core ML convolves over one to three axes, not {axes}"
    pads = ints(node, "pads", [0])
    return "Core ML has no negative pads of a convolution" if min(pads) < 0 else None


@emits("Conv", refuse=_refuse_rank)
def _conv(c: Context, node: ir.Node) -> Any:
    x, w = c.input(node, 0), weight(c, node, 1)
    axes = x.rank - 2
    settings = {
        "x": x, "weight": w, "strides": ints(node, "strides", [1] * axes), "dilations": ints(node, "dilations", [1] * axes),
        "groups": node.attributes.get_int("group", 1), **_pads(node, axes),
    }  # fmt: skip
    bias = c.input(node, 2)
    if bias is not None and bias.val is None:
        out = mb.conv(**settings)
        return mb.add(x=out, y=c.reshape(bias, [1, -1, *[1] * axes]))
    return mb.conv(**settings) if bias is None else mb.conv(bias=bias, **settings)


def _refuse_transpose(node: ir.Node) -> str | None:
    if not 1 <= (axes := (rank(node.inputs[0]) or 3) - 2) <= 3:
        return f"Core ML convolves over one to three axes, not {axes}"
    if "output_shape" in node.attributes:
        return "output_shape of a transposed convolution: pads are needed instead"
    w = node.inputs[1]
    producer = w.producer() if w is not None else None
    if constant(w) is None and (producer is None or not stored_constant(producer)):
        return "Core ML needs the weights of a transposed convolution to be constant"
    return None


@emits("ConvTranspose", refuse=_refuse_transpose)
def _conv_transpose(c: Context, node: ir.Node) -> Any:
    x, w = c.input(node, 0), weight(c, node, 1)
    axes = x.rank - 2
    strides = ints(node, "strides", [1] * axes)
    dilations = ints(node, "dilations", [1] * axes)
    more = ints(node, "output_padding", [0] * axes)
    pads = ints(node, "pads", [0] * 2 * axes)
    kernel = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic == "VALID":
        pads = [0] * 2 * axes
    elif automatic != "NOTSET":
        total = [k - s + o for k, s, o in zip(kernel, strides, more, strict=True)]
        if min(total) < 0:
            raise refused(node, "auto_pad asks for negative pads")
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = [*small, *large] if automatic == "SAME_UPPER" else [*large, *small]
    # Output padding is what the pads at the end cut off less; beyond, nothing but the bias is there.
    ends = [pads[i + axes] - more[i] for i in range(axes)]
    beyond = [max(0, -e) for e in ends]
    settings = {
        "x": x, "weight": w, "strides": strides, "dilations": dilations, "groups": node.attributes.get_int("group", 1), "pad_type": "custom",
        "pad": [p for i in range(axes) for p in (pads[i], max(0, ends[i]))],
    }  # fmt: skip
    bias = c.input(node, 2)
    if bias is not None and not any(beyond):
        return mb.conv_transpose(bias=bias, **settings)
    out = mb.conv_transpose(**settings)
    if any(beyond):
        amounts = [0, 0, 0, 0, *(p for b in beyond for p in (0, b))]
        out = mb.pad(x=out, pad=amounts, mode="constant", constant_val=like(out, 0))
    return out if bias is None else mb.add(x=out, y=c.reshape(bias, [1, -1, *[1] * axes]))


def _refuse_pool(node: ir.Node) -> str | None:
    kernel = ints(node, "kernel_shape")
    if len(kernel) > 3:
        return f"Core ML pools over one to three axes, not {len(kernel)}"
    if any(d != 1 for d in ints(node, "dilations", [1])):
        return "Core ML has no dilated pooling"
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return "Core ML's pooling gives no indices"
    if node.attributes.get_int("storage_order", 0):
        return "storage_order 1"
    return None


@emits("MaxPool", "AveragePool", refuse=_refuse_pool)
def _pool(c: Context, node: ir.Node) -> Any:
    x, kernel = c.input(node, 0), ints(node, "kernel_shape")
    axes = len(kernel)
    settings = {
        "x": x, "kernel_sizes": kernel, "strides": ints(node, "strides", [1] * axes), "ceil_mode": False, **_pads(node, axes),
    }  # fmt: skip
    counted = node.op_type == "AveragePool" and bool(node.attributes.get_int("count_include_pad", 0))
    if node.attributes.get_int("ceil_mode", 0) and settings["pad_type"] in ("valid", "custom"):
        # Spelled out as pads at the end, of which an average counts none: those that it counts become part of the input.
        pads = ints(node, "pads", [0] * 2 * axes)
        more = _ceiling(node, x, kernel, pads)
        if counted and any(pads):
            amounts = [0, 0, 0, 0, *(p for i in range(axes) for p in (pads[i], pads[i + axes]))]
            settings["x"] = x = mb.pad(x=x, pad=amounts, mode="constant", constant_val=like(x, 0))
            pads = [0] * 2 * axes
        counted = False
        pad = [p for i in range(axes) for p in (pads[i], pads[i + axes] + more[i])]
        settings |= {"pad_type": "custom", "pad": pad}
    if node.op_type == "MaxPool":
        out = through_floats(settings.pop("x"), lambda v: mb.max_pool(x=v, **settings))
    else:
        out = mb.avg_pool(exclude_padding_from_average=not counted, **settings)
    return [out, None] if len(node.outputs) > 1 else out


def _ceiling(node: ir.Node, x: Any, kernel: list[int], pads: list[int]) -> list[int]:
    """What ceil_mode adds to the pads at the end of each axis."""
    axes = len(kernel)
    strides = ints(node, "strides", [1] * axes)
    found = []
    for i, k in enumerate(kernel):
        size = x.shape[i + 2]
        if not isinstance(size, int | np.integer):
            raise refused(node, "ceil_mode over an axis of free size")
        left = int(size) + pads[i] + pads[i + axes] - k
        steps = -(-left // strides[i])
        # A window that would start in the pads at the end is left out.
        if steps * strides[i] >= int(size) + pads[i]:
            steps -= 1
        found.append(max(0, steps * strides[i] - left))
    return found


@emits("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(c: Context, node: ir.Node) -> Any:
    x = c.input(node, 0)
    reduce = mb.reduce_mean if node.op_type == "GlobalAveragePool" else mb.reduce_max
    return reduce(x=x, axes=list(range(2, x.rank)), keep_dims=True)
