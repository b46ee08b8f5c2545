"""Run what was built at several shapes, in turn, and hold every output against the reference.

A runtime may accept a shape that it cannot compute and give back what the call before left in its memory, or nothing; it
may also run a model wrongly without an error. So every artifact runs at the shape of the data (A), at another (B), at A
again and at a third (C), as far as the reference takes these shapes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from optkit.data import Feeds, TensorSpec, spelled
from optkit.errors import ModelError, OptkitError
from optkit.evaluate import Run

logger = logging.getLogger(__name__)

# Differences of an output, relative to its size. A float32 graph rewritten differs by 1e-3 where it is ill-conditioned, an
# artifact that runs wrongly by more than a tenth. Quantized, an output is far off only where it was near at shape A.
_EXACT, _NEAR, _FAR = 0.05, 0.5, 1.0
# The same input again gives the same output, but for kernels chosen by the shapes seen so far.
_AGAIN = 1e-3
# Size of a number below which only rounding is left, where numbers are around 1.
_ZERO = 1e-5
# The symbols in the size of an axis, which may be a sum or product of them.
_NAMES = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Inputs, and what the reference makes of them.

    Attributes:
        expected: Outputs by name.
        steady: Names of the outputs that the reference gives again when it is run again: not random.
        decided: By output, the axes whose size the numbers decide, such as the frames of speech.
    """

    feeds: Feeds
    expected: dict[str, np.ndarray]
    steady: frozenset[str]
    decided: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        return spelled(self.feeds)


def trials(
    reference: Run, inputs: Sequence[TensorSpec], feeds: Sequence[Feeds], outputs: Sequence[TensorSpec] = ()
) -> list[Trial]:
    """A, B and C: the data as it is; another batch size; another size of the longest other free axis.

    With no free axis, B is another batch of the data, or the same one backwards. Shapes that the reference refuses, or of
    which it makes nothing or NaN, are left out, so there may be one trial alone.

    Args:
        inputs: Of the model; free axes have a symbol.
        feeds: Batches of the data; the first is A.
        outputs: Of the model; axes with a symbol of no input are the numbers' to decide.
    """
    decided = _decided(inputs, outputs)
    first = reference(feeds[0])
    again = reference(feeds[0])
    steady = frozenset(name for name in first if _difference(again[name], first[name]) == 0)
    found = [Trial(feeds=feeds[0], expected=first, steady=steady, decided=decided)]
    for group in _others(inputs, feeds):
        for candidate in group:
            try:
                expected = reference(candidate)
            except OptkitError as error:
                logger.debug("the reference refuses a shape: %s", error)
                continue
            if any(_sound(first[name]) and not _sound(array) for name, array in expected.items()):
                continue
            found.append(Trial(feeds=candidate, expected=expected, steady=steady, decided=decided))
            break
    return found


