from __future__ import annotations

import functools
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.errors import OptkitError, RecipeError, UnknownNameError
from optkit.passes import PASSES
from optkit.recipe import Limits, Recipe, schema, shipped

STATIC = {"recipe": 1, "passes": [{"quantize-static": {"method": "mse"}}, "remove-dead"]}


def _refused(source, *parts: str, overrides=()) -> RecipeError:
    """The error, which must hold each of ``parts``."""
    with pytest.raises(OptkitError) as caught:
        Recipe.load(source, overrides)
    error = caught.value
    assert isinstance(error, RecipeError | UnknownNameError)
    assert error.exit_code == 2
    for part in parts:
        assert part in f"{error} | {error.hint}", f"{error} | {error.hint}"
    return error


# What ships


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_loads_says_what_it_is_and_comes_back_the_same(name):
    recipe = Recipe.load(name)
    assert recipe.description
    assert Recipe.load(recipe.dump()) == recipe
    assert Recipe.load(yaml.safe_load(recipe.yaml())) == recipe
    assert recipe.passes or recipe.candidates
    assert all(Recipe.load(candidate) for candidate in recipe.candidates)


def test_the_recipes_that_the_issue_names_are_there():
    assert {"auto", "fp32", "int8-static", "int8-dynamic"} <= set(shipped())


@pytest.mark.parametrize("name", [n for n in shipped() if Recipe.load(n).candidates])
def test_the_first_candidate_of_each_list_is_exact(name):
    first = Recipe.load(Recipe.load(name).candidates[0])
    assert all(p.exact for p in first.passes)


def test_the_resolved_recipe_has_every_default_written_out():
    dumped = Recipe.load({"recipe": 1, "passes": ["quantize-static"]}).dump()
    assert set(dumped) == set(Recipe.model_fields)
    assert dumped["passes"] == [{"quantize-static": PASSES["quantize-static"]().model_dump(mode="json")}]
    assert dumped["limits"] == Limits().model_dump(mode="json")


# Round trips

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
PASS = st.one_of(
    st.sampled_from(sorted(PASSES)).filter(lambda n: n not in ("quantize-static", "quantize-dynamic")).map(lambda n: {n: {}}),
    st.fixed_dictionaries(
        {},
        optional={
            "method": st.sampled_from(["min-max", "percentile", "entropy", "mse"]),
            "percentile": st.floats(50, 100, exclude_min=True),
            "targets": st.lists(NAMES, max_size=3),
            "ignore": st.lists(NAMES, max_size=3),
            "placement": NAMES,
        },
    ).map(lambda options: {"quantize-static": options}),
    st.integers(0, 10**9).map(lambda n: {"quantize-dynamic": {"smallest": n}}),
)  # fmt: skip


def _torch_first(passes):
    return sorted(passes, key=lambda p: PASSES[next(iter(p))].stage != "torch")


RECIPES = st.fixed_dictionaries(
    {"recipe": st.just(1)},
    optional={
        "description": NAMES,
        "target": st.none() | NAMES,
        "backend": st.none() | NAMES,
        "options": st.dictionaries(NAMES, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES, max_size=3),
        "passes": st.lists(PASS, max_size=4).map(_torch_first),
        "candidates": st.lists(NAMES, max_size=2),
        "repair": st.booleans(),
        "samples": st.none() | st.integers(1, 10**6),
        "seed": st.integers(0, 2**63),
        "require": st.dictionaries(
            st.sampled_from(["formats.int8", "operators.Conv", "weights.int8", "placement.cpu"]),
            st.tuples(st.sampled_from([">=", "<=", "==", ">", "<"]), st.floats(0, 1e6)).map(lambda c: f"{c[0]}{c[1]}"),
            max_size=2,
        ),
        "limits": st.fixed_dictionaries(
            {},
            optional={
                "max_drop": st.none() | st.floats(0, 100).map(lambda x: f"{x}%") | st.floats(0, 1).map(str) | st.floats(0, 1),
                "min_cosine": st.floats(-1, 1),
                "min_speedup": st.floats(0, 10),
                "max_latency_ms": st.none() | st.floats(1e-6, 1e6),
                "max_size_mb": st.none() | st.floats(1e-6, 1e6),
            },
        ),
    },
)  # fmt: skip


