"""Recipes: which passes, in which order, for which backend, within which limits. Data, never code."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from optkit.errors import RecipeError, UnknownNameError, UsageError
from optkit.passes import PASSES
from optkit.passes.base import Pass
from optkit.words import Worded

_CONDITION = re.compile(r"\s*(>=|<=|==|>|<)\s*(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*")


Goal = Literal["latency", "throughput", "size"]


def _amount(value: Any) -> Any:
    """``1%`` or a number, as text: ``0.01`` in YAML is a number."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(text, str):
        try:
            number = float(text.strip().removesuffix("%"))
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number >= 0):
            raise ValueError("write 1% (of the reference's metric) or 0.01 (absolute)")
    return text


def _requirement(key: str) -> str:
    group, _, name = key.partition(".")
    if group not in ("formats", "placement", "operators", "weights") or not name:
        raise ValueError("write formats.<format>, placement.<place>, operators.<operator> or weights.<type>")
    return key


def _condition(text: str) -> str:
    if _CONDITION.fullmatch(text) is None:
        raise ValueError('write a comparison with a number, as in ">=0.9"')
    return text


def condition(text: str) -> tuple[str, float]:
    """The comparison and the number of a condition under ``require``."""
    match = _CONDITION.fullmatch(text)
    assert match is not None, text
    return match[1], float(match[2])


