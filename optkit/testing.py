"""Check passes against small models written as text; for the tests of optkit and of plugins.

check_pass(FuseGelu(), ERF_GELU, ops=["Gelu"], x=X)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from optkit.graph import graphs, text, verify, walk
from optkit.inference import infer
from optkit.passes.base import Context, GraphPass
from optkit.reference import ReferenceSession
from optkit.targets import target


def parse(source: str, **weights: np.ndarray) -> ir.Model:
    """A model from ONNX's text form, with types and shapes inferred.

    Args:
        source: The text.
        weights: Initializers of the main graph that are too large for text, by name.
    """
    proto = onnx.parser.parse_model(source)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    model = ir.from_proto(proto)
    infer(model)
    return model


def random_feeds(model: ir.Model, *, size: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """One value for each input: normal floats, integers from 0 to 2, both truth values.

    Args:
        model: Its inputs are tensors with known types and ranks.
        size: What symbolic axes become.
        seed: Of the random numbers.
    """
    random, feeds = np.random.default_rng(seed), {}
    for value in model.graph.inputs:
        assert value.dtype is not None, f"{value.name} has no type"
        assert value.shape is not None, f"{value.name} has no shape"
        shape = tuple(d if isinstance(d, int) else size for d in value.shape)
        kind = value.dtype.numpy()
        drawn = (
            random.standard_normal(shape) if value.dtype.is_floating_point() else random.integers(0, 3, shape)
        )
        feeds[str(value.name)] = np.asarray(drawn % 2 if kind == np.bool_ else drawn).astype(kind)
    return feeds


def check_pass(
    pass_: GraphPass,
    model: str | ir.Model,
    *,
    ops: Sequence[str] | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    context: Context | None = None,
    **inputs: np.ndarray,
) -> ir.Model:
    """Run ``pass_`` on a copy of ``model`` and check what holds for every pass.

    The graph stays valid; inputs and outputs keep their names, types, shapes and order; a second run changes nothing;
    the pass reports changes if and only if it changed the graph; and ONNX Runtime, with its own rewrites off, computes
    the same numbers before and after.

    Args:
        pass_: The pass with its options.
        model: Text for ``parse``, or a model, which is left as it is.
        ops: The operator types expected after the pass, bodies included, ``Constant`` left out, in the order of the graph.
        atol: Absolute tolerance. The default suits values around 1 that a rewrite rounds a few times: 1e-5 is
            80 steps of float32 at 1.
        rtol: Relative tolerance, added to it; zero both where a pass promises the same bits.
        context: What the pass may know; by default the target ``cpu`` and no data.
        inputs: Values by name. Missing ones are drawn at random; when none is given, with symbolic axes at 3 and then at 5.

    Returns:
        The model after the pass.
    """
    source = parse(model) if isinstance(model, str) else model
    after, context = source.clone(), context or Context(target=target("cpu"))
    interface, before = _interface(source), _content(after)
    changes = pass_.run(after, context)
    verify(after)
    assert _interface(after) == interface, "the pass changed the interface"
    assert bool(changes) == (_content(after) != before), f"reported {len(changes)} changes:\n{text(after)}"
    found = [node.op_type for node in walk(after) if node.op_type != "Constant"]
    if ops is not None:
        assert found == list(ops), f"found {found}, expected {list(ops)}:\n{text(after)}"
    once = _content(after)
    again = pass_.run(after, context)
    assert not again, f"the second run changed the graph again: {list(again)}"
    assert _content(after) == once, "the second run changed the graph and did not say so"
    for size in (3,) if inputs else (3, 5):
        feeds = {**random_feeds(source, size=size), **inputs}
        same_numbers(source, after, feeds, atol=atol, rtol=rtol)
    return after


def same_numbers(
    before: ir.Model,
    after: ir.Model,
    feeds: Mapping[str, np.ndarray],
    *,
    atol: float = 1e-5,
    rtol: float = 1e-5,
) -> None:
    """Assert that ONNX Runtime, with its own rewrites off, computes the same with both models."""
    expected = ReferenceSession(before, optimize=False).run(feeds)
    found = ReferenceSession(after, optimize=False).run(feeds)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, f"{name}: {found[name].dtype}, not {value.dtype}"
        assert found[name].shape == value.shape, f"{name}: {found[name].shape}, not {value.shape}"
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=atol, err_msg=name)


def _interface(model: ir.Model) -> list[tuple[str, str | None, object, str]]:
    return [
        (side, v.name, v.type, str(v.shape))
        for side, values in (("input", model.graph.inputs), ("output", model.graph.outputs))
        for v in values
    ]


def _content(model: ir.Model) -> list[object]:
    """What a pass can change: the text, and what the initializers hold."""
    tensors = [(name, v.const_value) for g in graphs(model) for name, v in g.initializers.items()]
    return [
        text(model),
        list(model.functions),
        *((name, t.dtype, t.shape.numpy(), t.tobytes()) for name, t in tensors if t is not None),
    ]
