from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from optkit.backends import BACKENDS
from optkit.backends.base import Backend, Options
from optkit.errors import BackendUnavailableError, OptkitError, UnknownNameError
from optkit.passes import PASSES
from optkit.passes.base import GraphPass, Pass
from optkit.registry import Registry

EXAMPLE = Path(__file__).resolve().parent / "plugin_example"


def _install(folder: Path, name: str, points: dict[str, str], group: str = "tests.things") -> Path:
    """Metadata of a distribution ``name`` in ``folder``, as pip leaves it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{key} = {value}\n" for key, value in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    return folder


def _things(**more: object) -> Registry:
    table = {"path": "pathlib:Path", "Fraction": "fractions:Fraction"}
    return Registry("thing", table, group="tests.things", **more)


# The shipped tables


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_loads_and_is_named_as_its_row_says(name):
    kind = PASSES[name]
    assert issubclass(kind, Pass)
    assert kind.name == name
    assert kind.__doc__
    assert kind.__doc__.strip()
    assert kind.stage == ("graph" if issubclass(kind, GraphPass) else "torch")
    # A recipe may name it without options, and all of them are in the schema.
    assert isinstance(kind(), kind)
    assert set(kind.model_json_schema()["properties"] if kind.model_fields else {}) == set(kind.model_fields)


@pytest.mark.parametrize("name", PASSES)
def test_options_of_a_pass_are_frozen_documented_and_of_no_other_name(name):
    kind = PASSES[name]
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"
    for name, field in kind.model_fields.items():
        said = f"{name}:" in (kind.__doc__ or "") or field.description
        assert said, f"{kind.__name__} does not say what {name} is"


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_loads_and_is_named_as_its_row_says(name):
    try:
        kind = BACKENDS[name]
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert issubclass(kind, Backend)
    assert kind.name == name
    assert issubclass(kind.options, Options)
    assert isinstance(kind.options(), Options)
    assert all(key == placement.name for key, placement in kind.placements.items())
    assert kind().available() is None or isinstance(kind().available(), str)


def test_every_backend_of_a_target_is_in_the_table():
    from optkit.targets import TARGETS

    for name, target in TARGETS.items():
        assert target.name == name == name.lower()
        assert target.backends
        assert set(target.backends) <= set(BACKENDS)


def test_every_extra_that_a_backend_names_exists():
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
    assert set(BACKENDS._extras.values()) <= set(project["project"]["optional-dependencies"])


# Names


@pytest.mark.parametrize("name", ["path", "PATH", "Path", "fraction"])
def test_names_are_found_in_any_case(name):
    assert _things()[name].__name__ == name.capitalize()
    assert name in _things()


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown thing 'pathh'") as caught:
        _things()["pathh"]
    assert caught.value.hint == "did you mean 'path'?"
    assert "pathh" not in _things()
    assert 3 not in _things()


def test_an_unknown_name_like_none_lists_all():
    with pytest.raises(UnknownNameError) as caught:
        _things()["zzz"]
    assert caught.value.hint == "known: Fraction, path"


def test_a_default_is_given_for_unknown_names_as_in_any_mapping():
    assert _things().get("zzz") is None
    assert _things().get("path") is Path


def test_listing_imports_nothing():
    registry = Registry("thing", {"gone": "no_such_module_anywhere:X"}, group="tests.things")
    assert list(registry) == ["gone"]
    assert len(registry) == 1
    assert "gone" in registry


# Entry points


def test_entry_points_of_other_distributions_add_names(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(_install(tmp_path, "other", {"date": "datetime:date"}))
    registry = _things()
    assert list(registry) == ["path", "Fraction", "date"]
    assert registry["date"].__name__ == "date"


@pytest.mark.parametrize(
    "point", [{"path": "datetime:date"}, {"PATH": "datetime:date"}], ids=["same", "case"]
)
def test_a_name_that_the_table_has_is_an_error_that_names_both(tmp_path, monkeypatch, point):
    monkeypatch.syspath_prepend(_install(tmp_path, "other", point))
    with pytest.raises(OptkitError, match=r"(?i)'path': pathlib:Path and datetime:date") as caught:
        list(_things())
    assert caught.value.hint == "uninstall one of them"


def test_two_distributions_with_one_name_are_an_error(tmp_path, monkeypatch):
    _install(tmp_path, "one", {"date": "datetime:date"})
    monkeypatch.syspath_prepend(_install(tmp_path, "two", {"date": "datetime:datetime"}))
    with pytest.raises(OptkitError, match="two distributions provide the thing 'date'"):
        list(_things())


def test_the_same_object_under_the_same_name_twice_is_none(tmp_path, monkeypatch):
    # As with an editable install beside a wheel.
    monkeypatch.syspath_prepend(_install(tmp_path, "other", {"path": "pathlib:Path"}))
    assert _things()["path"] is Path


def test_groups_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(
        _install(tmp_path, "other", {"date": "datetime:date"}, group="tests.elsewhere")
    )
    assert "date" not in _things()


# What is missing


def test_a_missing_package_is_told_with_the_line_that_installs_it():
    registry = Registry("backend", {"x": "no_such_package_x.y:Z"}, group="tests.things", extras={"x": "fast"})
    with pytest.raises(
        BackendUnavailableError, match="backend 'x' needs the package 'no_such_package_x'"
    ) as caught:
        registry["x"]
    assert caught.value.hint == "pip install 'optkit[fast]'"
    assert caught.value.exit_code == 4


def test_what_another_distribution_needs_is_told_too(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin_a.py").write_text("import no_such_package_y\n")
    monkeypatch.syspath_prepend(_install(tmp_path, "other", {"bad": "broken_plugin_a:X"}))
    with pytest.raises(
        BackendUnavailableError, match="thing 'bad' needs the package 'no_such_package_y'"
    ) as caught:
        _things()["bad"]
    assert caught.value.hint == "pip install no_such_package_y"


def test_a_plugin_whose_object_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin_b.py").write_text("")
    monkeypatch.syspath_prepend(_install(tmp_path, "other", {"bad": "broken_plugin_b:X"}))
    with pytest.raises(OptkitError, match="thing 'bad': broken_plugin_b has no 'X'"):
        _things()["bad"]


def test_a_plugin_that_raises_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin_c.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(_install(tmp_path, "other", {"bad": "broken_plugin_c:X"}))
    with pytest.raises(OptkitError, match="thing 'bad': broken_plugin_c: ZeroDivisionError"):
        _things()["bad"]


def test_a_module_of_optkit_that_is_missing_is_our_bug_and_no_hint_to_install():
    registry = Registry("thing", {"x": "optkit.no_such_module:X"}, group="tests.things", extras={"x": "fast"})
    with pytest.raises(ModuleNotFoundError):
        registry["x"]


# A distribution as others write it

USE = """
import numpy as np
from optkit.passes import PASSES
from optkit.recipe import Recipe, schema
from optkit.testing import check_pass
recipe = Recipe.load({"recipe": 1, "passes": [{"double-negation": {"most": 3}}]})
assert recipe.passes[0].most == 3 and Recipe.load(recipe.dump()) == recipe
assert "double-negation" in schema()["properties"]["passes"]["items"]["anyOf"][0]["enum"]
check_pass(PASSES["double-negation"](), '<ir_version: 10, opset_import: ["" : 21]> '
    'g (float[N] x) => (float[N] y) { a = Neg(x) b = Neg(a) y = Exp(b) }', ops=["Identity", "Exp"])
print(*PASSES)
"""


def _use(*paths: Path, code: str = USE) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.path[:0] = {[str(p) for p in paths]!r}\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_a_pass_from_another_distribution_is_used_like_our_own(tmp_path):
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    (points,) = project["entry-points"].items()
    _install(tmp_path, project["name"].replace("-", "_"), points[1], group=points[0])
    done = _use(tmp_path, EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "double-negation"


def test_without_its_metadata_a_distribution_adds_nothing():
    done = _use(EXAMPLE, code="from optkit.passes import PASSES; print(*PASSES)")
    assert "double-negation" not in done.stdout.split()
