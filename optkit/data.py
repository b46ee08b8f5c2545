"""Calibration data: named batches, the same every time, read one at a time and checked against the model."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit import npz
from optkit.dims import worked_out
from optkit.errors import DataError

logger = logging.getLogger(__name__)

Feeds = dict[str, np.ndarray]

# Inputs that a line of a report names.
_SPELLED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a session or model takes or gives under one name.

    Attributes:
        dtype: NumPy's; bfloat16 and the 8 and 4 bit types are those of ``ml_dtypes``.
        shape: A number where the size is fixed, a symbol where it is free (the same symbol is the same size), None where
            nothing is known. A shape of None: not even the rank is known.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        axes = "?" if self.shape is None else ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.name}: {self.dtype.name}[{axes}]"

    def told(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "name": self.name,
            "dtype": self.dtype.name,
            "shape": None if self.shape is None else list(self.shape),
        }

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> TensorSpec:
        """What ``told`` gave."""
        shape = told["shape"]
        return cls(
            name=told["name"],
            dtype=np.dtype(told["dtype"]),
            shape=None if shape is None else tuple(shape),
        )

    @classmethod
    def of(cls, value: ir.Value) -> TensorSpec:
        """The spec of an input or output of a graph."""
        if (
            not isinstance(value.type, ir.TensorType)
            or value.dtype is None
            or value.dtype == ir.DataType.UNDEFINED
        ):
            raise DataError(f"{value.name!r} is not a tensor of known type ({value.type})")
        shape = None
        if value.shape is not None:
            shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
        return cls(name=value.name or "", dtype=np.dtype(value.dtype.numpy()), shape=shape)


def specs(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and the outputs of ``model``; inputs with an initializer are not the caller's and left out."""
    graph = model.graph
    inputs = tuple(TensorSpec.of(v) for v in graph.inputs if not v.is_initializer())
    return inputs, tuple(TensorSpec.of(v) for v in graph.outputs)


