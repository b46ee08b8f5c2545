from __future__ import annotations

import numpy as np
import pytest

from optkit.graph import text, verify, walk
from optkit.rewrite import Match, Names, Rule, apply, explain, replaceable, substitute
from optkit.testing import parse, same_numbers

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def rule(pattern, rewrite=lambda op, x, **_: op.Exp(x), check=None):
    return Rule(pattern, rewrite, check, name="rule")


def ops(model) -> list[str]:
    return [node.op_type for node in walk(model)]


def run(
    body: str, pattern, check=None, rewrite=lambda op, x, **_: op.Exp(x), weights: str = "float half = {0.5}"
) -> list[str]:
    model = parse(f"{HEADER} g (float[N] x, float[N] u) => (float[N] y) <{weights}> {{ {body} }}")
    changes = apply([rule(pattern, rewrite, check)], model)
    verify(model)
    assert bool(changes) == ("Exp" in ops(model))
    return ops(model)


def test_a_chain_is_replaced_and_its_nodes_go():
    assert run("a = Neg(x) b = Abs(a) y = Relu(b)", lambda op, x: op.Relu(op.Abs(x))) == ["Neg", "Exp"]


def test_a_variable_used_twice_asks_for_the_same_value():
    pattern = lambda op, x: op.Add(x, op.Neg(x))  # noqa: E731
    assert run("a = Neg(x) y = Add(x, a)", pattern) == ["Exp"]
    assert run("a = Neg(u) y = Add(x, a)", pattern) == ["Neg", "Add"]


@pytest.mark.parametrize("body", ["a = Neg(u) y = Add(x, a)", "a = Neg(u) y = Add(a, x)"])
def test_operands_of_commutative_operators_match_in_either_order(body):
    assert run(body, lambda op, x, u: op.Add(x, op.Neg(u))) == ["Exp"]


def test_operands_of_others_keep_their_order():
    pattern = lambda op, x, u: op.Sub(x, op.Neg(u))  # noqa: E731
    assert run("a = Neg(u) y = Sub(x, a)", pattern) == ["Exp"]
    assert run("a = Neg(u) y = Sub(a, x)", pattern) == ["Neg", "Sub"]


@pytest.mark.parametrize(
    ("number", "matches"), [("0.5", True), ("0.500001", True), ("0.51", False), ("-0.5", False)]
)
def test_a_number_asks_for_a_constant_scalar(number, matches):
    found = run("y = Mul(x, c)", lambda op, x: op.Mul(x, 0.5), weights=f"float[1] c = {{{number}}}")
    assert found == (["Exp"] if matches else ["Mul"])


def test_a_number_does_not_match_a_vector_or_an_input():
    assert run("y = Mul(x, c)", lambda op, x: op.Mul(x, 0.5), weights="float[2] c = {0.5, 0.5}") == ["Mul"]
    assert run("y = Mul(x, u)", lambda op, x: op.Mul(x, 0.5)) == ["Mul"]


def test_attributes_and_absent_inputs():
    pattern = lambda op, x: op.LeakyRelu(x, alpha=0.5)  # noqa: E731
    assert run("y = LeakyRelu<alpha = 0.5>(x)", pattern) == ["Exp"]
    assert run("y = LeakyRelu<alpha = 0.25>(x)", pattern) == ["LeakyRelu"]
    assert run("y = Clip(x, , half)", lambda op, x, h: op.Clip(x, None, h)) == ["Exp"]
    assert run("y = Clip(x, half, half)", lambda op, x, h: op.Clip(x, None, h)) == ["Clip"]
    assert run("y = Clip(x, , )", lambda op, x: op.Clip(x)) == ["Exp"]


@pytest.mark.parametrize(
    "body", ["a = Neg(x) y = Relu(a)", "a = Abs(x) y = Relu(a)", "a = Neg(x) y = Ceil(a)"]
)
def test_alternatives_inside_and_at_the_root(body):
    def pattern(op, x):
        inner = op.any(op.Neg(x), op.Abs(x))
        return op.any(op.Relu(inner), op.Ceil(inner))

    assert run(body, pattern) == ["Exp"]
    assert run("a = Sin(x) y = Relu(a)", pattern) == ["Sin", "Relu"]


def test_what_others_read_is_not_swallowed():
    pattern = lambda op, x: op.Relu(op.Abs(x))  # noqa: E731
    assert run("a = Abs(x) b = Relu(a) y = Add(a, b)", pattern) == ["Abs", "Relu", "Add"]
    model = parse(f"{HEADER} g (float[N] x) => (float[N] y, float[N] a) {{ a = Abs(x) y = Relu(a) }}")
    assert not apply([rule(pattern)], model)


def test_what_a_body_reads_is_not_swallowed():
    model = parse(
        f"""{HEADER} g (float[N] x, bool b) => (float[N] y, float[N] z) {{
          a = Abs(x)
          y = Relu(a)
          z = If (b) <then_branch = p () => (float[N] t) {{ t = Neg(a) }}, else_branch = q () => (float[N] e) {{ e = Identity(x) }}>
        }}"""
    )
    assert not apply([rule(lambda op, x: op.Relu(op.Abs(x)))], model)


def test_a_value_that_the_match_uses_twice_is_its_own():
    pattern = lambda op, x: op.Mul(op.Abs(x), op.Relu(op.Abs(x)))  # noqa: E731
    assert run("a = Abs(x) b = Relu(a) y = Mul(a, b)", pattern) == ["Exp"]


