"""The ladder of ways to trace a module: the first that works is taken."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from optkit.exporting.axes import Axes
from optkit.exporting.eager import quiet, run_eager
from optkit.exporting.explain import untraceable
from optkit.exporting.loops import compiled
from optkit.exporting.repairs import repaired
from optkit.exporting.signature import Flat, Signature

logger = logging.getLogger(__name__)

_DIM = torch.export.Dim
_LAST = "dynamic, with the last repairs"
# ``(name, what becomes of asked axes, keyword arguments of torch.export.export)``, best first.
_LADDER: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("dynamic", _DIM.DYNAMIC, {"strict": False}),
    (
        "dynamic, with run-time checks",
        _DIM.DYNAMIC,
        {"strict": False, "prefer_deferred_runtime_asserts_over_guards": True},
    ),
    (_LAST, _DIM.DYNAMIC, {"strict": False}),
    ("auto", _DIM.AUTO, {"strict": False}),
    ("strict", _DIM.AUTO, {"strict": True}),
)
# Loops of one module that are compiled, at most.
_LOOPS = 4
_FIXED = (("static", None, {"strict": False}), ("strict", None, {"strict": True}))


def climb(
    flat: Flat, tensors: Sequence[torch.Tensor], signature: Signature, axes: Axes, name: str
) -> tuple[Any, str]:
    """The exported program, and the rung that gave it.

    Raises:
        ModelError: None did; names the line at which the first stopped.
    """
    first: BaseException | None = None
    for rung, kind, options in _LADDER if axes else _FIXED:
        try:
            return _trace(flat, tensors, signature, axes, kind, options, last=rung == _LAST), rung
        except Exception as error:  # noqa: BLE001  (torch raises what user code raises, and many kinds of its own)
            logger.debug("%s: %s: %s", name, rung, error)
            first = first or error
    assert first is not None
    rung, kind, options = (_LADDER if axes else _FIXED)[0]
    errors = [first]
    while len(errors) <= _LOOPS:
        with compiled(flat.module, errors) as worth:
            if not worth:
                break
            try:
                with quiet(), torch.no_grad():
                    # The operators take their types from what they compute.
                    flat(*(t.clone() for t in tensors))
                return _trace(flat, tensors, signature, axes, kind, options), f"{rung}, with loops compiled"
            except Exception as error:  # noqa: BLE001  (as above)
                logger.debug("%s: with loops compiled: %s", name, error)
                errors.append(error)
    raise untraceable(name, first, flat.module) from first


def _trace(
    flat: Flat,
    tensors: Sequence[torch.Tensor],
    signature: Signature,
    axes: Axes,
    kind: Any,
    options: dict[str, Any],
    *,
    last: bool = False,
) -> Any:
    shapes = tuple({axis: kind for axis in axes.names.get(n, {})} for n in signature.names)
    with quiet(), torch.no_grad(), repaired(flat.module, last=last):
        return torch.export.export(
            flat,
            tuple(t.clone() for t in tensors),
            dynamic_shapes={"inputs": shapes} if axes else None,
            **options,
        )


def enlarged(module: Any, signature: Signature, axes: Axes, outputs: Sequence[str]) -> list[torch.Tensor]:
    """The example at sizes of at least 2: tracing takes an axis of one element for an axis of always one."""
    if not axes or min(axes.sizes.values()) > 1:
        return [t.clone() for t in signature.tensors]
    taken = set(axes.sizes.values())
    sizes = {}
    for label, size in axes.sizes.items():
        while size < 2 or (size != axes.sizes[label] and size in taken):
            size += 1
        taken.add(size)
        sizes[label] = size
    larger = axes.resized(signature.names, signature.tensors, sizes)
    try:
        run_eager(module, signature, larger, outputs)
    except Exception as error:  # noqa: BLE001  (whatever the user's module raises: then the example is all there is)
        logger.debug("the module does not take %s: %s", sizes, error)
        return [t.clone() for t in signature.tensors]
    return larger
