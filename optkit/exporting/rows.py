"""``list(tensor)`` that does not count the rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from optkit.exporting.shadowing import shadowed


@contextlib.contextmanager
def whole_rows(module: torch.nn.Module) -> Iterator[None]:
    """``torch.cat(list(tensor))`` keeps the axis free: a list of rows is as long as the example."""
    join: Any = torch.cat

    def joined(tensors: Any, dim: int = 0, **more: Any) -> Any:
        if isinstance(tensors, _Rows) and dim == 0:
            return tensors.tensor.flatten(0, 1)
        return join(tensors.tensor.unbind(0) if isinstance(tensors, _Rows) else tensors, dim, **more)

    try:
        torch.cat = joined
        with shadowed(module, "list", _List):
            yield
    finally:
        torch.cat = join


class _Rows:
    """The rows of a tensor, taken apart when they are asked for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Any) -> Any:
        return self.tensor.unbind(0)[index]


class _IsList(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, list | _Rows)


class _List(list[Any], metaclass=_IsList):
    """Python's ``list`` but for tensors."""

    def __new__(cls, values: Any = ()) -> Any:
        return _Rows(values) if isinstance(values, torch.Tensor) and values.ndim > 1 else list(values)