class Limits(BaseModel):
    """What the result must keep to; what is missed is reported, and the best feasible artifact ships.

    Attributes:
        max_drop: Loss of the metric: ``1%`` of the reference's, or ``0.01`` absolute. Needs an evaluator.
        min_cosine: Without an evaluator, least mean cosine of each float output to the fp32 reference's.
        min_speedup: Least speed-up over the reference.
        max_latency_ms: Largest median latency, where it was measured on the target.
        max_size_mb: Largest artifact, in 10^6 bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    max_drop: Annotated[
        str | None,
        BeforeValidator(_amount),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]}),
    ] = None
    min_cosine: float = Field(default=0.99, ge=-1, le=1)
    min_speedup: float = Field(default=1.0, ge=0)
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_size_mb: float | None = Field(default=None, gt=0)


class Recipe(Worded):
    """How to compile.

    Attributes:
        recipe: Version of the schema.
        target: Hardware, unless the caller names it.
        backend: Runtime, or None for the target's best.
        options: Options of the backend.
        passes: In order; passes over a torch module come first.
        candidates: Names of recipes to try instead of passes over the graph; the fastest that keeps the limits is taken.
            Behind passes over a torch module, they are tried on what was trained.
        repair: Where a quantized candidate misses a limit, return the layers that hurt most to float.
        goal: What is wanted most among what keeps the limits: ``latency`` of one request at a time, ``throughput`` of many,
            or a small ``size``.
        samples: Calibration batches to use; None means all.
        require: What the built artifact must show, as in ``formats.int8: ">=0.9"``.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, ser_json_inf_nan="constants"
    )

    recipe: Literal[1] = 1
    description: str = ""
    target: str | None = None
    backend: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    passes: tuple[Pass, ...] = ()
    candidates: tuple[str, ...] = ()
    repair: bool = False
    goal: Goal = "latency"
    samples: int | None = Field(default=None, ge=1)
    limits: Limits = Limits()
    require: dict[
        Annotated[str, AfterValidator(_requirement)], Annotated[str, AfterValidator(_condition)]
    ] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0)

    @staticmethod
    def load(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
        """Read a shipped recipe by name, a YAML file, or a mapping, and apply ``key=value`` overrides.

        Raises:
            RecipeError: Names the file, the key and, for unknown keys, the nearest known one.
        """
        if isinstance(source, Recipe):
            if not overrides:
                return source
            source = source.dump()
        where, raw = _read(source)
        raw = _with_imports(where, raw, ())
        for override in overrides:
            raw = _override(raw, override)
        return _build(where, raw)

    def dump(self) -> dict[str, Any]:
        """Plain data with every default written out; ``Recipe.load(recipe.dump()) == recipe``."""
        raw = self.model_dump(mode="json", exclude={"passes"})
        raw["passes"] = [{p.name: p.model_dump(mode="json")} for p in self.passes]
        return {key: raw[key] for key in type(self).model_fields}

    def yaml(self) -> str:
        """The resolved recipe as a file."""
        return yaml.safe_dump(self.dump(), sort_keys=False, default_flow_style=None, width=120)

    @property
    def graph_passes(self) -> tuple[Pass, ...]:
        """Its own passes over the graph or, where it has candidates, those of the first."""
        if self.candidates:
            return Recipe.load(self.candidates[0]).graph_passes
        return tuple(p for p in self.passes if p.stage == "graph")

    @property
    def exact(self) -> bool:
        """Whether none of its own passes changes numbers."""
        return all(p.exact for p in self.passes)

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved recipe."""
        return hashlib.sha256(json.dumps(self.dump(), sort_keys=True).encode()).hexdigest()


def shipped() -> list[str]:
    """Names of the recipes that come with optkit."""
    return sorted(
        f.name.removesuffix(".yaml") for f in files("optkit.recipes").iterdir() if f.name.endswith(".yaml")
    )


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, with the options of every pass."""
    base = Recipe.model_json_schema()
    properties = dict(base["properties"])
    options = [
        {
            "type": "object",
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 1,
            "properties": {name: PASSES[name].model_json_schema()},
        }
        for name in sorted(PASSES)
    ]
    properties["passes"] = {"type": "array", "items": {"anyOf": [{"enum": sorted(PASSES)}, *options]}}
    properties["imports"] = {
        "type": "array",
        "items": {"type": "string"},
        "description": "recipes whose passes come first, but behind passes over a torch module",
    }
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {**base, "$schema": draft, "properties": properties, "required": ["recipe"]}


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Mapping):
        return "recipe", dict(source)
    path = Path(source)
    is_file = isinstance(source, Path) or path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if is_file:
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file", hint=f"shipped recipes: {', '.join(shipped())}")
        where = str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{where}: not valid YAML: {error}") from error
    else:
        known = {name.lower(): name for name in shipped()}
        if str(source).lower() not in known:
            raise UnknownNameError("recipe", str(source), known.values(), listed="optkit recipe list")
        name = known[str(source).lower()]
        where, text = name, (files("optkit.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise RecipeError(f"{where}: a recipe is a mapping, starting with 'recipe: 1'")
    return where, raw


def _with_imports(where: str, raw: dict[str, Any], seen: tuple[str, ...]) -> dict[str, Any]:
    raw = dict(raw)
    before: list[Any] = []
    _check_keys(where, raw)
    imports = raw.pop("imports", None) or []
    if not isinstance(imports, list | tuple):
        raise RecipeError(f"{where}: imports: a list is wanted, not {type(imports).__name__}")
    for name in imports:
        if not isinstance(name, str):
            raise RecipeError(f"{where}: imports: {name!r} is not the name of a recipe")
        if name in seen:
            raise RecipeError(f"{where}: imports: {name} imports itself")
        source = Path(where).parent / name if name.endswith((".yaml", ".yml")) else name
        try:
            inner_where, inner = _read(source)
        except UsageError as error:
            raise RecipeError(f"{where}: imports: {error}", hint=error.hint) from error
        before += _with_imports(inner_where, inner, (*seen, name)).get("passes") or []
    if before or "passes" in raw:
        own = raw.get("passes") or []
        if not isinstance(own, list | tuple):
            raise RecipeError(f"{where}: passes: a list is wanted, not {type(own).__name__}")
        # Passes over a torch module come before any over the graph, those of imports too.
        torch = [_over_torch(item) for item in own]
        first = next((i for i, is_torch in enumerate(torch) if not is_torch), len(own))
        raw["passes"] = [*own[:first], *before, *own[first:]]
    return raw


def _over_torch(item: Any) -> bool:
    """Whether an entry of ``passes`` names a pass over a torch module; what is wrong with it, ``_build`` says."""
    name = (
        next(iter(item), None) if isinstance(item, Mapping) else item.name if isinstance(item, Pass) else item
    )
    kind = PASSES.get(name) if isinstance(name, str) else None
    return kind is not None and kind.stage == "torch"


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {override!r}: key=value is wanted",
            hint="for example --set passes.quantize-static.method=mse",
        )
    head, *rest = key.strip().split(".")
    try:
        # A condition such as >=0.9 is no YAML without quotes, which a shell takes away.
        value = text.strip() if head == "require" else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML") from error
    raw = dict(raw)
    if head == "passes":
        if len(rest) != 2:
            raise RecipeError(f"--set {override!r}: passes.<pass>.<option>=value is wanted")
        wanted, option = rest
        items = [_entry("--set", i, item) for i, item in enumerate(raw.get("passes") or [])]
        if not any(name.lower() == wanted.lower() for name, _ in items):
            raise UnknownNameError("pass of this recipe", wanted, [name for name, _ in items], where="--set")
        raw["passes"] = [
            {name: {**options, option: value} if name.lower() == wanted.lower() else options}
            for name, options in items
        ]
    elif rest:
        inner = raw.get(head) or {}
        if head not in Recipe.model_fields:
            raise UnknownNameError("key of a recipe", head, Recipe.model_fields, where=f"--set {override!r}")
        if head not in ("limits", "options", "require") or not isinstance(inner, Mapping):
            raise RecipeError(f"--set {override!r}: {head} has no keys below it")
        if head == "options" and len(rest) > 1:
            # One entry of an option that is a table; what it is called may have dots itself.
            table = inner.get(rest[0]) or {}
            if not isinstance(table, Mapping):
                raise RecipeError(f"--set {override!r}: options.{rest[0]} has no keys below it")
            raw[head] = {**inner, rest[0]: {**table, ".".join(rest[1:]): value}}
        else:
            raw[head] = {**inner, ".".join(rest): value}
    else:
        raw[head] = value
    return raw


def _entry(where: str, index: int, item: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(item, Pass):
        return item.name, item.model_dump(mode="json")
    if isinstance(item, str):
        return item, {}
    if isinstance(item, Mapping) and len(item) == 1:
        name, options = next(iter(item.items()))
        if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
            return name, dict(options or {})
    raise RecipeError(
        f"{where}: passes.{index}: the name of a pass, or one name with its options, is wanted, not {item!r}"
    )


def _check_keys(where: str, raw: Mapping[str, Any]) -> None:
    for key in raw:
        if key not in (*Recipe.model_fields, "imports"):
            raise RecipeError(
                f"{where}: unknown key {key!r}", hint=_nearest(key, (*Recipe.model_fields, "imports"))
            )
    written = raw.get("recipe")
    if type(written) is not int or written != 1:
        raise RecipeError(
            f"{where}: recipe: version {written!r} is not known", hint="start the file with 'recipe: 1'"
        )


def _build(where: str, raw: dict[str, Any]) -> Recipe:
    _check_keys(where, raw)
    passes = []
    for index, item in enumerate(raw.get("passes") or []):
        name, options = _entry(where, index, item)
        try:
            kind = PASSES[name]
        except UnknownNameError as error:
            raise RecipeError(f"{where}: passes.{index}: {error}", hint=error.hint) from error
        passes.append(validated(kind, f"{where}: passes.{index}: {kind.name}", options))
    recipe: Recipe = validated(Recipe, where, {**raw, "passes": tuple(passes)})
    stages = [p.stage for p in recipe.passes]
    if "graph" in stages and "torch" in stages[stages.index("graph") :]:
        raise RecipeError(f"{where}: passes over a torch module must come before passes over the graph")
    if "graph" in stages and recipe.candidates:
        raise RecipeError(
            f"{where}: passes over the graph and candidates are both given",
            hint="candidates are whole recipes: put the passes into a recipe of their own and name it",
        )
    return recipe


def validated(kind: type[BaseModel], where: str, values: Mapping[str, Any]) -> Any:
    """An instance of ``kind``.

    Raises:
        RecipeError: Names ``where``, the option and, for unknown ones, the nearest known.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            fields: Any = kind.model_fields
            for part in first["loc"][:-1]:
                annotation = fields[part].annotation if part in fields else None
                fields = getattr(annotation, "model_fields", {})
            known = _nearest(str(first["loc"][-1]), tuple(fields)) if fields else None
            raise RecipeError(f"{where}: unknown option {place!r}", hint=known) from error
        said = first["msg"].removeprefix("Value error, ")
        said = said[:1].lower() + said[1:] if said == first["msg"] else said
        shown = repr(first.get("input"))
        shown = shown if len(shown) < 100 else f"{shown[:100]}…"
        raise RecipeError(f"{where}: {place}: {said}, not {shown}") from error


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"
