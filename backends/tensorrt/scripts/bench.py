"""Time the engine by the clock of the device.

    python bench.py

Each run is between two events on the stream; copies to and from the device are not part of it. Warm-up runs are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closeness import batch, spread

if TYPE_CHECKING:
    import numpy as np
    from device import Device
    from engine import Engine

HERE = Path(__file__).resolve().parent


def bench(
    device: Device, engine: Engine, feeds: dict[str, np.ndarray], *, warmup: int, runs: int
) -> dict[str, Any]:
    """Median, spread and percentiles over ``runs`` runs, in milliseconds."""
    engine.bind(feeds)
    for _ in range(warmup):
        engine.enqueue()
    device.wait()
    times = []
    for _ in range(runs):
        start = device.event()
        engine.enqueue()
        times.append(device.seconds(start, device.event()))
    return {
        **spread(times), "warmup": warmup, "transfers": "not counted",
        "inputs": {name: list(array.shape) for name, array in feeds.items()},
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200, help="how many are timed (%(default)s)")
    parser.add_argument("--warmup", type=int, default=50, help="how many go before (%(default)s)")
    arguments = parser.parse_args()
    # Loads TensorRT, which the help does not need.
    from engine import Engine, opened

    records = []
    with opened() as gpu:
        loaded = Engine(gpu)
        for file in sorted((HERE / "golden").glob("*.npz")):
            given, _ = batch(file)
            records.append(bench(gpu, loaded, given, warmup=arguments.warmup, runs=arguments.runs))
        result = {"batches": records, "engine": loaded.sha256, **gpu.facts()}
    (HERE / "bench.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