@given(raw=RECIPES)
@settings(max_examples=200, deadline=None)
def test_any_recipe_comes_back_the_same_from_plain_data_and_from_yaml(raw):
    if raw.get("candidates"):
        # Passes over a module may have candidates behind them.
        raw = {**raw, "passes": [p for p in raw.get("passes", []) if PASSES[next(iter(p))].stage == "torch"]}
    recipe = Recipe.load(raw)
    assert Recipe.load(recipe.dump()) == recipe
    text = recipe.yaml()
    again = Recipe.load(yaml.safe_load(text))
    assert again == recipe
    assert (again.yaml(), again.digest) == (text, recipe.digest)


def test_the_passes_over_the_graph_are_its_own_or_those_of_the_first_candidate():
    cleanup = Recipe.load("cleanup").passes
    own = Recipe.load({"recipe": 1, "imports": ["cleanup"], "passes": [{"prune-structured": {"ratio": 0.5}}]})
    behind = Recipe.load(
        {
            "recipe": 1,
            "passes": [{"prune-structured": {"ratio": 0.5}}],
            "candidates": ["fp32", "openvino-fp32"],
        }
    )
    assert own.graph_passes == behind.graph_passes == cleanup
    assert [p.name for p in behind.passes] == ["prune-structured"]


def test_a_file_gives_what_its_data_gives(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(Recipe.load(STATIC).yaml())
    assert Recipe.load(path) == Recipe.load(str(path)) == Recipe.load(STATIC)


def test_a_recipe_is_given_back_as_it_is():
    recipe = Recipe.load(STATIC)
    assert Recipe.load(recipe) is recipe
    assert Recipe.load(recipe, ["seed=3"]).seed == 3
    assert recipe.seed == 0


def test_digests_differ_where_recipes_do():
    digests = {
        Recipe.load(STATIC, [o]).digest for o in ("seed=0", "seed=1", "passes.quantize-static.method=entropy")
    }
    assert len(digests) == 3


def test_names_are_read_in_any_case():
    assert Recipe.load("FP32") == Recipe.load("fp32")
    assert Recipe.load({"recipe": 1, "passes": ["Remove-Dead"]}).passes[0].name == "remove-dead"


# Mistakes


def test_an_unknown_recipe_suggests_the_nearest():
    _refused("int8-statik", "unknown recipe 'int8-statik'", "did you mean 'int8-static'?")


def test_a_missing_file_says_so(tmp_path):
    _refused(tmp_path / "gone.yaml", "gone.yaml: no such recipe file", "shipped recipes: auto")
    _refused("no/such/file", "no/such/file: no such recipe file")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("recipe: 1\npases: []", ["unknown key 'pases'", "did you mean 'passes'?"]),
        ("recipe: 1\nzzz: []", ["unknown key 'zzz'", "known: recipe, description"]),
        ("recipe: 2", ["recipe: version 2 is not known"]),
        ("recipe: true", ["recipe: version True is not known"]),
        ("recipe: '1'", ["recipe: version '1' is not known"]),
        ("passes: []", ["version None is not known", "start the file with 'recipe: 1'"]),
        ("recipe: 1\npasses: [fuse-gelo]", ["passes.0: unknown pass 'fuse-gelo'", "did you mean 'fuse-gelu'?"]),
        ("recipe: 1\npasses: [cast, {quantize-static: {metod: mse}}]",
         ["passes.1: quantize-static: unknown option 'metod'", "did you mean 'method'?"]),
        ("recipe: 1\npasses: [{quantize-static: {method: max}}]", ["passes.0: quantize-static: method:", "'max'"]),
        ("recipe: 1\npasses: [{quantize-static: {percentile: 3}}]", ["passes.0: quantize-static: percentile:", "3"]),
        ("recipe: 1\npasses: [{a: 1, b: 2}]", ["passes.0: the name of a pass"]),
        ("recipe: 1\npasses: [{quantize-static: 3}]", ["passes.0: the name of a pass"]),
        ("recipe: 1\npasses: [3]", ["passes.0: the name of a pass", "not 3"]),
        ("recipe: 1\npasses: {cast: {}}", ["passes: a list is wanted, not dict"]),
        ("recipe: 1\npasses: cast", ["passes: a list is wanted, not str"]),
        ("recipe: 1\nlimits: {max_drip: 1}", ["unknown option 'limits.max_drip'", "did you mean 'max_drop'?"]),
        ("recipe: 1\nlimits: {min_cosine: 2}", ["limits.min_cosine:", "2"]),
        ("recipe: 1\nlimits: {max_drop: lots}", ["limits.max_drop", "lots"]),
        ("recipe: 1\nlimits: {max_drop: -1%}", ["limits.max_drop", "-1%"]),
        ("recipe: 1\nlimits: 3", ["limits:"]),
        ("recipe: 1\nsamples: 0", ["samples:"]),
        ("recipe: 1\npasses: [cast]\ncandidates: [fp32]", ["passes over the graph and candidates are both given"]),
        ("recipe: 1\nseed: -1", ["seed:"]),
        ("recipe: 1\nrequire: {formats.int8: lots}", ["require.formats.int8", "lots", '">=0.9"']),
        ("recipe: 1\nrequire: {formats.int8: '>=1.2.3'}", ["require.formats.int8", ">=1.2.3"]),
        ("recipe: 1\nrequire: {formatz.int8: '>=1'}", ["require.formatz.int8"]),
        ("recipe: 1\nrequire: {formats: '>=1'}", ["require.formats"]),
        ("recipe: 1\nimports: [nothing-like-it]", ["imports", "nothing-like-it"]),
        ("recipe: 1\nimports: [cleanupp]", ["imports", "unknown recipe 'cleanupp'", "did you mean 'cleanup'?"]),
        ("recipe: 1\nimports: cleanup", ["imports: a list is wanted, not str"]),
        ("recipe: 1\nimports: 5", ["imports: a list is wanted, not int"]),
        ("recipe: 1\nimports: [3]", ["imports: 3 is not the name of a recipe"]),
        ("- recipe", ["a recipe is a mapping"]),
        ("", ["a recipe is a mapping"]),
        ("1: 2", ["a recipe is a mapping"]),
        ("recipe: [1", ["mine.yaml:1: not valid YAML"]),
        ("recipe: 1\npasses: [a\nseed: }", ["mine.yaml:3: not valid YAML"]),
        ("recipe: 1\nseed: !!python/object/apply:os.getcwd []", ["mine.yaml:2: not valid YAML"]),
    ],
)  # fmt: skip
def test_every_mistake_is_named_with_its_place(tmp_path, text, parts):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    _refused(path, "mine.yaml", *parts)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    _refused(path, "mine.yaml", "not valid YAML")


