"""Every family by name: how it is built, and to which kind it belongs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optkit.exporting.eager import quiet
from optkit.exporting.signature import Signature

# Kind -> where its table is. A table holds ``name -> function``, in the order of the matrix.
KINDS: dict[str, str] = {
    "vision": "optkit.benchmarks.families.vision",
    "detection": "optkit.benchmarks.families.detection",
    "geometry": "optkit.benchmarks.families.geometry",
    "text": "optkit.benchmarks.families.text",
    "decoders": "optkit.benchmarks.families.decoders",
    "recurrent": "optkit.benchmarks.families.recurrent",
    "multimodal": "optkit.benchmarks.families.multimodal",
    "audio": "optkit.benchmarks.families.audio",
    "video": "optkit.benchmarks.families.video",
    "diffusion": "optkit.benchmarks.families.diffusion",
}

# From which batch norms take their statistics.
_DRAWS = 32

Dynamic = Mapping[str, Mapping[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One network, ready to be exported.

    Attributes:
        inputs: As ``optkit.compile`` takes them.
        dynamic: The axes that must stay free.
    """

    module: torch.nn.Module
    inputs: Any
    dynamic: Dynamic


Builder = Callable[[], Built]


def table(kind: str) -> Mapping[str, Builder]:
    """The families of one kind.

    Raises:
        ImportError: A library that builds them is not installed.
    """
    found: Mapping[str, Builder] = importlib.import_module(KINDS[kind]).FAMILIES
    return found


def build(builder: Builder) -> Built:
    """The network, its weights and inputs the same every time."""
    torch.manual_seed(0)
    built = builder()
    _settle(built)
    return built


def _settle(built: Built) -> None:
    """Give batch norms the statistics of inputs like the example: with those of a new one, deep networks fade to nothing.

    Averages over several draws: the few elements that deep channels of one small batch have make a network of them that
    magnifies every rounding.
    """
    norms = [m for m in built.module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    built.module.eval()
    if not norms:
        return
    momenta = [n.momentum for n in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        # The average of all that is seen.
        norm.momentum = None
    signature = Signature(built.module, built.inputs)
    with torch.no_grad(), quiet():
        for _ in range(_DRAWS):
            args, kwargs = signature.arguments([_like(t) for t in signature.tensors])
            built.module(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Other numbers of the same mean and spread; integers as they are."""
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return tensor.clone()
    return torch.randn_like(tensor) * tensor.std() + tensor.mean()
