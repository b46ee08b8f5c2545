"""What OpenVINO's messages say, without the places in its own source files."""

from __future__ import annotations

import re

# Operators that the front end refuses: "-- Loop-14 with a message:", "-- No conversion rule found for operations: Det-21".
_REFUSED = re.compile(r"^-- (\S+) with a message:\n(.*?)(?=^-- |^Summary:|\Z)", re.MULTILINE | re.DOTALL)
_UNKNOWN = re.compile(r"^-- No conversion rule found for operations: (.*)$", re.MULTILINE)
_NODE = re.compile(r"ONNX node '<Node\(\w+\): (.*?)>'")


def reason(error: BaseException | str) -> str:
    """The part of a message that a reader can use."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [
        line
        for line in lines
        if not line.startswith(("Exception from ", "FrontEnd API failed", "While validating "))
        and not (line.startswith("Check '") and " failed at " in line)
    ]
    return (" ".join(told) or (lines[-1] if lines else "no reason given"))[:500]


def refused(message: str) -> list[tuple[str, str]]:
    """What the front end's message lists: the node, or the operator where none is named, and the reason."""
    unknown = [o.strip() for found in _UNKNOWN.findall(message) for o in found.split(",")]
    problems = [(_operator(o), "it has no rule for this operator") for o in unknown]
    for operator, text in _REFUSED.findall(message):
        node, kind = _NODE.search(text), _operator(operator)
        problems.append((f"{node[1]} ({kind})" if node else kind, reason(text)))
    return problems


def _operator(versioned: str) -> str:
    """``Det`` of ``Det-21``."""
    return versioned.rpartition("-")[0] or versioned
