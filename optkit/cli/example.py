"""Example inputs from the command line: arrays of a file, or sizes to draw some for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from optkit.errors import UsageError

_SIZES = r"[1-9][0-9]*(?:x[1-9][0-9]*)*"
_KINDS = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")


def example(text: str) -> Any:
    """What ``--inputs`` means.

    Args:
        text: An ``.npz`` file with one array an input; whatever ``--calib`` takes, of which the first batch counts; or sizes,
            as in ``ids=2x16:int64,image=2x3x224x224``, without names in the order of ``forward``.

    Returns:
        Arrays by name, or a tuple of them. Drawn floats are normal, integers 0 or 1.

    Raises:
        UsageError: It is none of these.
    """
    import numpy as np

    path = Path(text)
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"{path}: cannot be read: {error}", hint="write it with np.savez") from error
    parts = [p.strip() for p in text.split(",")]
    if not path.exists() and all(re.fullmatch(rf"([\w.]+=)?{_SIZES}(:\w+)?", p) for p in parts):
        rng = np.random.default_rng(0)
        drawn = [_drawn(part, rng) for part in parts]
        names = [name for name, _ in drawn if name]
        if names and (len(names) < len(drawn) or len(set(names)) < len(names)):
            raise UsageError(f"--inputs {text!r}: either all inputs have a name of their own or none has")
        return dict(drawn) if names else tuple(array for _, array in drawn)
    if not path.exists() and "=" in text:
        raise UsageError(
            f"--inputs {text!r}: NAME=SIZES is wanted",
            hint="for example --inputs ids=2x16:int64,image=2x3x224x224",
        )
    from optkit.data import CalibrationData

    return dict(next(iter(CalibrationData.load(text))))


def _drawn(part: str, rng: Any) -> tuple[str, Any]:
    name, _, rest = part.rpartition("=")
    sizes, _, kind = rest.partition(":")
    kind = kind or "float32"
    if kind not in _KINDS:
        raise UsageError(f"--inputs {part!r}: {kind} is not a type of inputs", hint=", ".join(_KINDS))
    shape = tuple(int(n) for n in sizes.split("x"))
    return name, (
        rng.standard_normal(shape) if kind.startswith("float") else rng.integers(0, 2, shape)
    ).astype(kind)
