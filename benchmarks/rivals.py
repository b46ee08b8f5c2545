"""What PyTorch and its libraries offer for what a kernel does, to be timed against it."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optkit.torch.operators import body, offered

_F = torch.nn.functional
_RAW = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.int8, torch.float8_e4m3fn)}
_Compute = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Another way to the same numbers.

    Attributes:
        name: Of the library, and what was called.
        compute: Takes the kernel's inputs and attributes.
    """

    name: str
    compute: _Compute


def _int_mm(x: Any, w: Any, scale: Any, shift: Any, bias: Any) -> Any:
    return torch._int_mm(x, w.t()).add_(shift).float().mul_(scale).add_(bias).to(bias.dtype)


def _sdpa(q: Any, k: Any, v: Any, mask: Any = None, *, scale: float = 1.0) -> Any:
    mask = None if mask is None else mask.to(q.dtype)
    return _F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _flash_3(q: Any, k: Any, v: Any, *, scale: float = 1.0) -> Any:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    # It has the sequence before the heads.
    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale)[0].transpose(1, 2)


def _add_norm(x: Any, residual: Any, scale: Any, bias: Any = None, *, epsilon: float) -> Any:
    total = x + residual
    if bias is None:
        return _F.rms_norm(total, total.shape[-1:], scale, epsilon), total
    return _F.layer_norm(total, total.shape[-1:], scale, bias, epsilon), total


_LIBRARIES: dict[str, tuple[tuple[str, _Compute], ...]] = {
    "matmul": (("cuBLAS by torch.matmul", lambda x, w: x @ w),),
    "linear": (("cuBLAS by torch.addmm", lambda x, w, b: torch.addmm(b, x, w)),),
    "linear-relu": (("cuBLAS by torch.addmm, relu", lambda x, w, b: torch.addmm(b, x, w).relu_()),),
    "linear-gelu": (("cuBLAS by torch.addmm, gelu", lambda x, w, b: _F.gelu(torch.addmm(b, x, w))),),
    "linear-int8": (("cuBLAS by torch._int_mm, scaled", _int_mm),),
    "attention": (("torch.scaled_dot_product_attention", _sdpa), ("FlashAttention-3", _flash_3)),
    "masked-attention": (("torch.scaled_dot_product_attention", _sdpa),),
    "layer-norm": (
        ("torch.layer_norm", lambda x, s, b, *, epsilon: _F.layer_norm(x, x.shape[-1:], s, b, epsilon)),
    ),
    "rms-norm": (("torch.rms_norm", lambda x, s, *, epsilon: _F.rms_norm(x, x.shape[-1:], s, epsilon)),),
    "add-layer-norm": (("torch.add, torch.layer_norm", _add_norm),),
    "add-rms-norm": (("torch.add, torch.rms_norm", _add_norm),),
    "swiglu": (("torch.silu, torch.mul", lambda gate, up: _F.silu(gate) * up),),
    "geglu": (("torch.gelu, torch.mul", lambda gate, up: _F.gelu(gate) * up),),
    "softmax": (("torch.softmax", lambda x: torch.softmax(x, -1)),),
}


def rivals(name: str, *, compiled: bool = True) -> list[Rival]:
    """Those that are installed; the kernel's body through torch.compile last, where torch can trace it."""
    found = [
        Rival(name=label, compute=compute)
        for label, compute in _LIBRARIES.get(name, ())
        if compute is not _flash_3 or importlib.util.find_spec("flash_attn_interface") is not None
    ]
    if compiled and name in offered().values():
        found.append(
            Rival(name="torch.compile of the body", compute=torch.compile(body(name), dynamic=False))
        )
    return found


def tensor(array: np.ndarray, device: str) -> torch.Tensor:
    """A copy on a device, in the format of the array."""
    raw, kind = _RAW.get(array.dtype.name, (None, None))
    found = torch.from_numpy(array if raw is None else array.view(raw))
    return (found if kind is None else found.view(kind)).to(device)


def seconds(
    call: Callable[[], Any], device: str, *, together: int = 20, rounds: int = 11, warmup: int = 5
) -> float:
    """Median of a call, as ``Prepared.times`` takes it; on a processor by its own clock, which is for trying this out."""
    cuda = device != "cpu"
    for _ in range(warmup):
        call()
    times: list[float] = []
    for _ in range(rounds):
        if cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
        else:
            begun = time.perf_counter()
        for _ in range(together):
            call()
        if cuda:
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3 / together)
        else:
            times.append((time.perf_counter() - begun) / together)
    return statistics.median(times)


def copy_bandwidth(device: str, size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy within the device's memory: what no kernel is faster than."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    took: float = seconds(lambda: to.copy_(source), device, together=5)
    return 2 * size / took


def timed(
    rival: Rival, inputs: Sequence[torch.Tensor], attributes: Mapping[str, Any], device: str
) -> tuple[float, list[torch.Tensor]]:
    """Seconds of a rival, and its outputs."""
    with torch.inference_mode():
        found = rival.compute(*inputs, **attributes)
        took = seconds(lambda: rival.compute(*inputs, **attributes), device)
    return took, list(found) if isinstance(found, tuple) else [found]
