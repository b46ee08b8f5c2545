"""Pages with a row for each model: what a part of a run leaves of the rest."""

from __future__ import annotations

import json

import pytest

from optkit.benchmarks.tables import processors, table
from optkit.errors import UnknownNameError


def _run(folder, arguments, value):
    return table(
        "page",
        None,
        [*arguments, "--out", str(folder)],
        known=("a", "b", "c"),
        measure=lambda name: {"name": name, "value": value},
        markdown=lambda result: " ".join(f"{m['name']}{m['value']}" for m in result["models"]),
        more=lambda: {"extra": value},
    )


def test_a_part_leaves_the_other_rows_and_their_order(tmp_path, capsys):
    _run(tmp_path, [], 1)
    rows = _run(tmp_path, ["--only", "c", "--only", "a"], 2)
    assert [(r["name"], r["value"]) for r in rows] == [("a", 2), ("b", 1), ("c", 2)]
    assert (tmp_path / "page.md").read_text() == "a2 b1 c2"
    assert capsys.readouterr().out.endswith("a2 b1 c2")
    record = json.loads((tmp_path / "page.json").read_text())
    assert record["models"] == rows and record["extra"] == 2 and "processor" in record["machine"]


def test_the_whole_starts_anew(tmp_path):
    _run(tmp_path, ["--only", "b"], 1)
    assert [r["value"] for r in _run(tmp_path, [], 2)] == [2, 2, 2]


def test_a_name_that_is_none_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(UnknownNameError, match="'d'"):
        _run(tmp_path, ["--only", "d"], 1)
    assert not list(tmp_path.iterdir())


def test_rows_that_were_measured_elsewhere_say_where(tmp_path, monkeypatch):
    for chip, arguments in (("Elder", []), ("Younger", ["--only", "b"])):
        monkeypatch.setattr("optkit.benchmarks.tables.processor", lambda chip=chip: {"name": chip})
        rows = _run(tmp_path, arguments, 1)
    machine = {"processor": {"name": "Elder"}}
    assert processors({"models": rows, "machine": machine}) == "Elder; b: Younger"
    assert processors({"models": [{"name": "a"}], "machine": machine}) == "Elder"


def test_rows_of_records_that_do_not_say_where_are_from_the_machine_of_the_record(tmp_path):
    rows = [{"name": name, "value": 1} for name in "abc"]
    record = {"machine": {"processor": {"name": "Elder"}}, "models": rows}
    (tmp_path / "page.json").write_text(json.dumps(record))
    assert [r["measured_on"] for r in _run(tmp_path, ["--only", "c"], 2)[:2]] == ["Elder", "Elder"]
