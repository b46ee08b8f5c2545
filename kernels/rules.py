"""Where kernels apply on an architecture, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from optkit.graph import describe
from optkit.kernels import KERNELS
from optkit.kernels.base import FLOATS, format_of
from optkit.rewrite import Match, Rule, explain
from optkit.targets.gpu import ARCHITECTURES, Capability, formats

# Nodes that a message names.
_NAMED = 2


def legal(rule: Rule, capability: Capability) -> Rule:
    """The rule, where the architecture has the formats of all that it matches."""
    known, limits, check = formats(capability), ARCHITECTURES[capability], rule.check

    def allowed(root: ir.Node, **bound: Any) -> Match:
        for value in (*root.outputs, *bound.values()):
            fmt = format_of(value) if isinstance(value, ir.Value) else None
            if fmt in FLOATS and fmt not in known:
                return Match().fail(f"{limits.arch} has no {fmt}", value)
        return check(root=root, **bound) if check is not None else Match()

    rule.check = allowed
    return rule


def missed(model: ir.Model, nodes: Sequence[ir.Node], capability: Capability) -> str | None:
    """Why the first of ``nodes`` are in no kernel: of each what the rules that came farthest say; None where none came far."""
    rules = [legal(rule, capability) for name in KERNELS for rule in KERNELS[name]().rules()]
    misses = explain(rules, model, least=1)
    told = []
    for name in dict.fromkeys(map(describe, nodes)):
        # A pattern that is something else altogether says nothing about the node.
        own = [m for m in misses if m.node == name and not m.reason.startswith("expected ")]
        reasons = dict.fromkeys(f"{m.rule}: {m.reason}" for m in own if m.depth == own[0].depth)
        if reasons:
            told.append(f"{name}: {', '.join(reasons)}")
    more = [f"and {len(told) - _NAMED} more"] if len(told) > _NAMED else []
    return "; ".join([*told[:_NAMED], *more]) or None
