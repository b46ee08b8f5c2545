"""Run an ``ir.Model`` in ONNX Runtime: the fp32 reference, and what observes values while a model runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from optkit.data import CalibrationData, specs, trial_sizes
from optkit.errors import DataError, ModelError
from optkit.graph import walk, weight_bytes
from optkit.inference import windows_fit
from optkit.store import detached
from optkit.targets import target
from optkit.unsigned import signed, unsigned

# Beyond, a second, packed copy of the weights would cost more memory than it saves time.
LARGE = 1_500_000_000
# Types without a counterpart in NumPy.
_ALIEN = re.compile(r"bfloat16|float[468]e|u?int[24]$|complex")
# Of these it gives outputs as bytes, and takes no inputs.
_AS_BYTES = "float8e4m3fn"
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_IN_FLOATS = "export the model in float32; -p or -r chooses what the artifact computes in"


class ReferenceSession:
    """A model in ONNX Runtime on this CPU, one thread by default, so that sums come out the same each time.

    Raises:
        ModelError: ONNX Runtime does not take it, or its inputs and outputs are of types that NumPy does not have.

    Args:
        model: A path, or a graph; a graph is not changed.
        outputs: Values to give back instead of the model's outputs; any float or integer value of the main graph.
        optimize: Whether ONNX Runtime may fuse.
        threads: Of one operator.
        disabled: Optimizers of ONNX Runtime that stay off, by their names; for a path, ``unsound`` tells which must.
        large: Read weights where they lie instead of packing them: little memory, slower products.
        precise: Keep products of 8-bit integers from saturating in 16 bits on processors where they would; without, they are as
            fast and as wrong as this machine has them.
    """

    def __init__(
        self,
        model: ir.Model | Path,
        *,
        outputs: Sequence[str] | None = None,
        optimize: bool = True,
        threads: int = 1,
        disabled: Sequence[str] = (),
        large: bool | None = None,
        precise: bool = True,
    ) -> None:
        if outputs is not None:
            assert isinstance(model, ir.Model), "outputs are values of a graph"
            model = with_outputs(model, outputs)
        self._weights: list[ort.OrtValue] = []
        where = model.name if isinstance(model, Path) else model.graph.name or "model"
        size = model.stat().st_size if isinstance(model, Path) else weight_bytes(model)
        options = session_options(
            threads=threads,
            optimize=optimize,
            large=size > LARGE if large is None else large,
            precise=precise,
        )
        if precise and target("cpu").saturates:
            model = _widened(model)
        source: str | bytes = str(model) if isinstance(model, Path) else self._take(model, options)
        if isinstance(model, ir.Model):
            disabled = (*disabled, *unsound(model))
        try:
            self._session = ort.InferenceSession(
                source,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(disabled) or None,
            )
        except Exception as error:
            lacks = "NOT_IMPLEMENTED" in str(error)
            raise ModelError(
                f"{where}: ONNX Runtime cannot load it: {first_line(error)}",
                hint=f"it has no kernel for these types on a processor: {_IN_FLOATS}" if lacks else None,
            ) from error
        _exchanged(where, *(
            {p.name: p.type.removeprefix("tensor(").removesuffix(")") for p in ports}
            for ports in (self._session.get_inputs(), self._session.get_outputs())
        ))  # fmt: skip
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name.

        Raises:
            DataError: An input has no value.
            ModelError: ONNX Runtime stopped; says at which node, as far as it tells.
        """
        try:
            results = self._session.run(None, {name: feeds[name] for name in self.inputs})
        except KeyError as error:
            raise DataError(
                f"no value for the input {error.args[0]!r}; given: {', '.join(feeds)}",
                hint=f"the inputs are {', '.join(self.inputs)}",
            ) from error
        except Exception as error:
            raise ModelError(f"ONNX Runtime stopped: {first_line(error)}") from error
        return dict(zip(self.outputs, results, strict=True))

    def _take(self, model: ir.Model, options: ort.SessionOptions) -> bytes:
        """The graph as bytes; its weights are handed over where they lie, without a copy in the message."""
        graph, weights = detached(model)
        # ONNX Runtime reads this memory for as long as the session lives.
        self._weights = [
            ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(w.numpy())) for w in weights.values()
        ]
        options.add_external_initializers(list(weights), self._weights)
        return graph

    def close(self) -> None:
        """Free the session."""
        del self._session
        self._weights.clear()


def exchanged(model: ir.Model, name: str) -> None:
    """Refuse a graph whose inputs or outputs no array can hold.

    Raises:
        ModelError: Lists them all.
    """
    _exchanged(name, *(
        {str(v.name): v.dtype.name.lower() for v in ports if v.dtype is not None}
        for ports in (model.graph.inputs, model.graph.outputs)
    ))  # fmt: skip


