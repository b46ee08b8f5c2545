"""Build the engine on the device that will run it.

    python build_engine.py

Precision comes from the types and the Q/DQ pairs of the graph alone. The timing cache is kept beside the engine, so that a
rebuild takes the same kernels. Nothing is done where the engine is there already (--force builds it anew).

    python build_engine.py --plugin liboptkit_plugins.so --model tensorrt/model.onnx

The graph of this folder calls no plug-ins. With these options another one of the same inputs and outputs is built, such as that in
tensorrt/ of a Triton artifact of the same model, with the library that its optkit_plugins.cpp compiles to; verify.py and bench.py
then run that engine. optkit finalize builds the graph of this folder again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

if __name__ == "__main__":
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--force", action="store_true", help="build although the engine is there")
    arguments.add_argument("--model", type=Path, metavar="ONNX", help="another graph than this folder's")
    arguments.add_argument(
        "--plugin", type=Path, action="append", default=[], metavar="LIB",
        help="a library of plug-ins to load before the graph is read; may be given again",
    )  # fmt: skip
    asked = arguments.parse_args()
    # Loads TensorRT, which the help does not need.
    from building import build

    build(force=asked.force, model=asked.model, plugins=asked.plugin)
