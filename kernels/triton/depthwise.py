"""Convolution of each channel with its own window, with bias and activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optkit.dims import shape_of
from optkit.graph import attribute, constant, users
from optkit.kernels.base import BYTES, DOMAIN, Argument, Kernel, Problem, Program, format_of, pointer
from optkit.kernels.triton.drawing import draw
from optkit.rewrite import Match, Rule
from optkit.targets.gpu import Capability

# Outputs of a block, and its warps: a window is read from the cache, whose lines neighbours share.
_BLOCK, _WARPS = 512, 4
_LARGEST = 7
# Sizes that ``shapes`` draws with.
_BATCH, _CHANNELS, _WIDTH = 2, 2, 16


class _Depthwise(Kernel):
    kind: ClassVar[str]
    formats: ClassVar[tuple[str, ...]] = ("fp16", "bf16", "fp32")

    def problem(self, node: ir.Node) -> Problem | str:
        x, w, _ = node.inputs
        fmt, shape = format_of(x), shape_of(w)
        if fmt is None or fmt not in self.formats:
            return f"no format of {self.name}"
        if shape is None or len(shape) != 4 or shape[1] != 1 or len(shape_of(x) or ()) != 4:
            return "not images of [batch, channels, height, width] with a window for each channel"
        window = shape[2:]
        if any(not isinstance(d, int) or d > _LARGEST for d in window):
            return f"no window of fixed size up to {_LARGEST} x {_LARGEST}"
        found = {name: _joined(attribute(node, name, ())) for name in ("strides", "pads")}
        return {"format": fmt, "window": _joined(window), **found}

    def program(self, problem: Problem, capability: Capability) -> Program:
        fmt, window, strides, pads = (
            str(problem["format"]),
            *(_split(problem[k]) for k in ("window", "strides", "pads")),
        )
        kinds = (("x", "input:0"), ("w", "input:1"), ("bias", "input:2"), ("y", "output:0"))
        sizes = ("n", "channels", "height", "width", "down", "across")
        return Program(
            function="optkit.kernels.triton.device.depthwise:depthwise",
            arguments=(
                *(Argument(name=n, type=pointer(fmt), binds=b, aligned=True) for n, b in kinds),
                *(Argument(name=n, type="i32", binds=n) for n in sizes),
            ),
            constants={
                "KERNEL_Y": window[0], "KERNEL_X": window[1], "STRIDE_Y": strides[0], "STRIDE_X": strides[1],
                "TOP": pads[0], "LEFT": pads[1], "BLOCK": _BLOCK, "KIND": self.kind,
            },
            grid=(f"cdiv(n, {_BLOCK})", "1", "1"),
            warps=_WARPS, waived={"128-bit loads": "windows start anywhere in a row"},
        )  # fmt: skip

    def expressions(self, problem: Problem) -> dict[str, str]:
        window, strides, pads = (_split(problem[k]) for k in ("window", "strides", "pads"))
        out = [
            f"(axis(0, {2 + i}) + {pads[i] + pads[2 + i] - window[i]}) // {strides[i]} + 1" for i in (0, 1)
        ]
        return {
            "channels": "axis(0, 1)", "height": "axis(0, 2)", "width": "axis(0, 3)", "down": out[0], "across": out[1],
            "n": f"axis(0, 0) * axis(0, 1) * ({out[0]}) * ({out[1]})",
        }  # fmt: skip

    def outputs(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        sizes = self.sizes(problem, shapes)
        return [(*shapes[0][:2], sizes["down"], sizes["across"])]

    def shapes(self, problem: Problem, rows: int) -> list[tuple[int, ...]]:
        window, strides, pads = (_split(problem[k]) for k in ("window", "strides", "pads"))
        # So many rows of outputs.
        height = max(1, (rows - 1) * strides[0] + window[0] - pads[0] - pads[2])
        return [(_BATCH, _CHANNELS, height, _WIDTH), (_CHANNELS, 1, *window), (_CHANNELS,)]

    def edges(self, problem: Problem, capability: Capability) -> tuple[int, ...]:
        across = self.outputs(problem, self.shapes(problem, 1))[0][3]
        rows = -(-_BLOCK // (_BATCH * _CHANNELS * across))
        return tuple(sorted({1, rows - 1, rows, rows + 1}))

    def draw(self, problem: Problem, rows: int, seed: int) -> list[np.ndarray | None]:
        return draw(self.shapes(problem, rows), str(problem["format"]), seed)

    def allowed(self, problem: Problem) -> float:
        # Sums in float32, rounded once; float32 also has the rounding of every product.
        return {"fp16": 0.55, "bf16": 0.55, "fp32": 8.0}[str(problem["format"])]

    def reference(self, problem: Problem, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        x, w, bias = (a.astype(np.float64) for a in inputs if a is not None)
        strides, (top, left, bottom, right) = _split(problem["strides"]), _split(problem["pads"])
        padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        views = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], (2, 3))
        views = views[:, :, :: strides[0], :: strides[1]]
        y = np.einsum("nchwij,cij->nchw", views, w[:, 0]) + bias[:, None, None]
        return [np.maximum(y, 0.0) if self.kind == "relu" else y]

    def work(self, problem: Problem, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        out, window = math.prod(self.outputs(problem, shapes)[0]), math.prod(_split(problem["window"]))
        moved = out + sum(math.prod(s) for s in shapes)
        return 2.0 * out * window, float(moved * BYTES[str(problem["format"])])

    def attributes(self, problem: Problem) -> dict[str, Any]:
        return {
            "group": _CHANNELS,
            "strides": list(_split(problem["strides"])),
            "pads": list(_split(problem["pads"])),
        }

    def rules(self) -> Sequence[Rule]:
        return [
            Rule(_pattern(self.kind, biased), self._rewrite, self._check, name=self.name)
            for biased in (True, False)
        ]

    def _check(self, root: ir.Node, x: ir.Value, w: ir.Value, bias: ir.Value | None = None) -> Match:
        match, conv = Match(), _convolution(root)
        fmt, window, image = format_of(x), shape_of(w), shape_of(x)
        if fmt not in self.formats or w.dtype != x.dtype or constant(w) is None:
            return match.fail("not images and constant windows in float32, float16 or bfloat16", w)
        if window is None or image is None or len(window) != 4 or len(image) != 4:
            return match.fail("not images of [batch, channels, height, width]", x)
        if window[1] != 1 or window[0] != attribute(conv, "group", 1) or image[1] != window[0]:
            return match.fail("not one window for each channel", w)
        if max(int(window[2] or 0), int(window[3] or 0)) > _LARGEST:
            return match.fail(f"windows are larger than {_LARGEST} x {_LARGEST}", w)
        if attribute(conv, "auto_pad", "NOTSET") != "NOTSET" or list(
            attribute(conv, "dilations", (1, 1))
        ) != [1, 1]:  # type: ignore[call-overload]
            return match.fail("pads by itself, or is dilated", conv)
        if bias is not None and (constant(bias) is None or bias.dtype != x.dtype):
            return match.fail("the bias is no constant in the format of the images", bias)
        if self.kind == "none" and any(n.op_type == "Relu" for n in users(root.outputs[0])):
            return match.fail("a Relu follows, which a kernel does too", root)
        return match

    def _rewrite(self, op: Any, root: ir.Node, x: ir.Value, w: ir.Value, bias: ir.Value | None = None) -> Any:
        conv, window = _convolution(root), shape_of(w)
        assert window is not None
        assert x.dtype is not None
        channels = int(window[0] or 0)
        attributes = {
            "group": channels, "strides": list(conv.attributes.get_ints("strides", (1, 1))),
            "pads": list(conv.attributes.get_ints("pads", (0, 0, 0, 0))),
        }  # fmt: skip
        added = np.zeros(channels, x.dtype.numpy()) if bias is None else bias
        (y,) = op.node(self.op, [x, w, added], attributes, domain=DOMAIN)
        y.type, y.shape = x.type, root.outputs[0].shape
        return y


def _convolution(root: ir.Node) -> ir.Node:
    node = root.inputs[0].producer() if root.op_type == "Relu" and root.inputs[0] is not None else root
    assert node is not None
    return node


def _joined(numbers: Any) -> str:
    return " ".join(str(int(n)) for n in numbers)


def _split(text: int | str | bool) -> tuple[int, ...]:
    return tuple(int(n) for n in str(text).split())


def _pattern(kind: str, biased: bool) -> Callable[..., Any]:
    def build(op: Any, *inputs: Any) -> Any:
        y = op.Conv(*inputs)
        return op.Relu(y) if kind == "relu" else y

    return (lambda op, x, w, bias: build(op, x, w, bias)) if biased else lambda op, x, w: build(op, x, w)


_BODY = (
    '<domain: "optkit", opset_import: ["" : %%d]> %s <group, strides, pads> (x, w, bias) => (y) { '
    "%s = Conv <group: int = @group, strides: ints = @strides, pads: ints = @pads> (x, w, bias) %s}"
)
_EXAMPLE: dict[str, int | str | bool] = {
    "format": "fp16",
    "window": "3 3",
    "strides": "1 1",
    "pads": "1 1 1 1",
}
_SMALL: tuple[dict[str, int | str | bool], ...] = (
    _EXAMPLE,
    {"format": "bf16", "window": "5 5", "strides": "2 2", "pads": "1 1 2 2"},
    {"format": "fp32", "window": "1 7", "strides": "1 2", "pads": "0 3 0 3"},
)


class DepthwiseConv(_Depthwise):
    """``y = conv(x, w) + bias`` of ``[batch, channels, height, width]`` with one window of up to 7 x 7 for each channel.

    Howard et al., "MobileNets", 2017, arXiv:1704.04861, eq. 3. Outputs of all channels are walked in the order of memory.
    """

    name, op, kind = "depthwise-conv", "DepthwiseConv", "none"
    size: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv:1704.04861"
    body: ClassVar[str] = _BODY % (op, "y", "")
    examples: ClassVar[tuple[Problem, ...]] = (_EXAMPLE,)
    small: ClassVar[tuple[Problem, ...]] = _SMALL


class DepthwiseConvRelu(_Depthwise):
    """``y = relu(conv(x, w) + bias)``; nothing is rounded on the way.

    As ``depthwise-conv``.
    """

    name, op, kind = "depthwise-conv-relu", "DepthwiseConvRelu", "relu"
    size: ClassVar[int] = 3
    source: ClassVar[str] = "arXiv:1704.04861"
    body: ClassVar[str] = _BODY % (op, "c", "y = Relu (c) ")
    examples: ClassVar[tuple[Problem, ...]] = (_EXAMPLE,)
    small: ClassVar[tuple[Problem, ...]] = _SMALL[:2]