def test_plain_data_is_checked_as_files_are():
    _refused({"recipe": 1, "pases": []}, "recipe: unknown key 'pases'")


# Imports


def _write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_passes_of_imports_come_first_in_their_order(tmp_path):
    path = _write(
        tmp_path,
        a="recipe: 1\nimports: [b.yaml, c.yaml]\npasses: [cast]\nseed: 5",
        b="recipe: 1\npasses: [remove-dead, lift-constants]\nseed: 7",
        c="recipe: 1\nimports: [b.yaml]\npasses: [remove-noops]",
    )
    recipe = Recipe.load(path)
    assert [p.name for p in recipe.passes] == [
        "remove-dead", "lift-constants", "remove-dead", "lift-constants", "remove-noops", "cast",
    ]  # fmt: skip
    # Only passes are taken over.
    assert recipe.seed == 5


def test_imports_are_found_beside_the_file_that_names_them(tmp_path):
    (tmp_path / "deep").mkdir()
    _write(tmp_path / "deep", c="recipe: 1\nimports: [../b.yaml]")
    path = _write(tmp_path, a="recipe: 1\nimports: [deep/c.yaml]", b="recipe: 1\npasses: [cast]")
    assert [p.name for p in Recipe.load(path).passes] == ["cast"]


@pytest.mark.parametrize(
    "files",
    [
        {"a": "recipe: 1\nimports: [a.yaml]"},
        {"a": "recipe: 1\nimports: [b.yaml]", "b": "recipe: 1\nimports: [a.yaml]"},
        {"a": "recipe: 1\nimports: [b.yaml]", "b": "recipe: 1\nimports: [./c.yaml]", "c": "recipe: 1\nimports: [././b.yaml]"},
    ],
    ids=["itself", "two", "three"],
)  # fmt: skip
def test_cycles_of_imports_are_refused(tmp_path, files):
    _refused(_write(tmp_path, **files), "imports", "imports itself")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("recipe: 1\npases: []", ["b.yaml: unknown key 'pases'"]),
        ("recipe: 3", ["b.yaml: recipe: version 3"]),
        ("recipe: 1\npasses: 7", ["b.yaml: passes: a list is wanted"]),
        ("[", ["b.yaml:1: not valid YAML"]),
    ],
)
def test_mistakes_in_imports_are_named_with_the_file_they_are_in(tmp_path, text, parts):
    _refused(_write(tmp_path, a="recipe: 1\nimports: [b.yaml]", b=text), *parts)


