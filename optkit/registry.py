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
        names = {name.lower(): name for name in rows}
        points: list[EntryPoint] = sorted(entry_points(group=self._group), key=lambda p: (p.name, p.value))
        for point in points:
            name = names.setdefault(point.name.lower(), point.name)
            if rows.setdefault(name, point.value) != point.value:
                raise OptkitError(
                    f"two distributions provide the {self._kind} {name!r}: {rows[name]} and {point.value}",
                    hint="uninstall one of them",
                )
        return rows

    def _name(self, name: object) -> str | None:
        """The name as its row has it; any case will do."""
        wanted = name.lower() if isinstance(name, str) else None
        return next((known for known in self._rows() if known.lower() == wanted), None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows())

    def __len__(self) -> int:
        return len(self._rows())

    def __contains__(self, name: object) -> bool:
        return self._name(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The object, or ``default`` for a name that nobody knows."""
        known = self._name(name)
        return default if known is None else self[known]

    def __getitem__(self, name: str) -> Any:
        known = self._name(name)
        if known is None:
            raise UnknownNameError(self._kind, name, self._rows())
        module, _, attribute = self._rows()[known].partition(":")
        ours = module.split(".")[0] == "optkit"
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = error.name or "?"
            # Our own modules are there or we are wrong; so is a package that no extra promises.
            if missing.split(".")[0] == "optkit" or (ours and known not in self._extras):
                raise
            package = f"'optkit[{self._extras[known]}]'" if known in self._extras else missing
            raise BackendUnavailableError(
                f"{self._kind} {known!r} needs the package {missing!r}, which is not installed",
                hint=f"pip install {package}",
            ) from error
        except Exception as error:
            if ours:
                raise
            raise OptkitError(f"{self._kind} {known!r}: {module}: {type(error).__name__}: {error}") from error
        if not ours and not hasattr(loaded, attribute):
            raise OptkitError(f"{self._kind} {known!r}: {module} has no {attribute!r}")
        return getattr(loaded, attribute)
