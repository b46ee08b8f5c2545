"""Blocks of pixels moved between channels and space become DepthToSpace or SpaceToDepth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from optkit.dims import Dim, shape_of, times
from optkit.passes.base import Context, GraphPass
from optkit.rewrite import Change, Match, Rule, apply


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """A way to move blocks: six axes by role, their order behind the Transpose, the operator.

    Roles: ``n`` batch, ``c`` channels of the smaller kind, ``b`` block, ``h`` and ``w`` small height and width.
    """

    axes: str
    perm: tuple[int, ...]
    op: str
    mode: str | None = None


_MOVES = (
    _Move(axes="nbbchw", perm=(0, 3, 4, 1, 5, 2), op="DepthToSpace", mode="DCR"),
    _Move(axes="ncbbhw", perm=(0, 1, 4, 2, 5, 3), op="DepthToSpace", mode="CRD"),
    _Move(axes="nchbwb", perm=(0, 3, 5, 1, 2, 4), op="SpaceToDepth"),
)


def _pattern(op: Any, x: Any, blocks: Any, whole: Any) -> Any:
    return op.Reshape(op.Transpose(op.Reshape(x, blocks)), whole)


def _found(root: ir.Node, x: ir.Value) -> tuple[_Move, int] | str:
    """The move and its block size, or why it is none."""
    transpose = root.inputs[0].producer() if root.inputs[0] is not None else None
    assert transpose is not None
    before, six, after = shape_of(x), shape_of(transpose.inputs[0]), shape_of(root.outputs[0])
    if before is None or six is None or after is None or (len(before), len(six), len(after)) != (4, 6, 4):
        return "not from four axes over six to four"
    perm = tuple(transpose.attributes.get_ints("perm", ()))
    reason = f"moves axes by {list(perm)}"
    for move in _MOVES:
        if perm != move.perm:
            continue
        sizes: dict[str, Dim | None] = {}
        if any(sizes.setdefault(role, size) != size for role, size in zip(move.axes, six, strict=True)):
            reason = "the blocks are not square"
            continue
        block = sizes["b"]
        if not isinstance(block, int) or block < 2 or None in sizes.values():
            reason = "the block size is not known"
            continue
        small = (sizes["n"], sizes["c"], times(sizes["h"], block), times(sizes["w"], block))
        deep = (sizes["n"], times(sizes["c"], block * block), sizes["h"], sizes["w"])
        if (before, after) == ((deep, small) if move.op == "DepthToSpace" else (small, deep)):
            return move, block
        reason = "splits or joins other axes"
    return reason


def _check(root: ir.Node, x: ir.Value, **_: Any) -> Match:
    found = _found(root, x)
    return Match().fail(found, root) if isinstance(found, str) else Match()


def _rewrite(op: Any, root: ir.Node, x: ir.Value, **_: Any) -> Any:
    found = _found(root, x)
    assert not isinstance(found, str)
    move, block = found
    mode = {} if move.mode is None else {"mode": move.mode}
    return getattr(op, move.op)(x, blocksize=block, **mode)


class FuseDepthToSpace(GraphPass):
    """Replace Reshape, Transpose, Reshape that move square blocks between channels and space by one operator.

    Before: ``[N, C, b, b, H, W]`` in the order 0, 1, 4, 2, 5, 3 as ``[N, C, b * H, b * W]`` (pixel shuffle).
    After: ``DepthToSpace(x, blocksize=b, mode="CRD")``; the other order of channels is DCR, the way back SpaceToDepth.
    """

    name: ClassVar[str] = "fuse-depth-to-space"

    def run(self, model: ir.Model, context: Context) -> Sequence[Change]:
        """Replace every move."""
        return apply([Rule(_pattern, _rewrite, _check, name="depth-to-space")], model)