# Overrides


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("seed=7", "seed", 7),
        ("repair=true", "repair", True),
        ("samples=null", "samples", None),
        ("limits.max_drop=2%", "limits.max_drop", "2%"),
        ("limits.max_drop=0.02", "limits.max_drop", "0.02"),
        ("limits.min_cosine=0.5", "limits.min_cosine", 0.5),
        ("options.threads=4", "options", {"threads": 4}),
        ("options.sizes.x.0=[1, 2, 4]", "options", {"sizes": {"x.0": [1, 2, 4]}}),
        ("require.formats.int8=>=0.9", "require", {"formats.int8": ">=0.9"}),
        ("passes.quantize-static.method=entropy", "passes.0.method", "entropy"),
        ("passes.Quantize-Static.method=entropy", "passes.0.method", "entropy"),
        ("passes.quantize-static.ignore=[a, 'b*']", "passes.0.ignore", ("a", "b*")),
        ("description=a=b", "description", "a=b"),
    ],
)  # fmt: skip
def test_one_value_is_overridden(override, read, expected):
    recipe = Recipe.load(STATIC, [override])
    value = functools.reduce(
        lambda v, k: v[int(k)] if k.isdigit() else getattr(v, k), read.split("."), recipe
    )
    assert value == expected


def test_other_options_of_a_pass_stay_when_one_is_overridden():
    recipe = Recipe.load(
        STATIC, ["passes.quantize-static.percentile=99", "passes.quantize-static.ignore=[x]"]
    )
    assert (recipe.passes[0].method, recipe.passes[0].percentile) == ("mse", 99)


def test_passes_of_imports_can_be_overridden():
    recipe = Recipe.load("int8-static", ["passes.quantize-static.method=mse"])
    assert next(p for p in recipe.passes if p.name == "quantize-static").method == "mse"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed", ["key=value is wanted"]),
        ("=3", ["key=value is wanted"]),
        ("seed=[", ["not valid YAML"]),
        ("sead=3", ["unknown key 'sead'", "did you mean 'seed'?"]),
        ("seed=x", ["seed:"]),
        ("seed.a=3", ["seed has no keys below it"]),
        ("limitz.max_drop=1%", ["unknown key of a recipe 'limitz'", "did you mean 'limits'?"]),
        (
            "passes.quantize-statik.method=mse",
            ["unknown pass of this recipe 'quantize-statik'", "did you mean"],
        ),
        ("passes.quantize-static.metod=mse", ["unknown option 'metod'", "did you mean 'method'?"]),
        ("passes.quantize-static=mse", ["passes.<pass>.<option>=value is wanted"]),
        ("passes=[]", ["passes.<pass>.<option>=value is wanted"]),
        ("limits.max_drip=1", ["unknown option 'limits.max_drip'"]),
    ],
)
def test_overrides_that_do_not_fit_are_refused(override, parts):
    _refused(STATIC, *parts, overrides=[override])