def validate(
    feeds: Mapping[str, Any],
    inputs: Sequence[TensorSpec],
    *,
    where: str = "",
    bounds: Mapping[str, tuple[int, int | None]] | None = None,
) -> Feeds:
    """Check one batch against ``inputs`` and return it in their order and types.

    Types are converted where no value changes its meaning: between widths of one kind, when every value fits (rounding a
    float is fine, overflow is not). Integers for a float input are refused: mostly they are pixels not yet normalised.

    Args:
        where: For messages: ``calib/0003.npz``.
        bounds: Smallest and largest size of free axes, by symbol.

    Raises:
        DataError: A name, type, shape or value does not fit; all that do not are listed.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(feeds, Mapping):
        raise DataError(
            f"{prefix}a batch must be a dict of arrays, not {type(feeds).__name__}",
            hint=f"yield {{{', '.join(f'{s.name!r}: ...' for s in inputs)}}}",
        )
    known = [s.name for s in inputs]
    problems = [
        f"unknown input {name!r}{_did_you_mean(str(name), [k for k in known if k not in feeds])}"
        for name in feeds
        if name not in known
    ]
    problems += [f"input {name!r} is missing" for name in known if name not in feeds]
    if problems:
        raise DataError(prefix + "; ".join(problems), hint=f"the model takes {', '.join(map(str, inputs))}")
    sizes: dict[str, tuple[int, str]] = {}
    batch = {}
    for spec in inputs:
        place = f"{prefix}input {spec.name!r}"
        array = _array(feeds[spec.name], place)
        _check_shape(array, spec, sizes, place, bounds or {})
        batch[spec.name] = _convert(array, spec.dtype, place)
    return batch


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _array(value: Any, place: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # ragged lists; tensors that need .detach() or .cpu()
        raise DataError(f"{place} is not an array: {error}") from error
    if array.dtype.kind in "OUSMm" or (array.dtype.kind == "V" and array.dtype.names):
        raise DataError(f"{place} holds {array.dtype} values, not numbers")
    return array


def _check_shape(
    array: np.ndarray,
    spec: TensorSpec,
    sizes: dict[str, tuple[int, str]],
    place: str,
    bounds: Mapping[str, tuple[int, int | None]],
) -> None:
    if spec.shape is None:
        return
    expected = f"the model takes {spec}"
    if array.ndim != len(spec.shape):
        raise DataError(
            f"{place} has {array.ndim} axes {list(array.shape)}, not {len(spec.shape)}", hint=expected
        )
    for axis, (size, wanted) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if isinstance(wanted, int):
            if size != wanted:
                raise DataError(
                    f"{place} has size {size} at axis {axis}, not {wanted}: {list(array.shape)}",
                    hint=expected,
                )
        elif wanted is not None:
            first, name = sizes.setdefault(wanted, (size, spec.name))
            if first != size:
                raise DataError(
                    f"{place} has size {size} at axis {axis}, but {wanted!r} is {first} in {name!r}",
                    hint=expected,
                )
            low, high = bounds.get(wanted, (1, None))
            if size < low or (high is not None and size > high):
                limit = f"at least {low}" if size < low else f"at most {high}"
                raise DataError(
                    f"{place} has size {size} at axis {axis}, but {wanted!r} is {limit} in the model",
                    hint=expected,
                )


def _kind(dtype: np.dtype[Any]) -> str:
    """``bool``, ``integer`` or ``float``; ml_dtypes' types are of NumPy's kind V or i/f."""
    if dtype.kind == "b":
        return "bool"
    if dtype.kind in "iu" or dtype.name.startswith(("int", "uint")):
        return "integer"
    return "complex" if dtype.kind == "c" else "float"


def _convert(array: np.ndarray, dtype: np.dtype[Any], place: str) -> np.ndarray:
    kind, wanted = _kind(array.dtype), _kind(dtype)
    if kind == "float":
        _check_finite(array, place)
    if array.dtype == dtype:
        return np.ascontiguousarray(array) if array.ndim else array.copy()
    if {kind, wanted} == {"bool", "integer"} or kind == wanted:
        with np.errstate(over="ignore", invalid="ignore"):
            converted = array.astype(dtype)
        fits = (
            np.isfinite(converted.astype(np.float32)).all()
            if wanted == "float"
            else np.array_equal(converted, array)
        )
        if not fits:
            raise DataError(f"{place} is {array.dtype} and has values that do not fit {dtype}")
        return converted
    hint = f"convert it with .astype({dtype.name!r}) if that is meant"
    if kind == "integer" and wanted == "float":
        hint += "; pixels usually need scaling and normalising first, as in training"
    raise DataError(f"{place} is {array.dtype}, the model takes {dtype}", hint=hint)


def _check_finite(array: np.ndarray, place: str) -> None:
    plain = array if array.dtype.kind == "f" else array.astype(np.float32)
    if np.isfinite(plain).all():
        return
    nan, inf = int(np.isnan(plain).sum()), int(np.isinf(plain).sum())
    raise DataError(
        f"{place} has {nan} NaN and {inf} infinite values of {array.size}",
        hint="remove such samples; for a mask use a large finite number such as -1e4",
    )


# Opens the source anew and yields (place, batch as it was found).
_Open = Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]


class CalibrationData:
    """Named batches that can be iterated any number of times and are the same each time.

    ``for feeds in data`` yields ``dict[str, np.ndarray]`` and holds one batch at a time.

    Args:
        batches: A sequence or other iterable of dicts that starts anew for each loop, or a function without parameters
            that returns one. A generator is refused, because it runs only once: pass the function that makes it.
        name: For messages and reports.

    Attributes:
        name: Where the batches come from, without folders above it.
        random: The values were drawn, not recorded: what is measured on them says nothing about accuracy.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]],
        *,
        name: str = "data",
    ) -> None:
        if isinstance(batches, Iterator):
            raise DataError(
                f"{name}: a {type(batches).__name__} can be read only once, and calibration reads its data several times",
                hint="pass a list, or the function that makes the generator",
            )
        if isinstance(batches, Mapping | str | bytes) or not (
            callable(batches) or isinstance(batches, Iterable)
        ):
            raise DataError(
                f"{name}: {type(batches).__name__} is not a series of batches",
                hint='pass a list of dicts, [{"x": array}], or a function that yields them',
            )
        self.name = name
        self.random = False
        self._count = len(batches) if isinstance(batches, Sequence) else None
        self._open: _Open = _Replay(batches, name).open

    @classmethod
    def load(
        cls, source: str | Path, inputs: ir.Model | Sequence[TensorSpec] | None = None, *, seed: int = 0
    ) -> CalibrationData:
        """What ``--calib`` names.

        * A folder: each ``.npz`` in it is one batch, in the order of the names; its arrays are named as the inputs.
        * One ``.npz``: its arrays hold samples along their first axis, all the same number. They are cut into batches of
          the model's batch size, or of one sample where that is free. (For exactly one batch, put the file in a folder.)
        * ``file.py:function``: the function is called anew for each pass and yields dicts of arrays. This runs the file.
        * ``random``: see ``random``.

        Args:
            inputs: What the batches must fit; they are then checked as by ``check``. Without, no batch is checked.

        Raises:
            DataError: The source is missing or is none of these.
        """
        text = str(source)
        if text == "random":
            if not isinstance(inputs, ir.Model):
                raise DataError("random calibration data needs the model, to know its inputs")
            return cls.random_batches(inputs, seed=seed)
        path = Path(text)
        if path.is_dir():
            data = cls._folder(path)
        elif path.is_file():
            data = cls._file(path, 1 if inputs is None else _batch_size(_specs(inputs)))
        elif ".py:" in text:
            data = cls(load_function(text), name=Path(text).name)
        else:
            hint = "give a folder of .npz files, one .npz, or file.py:function"
            if path.suffix == ".py":
                hint = f"give the function as well: {text}:batches"
            raise DataError(f"{text}: no such file or folder", hint=hint)
        return data if inputs is None else data.check(inputs)

    @classmethod
    def _folder(cls, folder: Path) -> CalibrationData:
        paths = sorted(p for p in folder.iterdir() if p.suffix == ".npz" and not p.name.startswith("."))
        if not paths:
            raise DataError(
                f"{folder}: no .npz files",
                hint='write each batch with np.savez(path, x=array), "x" an input\'s name',
            )

        def read() -> Iterator[tuple[str, Feeds]]:
            for path in paths:
                yield str(path), npz.read(path)

        return cls._make(read, name=folder.name, count=len(paths))

    @classmethod
    def _file(cls, path: Path, size: int) -> CalibrationData:
        samples = npz.count_samples(path)
        count, rest = divmod(samples, size)
        if not count:
            raise DataError(f"{path}: {samples} samples do not make one batch of {size}")
        if rest:
            logger.warning(
                "%s: the last %d of %d samples do not fill a batch of %d and are left out",
                path,
                rest,
                samples,
                size,
            )
        return cls._make(lambda: npz.cut(path, size, count), name=path.name, count=count)

    @classmethod
    def random_batches(
        cls, model: ir.Model, n: int = 16, *, seed: int = 0, sizes: Mapping[str, int] | int = 1
    ) -> CalibrationData:
        """Batches drawn from the input specification of ``model``, as ``draw`` does; marked ``random``."""

        def make() -> Iterator[tuple[str, Feeds]]:
            for index in range(n):
                yield f"random batch {index}", draw(model, np.random.default_rng([seed, index]), sizes)

        return cls._make(make, name=f"random (seed {seed})", count=n, random=True)

    @classmethod
    def _make(cls, open_: _Open, *, name: str, count: int | None, random: bool = False) -> CalibrationData:
        data = cls.__new__(cls)
        data.name, data.random, data._count, data._open = name, random, count, open_
        return data

    def __iter__(self) -> Iterator[Feeds]:
        for _, feeds in self.named():
            yield feeds

    def named(self) -> Iterator[tuple[str, Feeds]]:
        """The batches, each with its place for messages: ``calib/0003.npz``, ``calib.py:batches: batch 3``."""
        empty = True
        for place, feeds in self._open():
            empty = False
            if not isinstance(feeds, Mapping):
                raise DataError(
                    f"{place}: a batch must be a dict of arrays, not {type(feeds).__name__}",
                    hint='yield {"x": array}',
                )
            yield place, {str(k): _array(v, f"{place}: input {k!r}") for k, v in feeds.items()}
        if empty:
            raise DataError(f"{self.name}: no batches")

    def __len__(self) -> int:
        """The number of batches; a function is run through once to learn it."""
        if self._count is None:
            self._count = sum(1 for _ in self._open())
        return self._count

    def __bool__(self) -> bool:
        return True

    def mapped(self, function: Callable[[Feeds], Feeds]) -> CalibrationData:
        """Each batch after ``function``."""

        def read() -> Iterator[tuple[str, Feeds]]:
            return ((place, function(feeds)) for place, feeds in self.named())

        return self._make(read, name=self.name, count=self._count, random=self.random)

    def limit(self, n: int) -> CalibrationData:
        """The first ``n`` batches."""
        if n < 1:
            raise DataError(f"{self.name}: a limit of {n} batches leaves none")
        count = None if self._count is None else min(n, self._count)
        return self._make(
            lambda: itertools.islice(self._open(), n), name=self.name, count=count, random=self.random
        )

    def split(self, fraction: float = 0.25) -> tuple[CalibrationData, CalibrationData]:
        """Calibration and held-out batches: of every ``round(1 / fraction)`` batches the last is held out.

        Fewer batches than that: the last one is held out.

        Raises:
            DataError: There is only one batch.
        """
        if not 0 < fraction <= 0.5:
            raise ValueError(f"fraction {fraction} is not in (0, 0.5]")
        total = len(self)
        if total < 2:
            raise DataError(
                f"{self.name}: one batch cannot be split into calibration and held-out data",
                hint="give two batches or more; smaller ones will do",
            )
        k = min(round(1 / fraction), total)

        def part(held: bool) -> CalibrationData:
            def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
                return (item for i, item in enumerate(self._open()) if (i % k == k - 1) == held)

            return self._make(
                read, name=self.name, count=total // k if held else total - total // k, random=self.random
            )

        return part(False), part(True)

    def check(
        self,
        inputs: ir.Model | Sequence[TensorSpec],
        bounds: Mapping[str, tuple[int, int | None]] | None = None,
    ) -> CalibrationData:
        """The same batches, each passed through ``validate`` as it is read.

        Nothing is read now; a batch that does not fit raises ``DataError`` when its turn comes.
        """
        wanted = _specs(inputs)

        def read() -> Iterator[tuple[str, Feeds]]:
            for place, feeds in self._open():
                yield place, validate(feeds, wanted, where=place, bounds=bounds)

        return self._make(read, name=self.name, count=self._count, random=self.random)

    def remembered(self, most: int = 32 << 20) -> CalibrationData:
        """The same batches, kept after the first full reading where all of them take at most ``most`` bytes.

        Spares the caller's function from running once for every pass over the data; memory stays bounded.
        """
        kept: list[tuple[str, Feeds]] | None = None

        def read() -> Iterator[tuple[str, Mapping[str, Any]]]:
            nonlocal kept
            if kept is not None:
                yield from kept
                return
            fresh: list[tuple[str, Feeds]] = []
            held = 0
            for place, feeds in self._open():
                # A function may fill the same arrays again for its next batch.
                batch = {name: np.array(value) for name, value in feeds.items()} if held <= most else {}
                held += sum(array.nbytes for array in batch.values())
                if held <= most:
                    fresh.append((place, batch))
                else:
                    fresh.clear()
                yield place, feeds
            if held <= most:
                kept = fresh

        return self._make(read, name=self.name, count=self._count, random=self.random)

    def digest(self) -> str:
        """SHA-256 over the names, types, shapes and values of all batches, in order."""
        h = hashlib.sha256()
        for feeds in self:
            h.update(_digest(feeds))
        return h.hexdigest()


