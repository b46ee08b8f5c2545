"""State space layers as one loop."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from optkit.exporting.shadowing import files_of


@contextlib.contextmanager
def selective_scan(module: torch.nn.Module) -> Iterator[None]:
    """State space layers of transformers run step by step as one loop of any length, not as one copy of it a step."""
    files = [f for f in files_of(module) if hasattr(f, "mamba_selective_scan")]
    table: Any = importlib.import_module("torch._higher_order_ops.associative_scan")
    loop: Any = importlib.import_module("torch._higher_order_ops.scan")
    names = ("mamba_selective_scan", "is_torchdynamo_compiling", "is_torchdynamo_exporting")
    old, own = [(f, n, vars(f)[n]) for f in files for n in names if n in vars(f)], table.associative_scan

    def states(_: Any, inputs: Any, dim: int, **__: Any) -> Any:
        # The only use of it there: state = decay * state + input.
        decay, entering = (part.movedim(dim, 0) for part in inputs)

        def step(state: Any, now: Any) -> Any:
            state = now[0] * state + now[1]
            return state, state.clone()

        start = torch.zeros_like(entering[0])
        return decay, loop.scan(step, start, (decay, entering))[1].movedim(0, dim)

    def run(file: Any, function: Any) -> Callable[..., Any]:
        def scan(*args: Any, **kwargs: Any) -> Any:
            if "is_torchdynamo_compiling" not in vars(file) or kwargs.get("use_mambapy"):
                return function(*args, **kwargs)
            file.is_torchdynamo_compiling, file.is_torchdynamo_exporting = (lambda: True), (lambda: False)
            table.associative_scan = states
            try:
                return function(*args, **{**kwargs, "use_associative_scan": True})
            finally:
                table.associative_scan = own
                for owner, name, value in old:
                    if owner is file and name != "mamba_selective_scan":
                        setattr(file, name, value)

        return scan

    try:
        for file in files:
            file.mamba_selective_scan = run(file, file.mamba_selective_scan)
        yield
    finally:
        for owner, name, value in old:
            setattr(owner, name, value)
