"""An exported program that comes from a file is read without running code that the file brings.

torch's reader unpickles what is no tensor, loads compiled libraries from the archive, calls whatever function a node names
and evaluates sizes as Python. So what the archive holds is looked at first, and unpickling is held to tensors while torch reads.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from optkit.errors import UsageError

# What torch writes as the target of a node: an operator by its three names, arithmetic on sizes.
_TARGET = re.compile(
    r"torch\.ops\.(higher_order\.[A-Za-z]\w*|[A-Za-z]\w*\.(__i?(and|or|xor|lshift|rshift)__|(?!__)\w+)\.(?!_)\w+)"
    r"|torch\._?sym_\w+|math\.[a-z]\w*"
    r"|_operator\.(eq|ne|[lg][et]|neg|pos|mul|add|sub|floordiv|truediv|mod|pow|and_|or_|xor|not_|[lr]shift|getitem)"
)
_RESOLVED = ("torch", "_operator", "math")
_CALLED_IN_SIZES = re.compile(r"[A-Z]\w*|floor|ceiling|sqrt|log|exp|abs")
_SIZES = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
# Folders and files of an archive that hold more than tensors.
_CODE = {"data/aotinductor/": "compiled libraries", "constants/custom_obj_": "objects", "constants/opaque_obj_": "pickles"}  # fmt: skip
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def load_program(path: Path) -> Any:
    """The ``ExportedProgram`` of a file.

    Raises:
        UsageError: It is none that this torch reads, or holds code.
    """
    try:
        _look_through(path)
        with _tensors_alone(), _heard() as said:
            try:
                return torch.export.load(path)
            except Exception as error:
                raise _unreadable(path, said or [error]) from error
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _unreadable(path, [error]) from error


def _unreadable(path: Path, causes: list[BaseException]) -> UsageError:
    text = str(causes[-1]).strip()
    if "weights_only" in text or "Weights only" in text:
        kind = re.search(r"GLOBAL ([\w.]+)", text)
        return _code(path, f"pickled objects{f' ({kind[1]})' if kind else ''}")
    reason = next((line for line in text.splitlines() if line.strip()), type(causes[-1]).__name__)
    return UsageError(
        f"{path}: is not an exported program that torch {torch.__version__} reads: {reason[:200]}",
        hint="write it with torch.export.save(torch.export.export(module, args), 'model.pt2')",
    )


def _code(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path}: holds {what}, which can run any code when loaded, and is refused",
        hint="export it again with tensors alone, in plain tuples, lists and dicts; or give the module",
    )


def _look_through(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise _code(path, "files of the same name")
        for name in names:
            if found := next((what for place, what in _CODE.items() if place in name), ""):
                raise _code(path, found)
            if name.endswith(".json") and ("models/" in name or "exported_program" in name):
                _look_at(path, json.loads(archive.read(name)))


def _look_at(path: Path, part: Any) -> None:
    """Refuse nodes that call what is no operator, and sizes that are no arithmetic."""
    if isinstance(part, list):
        for item in part:
            _look_at(path, item)
    if not isinstance(part, dict):
        return
    for key, item in part.items():
        if isinstance(item, str) and key == "target":
            if item.startswith(_RESOLVED) and not _TARGET.fullmatch(item):
                raise _code(path, f"a call of {item[:80]}")
        elif isinstance(item, str) and key == "expr_str":
            if not _arithmetic(item):
                raise _code(path, f"the size {item[:80]!r}")
        else:
            _look_at(path, item)


def _arithmetic(text: str) -> bool:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    named = set()
    for node in ast.walk(tree):
        if not isinstance(node, _SIZES):
            return False
        if isinstance(node, ast.Name) and "__" in node.id:
            return False
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not _CALLED_IN_SIZES.fullmatch(node.func.id):
                return False
            if node.func.id == "Symbol" and len(node.args) == 1:
                named.add(node.args[0])
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return all(n in named and str(n.value).isidentifier() for n in strings)


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """While open, ``torch.load`` reads tensors and nothing else, whatever its caller asks for."""
    old = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _heard() -> Iterator[list[BaseException]]:
    """What torch reports to its log alone while it reads, in place of showing it."""
    found: list[BaseException] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None:
                found.append(record.exc_info[1])

    torchs = logging.getLogger("torch.export")
    keep, propagate, level = Keep(), torchs.propagate, torchs.level
    torchs.addHandler(keep)
    torchs.propagate = False
    torchs.setLevel(logging.WARNING)
    others = [h for h in torchs.handlers if h is not keep]
    for handler in others:
        torchs.removeHandler(handler)
    try:
        yield found
    finally:
        torchs.removeHandler(keep)
        for handler in others:
            torchs.addHandler(handler)
        torchs.propagate = propagate
        torchs.setLevel(level)
