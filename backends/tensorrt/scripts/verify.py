"""Run the engine on the golden inputs and compare with the golden outputs.

    python verify.py

The golden outputs are those of the same typed graph in ONNX Runtime on a CPU. Exit code 0: close enough; 1: not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent


def closeness(expected: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """Cosine, largest difference relative to the largest value, and whether shapes and infinities agree."""
    same = expected.shape == found.shape
    if not same or expected.dtype.kind not in "fV":
        equal = same and bool((expected == found).all())
        return {"cosine": 1.0 if equal else 0.0, "largest": 0.0 if equal else None, "finite": equal}
    a, b = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    finite = bool((np.isfinite(a) == np.isfinite(b)).all())
    a, b = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(np.array_equal(a, b))
    return {
        "cosine": cosine,
        "largest": float(np.abs(a - b).max(initial=0) / (np.abs(a).max(initial=0) or 1)),
        "finite": finite,
    }


def verify(run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]) -> dict[str, Any]:
    """Compare ``run`` with every golden batch; the record says whether all are within the bundle's limit."""
    bundle = json.loads((HERE / "bundle.json").read_text())
    outputs: list[dict[str, Any]] = []
    for file in sorted((HERE / "golden").glob("*.npz")):
        with np.load(file, allow_pickle=False) as batch:
            feeds = {k.removeprefix("in:"): batch[k] for k in batch.files if k.startswith("in:")}
            expected = {k.removeprefix("out:"): batch[k] for k in batch.files if k.startswith("out:")}
        found = run(feeds)
        for name, value in expected.items():
            record = (
                closeness(value, found[name])
                if name in found
                else {"cosine": 0.0, "largest": None, "finite": False}
            )
            outputs.append({"batch": file.stem, "output": name, **record})
    met = bool(outputs) and all(o["finite"] and o["cosine"] >= bundle["min_cosine"] for o in outputs)
    return {"met": met, "min_cosine": bundle["min_cosine"], "outputs": outputs}


if __name__ == "__main__":
    from device import Device
    from engine import Engine

    with Device() as device:
        engine = Engine(device)
        record = {**verify(engine.run), "engine": engine.sha256, **device.facts()}
    (HERE / "verified.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    raise SystemExit(0 if record["met"] else 1)
