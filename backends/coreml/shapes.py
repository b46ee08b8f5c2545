"""The sizes that free axes may have in the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from optkit.backends.sizes import Count, spelling
from optkit.errors import ModelError, UsageError

# Where nothing is said, a free axis may have any size up to this one: Core ML takes no unbounded range.
LARGEST = 4096


class Range(BaseModel):
    """From ``min`` to ``max``; ``default`` is what the Neural Engine runs, other sizes run elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: int = Field(default=1, ge=1)
    max: int = Field(default=LARGEST, ge=1)
    default: int | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min <= self.usual <= self.max:
            raise ValueError(f"min {self.min}, default {self.usual} and max {self.max} are not in order")
        return self

    @property
    def usual(self) -> int:
        """The default, or the smallest."""
        return self.min if self.default is None else self.default


Size = Annotated[
    Annotated[Count, Tag("size")]
    | Annotated[tuple[Count, ...], Field(min_length=2), Tag("sizes")]
    | Annotated[Range, Tag("range")],
    Discriminator(lambda v: "range" if isinstance(v, Mapping | Range) else spelling(v)),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The free axes of a model.

    Attributes:
        fixed: Size by the key of the axis.
        listed: Sizes by key; all lists are as long as one another, and belong together entry by entry.
        ranged: Ranges by key.
    """

    fixed: Mapping[str, int]
    listed: Mapping[str, tuple[int, ...]]
    ranged: Mapping[str, Range]


def keys(value: ir.Value) -> list[str | int]:
    """The axes of an input: sizes, and names for those that are free; an axis without one is ``<input>.<axis>``."""
    assert value.shape is not None
    return [
        d if isinstance(d, int) else (d.value or f"{value.name}.{axis}") for axis, d in enumerate(value.shape)
    ]


def axes(
    model: ir.Model, wanted: Mapping[str, Size], usual: Mapping[str, tuple[int, ...]] | None = None
) -> Axes:
    """What the free axes of ``model`` become; each goes by its name, or as ``<input>.<axis>``.

    Args:
        model: Its inputs have known ranks.
        wanted: As the options say.
        usual: Shapes that inputs usually have; they are the defaults of ranges that have none.

    Raises:
        ModelError: The rank of an input is not known.
        UsageError: A name is none of theirs, or lists of sizes do not belong together.
    """
    for value in model.graph.inputs:
        if value.shape is None:
            raise ModelError(f"the rank of the input {value.name!r} is not known, and Core ML needs it")
    free = dict.fromkeys(
        k for v in model.graph.inputs if not v.is_initializer() for k in keys(v) if isinstance(k, str)
    )
    aliases = {
        f"{v.name}.{axis}": k
        for v in model.graph.inputs
        if not v.is_initializer()
        for axis, k in enumerate(keys(v))
        if isinstance(k, str)
    }
    wanted = {name if name in free else aliases.get(name, name): size for name, size in wanted.items()}
    if unknown := [name for name in wanted if name not in free]:
        known = ", ".join(free) or "none: every axis has its size"
        raise UsageError(
            f"options.shapes.{unknown[0]}: no free axis has this name", hint=f"free axes: {known}"
        )
    listed = {k: v for k, v in wanted.items() if isinstance(v, tuple)}
    if len({len(v) for v in listed.values()}) > 1:
        counts = ", ".join(f"{k}: {len(v)}" for k, v in listed.items())
        raise UsageError(f"options.shapes: lists of sizes must be as long as one another ({counts})")
    ranged = {k: v for k, v in wanted.items() if isinstance(v, Range)}
    rest = [k for k in free if k not in wanted]
    if listed and (ranged or rest):
        raise UsageError(
            f"options.shapes: {(rest or list(ranged))[0]} is a range, and others are lists: an input has either",
            hint="give every free axis one size or a list of sizes",
        )
    sizes = {
        k: size
        for v in model.graph.inputs
        if not v.is_initializer() and v.name in (usual or {})
        for k, size in zip(keys(v), (usual or {})[str(v.name)], strict=True)
    }
    return Axes(
        fixed={k: v for k, v in wanted.items() if isinstance(v, int)},
        listed=listed,
        ranged={k: _around(v, sizes.get(k)) for k, v in ranged.items()}
        | {k: _around(Range(max=max(LARGEST, sizes.get(k, 1))), sizes.get(k)) for k in rest},
    )


def _around(range_: Range, size: int | None) -> Range:
    """With ``size`` for a default, where there is none and it fits."""
    if size is None or range_.default is not None or not range_.min <= size <= range_.max:
        return range_
    return range_.model_copy(update={"default": size})


def fix(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Give the axes of the inputs their sizes, in place; what is behind them has to be inferred again."""
    for value in model.graph.inputs:
        if value.shape is not None and not value.is_initializer():
            value.shape = ir.Shape([sizes.get(k, k) if isinstance(k, str) else k for k in keys(value)])
