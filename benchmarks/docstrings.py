"""Pairs of texts that belong together, found on every machine: docstrings of Python's standard library and NumPy.

The first paragraph of a docstring is the query, what follows is the document that it must find. Who asks for more than a few of
each file gets the rest of the files, and then SymPy's, which comes with torch and with these benchmarks.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np

# Tests repeat each other, and what is installed later must not change the samples.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "turtledemo",
}
_PER_FILE = 6


@cache
def pairs(n: int, *, held_out: bool) -> list[tuple[str, str]]:
    """``n`` times (first paragraph, rest), or all that there are.

    A quarter of the source files is held out from evaluations. A few pairs are taken of each file first, files in the order of
    a digest of their names, pairs in that of a digest of their text: neighbours have nothing to do with each other.
    """
    found: dict[str, str] = {}
    everywhere = (Path(sysconfig.get_path("stdlib")), Path(np.__file__).parent)
    for roots, most in ((everywhere, _PER_FILE), (everywhere, None), (_sympy(), None)):
        for path in _files(roots, held_out):
            new = ((q, d) for q, d in _read(path) if q not in found and d not in found.values())
            found.update(islice(new, most))
            if len(found) >= n:
                return _mixed(list(found.items())[:n])
    return _mixed(list(found.items()))


def _mixed(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(found, key=lambda pair: _digest(pair[0]))


def _sympy() -> tuple[Path, ...]:
    """Its folder, without importing it; none where it is not installed."""
    found = importlib.util.find_spec("sympy")
    return tuple(map(Path, found.submodule_search_locations or ())) if found is not None else ()


def _files(roots: Sequence[Path], held_out: bool) -> list[Path]:
    ordered = []
    for root in roots:
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            digest = _digest(inside.as_posix())
            if _LEFT_OUT.isdisjoint(inside.parts) and (digest[0] % 4 == 0) == held_out:
                ordered.append((digest, path))
    return [path for _, path in sorted(ordered)]


def _read(path: Path) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about their string escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            query, _, document = (ast.get_docstring(node) or "").partition("\n\n")
            query, document = (re.sub(r"\s+", " ", text).strip() for text in (query, document))
            if 30 <= len(query) <= 160 and len(document) >= 200 and query.lower() not in document.lower():
                yield query, document


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
