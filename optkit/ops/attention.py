"""Attention and position encodings."""

from __future__ import annotations

from optkit.ops.spec import OpSpec

ROWS = tuple(OpSpec(name=name, family="attention") for name in ("Attention", "RotaryEmbedding"))