def test_an_option_that_is_no_table_has_no_entries():
    _refused(
        STATIC, "options.threads has no keys below it", overrides=["options.threads=2", "options.threads.a=3"]
    )


# The schema


def _check(value, rules, whole):
    """What of JSON Schema the recipe's uses: enough to say whether a file fits."""
    if "$ref" in rules:
        rules = functools.reduce(lambda v, k: v[k], rules["$ref"].removeprefix("#/").split("/"), whole)
    if "allOf" in rules:
        return all(_check(value, r, whole) for r in rules["allOf"])
    if "anyOf" in rules:
        return any(_check(value, r, whole) for r in rules["anyOf"])
    if "const" in rules:
        return value == rules["const"]
    if "enum" in rules:
        return value in rules["enum"]
    kinds = {
        "string": str,
        "integer": int,
        "number": int | float,
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    if (kind := rules.get("type")) is not None and not isinstance(value, kinds[kind]):
        return False
    if isinstance(value, list):
        return all(_check(v, rules.get("items", {}), whole) for v in value)
    if isinstance(value, dict):
        known, more = rules.get("properties", {}), rules.get("additionalProperties", True)
        if not rules.get("minProperties", 0) <= len(value) <= rules.get("maxProperties", 99) or set(
            rules.get("required", [])
        ) - set(value):
            return False
        return all(
            _check(v, known[k], whole)
            if k in known
            else more is True or (more is not False and _check(v, more, whole))
            for k, v in value.items()
        )
    return (
        rules.get("minimum", value) <= value <= rules.get("maximum", value)
        if isinstance(value, int | float)
        else True
    )


def _raw(name):
    from importlib.resources import files

    return yaml.safe_load((files("optkit.recipes") / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", shipped())
def test_the_schema_accepts_every_shipped_recipe_as_written_and_as_resolved(name):
    rules = schema()
    assert _check(_raw(name), rules, rules)
    assert _check(Recipe.load(name).dump(), rules, rules)


@pytest.mark.parametrize(
    "raw",
    [
        {"recipe": 2},
        {},
        {"recipe": 1, "pases": []},
        {"recipe": 1, "passes": ["fuse-gelo"]},
        {"recipe": 1, "passes": [{"quantize-static": {"metod": "mse"}}]},
        {"recipe": 1, "passes": [{"quantize-static": {"method": "max"}}]},
        {"recipe": 1, "passes": [{}]},
        {"recipe": 1, "limits": {"max_drip": "1%"}},
        {"recipe": 1, "limits": {"min_cosine": 2}},
        {"recipe": 1, "samples": 0},
    ],
)
def test_the_schema_refuses_what_loading_refuses(raw):
    rules = schema()
    assert not _check(raw, rules, rules)
    _refused(raw)


def test_every_reference_in_the_schema_leads_somewhere():
    rules = schema()
    for reference in re.findall(r"'\$ref': '#/([^']*)'", str(rules)):
        functools.reduce(lambda v, k: v[k], reference.split("/"), rules)


def test_the_schema_names_every_pass_and_every_option():
    options = {}
    for item in schema()["properties"]["passes"]["items"]["anyOf"][1:]:
        options |= item["properties"]
    assert set(options) == set(PASSES)
    for name, rules in options.items():
        assert set(rules.get("properties", {})) == set(PASSES[name].model_fields)


def test_words_are_taken_in_any_case():
    recipe = Recipe.load({"recipe": 1, "goal": "Latency", "passes": [{"quantize-static": {"method": "MSE"}}]})
    assert recipe.goal == "latency" and recipe.passes[0].method == "mse"


def test_words_that_are_none_are_told_with_those_that_are():
    with pytest.raises(RecipeError, match="'latency', 'throughput' or 'size', not 'Speed'"):
        Recipe.load({"recipe": 1, "goal": "Speed"})
