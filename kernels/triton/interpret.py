"""A process of its own that runs programs in Triton's interpreter: ``python -m optkit.kernels.triton.interpret FOLDER``.

The interpreter executes the Python source with NumPy: it shows the arithmetic and the addresses of a kernel, and nothing of
layouts, machine code or races. Its ``dot`` multiplies bfloat16 as raw bits, it cuts what should be rounded to bfloat16, and what
it rounds to 8 bits is wrong at powers of 2; all is mended here and tried before anything runs.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from optkit.kernels.triton.tensors import array, tensor

_stock, _stock_convert = InterpreterBuilder.create_dot, interpreter._convert_float
_FLOATS = {
    tl.float32: np.float32, tl.float16: np.float16, tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn
}  # fmt: skip


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    """With bfloat16 widened; what is raw in the interpreter is 16 bits."""
    if a.dtype != tl.bfloat16 and b.dtype != tl.bfloat16:
        return _stock(self, a, b, d, *rest)
    wide = [
        v.data.view(ml_dtypes.bfloat16).astype(np.float32) if v.dtype == tl.bfloat16 else v.data
        for v in (a, b)
    ]
    return TensorHandle(np.matmul(*wide, dtype=np.float32).astype(d.data.dtype) + d.data, d.dtype.scalar)


def _convert(data: Any, before: Any, after: Any, mode: Any) -> Any:
    """Bits of floats as bits of other floats: by NumPy, to the nearest, ties to even."""
    if before not in _FLOATS or after not in _FLOATS:
        return _stock_convert(data, before, after, mode)
    wide = np.ascontiguousarray(data).view(_FLOATS[before]).astype(np.float32)
    return wide.astype(_FLOATS[after]).view(f"u{np.dtype(_FLOATS[after]).itemsize}")


InterpreterBuilder.create_dot = _dot
interpreter._convert_float = _convert


@triton.jit
def _try_dot(a, b, y):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(y + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def _check_dot() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
        y = torch.zeros(16, 16)
        _try_dot[(1,)](a, b, y)
        if not torch.allclose(y, a.float() @ b.float(), rtol=1e-5, atol=1e-5):
            raise RuntimeError(f"the interpreter of Triton {triton.__version__} multiplies {dtype} wrongly")


@triton.jit
def _try_cast(x, y):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 1024)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


def _check_cast() -> None:
    x = torch.linspace(-448, 448, 1024)
    x[:2] = torch.tensor([1.0625, 127.0])
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        y = torch.zeros(1024, dtype=dtype)
        _try_cast[(1,)](x, y)
        if not torch.equal(y.float(), x.to(dtype).float()):
            raise RuntimeError(f"the interpreter of Triton {triton.__version__} rounds to {dtype} wrongly")


def run(job: dict[str, Any], folder: Path) -> None:
    """One launch: arrays in from ``<key>.npz``, arrays out to ``<key>.out.npz``."""
    module, _, name = job["program"]["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    arrays = dict(np.load(folder / f"{job['key']}.npz"))
    given: dict[str, Any] = dict(job["scalars"])
    for argument, fmt in job["pointers"].items():
        given[argument] = tensor(arrays[argument], fmt)
    function[tuple(job["grid"])](**given, **job["program"]["constants"])
    found = {n: array(given[n], job["pointers"][n]) for n in job["outputs"]}
    np.savez(folder / f"{job['key']}.out.npz", allow_pickle=False, **found)


def main(folder: Path) -> None:
    """All launches, in order."""
    _check_dot()
    _check_cast()
    for job in json.loads((folder / "jobs.json").read_bytes()):
        run(job, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
