"""Run the engine on the golden inputs and compare with the golden outputs.

    python verify.py

The golden outputs are those of the same typed graph in ONNX Runtime on a CPU. Exit code 0: close
enough; 1: not, or nothing was compared, and a line on stderr says why; 4: TensorRT or the device is missing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from closeness import verify

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    # Loads TensorRT, which the help does not need.
    from engine import Engine, opened

    with opened() as device:
        engine = Engine(device)
        checked = verify(engine.run, HERE / "golden", engine.bundle["min_cosine"])
        record = {**checked, "engine": engine.sha256, **device.facts()}
    (HERE / "verified.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    raise SystemExit(0 if record["met"] else 1)
