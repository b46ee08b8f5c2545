"""Modules whose parameters are spread over processes by ``torch.distributed.fsdp.fully_shard``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

# What ``fully_shard`` keeps on a module, under a name of its own for each process.
_STATE = "__composable_api_state_key"


def _sharding() -> tuple[type[nn.Module], type[torch.Tensor]] | None:
    """The mixin of sharded modules and the class of their parameters; None where this torch has no processes to talk to."""
    if not torch.distributed.is_available():
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return cast(type[nn.Module], FSDPModule), DTensor


def is_sharded(module: nn.Module) -> bool:
    """Whether parts of the module are sharded."""
    kinds = _sharding()
    return kinds is not None and any(isinstance(m, kinds[0]) for m in module.modules())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; where it is sharded every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has, as ``other`` is: this process's part of it where that is sharded."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = other
    # Each takes its part from what it has: nothing is sent.
    return distribute_tensor(tensor, placed.device_mesh, placed.placements, src_data_rank=None)


def gather(module: nn.Module) -> None:
    """Give every process all parameters, as plain ones, and take off what ``fully_shard`` put on; every process must call it."""
    kinds = _sharding()
    assert kinds is not None
    sharded = [m for m in module.modules() if isinstance(m, kinds[0])]
    for part in sharded:
        cast(Any, part).reshard()
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in owner._parameters.items():
            if isinstance(old, kinds[1]) and old not in made:
                made[old] = nn.Parameter(whole(old.detach()).clone(), requires_grad=old.requires_grad)
            if old in made:
                owner._parameters[name] = made[old]
    for part in sharded:
        state = cast(Any, part)._get_fsdp_state()
        for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
            handle.remove()
        for key in [k for k in vars(part) if k.startswith(_STATE)]:
            delattr(part, key)
        # The class is the mixin with the module's own.
        part.__class__ = type(part).__bases__[1]


def replaced(old: Mapping[str, nn.Parameter], module: nn.Module) -> dict[nn.Parameter, nn.Parameter] | None:
    """Which parameter took the place of which, by name; None where other names have parameters."""
    now = dict(module.named_parameters())
    return None if now.keys() != old.keys() else {old[name]: p for name, p in now.items()}
