"""From an exported program to ONNX."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from optkit.errors import ModelError, UnsupportedOpError
from optkit.exporting.attention import zero_masked_rows
from optkit.exporting.eager import quiet
from optkit.exporting.explain import is_users, shorten
from optkit.exporting.operators import translations
from optkit.exporting.pooling import clamp_windows
from optkit.exporting.program import simplify

logger = logging.getLogger(__name__)


def write(program: Any, name: str) -> ir.Model:
    """The program as a graph.

    Raises:
        UnsupportedOpError: ONNX has no word for an operator; lists its nodes with their lines.
        ModelError: The exporter fails otherwise.
    """
    failure: Exception | None = None
    for decompose in (False, True):
        try:
            with quiet(), torch.no_grad():
                ready = simplify(program.run_decompositions() if decompose else program)
                written = torch.onnx.export(
                    ready, dynamo=True, optimize=False, verbose=False, custom_translation_table=translations()
                )
        except Exception as error:  # noqa: BLE001  (the exporter wraps whatever went wrong in errors of its own)
            logger.debug("%s: no ONNX: %s", name, error)
            failure = failure or error
            continue
        assert written is not None
        model: ir.Model = written.model
        zero_masked_rows(model)
        clamp_windows(model)
        return model
    assert failure is not None
    raise _no_word(program, failure, name) from failure


def _no_word(program: Any, error: Exception, name: str) -> ModelError:
    text, current = "", error
    while current is not None:
        text += f"{current}\n"
        current = current.__cause__ or current.__context__  # type: ignore[assignment]
    missing = re.search(
        r"No (?:ONNX|decompositions).*?for <OpOverload\(op='([\w.:]+)', overload='(\w+)'\)>", text
    )
    lines = [line for line in text.splitlines() if line.strip()]
    reason = next(
        (ln for ln in lines if "No ONNX" in ln or "Error calling" in ln), lines[0] if lines else str(error)
    )
    if missing is None:
        return ModelError(
            f"{name}: torch.onnx cannot write it: {reason[:400]}",
            hint="run with --debug for the whole message",
        )
    target = f"{missing[1]}.{missing[2]}"
    problems = []
    for node in program.graph.nodes:
        if str(node.target) in (target, target.replace("::", ".")):
            trace = node.meta.get("stack_trace") or ""
            at = re.findall(r'File "([^"]+)", line (\d+)', trace)
            where = _place(at)
            problems.append(
                (f"{node.name} ({target}{': ' + where if where else ''})", "ONNX has no such operator")
            )
    problems = problems or [(target, "ONNX has no such operator")]
    return UnsupportedOpError(name, problems, hint="write that line with other operators of torch")


def _place(frames: Sequence[tuple[str, str]]) -> str:
    users = [(f, n) for f, n in frames if is_users(f)]
    return f"{shorten(users[-1][0])}:{users[-1][1]}" if users else ""
