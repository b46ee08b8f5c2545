"""Number formats and the names of precisions."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from optkit.errors import UnknownNameError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A number format for quantized tensors: integers, or floats of 8 bits.

    Attributes:
        low: Smallest stored number.
        high: Largest stored number.
        symmetric: Whether the zero point is fixed at 0 (or at the middle of an unsigned range).
    """

    name: str
    dtype: ir.DataType
    low: int
    high: int
    symmetric: bool

    @property
    def steps(self) -> int:
        """Number of steps between the smallest and the largest integer."""
        return self.high - self.low

    @property
    def integer(self) -> bool:
        """Whether its numbers are evenly spaced."""
        return self.dtype.is_integer()

    @property
    def precision(self) -> str:
        """What hardware that computes in it calls it."""
        return "int8" if self.integer else "fp8"


# Symmetric int8 leaves out -128, so that -x is in range when x is.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(name="s8", dtype=ir.DataType.INT8, low=-127, high=127, symmetric=True),
        Format(name="s8-asym", dtype=ir.DataType.INT8, low=-128, high=127, symmetric=False),
        Format(name="u8", dtype=ir.DataType.UINT8, low=0, high=255, symmetric=False),
        Format(name="s16", dtype=ir.DataType.INT16, low=-32767, high=32767, symmetric=True),
        # OCP 8-bit Floating Point Specification, 2023: E4M3 ends at 448 and has no infinity.
        Format(name="e4m3", dtype=ir.DataType.FLOAT8E4M3FN, low=-448, high=448, symmetric=True),
        Format(name="u16", dtype=ir.DataType.UINT16, low=0, high=65535, symmetric=False),
    )
}

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8", "w8a16", "w4a16", "w4a8", "nvfp4", "mxfp4", "mxfp8")
_SUFFIX = re.compile(r"-(g[1-9]\d*|sym|asym|dyn)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """A precision as a user writes it: a base name and suffixes.

    Attributes:
        base: One of ``PRECISIONS``.
        dynamic: Activation scales are computed while running (``-dyn``).
        group: Weights that share a scale (``-g128``), or None.
        symmetric: ``-sym`` or ``-asym`` where said, else None.
    """

    base: str
    dynamic: bool = False
    group: int | None = None
    symmetric: bool | None = None

    @staticmethod
    def parse(text: str) -> Precision:
        """Read ``int8``, ``int8-dyn``, ``w4a16-g128`` …, in any case.

        Raises:
            UsageError: The name or a suffix is not known.
        """
        rest, suffixes = text.strip().lower(), []
        while match := _SUFFIX.search(rest):
            suffixes.append(match[1])
            rest = rest[: match.start()]
        rest = {"w8a8": "int8", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(rest, rest)
        if rest not in PRECISIONS:
            raise UnknownNameError("precision", text, PRECISIONS)
        # Of each kind one: a group size, sym or asym, dyn.
        kinds = [s[0] if s[0] in "gd" else "sym" for s in suffixes]
        if len(kinds) != len(set(kinds)):
            raise UsageError(f"precision {text!r}: the suffixes contradict each other")
        group = next((int(s[1:]) for s in suffixes if s[0] == "g"), None)
        symmetric = True if "sym" in suffixes else False if "asym" in suffixes else None
        return Precision(base=rest, dynamic="dyn" in suffixes, group=group, symmetric=symmetric)
