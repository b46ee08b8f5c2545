"""A module takes the architecture of a genome; its weights come from those that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from optkit.passes.architecture.evolve import Genome
from optkit.passes.architecture.space import CONVOLUTIONS, Convolution, Depth, Form, Space, Width
from optkit.passes.base import Batch, call
from optkit.passes.modes import evaluating
from optkit.passes.nested import tensors
from optkit.passes.pruning.modules import Cut


def become(space: Space, genome: Genome, module: nn.Module, batch: Batch) -> str | None:
    """Give ``module``, which the space is of, an architecture in place; gives the reason where it does not run so."""
    chosen = list(zip(space.choices, genome, strict=True))
    gone = {u for c, g in chosen if isinstance(c, Width) for u in c.gone(g)}
    for choice, option in chosen:
        if isinstance(choice, Depth) and option:
            # What comes in is what goes out: the units of the two ends are the same ones.
            for before, after in choice.ends:
                (gone.add if before in gone else gone.discard)(after)
    shapes = [x.shape for x in _outputs(module, batch)]
    if gone:
        groups = [g for g in space.found.groups() if not gone.isdisjoint(g.units)]
        reason = Cut(module, space.model, space.found, batch).try_all(groups, gone)
        if reason is not None:
            return reason
    for choice, option in chosen:
        if isinstance(choice, Convolution) and option:
            module.set_submodule(
                choice.name, formed(module.get_submodule(choice.name), choice.options[option])
            )
    for choice, option in chosen:
        if isinstance(choice, Depth) and option:
            module.set_submodule(choice.name, nn.Identity())
    try:
        found = [x.shape for x in _outputs(module, batch)]
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return None if found == shapes else f"an output is {list(found[0])}, and should be {list(shapes[0])}"


def _outputs(module: nn.Module, batch: Batch) -> list[torch.Tensor]:
    with evaluating(module), torch.no_grad():
        return tensors(call(module, batch))


def formed(layer: Any, form: Form) -> nn.Module:
    """A convolution in another form."""
    made: nn.Module
    assert isinstance(layer, CONVOLUTIONS)
    with torch.no_grad():
        made = separable(layer) if form.separable else centre(layer, form.kernel)
    return made.requires_grad_(layer.weight.requires_grad).train(layer.training)


def centre(layer: Any, kernel: Sequence[int]) -> nn.Module:
    """The centre of the kernel, with so much less padding that the output has the same size."""
    cut = [(old - new) // 2 for old, new in zip(layer.kernel_size, kernel, strict=True)]
    padding = tuple(p - c for p, c in zip(layer.padding, cut, strict=True))
    made = _like(
        layer,
        layer.in_channels,
        layer.out_channels,
        kernel,
        padding,
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    place = tuple(slice(c, c + k) for c, k in zip(cut, kernel, strict=True))
    made.weight.copy_(layer.weight[(slice(None), slice(None), *place)])
    if layer.bias is not None:
        made.bias.copy_(layer.bias)
    return made


def separable(layer: Any) -> nn.Module:
    """A depthwise and a pointwise convolution whose product is nearest to a plain one.

    Of each input channel the kernels to all outputs form a matrix ``[outputs, positions]``; its best approximation of rank
    1 is a kernel for the channel and a weight for each output (Guo et al., "Network Decoupling", 2018, arXiv:1808.05517,
    section 3.2, with one term; Eckart and Young 1936 for the optimum).
    """
    weight = layer.weight.double()
    outs, ins = weight.shape[:2]
    u, s, v = torch.linalg.svd(weight.movedim(1, 0).flatten(2), full_matrices=False)
    root = s[:, :1].sqrt()
    ones = (1,) * len(layer.kernel_size)
    depth = _like(layer, ins, ins, layer.kernel_size, layer.padding, groups=ins, bias=False)
    depth.weight.copy_((root * v[:, 0]).reshape(ins, 1, *layer.kernel_size))
    point = type(layer)(ins, outs, 1, bias=layer.bias is not None).to(layer.weight)
    point.weight.copy_((root * u[:, :, 0]).T.reshape(outs, ins, *ones))
    if layer.bias is not None:
        point.bias.copy_(layer.bias)
    return nn.Sequential(depth, point)


def _like(
    layer: Any, ins: int, outs: int, kernel: Sequence[int], padding: Sequence[int], *, groups: int, bias: bool
) -> Any:
    made = type(layer)(
        ins, outs, tuple(kernel), layer.stride, tuple(padding), layer.dilation, groups=groups, bias=bias
    )
    return made.to(layer.weight)
