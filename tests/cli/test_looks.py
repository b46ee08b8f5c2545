"""Commands that only look: ``inspect``, ``targets``, ``recipe``, ``doctor``."""

from __future__ import annotations

import onnx
import pytest
import yaml

LOOP = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[4] x, bool c) => (float[4] y)
{
  y = If (c) <
    then_branch = a () => (float[4] p) { p = Relu(x) },
    else_branch = b () => (float[4] q) { q = Neg(x) }
  >
}
"""


def test_inspect_shows_interface_operators_and_products(optkit, given):
    ran = optkit("inspect", given / "model.onnx", "--shape", "x=2x32")
    assert ran.code == 0, ran.err
    for wanted in (
        "x: float32[2, 32]",
        "y: float32[2, 10]",
        "opset 21",
        "MatMul",
        "Gemm",
        "21,898",
        "87.6 kB",
        "43.5 k",
    ):
        assert wanted in ran.out, wanted
    free = optkit("inspect", given / "model.onnx")
    assert "depend on free axes: N" in free.out


def test_inspect_counts_by_operator(optkit, given):
    document = optkit("inspect", given / "model.onnx", "--shape", "x=1x32", "--json", "--nodes").json
    assert document["macs"] == 32 * 128 + 128 * 128 + 128 * 10
    assert document["operators"]["MatMul"] == {
        "count": 2,
        "parameters": 32 * 128 + 128 * 128,
        "macs": 32 * 128 + 128 * 128,
    }
    assert document["int8_share"] == 0
    assert document["nodes_listed"][0]["name"] == "first"


def test_inspect_adds_up_by_family(optkit, given):
    document = optkit("inspect", given / "model.onnx", "--shape", "x=2x32", "--json").json
    (product,) = [f for name, f in document["families"].items() if name == "matmul"]
    assert product["macs"] == document["macs"]
    moved = 4 * (
        2 * 32 + 32 * 128 + 2 * 128 + 2 * 128 + 128 * 128 + 2 * 128 + 2 * 128 + 128 * 10 + 10 + 2 * 10
    )
    assert product["bytes"] == moved
    assert product["intensity"] == pytest.approx(2 * document["macs"] / moved)
    assert "floor" not in document
    assert "Operations/byte" in optkit("inspect", given / "model.onnx", "--shape", "x=2x32").out


def test_inspect_knows_the_floor_on_a_target(optkit, given):
    shaped = ("inspect", given / "model.onnx", "--shape", "x=2x32", "--target", "cpu")
    least = optkit(*shaped, "--json").json["floor"]
    macs = 2 * (32 * 128 + 128 * 128 + 128 * 10)
    compute = 2 * macs / least["peak"]["fp32"]
    assert least["ms"] == pytest.approx(1e3 * max(compute, least["bytes"] / least["bandwidth"]))
    assert "no kernel can be faster" in optkit(*shaped).out
    free = optkit("inspect", given / "model.onnx", "--target", "cpu")
    assert "not known on cpu: depends on free axes" in free.out


def test_inspect_of_an_artifact_tells_what_ran(optkit, artifact):
    document = optkit("inspect", artifact, "--shape", "x=1x32", "--json").json
    assert document["int8_share"] == 1
    assert document["artifact"]["achieved"]["formats"]["int8"] > 0.5
    shown = optkit("inspect", artifact).out
    assert "as measured when it was compiled" in shown
    assert "weights int8 per channel, symmetric" in shown


def test_inspect_says_why_layers_stay_in_float(optkit, tmp_path):
    source = '<ir_version: 10, opset_import: ["" : 21]>\ng (float[2, 3] a, float[3, 4] b) => (float[2, 4] y) { [product] y = MatMul(a, b) }'
    onnx.save(onnx.parser.parse_model(source), tmp_path / "m.onnx")
    ran = optkit("inspect", tmp_path / "m.onnx", "--why")
    assert "product" in ran.out
    assert "its second operand is not a constant" in ran.out


def test_targets_lists_this_machine(optkit):
    assert "cpu" in optkit("targets").out
    (cpu,) = [t for t in optkit("targets", "--json").json if t["name"] == "cpu"]
    assert cpu["runs_here"]
    assert "onnxruntime" in cpu["backends"]


def test_recipes_are_listed_with_what_they_do(optkit):
    ran = optkit("recipe", "list")
    assert ran.code == 0, ran.err
    names = [r["name"] for r in optkit("recipe", "list", "--json").json]
    assert {"auto", "fp32", "int8-static", "int8-dynamic"} <= set(names)
    assert all(name in ran.out for name in names)


def test_a_shown_recipe_is_a_recipe_with_every_default(optkit, given, tmp_path):
    ran = optkit("recipe", "show", given / "recipe.yaml", "--set", "seed=3")
    shown = yaml.safe_load(ran.out)
    assert shown["seed"] == 3
    assert shown["passes"][1]["quantize-static"]["placement"] == "default"
    (tmp_path / "again.yaml").write_text(ran.out)
    assert optkit("recipe", "show", tmp_path / "again.yaml").out == ran.out
    assert optkit("recipe", "show", given / "recipe.yaml", "--set", "seed=3", "--json").json == shown


def test_recipe_check_names_the_place(optkit, given, tmp_path):
    ran = optkit("recipe", "check", given / "recipe.yaml")
    assert (ran.code, "valid" in ran.out) == (0, True)
    for text, message, hint in (
        (
            "recipe: 1\nlimits: {max_dorp: 1%}\n",
            "unknown option 'limits.max_dorp'",
            "did you mean 'max_drop'?",
        ),
        (
            "recipe: 1\npasses: [remove-nops]\n",
            "passes.0: unknown pass 'remove-nops'",
            "did you mean 'remove-noops'?",
        ),
        ("recipe: 2\n", "recipe: version 2 is not known", "recipe: 1"),
        ("- just a list\n", "a recipe is a mapping", ""),
        (
            "recipe: 1\ncandidates: [int8-statc]\n",
            "unknown recipe 'int8-statc'",
            "did you mean 'int8-static'?",
        ),
        ("recipe: 1\ntarget: cpuu\n", "unknown target 'cpuu'", "did you mean 'cpu'?"),
        (
            "recipe: 1\npasses: [{quantize-static: {percentile: lots}}]\n",
            "passes.0: quantize-static: percentile:",
            "",
        ),
    ):
        (tmp_path / "r.yaml").write_text(text)
        ran = optkit("recipe", "check", tmp_path / "r.yaml")
        assert (ran.code, ran.out) == (2, "")
        assert message in ran.err
        assert hint in ran.err
    assert optkit("recipe", "check", "no-such-recipe").code == 2


def test_the_schema_names_every_pass(optkit):
    document = optkit("recipe", "schema").json
    assert document["$schema"].startswith("https://json-schema.org/")
    assert "quantize-static" in str(document["properties"]["passes"])


def test_doctor_names_versions_and_backends(optkit):
    ran = optkit("doctor")
    assert (ran.code, "onnxruntime" in ran.out, "ready" in ran.out) == (0, True, True)
    document = optkit("doctor", "--json").json
    assert document["packages"]["onnx"]
    assert "checks" not in document


def test_doctor_checks_a_model(optkit, given, tmp_path):
    ran = optkit("doctor", given / "model.onnx")
    assert ran.code == 0, ran.out
    assert "one run on random inputs" in ran.out
    onnx.save(onnx.parser.parse_model(LOOP), tmp_path / "loop.onnx")
    document = optkit("doctor", tmp_path / "loop.onnx", "--json").json
    states = {c["check"]: (c["state"], c["detail"]) for c in document["checks"]}
    assert states["control flow"][0] == "note"
    assert states["free axes"] == ("ok", "none: every input has a fixed shape")
    assert document["ok"]


@pytest.mark.parametrize("content", [b"", b"\x00garbage" * 50, None])
def test_doctor_fails_where_the_model_does_not_load(optkit, given, tmp_path, content):
    whole = (given / "model.onnx").read_bytes()
    (tmp_path / "bad.onnx").write_bytes(whole[: len(whole) // 2] if content is None else content)
    ran = optkit("doctor", tmp_path / "bad.onnx")
    assert ran.code == 1
    assert "failed" in ran.out
    assert "Traceback" not in ran.err


@pytest.fixture(scope="module")
def stored(bench_, tmp_path_factory):
    """An artifact in files of a runtime, without a graph that can be read back."""
    pytest.importorskip("openvino")
    import optkit

    folder = tmp_path_factory.mktemp("stored") / "build"
    overrides = ["limits.min_speedup=0"]
    optkit.compile(
        bench_ / "model.onnx", target="cpu", recipe="openvino-fp32", out=folder, overrides=overrides
    )
    return folder


def test_an_artifact_without_a_graph_is_inspected_by_what_it_says_of_itself(optkit, given, stored):
    assert not (stored / "model.onnx").exists()
    ran = optkit("inspect", stored)
    assert ran.code == 0, ran.err
    assert "x: float32[x.0, 32]" in ran.out
    assert "for cpu with openvino, from model.onnx" in ran.out
    assert "FullyConnected" in ran.out
    document = optkit("inspect", stored, "--json").json
    assert document["operators"] == document["artifact"]["achieved"]["operators"]


def test_inspect_says_what_needs_the_graph(optkit, given, stored):
    ran = optkit("inspect", stored, "--why", "--nodes")
    assert ran.code == 2
    assert "--nodes and --why: the graph is needed" in ran.err
    assert "give the file that it was compiled from, model.onnx" in ran.err


def test_an_artifact_without_a_graph_is_timed(optkit, stored, given):
    ran = optkit("bench", stored, "--against", given / "model.onnx", "--batch", 3, "--runs", 9, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["inputs"] == "x [3, 32]"
    ran = optkit("bench", stored, "--calib", given / "calib", "--runs", 9)
    assert "batches of calib" in ran.err
