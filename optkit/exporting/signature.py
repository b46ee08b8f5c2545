"""What goes into a module and comes out of it, as flat named tensors."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from optkit.errors import UsageError


class Signature:
    """The example inputs of a module, taken apart: named tensors, and what puts them together again.

    Names come from the parameters of ``forward`` and, for what is nested, from keys and positions: ``cache.0.key``.
    Whatever is not a tensor stays as it is given: it becomes part of the graph.

    Args:
        module: What will be called.
        inputs: A tensor, a tuple of positional arguments, a mapping of named ones, or ``(args, kwargs)``. NumPy arrays
            are taken for tensors.

    Attributes:
        names: Of the tensors, in order.
        tensors: The example.
        fixed: Names of what is not a tensor, and None.
    """

    def __init__(self, module: Any, inputs: Any) -> None:
        know_caches()
        args, kwargs = _arguments(inputs)
        parameters = _parameters(module, args, kwargs)
        try:
            inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(
                f"inputs do not fit {type(module).__name__}.forward: {error}",
                hint=f"it takes {', '.join(inspect.signature(module.forward).parameters) or 'nothing'}",
            ) from error
        except ValueError:  # built in: no signature to compare with
            pass
        leaves, self._spec = pytree.tree_flatten_with_path((args, kwargs))
        self._leaves: list[Any] = []
        self._places: list[int] = []
        self.tensors: list[torch.Tensor] = []
        self.fixed: dict[str, Any] = {}
        names: list[str] = []
        for path, leaf in leaves:
            name = _name(parameters, path)
            value = torch.from_numpy(np.ascontiguousarray(leaf)) if isinstance(leaf, np.ndarray) else leaf
            if isinstance(value, torch.Tensor):
                self._places.append(len(self._leaves))
                names.append(name)
                self.tensors.append(value.detach())
            else:
                self.fixed[name] = value
            self._leaves.append(None if isinstance(value, torch.Tensor) else value)
        if not names:
            raise UsageError(
                "the example inputs hold no tensor", hint="give inputs=(tensor, ...) as forward takes them"
            )
        self.names = _unique(names)

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``forward`` with ``tensors`` in the place of the example's."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(args), dict(kwargs)


class Flat(torch.nn.Module):
    """A module that takes and gives plain tensors, whatever the one inside takes and gives."""

    def __init__(self, module: torch.nn.Module, signature: Signature) -> None:
        super().__init__()
        self.module = module
        self._signature = signature

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Put the arguments together, call, take the results apart."""
        args, kwargs = self._signature.arguments(inputs)
        return tuple(
            v for v in pytree.tree_leaves(self.module(*args, **kwargs)) if isinstance(v, torch.Tensor)
        )


def output_names(result: Any) -> list[str]:
    """Names for the tensors in what a module returned, in the order in which ``Flat`` gives them."""
    tensors = [(path, leaf) for path, leaf in _with_paths(result) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise UsageError(
            f"the module returns no tensor but a {type(result).__name__}",
            hint="return tensors, or tuples, lists or dicts of them",
        )
    names = []
    for path, _ in tensors:
        keys = [_key(k) for k in path]
        text = ".".join(keys)
        names.append(text if text and not text[0].isdigit() else f"output{'_' if text else ''}{text}")
    return _unique(names)


def _with_paths(result: Any) -> list[tuple[tuple[Any, ...], Any]]:
    try:
        return list(pytree.tree_flatten_with_path(result)[0])
    except ValueError:  # a type that was registered without names for its parts, as diffusers does
        leaves = pytree.tree_leaves(result)
        named = isinstance(result, Mapping) and len(result) == len(leaves)
        keys: Sequence[Any] = list(result) if named else range(len(leaves))
        return [((pytree.MappingKey(k),), leaf) for k, leaf in zip(keys, leaves, strict=True)]


def know_caches() -> None:
    """Let caches of transformers, where that is loaded, be taken apart into one key and one value a layer."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None or module.DynamicCache in pytree.SUPPORTED_NODES:
        return
    dynamic, pair = module.DynamicCache, module.EncoderDecoderCache

    def flatten(cache: Any) -> tuple[list[Any], Any]:
        filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        return [t for layer in filled for t in (layer.keys, layer.values)], None

    def named(cache: Any) -> tuple[list[Any], Any]:
        tensors, context = flatten(cache)
        kinds = ("key", "value")
        return [(pytree.MappingKey(f"{i // 2}.{kinds[i % 2]}"), t) for i, t in enumerate(tensors)], context

    def unflatten(tensors: Any, _: Any) -> Any:
        cache = dynamic()
        tensors = list(tensors)
        for layer in range(len(tensors) // 2):
            cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
        return cache

    pytree.register_pytree_node(
        dynamic,
        flatten,
        unflatten,
        flatten_with_keys_fn=named,
        serialized_type_name="transformers.DynamicCache",
    )
    pytree.register_pytree_node(
        pair,
        lambda c: ([c.self_attention_cache, c.cross_attention_cache], None),
        lambda parts, _: pair(*parts),
        flatten_with_keys_fn=lambda c: (
            [
                (pytree.MappingKey("self"), c.self_attention_cache),
                (pytree.MappingKey("cross"), c.cross_attention_cache),
            ],
            None,
        ),
        serialized_type_name="transformers.EncoderDecoderCache",
    )


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, torch.Tensor | np.ndarray):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
            return inputs[0], dict(inputs[1])
        return tuple(inputs), {}
    raise UsageError(
        f"example inputs are a {type(inputs).__name__}",
        hint="give a tensor, a tuple of arguments, a dict of named ones, or (args, kwargs)",
    )


def _parameters(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """A name for each positional argument."""
    try:
        found = list(inspect.signature(module.forward).parameters.values())
    except ValueError:
        found = []
    plain = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in found if p.kind == p.VAR_POSITIONAL), "input")
    return [plain[i] if i < len(plain) else f"{rest}_{i - len(plain)}" for i in range(len(args))]


def _name(parameters: list[str], path: Sequence[Any]) -> str:
    positional, first, *rest = path
    head = parameters[first.idx] if positional.idx == 0 else str(first.key)
    return ".".join([head, *map(_key, rest)])


def _key(key: Any) -> str:
    for field in ("key", "idx", "name"):
        if hasattr(key, field):
            return re.sub(r"[^0-9A-Za-z_.]+", "_", str(getattr(key, field)))
    return re.sub(r"[^0-9A-Za-z_.]+", "_", str(key)).strip("_")


def _unique(names: list[str]) -> list[str]:
    taken: set[str] = set()
    for i, name in enumerate(names):
        unique, n = name, 1
        while unique in taken:
            unique, n = f"{name}_{n}", n + 1
        taken.add(unique)
        names[i] = unique
    return names
