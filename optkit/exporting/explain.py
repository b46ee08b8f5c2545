"""What torch says when it cannot trace a module, in words that name the line and a way out."""

from __future__ import annotations

import linecache
import re
import traceback
from pathlib import Path

import torch

from optkit.errors import ModelError

_HERE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)

# What the message holds -> what is wrong, and a rewrite. First match wins.
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"data-dependent expression|GuardOnDataDependent|data-dependent branching|DataDependentOutput|bool\(\) on|Tensor-likes? .* truth",
        "a Python decision depends on the value of a tensor",
        "compute both sides and choose with torch.where, use torch.cond, or make the value an argument",
    ),
    (
        r"specialized|[Nn]ot all values of|Constraints violated|marked .* as dynamic|derived dim|suggested fixes",
        "the code fixes the size of an axis that was asked to be free",
        "compute sizes from x.shape[i] and not by int(), len() or a constant; or ask for fewer axes",
    ),
    (
        r"\.item\(\)|aten\._local_scalar_dense|\.tolist\(\)|\.numpy\(\)|FakeTensor.*numpy",
        "a tensor's value is taken out of the graph",
        "keep it a tensor, or pass it as a Python number",
    ),
    (r"vmap|functorch", "a vmap cannot be traced here", "write the mapped axis out as a batch axis"),
    (
        r"not a known type|pytree|Unsupported.*type",
        "an argument or result is of a type that tracing does not know",
        "pass and return tensors, tuples, lists and dicts; register others with torch.utils._pytree",
    ),
    (
        r"does not have a kernel|NotImplementedError|not implemented|has no fake impl|no fake impl",
        "an operator has no rule for its shapes",
        "register one with torch.library.register_fake, or use an operator of torch",
    ),
)


def untraceable(name: str, error: BaseException, root: torch.nn.Module) -> ModelError:
    """The error for a module that torch cannot trace."""
    text = _message(error)
    what, hint = next(
        ((what, hint) for pattern, what, hint in _CAUSES if re.search(pattern, text)),
        ("", "change that line, or export the module yourself and give the .onnx or .pt2 file"),
    )
    at = where(error, root)
    at = f"{at}: " if at else ""
    first = _first_line(text)
    return ModelError(f"{name}: cannot be traced: {at}{what + ': ' if what else ''}{first}", hint=hint)


def where(error: BaseException, root: torch.nn.Module) -> str:
    """The module below ``root`` and the line of the user's in which an error arose, as far as they are known."""
    line = place(error)
    return ", ".join(p for p in (_inside(error, root), located(line) if line is not None else "") if p)


def _inside(error: BaseException, root: torch.nn.Module) -> str:
    paths = {id(m): f"{path} ({type(m).__name__})" for path, m in root.named_modules() if path}
    for part in reversed(chain(error)):
        owners = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(part.__traceback__)]
        if found := [paths[o] for o in owners if o in paths]:
            return found[-1]
    return ""


def located(line: tuple[str, int, str]) -> str:
    """``file:line, `code` ``."""
    file, number, code = line
    return f"{file}:{number}, `{code}`" if code else f"{file}:{number}"


def place(error: BaseException) -> tuple[str, int, str] | None:
    """``(file, line, code)`` of the user's innermost line: that of the traceback, else one that the message names."""
    if (found := stopped(error)) is not None:
        file, number = found
        return shorten(file), number, linecache.getline(file, number).strip()
    for file, number in reversed(re.findall(r'File "([^"]+)", line (\d+)', _message(error))):
        if is_users(file):
            return shorten(file), int(number), linecache.getline(file, int(number)).strip()
    return None


def stopped(error: BaseException) -> tuple[str, int] | None:
    """File and line of the user's innermost frame in the traceback."""
    for part in reversed(chain(error)):
        stack = traceback.extract_tb(part.__traceback__)
        # What lies before the last frame of this package is whoever called it.
        inside = max((i for i, f in enumerate(stack) if f.filename.startswith(_HERE)), default=-1)
        if frames := [f for f in stack[inside + 1 :] if is_users(f.filename)]:
            return frames[-1].filename, frames[-1].lineno or 0
    return None


def chain(error: BaseException) -> list[BaseException]:
    """An error and what it came from, the last cause last."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def shorten(file: str) -> str:
    """A path without what comes before the package or the folder it is in: no place of this machine."""
    parts = Path(file).parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[-2:]) if len(parts) > 2 else file


def is_users(file: str) -> bool:
    """Whether a file is neither of torch, of Python itself nor of this package."""
    if file.startswith((_HERE, _TORCH, "torch/", "<", "python3")):
        return False
    return not re.search(r"(^|/)lib/python3\.\d+/(?!site-packages)", file)


def _message(error: BaseException) -> str:
    return "\n".join(f"{type(part).__name__}: {part}" for part in chain(error))


def _first_line(text: str) -> str:
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    line = next(
        (ln for ln in lines if "specialized" in ln or "data-dependent" in ln), lines[0] if lines else ""
    )
    return re.sub(r"^\w+Error: ", "", line)[:300]
