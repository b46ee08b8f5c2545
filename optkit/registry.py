"""Names to objects: a built-in table of strings, then entry points of other distributions."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from optkit.errors import BackendUnavailableError, OptkitError, UnknownNameError


class Registry(Mapping[str, Any]):
    """A read-only mapping whose values are imported when they are asked for.

    Args:
        kind: What the names stand for, as in ``unknown pass 'x'``.
        table: ``name -> "package.module:Object"``.
        group: Entry-point group through which other distributions add names; a name twice is an error.
        extras: ``name -> extra`` of this distribution that installs what the object needs.
    """

    def __init__(
        self, kind: str, table: Mapping[str, str], *, group: str, extras: Mapping[str, str] | None = None
    ) -> None:
        self._kind, self._table, self._group, self._extras = kind, dict(table), group, dict(extras or {})
        self._rows = cache(self._read)

    def _read(self) -> dict[str, str]:
        rows = dict(self._table)
        points: list[EntryPoint] = sorted(entry_points(group=self._group), key=lambda p: (p.name, p.value))
        for point in points:
            if rows.get(point.name, point.value) != point.value:
                raise OptkitError(
                    f"two distributions provide the {self._kind} {point.name!r}: {rows[point.name]} and {point.value}",
                    hint="uninstall one of them",
                )
            rows[point.name] = point.value
        return rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows())

    def __len__(self) -> int:
        return len(self._rows())

    def __contains__(self, name: object) -> bool:
        return name in self._rows()

    def __getitem__(self, name: str) -> Any:
        rows = self._rows()
        if name not in rows:
            lowered = {known.lower(): known for known in rows}
            if name.lower() not in lowered:
                raise UnknownNameError(self._kind, name, rows)
            name = lowered[name.lower()]
        module, _, attribute = rows[name].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if name not in self._extras or (error.name or "").startswith("optkit"):
                raise
            raise BackendUnavailableError(
                f"{self._kind} {name!r} needs the package {error.name!r}, which is not installed",
                hint=f"pip install 'optkit[{self._extras[name]}]'",
            ) from error
