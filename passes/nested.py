"""Inputs and outputs of torch modules, nested as they may be: caches, lists, dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    import onnx_ir as ir

    from optkit.passes.base import Batch


def fresh(batch: Batch) -> Batch:
    """The batch for one more call: what is nested in it is copied, as modules write to their caches."""

    def one(x: Any) -> Any:
        if x is None or isinstance(x, torch.Tensor):
            return x
        return pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, x)

    if isinstance(batch, Mapping):
        return {name: one(x) for name, x in batch.items()}
    return tuple(one(x) for x in batch)


def tensors(x: Any) -> list[torch.Tensor]:
    """All tensors inside, in the order in which graphs have them."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(x):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):  # of a type that torch does not take apart
            found += tensors(list(leaf.values()))
    return found


def feeds(model: ir.Model, batch: Batch) -> dict[str, np.ndarray]:
    """A batch of a module as one for the graph that was made of it."""
    given = [t.numpy(force=True) for t in tensors(batch)]
    return dict(zip([str(v.name) for v in model.graph.inputs], given, strict=True))