def _decided(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> dict[str, frozenset[int]]:
    given = {symbol for spec in inputs for symbol in spec.shape or () if isinstance(symbol, str)}
    return {
        spec.name: frozenset(
            axis
            for axis, size in enumerate(spec.shape or ())
            if not isinstance(size, int) and not (size and given.issuperset(_NAMES.findall(size)))
        )
        for spec in outputs
    }


def _sound(array: np.ndarray) -> bool:
    return array.size > 0 and (array.dtype.kind != "f" or bool(np.isfinite(array).all()))


def _others(inputs: Sequence[TensorSpec], feeds: Sequence[Feeds]) -> Iterator[Iterator[Feeds]]:
    sizes: dict[str, int] = {}
    for spec in inputs:
        for axis, symbol in enumerate(spec.shape or ()):
            if isinstance(symbol, str):
                sizes.setdefault(symbol, feeds[0][spec.name].shape[axis])
    batch = {s.shape[0] for s in inputs if s.shape and isinstance(s.shape[0], str)}
    # The longest alone, under whatever names: what is small may be a height or a window that is free by name only.
    longest = max((size for symbol, size in sizes.items() if symbol not in batch), default=0)
    lengths = [symbol for symbol, size in sizes.items() if symbol not in batch and size == longest]
    if batch:
        yield iter([_resized(feeds[0], inputs, {s: 1 if sizes[s] != 1 else 2 for s in batch})])
    if lengths:
        # Half; failing that, a multiple of what networks reduce their input by.
        halves = [{s: -(-sizes[s] // 2 // m) * m for s in lengths} for m in (1, 32)]
        doubled = {s: sizes[s] * 2 for s in lengths}
        options = [h if h != {s: sizes[s] for s in lengths} else doubled for h in halves]
        yield (_resized(feeds[0], inputs, option) for option in options)
    if not sizes:
        other = feeds[1] if len(feeds) > 1 else {k: np.flip(v).copy() for k, v in feeds[0].items()}
        yield iter([other])


def _resized(feeds: Feeds, inputs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> Feeds:
    """The first elements along the named axes, and again from the start where there are too few."""
    resized = dict(feeds)
    for spec in inputs:
        for axis, symbol in enumerate(spec.shape or ()):
            if isinstance(symbol, str) and symbol in sizes:
                array = resized[spec.name]
                places = np.arange(sizes[symbol]) % max(1, array.shape[axis])
                resized[spec.name] = np.ascontiguousarray(np.take(array, places, axis=axis))
    return resized


def check(run: Run, trials: Sequence[Trial], *, name: str, lossy: bool) -> None:
    """Run the trials in the order A, B, A, C.

    Args:
        name: For messages.
        lossy: Whether the numbers may differ from the reference's.

    Raises:
        ModelError: An output is missing, has another shape, is stale or is wrong; names it.
    """
    order = [trials[0], *trials[1:2], trials[0], *trials[2:]]
    first: dict[str, np.ndarray] = {}
    before: tuple[Trial, dict[str, np.ndarray]] | None = None
    apart = {key: 0.0 for key in trials[0].expected}
    for trial in order:
        try:
            outputs = run(trial.feeds)
        except OptkitError as error:
            raise ModelError(f"{name}: does not run with {trial}: {error}", hint=error.hint) from error
        for key, expected in trial.expected.items():
            where = f"{name}: output {key!r} with {trial}"
            found = outputs.get(key)
            if key not in trial.steady:
                if found is None:
                    raise ModelError(f"{where} came out as nothing")
                continue
            if lossy and found is not None and _other_size(found, trial, key):
                # For the gate on accuracy to judge; but not what is left over from the call before.
                if before is not None and _same(found, before[1][key]) and before[0] is not trial:
                    raise ModelError(f"{where} still holds what the call before gave, with {before[0]}")
                continue
            if found is None or found.shape != expected.shape:
                shape = "nothing" if found is None else list(found.shape)
                raise ModelError(f"{where} came out as {shape}, the reference gives {list(expected.shape)}")
            difference = _difference(found, expected)
            if trial is trials[0] and key not in first:
                apart[key] = difference
            limit = (_FAR if apart[key] < _NEAR else np.inf) if lossy else _EXACT
            if difference > limit:
                if before is not None and _same(found, before[1][key]):
                    raise ModelError(f"{where} still holds what the call before gave, with {before[0]}")
                if difference == np.inf:
                    raise ModelError(
                        f"{where} is finite at other places than the reference", hint=_hint(lossy=lossy)
                    )
                what = f"{where} differs from the reference by {difference:.0%} of its size"
                raise ModelError(what, hint=_hint(lossy=lossy))
            if trial is trials[0] and key in first and _difference(found, first[key]) > _AGAIN:
                raise ModelError(f"{where} is not what the same input gave before another shape was run")
        if trial is trials[0]:
            first = first or outputs
        before = (trial, outputs)


def _hint(*, lossy: bool) -> str:
    """What to do about wrong numbers."""
    find = "to find the node, compile the model cut off behind one (onnx.utils.extract_model)"
    if lossy:
        return f"-p fp32 keeps the numbers, another recipe may be nearer (optkit recipe list); {find}"
    return (
        "another --backend may compute it; the mistake is optkit's or the runtime's, "
        f"so please report it with the model; {find}"
    )


def _other_size(found: np.ndarray, trial: Trial, key: str) -> bool:
    """Whether an output has another shape than the reference's, but only along axes that the numbers decide."""
    expected, axes = trial.expected[key].shape, trial.decided.get(key, frozenset())
    if found.shape == expected or not found.size or found.ndim != len(expected):
        return False
    return all(n == e or axis in axes for axis, (n, e) in enumerate(zip(found.shape, expected, strict=True)))


def _same(found: np.ndarray, old: np.ndarray) -> bool:
    return found.size > 0 and found.shape == old.shape and found.tobytes() == old.tobytes()


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of ``expected``, or the share of integers that differ; inf for NaN.

    Outputs that are all but zero are held against ``_ZERO``.
    """
    if found.shape != expected.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    if expected.dtype.kind in "iub":
        return float(np.mean(found != expected))
    x, y = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(x[finite]).all():
        return float("inf")
    apart, size = np.linalg.norm(x[finite] - y[finite]), np.linalg.norm(y[finite])
    return float(apart / max(size, _ZERO * np.sqrt(y.size)))
