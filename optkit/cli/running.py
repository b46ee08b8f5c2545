"""Models and artifacts alike, opened to be run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.cli import options
from optkit.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from optkit.cli.terminal import Terminal
    from optkit.data import TensorSpec
    from optkit.evaluate import Run
    from optkit.frontend import Loaded

_GRAPH = "model.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """Something that runs.

    Attributes:
        name: As the user wrote it.
        inputs: What it takes.
        kept: Inputs of the model that an artifact keeps from run to run; samples give them as they do for the model.
        run: Takes a batch, gives all outputs.
        target: What an artifact was compiled for; None for a model.
        predicted: What was done to give the numbers of that target on this machine; None where nothing was.
        stands_in: Whether another runtime computes here what an artifact's own would on its target.
    """

    name: str
    inputs: Sequence[TensorSpec]
    run: Run
    kept: Sequence[TensorSpec] = ()
    target: str | None = None
    predicted: str | None = None
    stands_in: bool = False


class Remarks:
    """What has to be said beside the numbers of what was opened: where they come from.

    Attributes:
        fields: For the JSON document: the words by their kind, and by what was opened.
    """

    def __init__(self) -> None:
        self.fields: dict[str, dict[str, str]] = {}

    def add(self, one: Opened) -> None:
        """Take down what holds for ``one``."""
        from optkit.targets import called

        if one.target is None:
            return
        if called(one.target) != one.target:
            self._put("experimental", one, f"for {called(one.target)}")
        if one.stands_in:
            self._put("not_run_on", one, f"ran on this machine in another runtime, not on {one.target}")
        if one.predicted is not None:
            self._put("predicted", one, f"predicted for {one.target}: {one.predicted}")

    def _put(self, key: str, one: Opened, words: str) -> None:
        self.fields.setdefault(key, {})[one.name] = words

    def say(self, terminal: Terminal) -> None:
        """A line each."""
        for found in self.fields.values():
            for name, words in found.items():
                terminal.say(f"{name}: {words}")


@contextlib.contextmanager
def opened(
    model: str, *, threads: int = 1, streams: int | None = None, predict: bool = False, timed: bool = False
) -> Iterator[Opened]:
    """Open an artifact with its own options, or an .onnx file in ONNX Runtime with default ones.

    Args:
        threads: Of one operator.
        streams: Requests at the same time, on one thread each; ``run`` may then be called by as many threads.
        predict: Give the numbers of the artifact's target where this machine's differ, and refuse inputs that it would refuse.
        timed: Refuse what runs here in the stead of something else.

    Raises:
        UsageError: There is no such file, or the folder is not an artifact.
        ModelError: It does not load.
    """
    if Path(model).is_dir():
        from optkit.artifact import load
        from optkit.evaluate import admitted
        from optkit.targets import called

        artifact = load(model)
        if timed and artifact.backend.stands_in:
            where = artifact.manifest.target
            raise UsageError(
                f"{model} is for {called(where)}: what can be run of it here is no measure of its speed there",
                hint=f"optkit finalize {model}, where the {where} is at hand",
            )
        said = artifact.prediction if predict else None
        shared = None if streams is not None else threads
        with artifact.session(threads=shared, streams=streams, predict=predict) as session:
            yield Opened(
                name=model, inputs=session.inputs, run=admitted(session) if predict else session.run, kept=session.kept,
                target=artifact.manifest.target, predicted=said, stands_in=artifact.backend.stands_in,
            )  # fmt: skip
        return
    from optkit.data import specs
    from optkit.frontend import read
    from optkit.reference import ReferenceSession

    path = options.source(model)
    loaded = read(path, check=False)
    inputs, _ = specs(loaded.model)
    # A PyTorch model has no file that ONNX Runtime reads: its graph as exported.
    reference = ReferenceSession(loaded.original, threads=threads, precise=False)
    try:
        yield Opened(name=model, inputs=inputs, run=reference.run)
    finally:
        reference.close()


def graph(model: str, **given: Any) -> Loaded:
    """The graph of a model, or of an artifact that is an ONNX file.

    Raises:
        UsageError: As ``opened``; or the artifact holds no graph.
    """
    from optkit.frontend import is_torch, read

    path = Path(model)
    if not path.is_dir() or is_torch(model):
        dynamic = given.pop("dynamic_shapes", None)
        return read(options.source(model), dynamic=dynamic, **given)
    if not holds_graph(model):
        raise UsageError(f"{path}: holds no ONNX graph", hint="give the .onnx file that it was compiled from")
    return read(path / _GRAPH)


def holds_graph(model: str) -> bool:
    """Whether ``graph`` can show it; an artifact in a runtime's own files cannot be read back.

    Raises:
        UsageError: It is a folder, and neither a model nor an artifact.
    """
    from optkit.artifact import load
    from optkit.frontend import is_torch

    path = Path(model)
    if not path.is_dir() or is_torch(model):
        return True
    load(path, verify=False)
    return (path / _GRAPH).is_file()


def interface(model: str) -> Loaded:
    """A graph of inputs alone, those of an artifact that holds none: what data must fit, and what can be drawn for.

    Raises:
        OptkitError: It cannot be opened on this machine.
    """
    import onnx_ir as ir

    from optkit.frontend import Loaded
    from optkit.graph import OPSET

    with opened(model) as found:
        specs = tuple(found.inputs)
    values = []
    for spec in specs:
        # Runtimes keep no names of free axes.
        axes = [d if d is not None else f"{spec.name}.{k}" for k, d in enumerate(spec.shape or ())]
        kind = ir.TensorType(ir.DataType.from_numpy(spec.dtype))
        values.append(
            ir.Value(name=spec.name, shape=ir.Shape(axes) if spec.shape is not None else None, type=kind)
        )
    empty = ir.Graph(values, [], nodes=[], opset_imports={"": OPSET})
    return Loaded(model=ir.Model(empty, ir_version=10), name=Path(model).name, opset=OPSET, notes=())


def shaped(loaded: Loaded, shapes: Sequence[str]) -> tuple[str, ...]:
    """Fix inputs of the graph to the shapes that ``--shape`` gave, in place; the axes that are still free.

    Raises:
        UsageError: An input is not known, or the shape does not fit it.
    """
    import onnx_ir as ir

    from optkit.errors import UnknownNameError
    from optkit.inference import infer

    inputs = {str(v.name): v for v in loaded.model.graph.inputs}
    sizes: dict[str, int] = {}
    for text in shapes:
        name, shape = options.size_of(text)
        if name not in inputs:
            raise UnknownNameError("input", name, inputs, where="--shape")
        old = inputs[name].shape
        if old is not None and (
            len(old) != len(shape)
            or any(isinstance(d, int) and d != n for d, n in zip(old, shape, strict=True))
        ):
            raise UsageError(f"--shape {text!r}: the model takes {name}{list(map(str, old))}")
        for d, n in zip(old or (), shape, strict=False):
            if not isinstance(d, int) and d.value is not None and sizes.setdefault(d.value, n) != n:
                raise UsageError(f"--shape {text!r}: {d.value} is {sizes[d.value]} in another input")
        inputs[name].shape = ir.Shape(shape)
    if shapes:
        for value in inputs.values():
            if value.shape is not None:
                value.shape = ir.Shape(
                    d if isinstance(d, int) else sizes.get(d.value or "", d) for d in value.shape
                )
        for value in (*(o for node in loaded.model.graph for o in node.outputs), *loaded.model.graph.outputs):
            if value.shape is not None and not value.shape.is_static():
                value.shape = None
        infer(loaded.model)
    free = [d for v in inputs.values() for d in v.shape or () if not isinstance(d, int)]
    return tuple(dict.fromkeys(str(d.value) for d in free))


def feeds(
    model: str, calib: str | None, shapes: Sequence[str], batch: int, most: int
) -> tuple[list[dict[str, np.ndarray]], str]:
    """The first ``most`` batches of the data; without data, drawn ones. Also what they are, in words.

    Raises:
        UsageError: The data does not fit the model.
    """
    from optkit.data import CalibrationData, specs

    loaded = graph(model) if holds_graph(model) else interface(model)
    if calib is None and loaded.examples and not shapes:
        return list(loaded.examples), "the module's example inputs"
    if calib is not None:
        data = CalibrationData.load(calib, loaded.model)
        batches = list(itertools.islice(data, most))
        return batches, f"{len(batches)} batches of {data.name}"
    first = {
        v.shape[0].value for v in loaded.model.graph.inputs if v.shape and not isinstance(v.shape[0], int)
    }
    free = shaped(loaded, shapes)
    sizes: Mapping[str, int] = {axis: batch if axis in first else 1 for axis in free}
    data = CalibrationData.random_batches(loaded.model, most, sizes=sizes)
    note = f"; free axes set to {', '.join(f'{a} = {n}' for a, n in sizes.items())}" if sizes else ""
    names = ", ".join(str(s) for s in specs(loaded.model)[0])
    return list(data), f"drawn at random for {names}{note}"
