"""Real files of this machine whose extension says, without doubt, what they are."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

# Extension -> label of Magika. Left out: what names several types (txt, h, cfg) and what Python writes as it runs (pyc).
_TYPES = {
    "awk": "awk",
    "bat": "batch",
    "bib": "bib",
    "bmp": "bmp",
    "bz2": "bzip",
    "c": "c",
    "cc": "cpp",
    "class": "javabytecode",
    "cmake": "cmake",
    "cpp": "cpp",
    "crt": "pem",
    "css": "css",
    "csv": "csv",
    "deb": "deb",
    "diff": "diff",
    "epub": "epub",
    "exe": "pebin",
    "f90": "fortran",
    "gif": "gif",
    "go": "go",
    "gz": "gzip",
    "html": "html",
    "ico": "ico",
    "ipynb": "ipynb",
    "jar": "jar",
    "java": "java",
    "jpeg": "jpeg",
    "jpg": "jpeg",
    "js": "javascript",
    "json": "json",
    "lua": "lua",
    "m4": "m4",
    "md": "markdown",
    "npy": "npy",
    "npz": "npz",
    "ogg": "ogg",
    "onnx": "onnx",
    "otf": "otf",
    "patch": "diff",
    "pdf": "pdf",
    "pem": "pem",
    "php": "php",
    "pl": "perl",
    "pm": "perl",
    "png": "png",
    "po": "po",
    "ps": "postscript",
    "py": "python",
    "pyi": "python",
    "rb": "ruby",
    "rs": "rust",
    "rst": "rst",
    "sh": "shell",
    "so": "elf",
    "sql": "sql",
    "sqlite": "sqlite",
    "svg": "svg",
    "tcl": "tcl",
    "toml": "toml",
    "ttf": "ttf",
    "wav": "wav",
    "webp": "webp",
    "whl": "zip",
    "woff2": "woff2",
    "xml": "xml",
    "xz": "xz",
    "yaml": "yaml",
    "yml": "yaml",
    "zip": "zip",
}
_SMALLEST = 64


def typed_files(per_type: int, skip: int = 0) -> Iterator[tuple[str, Path]]:
    """(type, file), at most ``per_type`` of each behind the first ``skip``, types in turn.

    Files come in the order of a digest of their paths: what is installed later moves no other file.
    """
    found = _found()
    for i in range(skip, skip + per_type):
        for kind in sorted(found):
            if i < len(found[kind]):
                yield kind, found[kind][i]


@cache
def _found() -> dict[str, list[Path]]:
    ordered = defaultdict(list)
    for root in ("/usr/share", "/usr/lib", "/usr/include", sys.base_prefix, sys.prefix):
        for folder, _, names in os.walk(root):
            for name in names:
                kind = _TYPES.get(name.rpartition(".")[2].lower())
                if kind:
                    whole = os.path.join(folder, name)
                    ordered[kind].append((hashlib.sha256(whole.encode(errors="replace")).digest(), whole))
    found: dict[str, list[Path]] = {}
    for kind, paths in ordered.items():
        seen: set[bytes] = set()
        found[kind] = []
        # The same file often lies in several environments: a copy must not be in both halves.
        for _, name in sorted(set(paths))[:200]:
            path = Path(name)
            if path.is_symlink() or not os.access(path, os.R_OK) or path.stat().st_size < _SMALLEST:
                continue
            content = bytes_at_both_ends(path).tobytes()
            if content not in seen:
                seen.add(content)
                found[kind].append(path)
    return found


def bytes_at_both_ends(path: Path, *, size: int = 1024, block: int = 4096, padding: int = 256) -> np.ndarray:
    """First and last ``size`` bytes without the white space around them, ``[2 * size]``, as Magika reads a file."""
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(block)
        file.seek(max(0, length - block))
        tail = file.read(block)
    # A file of one block is stripped at both ends before it is cut.
    head, tail = (head.strip(), tail.strip()) if length <= block else (head.lstrip(), tail.rstrip())
    first, last = head[:size], tail[-size:]
    x = np.full(2 * size, padding, np.int32)
    x[: len(first)] = np.frombuffer(first, np.uint8)
    x[2 * size - len(last) :] = np.frombuffer(last, np.uint8)
    return x