def test_bodies_are_rewritten_with_names_that_are_free_everywhere():
    model = parse(
        f"""{HEADER} g (float[N] x, bool b) => (float[N] y) {{
          s = Relu(x)
          y = If (b) <
            then_branch = p () => (float[N] t) {{ t0 = Abs(s) t = Relu(t0) }},
            else_branch = q () => (float[N] e) {{ e0 = Abs(s) e = Relu(e0) }}
          >
        }}"""
    )
    before = model.clone()
    pattern = lambda op, x: op.Relu(op.Abs(x))  # noqa: E731
    changes = apply([rule(pattern, lambda op, x, **_: op.Add(x, np.zeros(1, np.float32)))], model)
    verify(model)
    assert [c.node for c in changes] == ["t", "e"]
    assert ops(model) == ["Relu", "If", "Add", "Add"]
    # Relu(Abs(relu)) is relu itself.
    same_numbers(before, model, {"x": np.array([-1, 2], np.float32), "b": np.array(True)})


def test_an_output_keeps_its_name_and_shape():
    model = parse(f"{HEADER} g (float[N, 2] x) => (float[N, 2] y) {{ a = Abs(x) y = Relu(a) }}")
    apply([rule(lambda op, x: op.Relu(op.Abs(x)))], model)
    (output,) = model.graph.outputs
    assert (output.name, str(output.shape), model.graph[0].name) == ("y", "[N,2]", "y/Exp")


def test_new_values_have_types_and_shapes():
    model = parse(
        f"{HEADER} g (float[N, 2] x) => (int64[1] y) {{ a = Abs(x) b = Relu(a) s = Shape(b) y = Size(s) }}".replace(
            "int64[1]", "int64"
        )
    )
    pattern = lambda op, x: op.Relu(op.Abs(x))  # noqa: E731
    apply([rule(pattern, lambda op, x, **_: op.Relu(op.Transpose(x, perm=[1, 0])))], model)
    assert "float[2,N]" in {
        f"{v.dtype.name.lower()}{v.shape}" for node in model.graph for v in node.outputs if v.dtype
    }


def test_the_earlier_rule_wins_and_rules_run_until_none_applies():
    model = parse(
        f"{HEADER} g (float[N] x) => (float[N] y) {{ a = Relu(x) b = Relu(a) c = Relu(b) y = Relu(c) }}"
    )
    twice = Rule(lambda op, x: op.Relu(op.Relu(x)), lambda op, x, **_: op.Relu(x), name="twice")
    once = Rule(lambda op, x: op.Relu(x), lambda op, x, **_: op.Abs(x), name="once")
    assert {c.rule for c in apply([twice], model)} == {"twice"}
    assert ops(model) == ["Relu"]
    assert [c.rule for c in apply([twice, once], model)] == ["once"]


def test_a_check_that_fails_says_why_and_where():
    model = parse(f"{HEADER} g (float[N] x) => (float[N] y) {{ a = Abs(x) y = Relu(a) }}")

    def check(x, **_):
        return Match().fail("not wide enough", x)

    found = explain([rule(lambda op, x: op.Relu(op.Abs(x)), check=check)], model)
    assert [(m.reason, m.depth) for m in found] == [("not wide enough at x", 3)]


def test_explain_gives_the_deepest_reason_and_nothing_for_strangers():
    body = "a = Neg(x) b = Abs(a) y = Relu(b)"
    model = parse(f"{HEADER} g (float[N] x) => (float[N] y) {{ {body} }}")
    deep = rule(lambda op, x: op.Relu(op.Abs(op.Exp(x))))
    (miss,) = explain([deep], model)
    assert (miss.reason, miss.depth) == ("expected Exp, found ? (Neg)", 2)
    assert not explain([rule(lambda op, x: op.Relu(op.Sin(x)))], model)


def test_explain_names_the_other_reader():
    model = parse(
        f"{HEADER} g (float[N] x) => (float[N] y, float[N] z) {{ a = Abs(x) y = Relu(a) z = Neg(a) }}"
    )
    (miss,) = explain([rule(lambda op, x: op.Relu(op.Abs(x)))], model)
    assert "a is also read by ? (Neg)" in miss.reason


def test_metadata_of_the_root_is_kept():
    model = parse(f"{HEADER} g (float[N] x) => (float[N] y) {{ a = Abs(x) y = Relu(a) }}")
    model.graph[1].metadata_props["optkit.source"] = "net.py:3"
    apply([rule(lambda op, x: op.Relu(op.Abs(x)))], model)
    assert model.graph[0].metadata_props["optkit.source"] == "net.py:3"


def test_names_are_taken_once():
    model = parse(f"{HEADER} g (float[N] x) => (float[N] y) <float c = {{1}}> {{ a = Abs(x) y = Add(a, c) }}")
    names = Names(model)
    assert [names.new(n) for n in ("x", "c", "a", "b", "b")] == ["x_1", "c_1", "a_1", "b", "b_1"]


def test_substituting_an_output_by_an_input_is_refused():
    model = parse(f"{HEADER} g (float[N] x) => (float[N] y) {{ y = Abs(x) }}")
    (node,) = model.graph
    assert not replaceable(node.outputs[0], node.inputs[0])
    with pytest.raises(ValueError, match="cannot become the output y"):
        substitute(node.outputs[0], node.inputs[0])


def test_applying_twice_gives_the_same_bytes():
    source = f"{HEADER} g (float[N] x) => (float[N] y) {{ a = Abs(x) b = Relu(a) c = Abs(b) y = Relu(c) }}"
    models = [parse(source), parse(source)]
    for model in models:
        apply(
            [rule(lambda op, x: op.Relu(op.Abs(x)), lambda op, x, **_: op.Add(x, np.ones(1, np.float32)))],
            model,
        )
    assert text(models[0]) == text(models[1])
