"""LiteRT at work in a process that it may abort. Nothing of optkit is imported here but this module."""

from __future__ import annotations

import contextlib

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main(file: str) -> None:
    """Run each signature of ``file`` on zeros; an error that LiteRT raises is no death."""
    with contextlib.suppress(RuntimeError, ValueError):
        interpreter = Interpreter(model_path=file, num_threads=1)
        for key in interpreter.get_signature_list():
            run = interpreter.get_signature_runner(key)
            run(**{name: np.zeros(d["shape"], d["dtype"]) for name, d in run.get_input_details().items()})
