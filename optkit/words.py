"""Options that are one of some words take these in any case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationInfo, field_validator


class Worded(BaseModel):
    """What a recipe or a caller writes: ``ios17`` is ``iOS17`` where a field is ``Literal["iOS16", "iOS17"]``."""

    @field_validator("*", mode="before")
    @classmethod
    def _in_any_case(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str) or info.field_name is None:
            return value
        known = _words(cls.model_fields[info.field_name].annotation)
        return next((word for word in known if word.lower() == value.lower()), value)


def _words(annotation: Any) -> Iterator[str]:
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        else:
            yield from _words(part)
