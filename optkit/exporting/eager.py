"""A module as it is: called in evaluation mode, without gradients, and without telling the terminal about itself."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from optkit.errors import OptkitError, UsageError
from optkit.exporting.explain import where
from optkit.exporting.signature import Signature
from optkit.passes.modes import evaluating

logger = logging.getLogger(__name__)


def run_eager(
    module: Any, signature: Signature, tensors: Sequence[torch.Tensor], outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    """One call in evaluation mode without gradients; arguments are copies, as caches are written to."""
    from torch.utils import _pytree as pytree

    args, kwargs = signature.arguments([t.clone() for t in tensors])
    with evaluating(module), torch.no_grad(), quiet():
        result = module(*args, **kwargs)
    found = [v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
    return {n: v.resolve_conj().numpy(force=True).copy() for n, v in zip(outputs, found, strict=True)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from telling the user's terminal about itself."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "torch", "transformers")]
    children = [
        logging.getLogger(n)
        for n in tuple(logging.root.manager.loggerDict)
        if n.startswith(("torch", "transformers"))
    ]
    old = [(lg, lg.level) for lg in dict.fromkeys([*loggers, *children])]
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warnings.simplefilter("ignore")
        try:
            for lg, _ in old:
                lg.setLevel(logging.CRITICAL)
            yield
        finally:
            for lg, level in old:
                lg.setLevel(level)
            if said.getvalue():
                logger.debug("said while tracing: %s", said.getvalue())


def call(module: Any, signature: Signature, tensors: Sequence[torch.Tensor], name: str) -> Any:
    """Run the module on the example.

    Raises:
        UsageError: It does not run; names the line.
    """
    args, kwargs = signature.arguments([t.clone() for t in tensors])
    try:
        with torch.no_grad(), quiet():
            return module(*args, **kwargs)
    except OptkitError:
        raise
    except Exception as error:
        at = where(error, module)
        raise UsageError(
            f"{name}: does not run on the example inputs: {at + ': ' if at else ''}{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            hint="give inputs that the module takes",
        ) from error
