"""``optkit plan``: floors, estimates and costs, and that none of it is called a measurement."""

from __future__ import annotations

import onnx
import pytest


def test_a_plan_lists_layers_totals_and_costs(optkit, given):
    ran = optkit("plan", given / "model.onnx", "-t", "h100", "--shape", "x=4x32", "-p", "fp16")
    assert ran.code == 0, ran.err
    wanted = (
        "launches after fusion",
        "Floor",
        "Estimate",
        "computed, not measured",
        "$4.29 an hour",
        "4 samples a run",
        "first",
        "MatMul",
    )
    for words in wanted:
        assert words in ran.out, words


def test_as_json_it_says_that_nothing_was_measured(optkit, given):
    document = optkit(
        "plan", given / "model.onnx", "-t", "h100", "--shape", "x=1x32", "--json", "--price", "3.6"
    ).json
    assert document["measured"] is False
    assert document["price"] == {"dollars_an_hour": 3.6, "source": "as given"}
    assert document["dollars_a_million"]["high"] == pytest.approx(document["seconds"]["high"] * 1e3)
    assert document["seconds"]["floor"] <= document["seconds"]["low"] <= document["seconds"]["high"]
    assert sum(layer["macs"] for layer in document["layers"]) == 32 * 128 + 128 * 128 + 128 * 10


def test_the_page_says_what_floor_and_estimate_are(optkit, given):
    said = optkit("plan", given / "model.onnx", "-t", "h100", "--shape", "x=4x32").out
    wanted = (
        "bound by compute",
        "with cold caches",
        "the longer of all operations at their peaks",
        "less 52.4 MB that the last cache may keep from run to run",
        "the sum of the layers",
        "Layers may overlap, so the run's floor is not their sum",
    )
    for words in wanted:
        assert words in said, words


def test_operators_that_nobody_counts_are_named(optkit, tmp_path):
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[4, 64, 64] x) => (float[4] y) { h = MatMul (x, x) y = Det (h) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "det.onnx")
    page = optkit("plan", tmp_path / "det.onnx", "-t", "h100").out
    assert "Not counted" in page
    assert "too low: Det" in page
    assert optkit("plan", tmp_path / "det.onnx", "-t", "h100", "--json").json["uncounted"] == ["Det"]


def test_a_table_of_prices_takes_the_place_of_the_list(optkit, given, tmp_path):
    (tmp_path / "prices.yaml").write_text("l4: 0.5\n")
    asked = ("plan", given / "model.onnx", "--shape", "x=1x32", "--prices", tmp_path / "prices.yaml")
    assert optkit(*asked, "-t", "l4", "--json").json["price"]["dollars_an_hour"] == 0.5
    assert optkit(*asked, "-t", "h100", "--json").json["price"]["dollars_an_hour"] == 4.29
    assert "no price of jetson-orin" in optkit(*asked, "-t", "jetson-orin").out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["-t", "h100"], "has free axes: N"),
        (["--shape", "x=1x32"], "a plan needs a target"),
        (["-t", "cpu"], "no bandwidth and peaks of cpu are known"),
        (["-t", "h100", "--shape", "x=1x32", "--prices", "nowhere.yaml"], "no such file"),
    ],
)
def test_what_is_missing_is_said_with_exit_code_2(optkit, given, more, said):
    ran = optkit("plan", given / "model.onnx", *more)
    assert (ran.code, said in ran.err) == (2, True), ran.err


@pytest.mark.parametrize("text", ["h100: much\n", "- 1\n", ""])
def test_tables_that_are_none_are_refused(optkit, given, tmp_path, text):
    (tmp_path / "prices.yaml").write_text(text)
    ran = optkit(
        "plan", given / "model.onnx", "-t", "h100", "--shape", "x=1x32", "--prices", tmp_path / "prices.yaml"
    )
    assert ran.code == 2
    assert "not dollars an hour" in ran.err
