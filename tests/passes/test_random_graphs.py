"""Random graphs through the whole clean-up: every pass keeps the numbers, the interface, and finds nothing twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from optkit.graph import verify
from optkit.passes.base import Context
from optkit.recipe import Recipe
from optkit.reference import ReferenceSession
from optkit.targets import target

Shape = tuple[int | str, ...]


class RandomGraph:
    """Grows a graph a step at a time and knows the shape of every value; ``N`` is the one symbolic axis."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        shapes: dict[str, Shape] = {"x": ("N", 4, 6), "u": ("N", 2, 4, 4)}
        kind = ir.TensorType(ir.DataType.FLOAT)
        self.inputs = [ir.Value(name=n, type=kind, shape=ir.Shape(s)) for n, s in shapes.items()]
        self.values = list(zip(self.inputs, shapes.values(), strict=True))
        self.steps = [
            self.unary, self.affine, self.affine, self.affine, self.binary, self.transpose, self.transpose, self.reshape,
            self.reshape, self.unsqueeze, self.squeeze, self.slice, self.concat, self.matmul, self.convolution,
            self.batch_norm, self.expand, self.casts, self.centre, self.hard_swish,
        ]  # fmt: skip

    def node(self, op: str, inputs: Sequence[ir.Value], **attributes: object) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: object, dtype: type = np.float32) -> ir.Value:
        """An initializer or a Constant node."""
        tensor = ir.tensor(np.asarray(array, dtype), name=f"c{len(self.initializers)}")
        if self.random.random() < 0.5:
            return self.node("Constant", [], value=tensor)
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.initializers.append(value)
        return value

    def integers(self, *numbers: int) -> ir.Value:
        return self.constant(numbers, np.int64)

    def floats(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape) * 0.5

    def keep(self, value: ir.Value, shape: Shape) -> None:
        if len(shape) <= 5:
            self.values.append((value, shape))

    def sizes(self, wanted: Shape, value: ir.Value, shape: Shape) -> ir.Value:
        """A vector of sizes as exporters compute it."""
        whole, parts = self.node("Shape", [value]), []
        for dim in wanted:
            if dim != "N":
                parts.append(self.integers(int(dim)))
            elif self.random.random() < 0.5:
                one = self.node("Gather", [whole, self.constant(shape.index("N"), np.int64)], axis=0)
                parts.append(self.node("Unsqueeze", [one, self.integers(0)]))
            else:
                at = shape.index("N")
                parts.append(self.node("Slice", [whole, self.integers(at), self.integers(at + 1)]))
        return self.node("Concat", parts, axis=0)

    def unary(self, value: ir.Value, shape: Shape) -> None:
        op = str(self.random.choice(["Relu", "Neg", "Sigmoid", "Abs", "Identity", "Floor", "Clip"]))
        low, high = self.random.choice([-np.inf, -1, 0]), self.random.choice([np.inf, 1, 6])
        limits = [self.constant(low), self.constant(high)] if op == "Clip" else []
        self.keep(self.node(op, [value, *limits]), shape)

    def affine(self, value: ir.Value, shape: Shape) -> None:
        numbers = [
            self.random.choice([0.0, 1.0, 0.5, 3.0, -1.0]),
            self.floats(*(int(d) if d != "N" and self.random.random() < 0.5 else 1 for d in shape)),
            self.floats(shape[-1]) if shape and shape[-1] != "N" else 1.0,
        ]
        number = np.asarray(numbers[self.random.integers(3)])
        op = str(self.random.choice(["Add", "Sub", "Mul", "Div"]))
        if op == "Div":
            number = np.where(np.abs(number) < 0.1, 0.5, number)
        operands = [value, self.constant(number)]
        self.keep(
            self.node(op, operands if op == "Div" or self.random.random() < 0.5 else operands[::-1]), shape
        )

    def binary(self, value: ir.Value, shape: Shape) -> None:
        like = [v for v, s in self.values if s == shape]
        op = str(self.random.choice(["Add", "Mul", "Sub", "Max"]))
        self.keep(self.node(op, [value, like[self.random.integers(len(like))]]), shape)

    def transpose(self, value: ir.Value, shape: Shape) -> None:
        order = [int(i) for i in self.random.permutation(len(shape))]
        self.keep(self.node("Transpose", [value], perm=order), tuple(shape[i] for i in order))

    def reshape(self, value: ir.Value, shape: Shape) -> None:
        rest = int(np.prod([d for d in shape if d != "N"]))
        shapes: list[Shape] = [("N", rest), ("N", 1, rest)]
        if rest % 2 == 0:
            shapes += [("N", rest // 2, 2), ("N", 2, rest // 2)]
        wanted = shapes[self.random.integers(len(shapes))]
        fixed = self.integers(*(-1 if d == "N" else int(d) for d in wanted))
        size = fixed if self.random.random() < 0.3 else self.sizes(wanted, value, shape)
        self.keep(self.node("Reshape", [value, size]), wanted)

    def unsqueeze(self, value: ir.Value, shape: Shape) -> None:
        at = int(self.random.integers(len(shape) + 1))
        self.keep(self.node("Unsqueeze", [value, self.integers(at)]), (*shape[:at], 1, *shape[at:]))

    def squeeze(self, value: ir.Value, shape: Shape) -> None:
        if 1 in shape:
            at = shape.index(1)
            self.keep(self.node("Squeeze", [value, self.integers(at)]), shape[:at] + shape[at + 1 :])

    def slice(self, value: ir.Value, shape: Shape) -> None:
        at = int(self.random.integers(len(shape)))
        size = shape[at]
        if size == "N":
            return
        start = int(self.random.integers(int(size)))
        bounds = [self.integers(start), self.integers((1 << 63) - 1), self.integers(at)]
        self.keep(self.node("Slice", [value, *bounds]), (*shape[:at], int(size) - start, *shape[at + 1 :]))

    def concat(self, value: ir.Value, shape: Shape) -> None:
        at = int(self.random.integers(len(shape)))
        if shape[at] != "N" and int(shape[at]) < 9:
            self.keep(
                self.node("Concat", [value, value], axis=at),
                (*shape[:at], 2 * int(shape[at]), *shape[at + 1 :]),
            )

    def matmul(self, value: ir.Value, shape: Shape) -> None:
        if len(shape) > 1 and shape[-1] != "N":
            self.keep(
                self.node("MatMul", [value, self.constant(self.floats(int(shape[-1]), 5))]), (*shape[:-1], 5)
            )

    def convolution(self, value: ir.Value, shape: Shape) -> None:
        if len(shape) != 4 or shape[0] != "N" or min(shape[2], shape[3]) < 2 or max(shape[2], shape[3]) > 8:
            return
        inputs = int(shape[1])
        group = int(self.random.choice([g for g in (1, 2, inputs) if inputs % g == 0]))
        outputs, pad = group * int(self.random.integers(1, 3)), int(self.random.integers(2))
        image = [int(d) + 2 * pad - 1 for d in shape[2:]]
        if self.random.random() < 0.3:
            weight = self.constant(self.floats(inputs, outputs // group, 2, 2))
            image = [int(d) + 1 for d in shape[2:]]
            self.keep(self.node("ConvTranspose", [value, weight], group=group), ("N", outputs, *image))
            return
        operands = [value, self.constant(self.floats(outputs, inputs // group, 2, 2))]
        if self.random.random() < 0.5:
            operands.append(self.constant(self.floats(outputs)))
        self.keep(self.node("Conv", operands, group=group, pads=[pad] * 4), ("N", outputs, *image))

    def batch_norm(self, value: ir.Value, shape: Shape) -> None:
        if len(shape) > 1 and shape[0] == "N":
            count = int(shape[1])
            statistics = [
                self.floats(count),
                self.floats(count),
                self.floats(count),
                self.floats(count) ** 2 + 0.3,
            ]
            self.keep(self.node("BatchNormalization", [value, *map(self.constant, statistics)]), shape)

    def expand(self, value: ir.Value, shape: Shape) -> None:
        small = self.constant(
            self.floats(*(1 if d == "N" or self.random.random() < 0.5 else int(d) for d in shape))
        )
        wide = self.node("Expand", [small, self.sizes(shape, value, shape)])
        self.keep(self.node("Add", [value, wide]), shape)

    def casts(self, value: ir.Value, shape: Shape) -> None:
        self.keep(self.node("Cast", [self.node("Cast", [value], to=11)], to=1), shape)

    def centre(self, value: ir.Value, shape: Shape) -> None:
        mean = self.node(
            "ReduceMean", [value, self.integers(int(self.random.integers(len(shape))))], keepdims=1
        )
        self.keep(self.node("Sub", [value, mean]), shape)

    def hard_swish(self, value: ir.Value, shape: Shape) -> None:
        moved = self.node("Add", [value, self.constant(3)])
        clipped = self.node("Clip", [moved, self.constant(0), self.constant(6)])
        self.keep(self.node("Div", [self.node("Mul", [value, clipped]), self.constant(6)]), shape)

    def model(self, steps: int) -> ir.Model:
        for _ in range(steps):
            value, shape = self.values[self.random.integers(max(0, len(self.values) - 6), len(self.values))]
            if "N" in shape:
                self.steps[self.random.integers(len(self.steps))](value, shape)
        made = self.values[2:]
        outputs = dict([made[-1], *(made[i] for i in self.random.integers(0, len(made), size=2))])
        for value, shape in outputs.items():
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        graph = ir.Graph(
            self.inputs,
            list(outputs),
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": 21},
            name="g",
        )
        return ir.from_proto(ir.to_proto(ir.Model(graph, ir_version=10)))


def interface(model: ir.Model) -> list[tuple[object, ...]]:
    return [(v.name, v.type, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


@pytest.mark.parametrize("seed", range(24))
def test_every_pass_keeps_what_a_random_graph_computes(seed):
    model, random = RandomGraph(seed).model(40), np.random.default_rng(seed)
    # One is the size that broadcasting can be fooled with.
    feeds = [
        {v.name: random.standard_normal([n, *v.shape[1:]]).astype(np.float32) for v in model.graph.inputs}
        for n in (1, 4)
    ]
    before, declared = ReferenceSession(model, optimize=False), interface(model)
    expected, context = [before.run(f) for f in feeds], Context(target=target("cpu"))
    for pass_ in Recipe.load("cleanup").passes:
        changes = pass_.run(model, context)
        verify(model)
        assert interface(model) == declared
        assert not pass_.run(model, context), f"{pass_.name} found more in a second run"
        if not changes:
            continue
        after = ReferenceSession(model, optimize=False)
        for feed, results in zip(feeds, expected, strict=True):
            for name, found in after.run(feed).items():
                assert found.shape == results[name].shape, f"{pass_.name}: {name}"
                # Up to forty steps round and amplify each other's rounding; a wrong rewrite is off by far more.
                size = max(1.0, float(np.abs(results[name]).max(initial=0)))
                np.testing.assert_allclose(
                    found, results[name], atol=2e-4 * size, rtol=2e-3, err_msg=f"{pass_.name}: {name}"
                )
