"""Where PyTorch models come from: an object, a factory named on the command line, or a file."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optkit.errors import BackendUnavailableError, OptkitError, UsageError
from optkit.exporting.axes import Dynamic
from optkit.exporting.explain import place
from optkit.exporting.trust import load_program

_PT2 = "torch.export.save(torch.export.export(module, args), 'model.pt2')"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A module or program, and what was given with it."""

    module: Any
    inputs: Any
    dynamic: Dynamic | None
    name: str
    notes: tuple[str, ...] = ()


def open_source(
    source: Any, inputs: Any = None, dynamic: Dynamic | None = None, *, weights: str | Path | None = None
) -> Source:
    """Find the module that ``source`` means.

    Args:
        source: A module, program or ScriptModule; ``(module, inputs)`` or ``(module, inputs, dynamic)``; the name of a
            factory that returns one of these; or a path: ``.pt2``, TorchScript, or a Hugging Face folder.
        inputs: Win over those that come with the source, as ``dynamic`` does.
        weights: A checkpoint for the module.

    Raises:
        UsageError: It is none of these, or needs what was not given.
    """
    name, notes = "module", tuple[str, ...]()
    if isinstance(source, str | Path):
        path = Path(source)
        if isinstance(source, str) and is_factory(source) and not path.exists():
            source, name = _factory(source), source.rpartition(":")[2].strip("_") or "module"
        elif path.is_dir():
            source, name = _folder(path), path.resolve().name
            notes = ("its example inputs were drawn at random",) if inputs is None else ()
        else:
            source, name = _file(path), path.stem
    if isinstance(source, tuple | list):
        if not 2 <= len(source) <= 3 or not isinstance(
            source[0], torch.nn.Module | torch.export.ExportedProgram
        ):
            raise UsageError(
                f"{name}: gave {len(source)} values, not (module, inputs) or (module, inputs, dynamic)",
                hint="return the nn.Module first and its example inputs second",
            )
        module, own, *rest = source
        inputs = own if inputs is None else inputs
        dynamic = dynamic or (rest[0] if rest else None)
    else:
        module = source
    if not isinstance(module, torch.nn.Module | torch.export.ExportedProgram):
        raise UsageError(
            f"{name}: {type(module).__name__} is no PyTorch module",
            hint="give an nn.Module and example inputs",
        )
    if name == "module" and isinstance(module, torch.nn.Module):
        name = type(module).__name__
    if weights is not None:
        if not isinstance(module, torch.nn.Module):
            raise UsageError(
                f"{name}: an exported program has its weights already", hint="leave the weights out"
            )
        notes += load_weights(module, Path(weights))
    return Source(module=module, inputs=inputs, dynamic=dynamic or None, name=name, notes=notes)


def is_factory(source: str) -> bool:
    """Whether ``source`` is of the form ``package.module:name``."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", source) is not None


def load_weights(module: torch.nn.Module, path: Path) -> tuple[str, ...]:
    """Put a checkpoint into ``module``: safetensors, or a file of ``torch.save`` that holds tensors alone.

    Returns:
        A sentence about what the checkpoint has and the module has no place for, such as a head that was cut off.

    Raises:
        UsageError: The file is missing, holds code, or does not fit; lists what is missing or of another shape.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise BackendUnavailableError(
                f"{path}: safetensors is not installed", hint="pip install safetensors"
            ) from error
        state: Any = load_file(path)
    else:
        state = _checkpoint(path)
    state = _tensors_in(state)
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UsageError(
            f"{path}: holds no state dict but a {type(state).__name__}", hint="save module.state_dict()"
        )
    state = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in state.items()}
    own = module.state_dict()
    more = [k for k in state if k not in own]
    wrong = [f"{k} is missing" for k in own if k not in state]
    # Where something is missing, what is too much tells under which name it may be.
    wrong += [f"{k} is not in the module" for k in more] if wrong else []
    wrong += [
        f"{k} is {list(state[k].shape)}, not {list(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if wrong:
        rest = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(f"{path}: does not fit {type(module).__name__}: {'; '.join(wrong[:5])}{rest}")
    module.load_state_dict(state, strict=False)
    if not more:
        return ()
    return (
        f"{path.name} holds {len(more)} tensors that the module has no place for: {', '.join(sorted(more)[:5])}",
    )


def _tensors_in(state: Any) -> Any:
    """The weights of a training checkpoint, which keeps them under a name of its own beside the optimizer's state."""
    if not isinstance(state, Mapping) or any(isinstance(v, torch.Tensor) for v in state.values()):
        return state
    known = ("state_dict", "model_state_dict", "model_state", "model")
    inner = [state[k] for k in known if isinstance(state.get(k), Mapping)]
    inner += [v for v in state.values() if isinstance(v, Mapping) and v and all(isinstance(t, torch.Tensor) for t in v.values())]  # fmt: skip
    return inner[0] if inner else state


def _checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"{path}: cannot be read without running code from it: {str(error).strip().partition(chr(10))[0][:200]}",
            hint="save tensors alone: torch.save(module.state_dict(), path), or safetensors",
        ) from error


def _factory(text: str) -> Any:
    package, _, name = text.partition(":")
    # A script in the working directory is as good as an installed package; python -c has it on the path, optkit not.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{text}: cannot import {package}: {error}",
            hint="run where it can be imported, or set PYTHONPATH",
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{text}: {package} has no {part!r}")
        found = getattr(found, part)
    if isinstance(found, torch.nn.Module | torch.export.ExportedProgram | tuple):
        return found
    if not callable(found):
        raise UsageError(
            f"{text}: {type(found).__name__} is no function",
            hint="name a function that returns (module, inputs)",
        )
    needed = [
        p.name for p in inspect.signature(found).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]  # fmt: skip
    if needed:
        raise UsageError(
            f"{text}: needs arguments: {', '.join(needed)}", hint="name a function without parameters"
        )
    try:
        return found()
    except OptkitError:
        raise
    except Exception as error:
        at = place(error)
        where = f"{at[0]}:{at[1]}: " if at else ""
        raise UsageError(f"{text}: {where}{type(error).__name__}: {error}") from error


def _file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    names = _members(path)
    if path.suffix == ".pt2" or any(
        n.endswith("serialized_exported_program.json") or "/models/" in n for n in names
    ):
        return load_program(path)
    if any(n.endswith("constants.pkl") and "/" in n for n in names):
        try:
            return torch.jit.load(path, map_location="cpu")
        except Exception as error:
            raise UsageError(
                f"{path}: this TorchScript cannot be loaded: {str(error).strip().partition(chr(10))[0][:200]}",
                hint=f"export the nn.Module instead: {_PT2}",
            ) from error
    if path.suffix == ".safetensors" or _is_tensors(path):
        raise UsageError(
            f"{path}: holds weights, and no network",
            hint="name the network and give the weights to it: optkit compile package.module:factory --weights FILE",
        )
    raise UsageError(
        f"{path}: pickles can run any code when loaded, and are refused",
        hint=f"save the network with {_PT2}, or its weights with safetensors",
    )


def _is_tensors(path: Path) -> bool:
    """Whether torch reads the file without running code from it."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  (whatever is wrong with it: it is not this)
        return False
    return True


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return []


def _folder(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: a folder without config.json", hint="give an .onnx file, or a Hugging Face folder"
        )
    if importlib.util.find_spec("transformers") is None:
        raise BackendUnavailableError(
            f"{folder}: a Hugging Face folder needs transformers", hint="pip install transformers safetensors"
        )
    from optkit.exporting.hugging_face import open_folder

    return open_folder(folder)
