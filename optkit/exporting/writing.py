"""From an exported program to ONNX."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch

from optkit.errors import ModelError, UnsupportedOpError
from optkit.exporting import loops
from optkit.exporting.attention import zero_masked_rows
from optkit.exporting.eager import quiet
from optkit.exporting.explain import chain, is_users, located, place, shorten
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
        loops.written_out(model)
        zero_masked_rows(model)
        clamp_windows(model)
        return model
    assert failure is not None
    raise _no_word(program, failure, name) from failure


def _no_word(program: Any, error: Exception, name: str) -> ModelError:
    text = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(str(part) for part in chain(error)))
    missing = re.search(
        r"No (?:ONNX|decompositions).*?for <OpOverload\(op='([\w.:]+)', overload='(\w+)'\)>", text
    )
    if missing is None:
        lines = [line for line in text.splitlines() if line.strip()]
        # What the exporter says first is in which of its steps it was; what went wrong there comes last.
        inner = str(chain(error)[-1]).strip().partition("\n")[0]
        reason = next((ln for ln in lines if "No ONNX" in ln or "Error calling" in ln), inner or lines[0])
        at = place(error)
        return ModelError(
            f"{name}: torch.onnx cannot write it: {located(at) + ': ' if at else ''}{reason[:400]}",
            hint="write that line with other operators of torch; --debug shows the whole message",
        )
    target = f"{missing[1]}.{missing[2]}"
    places = [
        _place(n.meta) for n in program.graph.nodes if str(n.target) in (target, target.replace("::", "."))
    ]
    problems = [(f"{target}{': ' + at if at else ''}", "ONNX has no such operator") for at in places or [""]]
    return UnsupportedOpError(name, problems, hint="write that line with other operators of torch")


def _place(meta: Mapping[str, Any]) -> str:
    """The module and the line of the user's that a node of the program comes from."""
    scopes = [str(path) for path, _ in (meta.get("nn_module_stack") or {}).values()]
    module = re.sub(r"^(L\['self'\]\.)?module\.?|@\d+", "", scopes[-1]) if scopes else ""
    frames = re.findall(r'File "([^"]+)", line (\d+)', meta.get("stack_trace") or "")
    lines = [f"{shorten(f)}:{n}" for f, n in frames if is_users(f)]
    return ", ".join(p for p in (module, *lines[-1:]) if p)
