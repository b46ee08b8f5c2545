"""The kernels as operators of PyTorch: ``import optkit.torch.operators``, then ``torch.ops.optkit.layer_norm(x, scale, bias)``.

On a GPU from sm_80 on they launch the programs of ``optkit.kernels``, which torch.compile sees; on a processor they compute
the kernel's ONNX body, which ``optkit.compile`` writes them out as too. ``torch.export`` keeps them. They have no gradients.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from optkit.errors import UnknownNameError, UsageError
from optkit.kernels import KERNELS
from optkit.kernels.base import DOMAIN
from optkit.kernels.expressions import evaluate
from optkit.targets.gpu import Capability
from optkit.torch import bodies

if TYPE_CHECKING:
    from optkit.kernels.base import Kernel

_FORMATS = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "i8": torch.int8,
    "i32": torch.int32, "i64": torch.int64,
}  # fmt: skip
_TYPES = {ir.AttributeType.FLOAT: float, ir.AttributeType.INT: int, ir.AttributeType.INTS: Sequence[int]}


def offered() -> dict[str, str]:
    """Kernels by the name of their operator in ``torch.ops.optkit``."""
    return {name.replace("-", "_"): name for name in KERNELS if not bodies.missing(_function(name))}


def operator(name: str) -> Any:
    """The operator of the kernel ``name``.

    Raises:
        UnknownNameError: There is none; names the nearest.
    """
    word = name.replace("-", "_")
    if word not in offered():
        raise UnknownNameError("operator", name, offered())
    return getattr(torch.ops.optkit, word).default


def body(name: str) -> Callable[..., Any]:
    """What the operator of the kernel ``name`` means, in operators of torch."""
    function, attributes = _function(name), _attributes(name)
    count = len(function.inputs)

    def compute(*given: Any, **named: Any) -> Any:
        order = [*(v.name for v in function.inputs), *attributes]
        values = dict(zip(order, given, strict=False)) | named
        tensors = [values[str(v.name)] for v in function.inputs]
        found = {k: values.get(k, default) for k, (_, default) in attributes.items()}
        results = bodies.run(function, tensors, found)
        return results[0] if len(results) == 1 else results

    assert count
    return compute


def launch(
    kernel: Kernel,
    inputs: Sequence[torch.Tensor],
    attributes: Mapping[str, Any],
    capability: Capability,
) -> list[torch.Tensor]:
    """Start the kernel's program for ``capability`` on tensors of the device; the outputs.

    Raises:
        UsageError: There is no program for these formats and sizes; says why.
    """
    inputs = [x.contiguous() for x in inputs]
    problem = kernel.problem(_node(kernel, inputs, attributes))
    why = problem if isinstance(problem, str) else kernel.unsupported(problem, capability)
    if isinstance(problem, str) or why is not None:
        raise UsageError(f"{kernel.name}: {why}", hint="write it with operators of torch")
    shapes = [tuple(x.shape) for x in inputs]
    program = kernel.program(problem, capability)
    sizes = kernel.sizes(problem, shapes)
    made = kernel.outputs(problem, shapes)
    outputs: dict[int, torch.Tensor] = {}
    given: dict[str, Any] = {}
    for argument in program.arguments:
        kind, _, index = argument.binds.partition(":")
        if kind == "input":
            x = inputs[int(index)]
            # Bytes are i8 to the programs, whatever is packed in them.
            given[argument.name] = x.view(torch.int8) if x.dtype == torch.uint8 else x
        elif kind == "output":
            written = program.aliases.get(int(index))
            if written is not None:
                # In place, and an operator changes nothing that it is given.
                outputs[int(index)] = inputs[written].clone()
            else:
                dtype = _FORMATS[argument.type.lstrip("*")]
                shape = made[int(index)]
                assert shape is not None
                outputs[int(index)] = torch.empty(shape, dtype=dtype, device=inputs[0].device)
            given[argument.name] = outputs[int(index)]
        else:
            given[argument.name] = evaluate(argument.binds, sizes)
    grid = tuple(evaluate(expression, sizes) for expression in program.grid)
    module, _, name = program.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    if 0 not in grid:
        _traceable(function)[grid](
            **given, **program.constants, num_warps=program.warps, num_stages=program.stages
        )
    return [outputs[i] for i in sorted(outputs)]


def _traceable(function: Any) -> Any:
    """So that torch.compile sees what is launched; Triton's interpreter has nothing to show."""
    from triton.runtime.jit import JITFunction

    return torch.library.wrap_triton(function) if isinstance(function, JITFunction) else function


@cache
def _scratch() -> None:
    """Programs with tensor descriptors want memory of their own."""
    import triton

    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


@cache
def _function(name: str) -> ir.Function:
    function: ir.Function = KERNELS[name]().function()
    return function


@cache
def _attributes(name: str) -> dict[str, tuple[Any, Any]]:
    """Type and default by name, those without a default first."""
    kernel, found = KERNELS[name](), {}
    for key, declared in sorted(
        _function(name).attributes.items(), key=lambda item: item[1].value is not None
    ):
        example = kernel.attributes(kernel.examples[0])[key]
        plain = Sequence[int] if isinstance(example, list) else type(example)
        found[key] = (_TYPES.get(declared.type, plain), declared.value)
    return found


def _signature(name: str) -> inspect.Signature:
    """What torch reads the schema of the operator from."""
    function, kind = _function(name), inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(str(v.name), kind, annotation=torch.Tensor) for v in function.inputs]
    for key, (type_, default) in _attributes(name).items():
        absent = inspect.Parameter.empty if default is None else default
        parameters.append(inspect.Parameter(key, kind, annotation=type_, default=absent))
    count = len(function.outputs)
    returned = torch.Tensor if count == 1 else tuple[(torch.Tensor,) * count]  # type: ignore[misc]
    return inspect.Signature(parameters, return_annotation=returned)


def _node(kernel: Kernel, inputs: Sequence[torch.Tensor], attributes: Mapping[str, Any]) -> ir.Node:
    """The call that a graph would have, every output read."""
    values = [
        ir.Value(name=f"i{i}", shape=ir.Shape([int(d) for d in x.shape]), type=ir.TensorType(bodies.ONNX[x.dtype]))
        for i, x in enumerate(inputs)
    ]  # fmt: skip
    count = len(kernel.function().outputs)
    node = ir.node(
        kernel.op, values, attributes=dict(attributes), domain=DOMAIN, num_outputs=count, name="call"
    )
    ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21, DOMAIN: 1})
    return node


def _register(word: str, name: str) -> None:
    kernel: Kernel = KERNELS[name]()
    compute, attributes = body(name), _attributes(name)
    count = len(_function(name).inputs)

    def on_device(*given: Any, **named: Any) -> Any:
        order = [str(v.name) for v in _function(name).inputs] + list(attributes)
        values = (
            {k: default for k, (_, default) in attributes.items()}
            | dict(zip(order, given, strict=False))
            | named
        )
        tensors = [values[k] for k in order[:count]]
        if tensors[0].device.type != "cuda":
            # torch.compile takes the operator apart wherever its tensors are.
            return compute(*given, **named)
        _scratch()
        major, minor = torch.cuda.get_device_capability(tensors[0].device)
        found = launch(kernel, tensors, {k: values[k] for k in attributes}, (major, minor))
        return found[0] if len(found) == 1 else tuple(found)

    on_device.__signature__ = _signature(name)  # type: ignore[attr-defined]
    made = torch.library.triton_op(f"optkit::{word}", on_device, mutates_args=())
    made.register_kernel("cpu")(compute)
    made.register_fake(compute)


for _word, _name in offered().items():
    _register(_word, _name)
