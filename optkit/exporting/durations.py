"""Speech that repeats each sound for as long as it lasts, without a loop over the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from optkit.exporting.shadowing import files_of

# Frames at most where the module does not say how many places it has.
_PLACES = 5000


@contextlib.contextmanager
def vectorized(module: torch.nn.Module) -> Iterator[None]:
    """FastSpeech of transformers repeats by counting: its own loop asks for every duration in Python."""
    files = [f for f in files_of(module) if hasattr(f, "length_regulator")]
    places = min(
        (int(m.max_len) for m in module.modules() if hasattr(m, "pos_enc") and hasattr(m, "max_len")),
        default=_PLACES,
    )

    def regulated(embeddings: Any, durations: Any, speaking_speed: float = 1.0) -> Any:
        return repeat(embeddings, durations, speaking_speed, places)

    old = [(f, f.length_regulator) for f in files]
    try:
        for file in files:
            file.length_regulator = regulated
        yield
    finally:
        for file, function in old:
            file.length_regulator = function


def repeat(embeddings: Any, durations: Any, speed: float = 1.0, places: int = _PLACES) -> Any:
    """``[batch, text, width]`` with every row repeated, zeros behind the end: ``[batch, frames, width]``.

    Args:
        durations: ``[batch, text]``, integers; where all are zero, each counts as one.
        places: Frames at most.
    """
    if speed != 1.0:
        durations = torch.round(durations.float() * speed).long()
    durations = torch.where(durations.sum() == 0, torch.ones_like(durations), durations)
    ends = durations.cumsum(1)
    frames = ends[:, -1].max().item()
    # Tracing must know these of a number that the data decides.
    torch._check(frames >= 2)
    torch._check(frames <= places)
    row = (torch.arange(frames)[None, :, None] >= ends[:, None, :]).sum(-1)
    last = embeddings.shape[1]
    found = embeddings.gather(1, row.clamp(max=last - 1)[..., None].expand(-1, -1, embeddings.shape[2]))
    return torch.where((row < last)[..., None], found, torch.zeros((), dtype=embeddings.dtype))
