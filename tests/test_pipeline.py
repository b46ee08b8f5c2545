from __future__ import annotations

import logging
from typing import ClassVar

import onnx_ir as ir
import pytest

from optkit.backends.onnxruntime import OnnxRuntime
from optkit.errors import (
    BackendUnavailableError,
    DataError,
    LimitMissedError,
    ModelError,
    OptkitError,
    PassError,
    RecipeError,
    UnknownNameError,
    UnsupportedOpError,
    UsageError,
)
from optkit.legalize import legalize
from optkit.passes import PASSES
from optkit.passes.base import Context, GraphPass, Pass
from optkit.pipeline import run_passes
from optkit.rewrite import Change
from optkit.targets import target
from optkit.testing import parse

CONTEXT = Context(target=target("cpu"))
SOURCE = (
    '<ir_version: 10, opset_import: ["" : 21]>\ng (float[2] x) => (float[2] y) { a = Identity(x) y = Exp(a) }'
)


class _Pass(GraphPass):
    name: ClassVar[str] = "test-pass"

    does: str = "nothing"

    def run(self, model, context):
        if self.does == "raise":
            raise KeyError("w")
        if self.does == "refuse":
            raise ModelError("the model is odd", hint="straighten it")
        if self.does == "break":
            model.graph[0].outputs[0].name = "y"
        return [Change(rule="r", node="n")] if self.does == "change" else []


class _TorchPass(Pass):
    name: ClassVar[str] = "torch-pass"
    stage: ClassVar[str] = "torch"


def test_every_pass_is_recorded_in_order_with_its_counts(caplog):
    with caplog.at_level(logging.INFO):
        records, seconds = run_passes(
            parse(SOURCE), [_Pass(does="change"), PASSES["remove-noops"](), _Pass()], CONTEXT
        )
    assert [(r.name, r.nodes_before, r.nodes_after, r.changes) for r in records] == [
        ("test-pass", 2, 2, 1),
        ("remove-noops", 2, 1, 1),
        ("test-pass", 1, 1, 0),
    ]
    assert set(seconds) == {"test-pass", "remove-noops"}
    assert all(s >= 0 for s in seconds.values())
    assert "remove-noops: 1 changes, 2 -> 1 nodes" in caplog.text


def test_a_pass_that_raises_is_named_and_reported_as_its_defect():
    with pytest.raises(PassError, match="test-pass: KeyError: 'w'") as caught:
        run_passes(parse(SOURCE), [_Pass(does="raise")], CONTEXT)
    assert "defect of the pass" in caught.value.hint
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_on_purpose_keeps_its_kind_and_hint_and_gets_the_name():
    with pytest.raises(ModelError, match=r"^test-pass: the model is odd$") as caught:
        run_passes(parse(SOURCE), [_Pass(does="refuse")], CONTEXT)
    assert caught.value.hint == "straighten it"


def test_a_pass_that_breaks_the_graph_is_named():
    with pytest.raises(PassError, match=r"test-pass broke the graph: .*the name 'y' is defined twice"):
        run_passes(parse(SOURCE), [_Pass(does="break")], CONTEXT)


def test_a_pass_over_a_module_cannot_run_on_a_graph():
    with pytest.raises(
        PassError, match="torch-pass works on a PyTorch module, but the model is already a graph"
    ):
        run_passes(parse(SOURCE), [_TorchPass()], CONTEXT)


# Legalization


def test_a_graph_that_the_backend_runs_passes():
    legalize(parse(SOURCE), OnnxRuntime(), target("cpu"), name="m")


def test_every_node_that_the_backend_cannot_run_is_listed_bodies_included():
    model = parse("""
    <ir_version: 10, opset_import: ["" : 21]>
    g (bfloat16[2, 2] x, bool b) => (bfloat16[2, 2] y) {
      a = MatMul(x, x)
      y = If (b) <then_branch = yes () => (bfloat16[2, 2] t) { t = Gemm(a, x) },
                  else_branch = no () => (bfloat16[2, 2] e) { e = Neg(a) }>
    }
    """)
    for node, name in zip(ir.traversal.RecursiveGraphIterator(model.graph), "abcd", strict=True):
        node.name = name
    with pytest.raises(
        UnsupportedOpError, match=r"m on onnxruntime for cpu: 2 unsupported node\(s\):"
    ) as caught:
        legalize(model, OnnxRuntime(), target("cpu"), name="m")
    assert [node for node, _ in caught.value.problems] == ["a (MatMul)", "c (Gemm)"]
    assert all("bfloat16" in reason for _, reason in caught.value.problems)
    assert "\n  a (MatMul): " in str(caught.value)


# Errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (OptkitError, 1), (ModelError, 1), (UnsupportedOpError, 1), (PassError, 1), (UsageError, 2), (RecipeError, 2),
        (DataError, 2), (UnknownNameError, 2), (LimitMissedError, 3), (BackendUnavailableError, 4),
    ],
)  # fmt: skip
def test_every_error_has_its_exit_code(kind, code):
    assert kind.exit_code == code
    assert issubclass(kind, OptkitError)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quantise-static", "did you mean 'quantize-static'?"),
        ("FUSE-GELU", "did you mean 'fuse-gelu'?"),
        ("x", "known: fuse-gelu, quantize-static"),
    ],
)
def test_an_unknown_name_gets_the_nearest_or_all_known_ones(name, hint):
    error = UnknownNameError("pass", name, ["quantize-static", "fuse-gelu"], where="mine.yaml")
    assert str(error) == f"mine.yaml: unknown pass {name!r}"
    assert error.hint == hint