def _specs(inputs: ir.Model | Sequence[TensorSpec]) -> Sequence[TensorSpec]:
    return specs(inputs)[0] if isinstance(inputs, ir.Model) else inputs


def _batch_size(inputs: Sequence[TensorSpec]) -> int:
    """The fixed size of the first axis that all inputs agree on, or 1."""
    sizes = {spec.shape[0] for spec in inputs if spec.shape}
    size = sizes.pop() if len(sizes) == 1 else 1
    return size if isinstance(size, int) and size > 0 else 1


def _digest(feeds: Mapping[str, Any]) -> bytes:
    h = hashlib.sha256()
    for name in sorted(feeds):
        array = np.asarray(feeds[name])
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        h.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        # A view as bytes: hashlib takes no bfloat16 buffers, and no copy is made of a contiguous array.
        h.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return h.digest()


class _Replay:
    """Opens an iterable or a function again and again, and notices when the batches are not those of the first time."""

    def __init__(
        self, source: Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]], name: str
    ) -> None:
        self._source, self._name = source, name
        self._seen: list[bytes] = []
        self._count: int | None = None

    def open(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        index = 0
        for feeds in self._batches():
            place = f"{self._name}: batch {index}"
            if isinstance(feeds, Mapping) and not isinstance(self._source, Sequence):
                self._compare(
                    index, _digest({str(k): _array(v, f"{place}: input {k!r}") for k, v in feeds.items()})
                )
            yield place, feeds
            index += 1
        if self._count is not None and index != self._count:
            self._changed(f"gave {self._count} batches the first time and {index} now")
        self._count = index

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        # The user's own code runs here and may raise anything; the message must say that it was theirs.
        try:
            batches = (
                self._source()
                if callable(self._source) and not isinstance(self._source, Sequence)
                else self._source
            )
            yield from batches
        except (DataError, GeneratorExit):
            raise
        except Exception as error:
            raise DataError(f"{self._name} raised {type(error).__name__}: {error}") from error

    def _compare(self, index: int, digest: bytes) -> None:
        if index == len(self._seen):
            self._seen.append(digest)
        elif self._seen[index] != digest:
            self._changed(f"batch {index} is not what it was the first time")

    def _changed(self, how: str) -> None:
        raise DataError(f"{self._name}: {how}", hint="fix its random seed and switch shuffling off")


def load_function(reference: str) -> Callable[..., Any]:
    """The function that ``file.py:function`` names; runs the file.

    Raises:
        DataError: There is no such file or function, or the file raises.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(f"optkit_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise DataError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    # As with `python file.py`, modules beside the file can be imported, also later, from inside the function.
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"{file} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = [
            n
            for n, v in vars(module).items()
            if callable(v) and not n.startswith("_") and not isinstance(v, type)
        ]
        raise DataError(f"{file}: no function {name!r}{_did_you_mean(name, found)}")
    return function  # type: ignore[no-any-return]


# What ``trial_sizes`` gives the first axis (batch), the last, and those between.
_TRIALS = (
    (2, 16, 16), (1, 16, 16), (1, 64, 64), (1, 1, 1), (1, 224, 224), (1, 16, 1), (1, 256, 1), (1, 512, 1), (1, 512, 512),
)  # fmt: skip


def trial_sizes(inputs: Sequence[TensorSpec]) -> Iterator[dict[str, int]]:
    """Sizes for the free axes of ``inputs``, for ``draw``: small ones that many models run with, to be tried in turn.

    Axes that are sums of others, such as ``past + sequence``, are left out: their size follows.
    """
    first, last = {s.shape[0] for s in inputs if s.shape}, {s.shape[-1] for s in inputs if s.shape}
    tried: list[dict[str, int]] = []
    for batch, size, between in _TRIALS:
        sizes = {d: batch if d in first else size if d in last else between for d in _free(inputs)}
        if sizes not in tried:
            tried.append(sizes)
            yield sizes


def _free(inputs: Sequence[TensorSpec]) -> list[str]:
    """The symbols of free axes whose size does not follow from those of others."""
    named = dict.fromkeys(d for s in inputs for d in s.shape or () if isinstance(d, str))
    return [d for d in named if worked_out(d, dict.fromkeys(named.keys() - {d}, 1)) is None]


# The largest index drawn for an integer input: enough to vary, below most vocabularies that could not be found.
_INDICES = 2


def draw(model: ir.Model, rng: np.random.Generator, sizes: Mapping[str, int] | int = 1) -> Feeds:
    """One batch from the input specification alone: floats from N(0, 1), small integers, masks of ones, booleans of both kinds.

    Args:
        sizes: For the free axes by symbol, or one for all; a symbol that is not listed gets 1. Of a sum such as
            ``past + sequence`` the symbols count.
    """
    feeds = {}
    other = sizes if isinstance(sizes, int) else 1
    given = {d: sizes for d in _free(specs(model)[0])} if isinstance(sizes, int) else sizes
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        spec = TensorSpec.of(value)
        shape = tuple(other if (size := worked_out(d, given)) is None else size for d in spec.shape or ())
        feeds[spec.name] = drawn(spec, rng, shape, _bound(value))
    return feeds


def drawn(
    spec: TensorSpec, rng: np.random.Generator, shape: tuple[int, ...], bound: int | None = None
) -> np.ndarray:
    """One input as ``draw`` gives it.

    Args:
        bound: All integers are below it; where it is not known they are 0 and 1.
    """
    kind = _kind(spec.dtype)
    array: np.ndarray
    if kind == "float":
        array = rng.standard_normal(shape, np.float32)
    elif kind == "integer" and "mask" not in spec.name.lower():
        array = rng.integers(0, bound or _INDICES, shape)
    elif kind == "bool" and shape and shape[-1] > 1:
        # A key may be hidden by True as well as by False, and a query that sees no key computes NaN.
        array = rng.integers(0, 2, shape)
        array[..., 0], array[..., -1] = 1, 0
    else:
        array = np.ones(shape)
    return np.asarray(array).astype(spec.dtype)


def _bound(value: ir.Value) -> int | None:
    """The rows of the smallest table that ``value`` indexes, where it reaches one."""
    bounds = []
    for node, index in value.uses():
        if node.op_type == "Gather" and index == 1:
            table, axis = node.inputs[0], node.attributes.get_int("axis", 0)
            if table is not None and table.shape is not None and -len(table.shape) <= axis < len(table.shape):
                rows = table.shape[axis]
                bounds.append(rows if isinstance(rows, int) else None)
        elif node.op_type in ("Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape") and index == 0:
            bounds.append(_bound(node.outputs[0]))
    return min((b for b in bounds if b), default=None)


def spelled(batch: Mapping[str, np.ndarray]) -> str:
    """``x [1, 3, 224, 224]``; of many inputs, such as caches, the first and how many there are beside."""
    shown = [f"{name} {list(array.shape)}" for name, array in batch.items()]
    if len(shown) > _SPELLED + 1:
        shown[_SPELLED:] = [f"{len(shown) - _SPELLED} more"]
    return ", ".join(shown)