def _exchanged(where: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    types = (*inputs.items(), *((n, kind) for n, kind in outputs.items() if kind != _AS_BYTES))
    if alien := [f"{name} ({kind})" for name, kind in types if _ALIEN.match(kind)]:
        raise ModelError(
            f"{where}: inputs and outputs of types that ONNX Runtime does not exchange with NumPy: {', '.join(alien)}",
            hint=_IN_FLOATS,
        )


# Operators that ONNX Runtime moves Q/DQ pairs over.
_CROSSED = ("MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def _widened(model: ir.Model | Path) -> ir.Model | Path:
    """``model``, or a copy that multiplies integers u8 by u8: ONNX Runtime's own remedy leaves out bodies of loops and conditionals."""
    try:
        graph = ir.load(model) if isinstance(model, Path) else model
    except Exception:  # noqa: BLE001  (of a broken file; ONNX Runtime reads it next, and says what is wrong)
        return model
    if not signed(graph):
        return model
    copy = graph.clone()
    unsigned(copy)
    return copy


def unsound(model: ir.Model) -> tuple[str, ...]:
    """Optimizers of ONNX Runtime that stop at ``model``, or make it compute something else, by their names.

    Those that take a Clip or Relu into the QuantizeLinear behind it know integers alone (1.32): at floats of 8 bits the one
    stops, the other drops the Relu. The one that moves pairs writes their type down twice, and another changes one of the two.
    The one that takes a Transpose into the MatMul behind it ends the process (``turned_operand``); in half precision, where
    casts come in between on a processor, it stays off altogether, since rewrites bring the two together.
    """
    found: dict[str, None] = {}
    for node in walk(model):
        value = node.outputs[0]
        if node.op_type == "QuantizeLinear" and value.dtype is not None and not value.dtype.is_integer():
            found |= dict.fromkeys(("ClipQuantRewrite", "ReluQuantRewrite"))
        elif moves_signed(node):
            found["QDQPropagationTransformer"] = None
        elif node.op_type == "MatMul" and (value.dtype in _HALVES or turned_operand(node) is not None):
            found["MatmulTransposeFusion"] = None
    return tuple(found)


def turned_operand(node: ir.Node) -> tuple[int, ir.Node] | None:
    """The operand of a MatMul, and the Transpose that it comes from, at which ONNX Runtime (1.32) ends the process as it loads the graph.

    It changes the order of a Cast and the Transpose before it, to take that into the product: where the first of three axes does
    not stay the first, a node is left over that others still read. In half precision it adds the Cast itself.
    """
    for index, value in enumerate(node.inputs[:2] if node.op_type == "MatMul" else ()):
        behind = None if value is None else value.producer()
        if behind is not None and behind.op_type == "Cast":
            value = behind.inputs[0]
            behind = None if value is None else value.producer()
        if behind is None or behind.op_type != "Transpose" or "perm" not in behind.attributes:
            continue
        is_cast = value is not node.inputs[index] or behind.outputs[0].dtype in _HALVES
        if is_cast and tuple(behind.attributes["perm"].as_ints()) in ((1, 0, 2), (1, 2, 0)):
            return index, behind
    return None


def moves_signed(node: ir.Node) -> bool:
    """Whether ONNX Runtime (1.32) writes another pair of int8 behind ``node``, which it then cannot read on x86."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return False
    x = node.inputs[0]
    return (
        x.dtype == ir.DataType.INT8
        and x.const_value is None
        and any(use.node.op_type in _CROSSED and use.idx == 0 for use in node.outputs[0].uses())
    )


def session_options(
    *, threads: int, optimize: bool = True, large: bool = False, precise: bool = False
) -> ort.SessionOptions:
    """Options that every session of this project starts from; ``precise`` as of ``ReferenceSession``."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    # Spinning threads burn the CPU time that others on the machine, and our own measurements, would use.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if large:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if precise and target("cpu").saturates:
        # Pairs stay what they say, in floats. Operators on integers multiply u8 by u8, which widen first. Both are slower.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def first_line(error: Exception) -> str:
    """The part of a runtime's message that a reader can use."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("[ONNXRuntimeError] : ")[:500]


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy that shares all tensors and gives back ``names`` instead of its own outputs."""
    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs} | {v.name: v for v in copy.graph.inputs}
    for output in copy.graph.outputs:
        if output.type is None:
            output.type = ir.TensorType(ir.DataType.FLOAT)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    return copy


def trial_batches(
    model: ir.Model,
    n: int,
    *,
    seed: int,
    sizes: Mapping[str, int] | None = None,
    run: Callable[[Mapping[str, np.ndarray]], object] | None = None,
) -> CalibrationData:
    """Batches drawn from the input specification, in the first sizes tried for the free axes that ``model`` runs with.

    Such that some window is larger than what it slides over come last.

    Args:
        sizes: Of some of them, by symbol: these are not tried.
        run: Runs it, where a session is open already.

    Raises:
        DataError: It runs with none.
    """
    if run is None:
        session = ReferenceSession(model, disabled=unsound(model))
        try:
            return trial_batches(model, n, seed=seed, sizes=sizes, run=session.run)
        finally:
            session.close()
    reason, small = "", None
    for trial in trial_sizes(specs(model)[0]):
        drawn = CalibrationData.random_batches(model, n, seed=seed, sizes={**trial, **(sizes or {})})
        feeds = next(iter(drawn))
        try:
            run(feeds)
        except ModelError as error:
            reason = reason or str(error)
            continue
        if windows_fit(model, {name: x.shape for name, x in feeds.items()}):
            return drawn
        small = small or drawn
    if small is not None:
        return small
    raise DataError(
        f"the model runs with none of the inputs drawn from its input specification: {reason}",
        hint="give --calib with inputs that it takes",
    )
