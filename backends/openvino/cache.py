"""Compiled models of finished artifacts, so that the next load is three to five times faster.

They live in ``$OPTKIT_CACHE/openvino`` (``~/.cache/optkit/openvino``), not in the artifact: what is in the artifact is
covered by its manifest, and an artifact may lie where nothing can be written. OpenVINO names its file after the path of the
model and accepts it where time (in seconds) and size agree; the folder's name here says the content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
# What is kept, newest first: as many models as one machine serves, within the disk that a cache may take.
_MOST, _MOST_BYTES = 32, 4 << 30


def root() -> Path:
    """Where the compiled models are."""
    named = os.environ.get("OPTKIT_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "optkit") / "openvino"


def folder(path: Path, files: Sequence[str], machine: str) -> Path | None:
    """The folder for the artifact in ``path``; None where it is not finished, or the cache cannot be written.

    Args:
        files: Names of the model's files.
        machine: Version and processor that the compiled model fits.
    """
    try:
        listed = json.loads((path / _MANIFEST).read_bytes())["files"]
        digests = {f["path"]: f["sha256"] for f in listed if f["path"] in files}
        # An edited file is another one, whatever the manifest says.
        stamps = [(f.stat().st_size, f.stat().st_mtime_ns) for f in (path / name for name in files)]
        key = hashlib.sha256(json.dumps([machine, sorted(digests.items()), stamps]).encode()).hexdigest()[:32]
        place = root() / key
        place.mkdir(parents=True, exist_ok=True)
        os.utime(place)
    except (OSError, LookupError, TypeError, ValueError) as error:
        logger.debug("no cache for %s: %s", path, error)
        return None
    _evict(place)
    return place


def _evict(current: Path) -> None:
    """Remove what was not used for longest, where there is too much."""
    total = 0
    with contextlib.suppress(OSError):
        entries = sorted(root().iterdir(), key=lambda p: -p.stat().st_mtime_ns)
        for index, entry in enumerate(entries):
            total += sum(f.stat().st_size for f in entry.iterdir() if f.is_file())
            if entry != current and (index >= _MOST or total > _MOST_BYTES):
                shutil.rmtree(entry, ignore_errors=True)
