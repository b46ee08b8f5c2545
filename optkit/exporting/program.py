"""What is changed in an exported program before it becomes ONNX: assertions go, a few operators are written out."""

from __future__ import annotations

from typing import Any

import torch

_ASSERTIONS = (
    "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size", "_functional_assert_async",
    "_functional_assert_scalar", "_functional_sym_constrain_range",
)  # fmt: skip


def simplify(program: Any) -> Any:
    """The program without run-time assertions, and without operators for which ONNX has no word."""
    wanted = {
        target: function
        for target, function in (_written_out() | _kernels(program)).items()
        if any(node.target is target for node in program.graph.nodes)
    }
    if wanted:
        program = program.run_decompositions(wanted)
    graph = program.graph_module.graph
    changed = False
    for node in reversed(tuple(graph.nodes)):
        name = getattr(getattr(node.target, "_schema", None), "name", "").rpartition("::")[2]
        if node.op == "call_function" and not node.users and name in _ASSERTIONS:
            graph.erase_node(node)
            changed = True
    if changed:
        graph.eliminate_dead_code()
        program.graph_module.recompile()
    return program


def _written_out() -> dict[Any, Any]:
    aten: Any = torch.ops.aten
    return {
        aten.cumprod.default: _cumprod,
        aten.prod.dim_int: _prod_dim,
        aten.linalg_inv.default: _inverse,
        aten.linalg_inv_ex.default: _inverse_ex,
    }


def _kernels(program: Any) -> dict[Any, Any]:
    """Operators that stand for kernels of ours, as the bodies that they mean."""
    if not any(str(node.target).startswith("optkit.") for node in program.graph.nodes):
        return {}
    from optkit.torch.operators import body, offered, operator

    return {operator(name): body(name) for name in offered().values()}


def _cumprod(x: Any, dim: int, *, dtype: Any = None) -> Any:
    """Size and sign apart: ``exp(cumsum(log |x|))``; a zero makes all that follows zero, as it must."""
    if dtype is not None:
        x = x.to(dtype)
    size = torch.exp(torch.cumsum(torch.log(torch.abs(x)), dim))
    negative = torch.cumsum((x < 0).to(x.dtype), dim)
    return size * (1 - 2 * torch.remainder(negative, 2))


def _prod_dim(x: Any, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if dtype is not None:
        x = x.to(dtype)
    found = None
    for part in torch.unbind(x, dim):
        found = part if found is None else found * part
    return found.unsqueeze(dim) if keepdim else found  # type: ignore[union-attr]


def _inverse(x: Any) -> Any:
    """By cofactors, for matrices of two or three rows."""
    n = x.shape[-1]
    if n == 1:
        return 1 / x
    if n == 2:
        a, b, c, d = x[..., 0, 0], x[..., 0, 1], x[..., 1, 0], x[..., 1, 1]
        rows = torch.stack([d, -b, -c, a], dim=-1).reshape(x.shape)
        return rows / (a * d - b * c)[..., None, None]
    if n == 3:
        r = x.unbind(-2)
        crossed = [_cross(r[1], r[2]), _cross(r[2], r[0]), _cross(r[0], r[1])]
        return torch.stack(crossed, dim=-1) / (r[0] * crossed[0]).sum(-1)[..., None, None]
    return NotImplemented


def _cross(a: Any, b: Any) -> Any:
    a0, a1, a2 = a.unbind(-1)
    b0, b1, b2 = b.unbind(-1)
    return torch.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0], dim=-1)


def _inverse_ex(x: Any, *, check_errors: bool = False) -> Any:
    found = _inverse(x)
    return found if found is NotImplemented else (found, torch.zeros(x.shape[:-2], dtype=torch.int32))
