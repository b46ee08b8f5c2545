"""Importance of the weights of a torch module by what it does with the example batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from optkit.errors import UsageError
from optkit.passes.base import Context, call
from optkit.passes.modes import evaluating
from optkit.passes.pruning.choose import Score, by_norm_scale, magnitude, norm_scales


def score(criterion: str, module: nn.Module, graph: ir.Graph, context: Context) -> Score:
    """What a criterion of ``PruneStructured`` says of weights, named as in the module."""
    if criterion == "magnitude":
        return magnitude
    if criterion == "norm-scale":
        return by_norm_scale(norm_scales(graph))
    found = _taylor(module, context) if criterion == "taylor" else _wanda(module, context)

    def of(weight: ir.Value, axis: int) -> np.ndarray:
        part = found(str(weight.name), axis)
        assert weight.const_value is not None
        return np.zeros(weight.const_value.shape.numpy()[axis]) if part is None else part

    return of


def _taylor(module: nn.Module, context: Context) -> Callable[[str, int], np.ndarray | None]:
    training = context.training
    assert training is not None
    if training.loss is None:
        raise UsageError(
            "the criterion taylor needs gradients, and there is no loss", hint="give loss= to optkit.training"
        )
    module.zero_grad(set_to_none=True)
    with evaluating(module):
        for index, batch in enumerate(training.batches):
            training.loss(call(module, batch), index).backward()
    products = {
        name: (p.detach() * p.grad).double().cpu().numpy()
        for name, p in module.named_parameters()
        if p.grad is not None
    }
    module.zero_grad(set_to_none=True)

    def of(name: str, axis: int) -> np.ndarray | None:
        if name not in products:
            return None
        x = np.moveaxis(products[name], axis, 0)
        total: np.ndarray = np.square(x.reshape(len(x), -1).sum(1))
        return total

    return of


def _wanda(module: nn.Module, context: Context) -> Callable[[str, int], np.ndarray | None]:
    norms = input_norms(module, context)
    weights = {name: p.detach().double().cpu().numpy() for name, p in module.named_parameters()}

    def of(name: str, axis: int) -> np.ndarray | None:
        path = name.rpartition(".")[0]
        if axis != 1 or path not in norms or weights[name].shape[1] != len(norms[path]):
            return None
        x = np.moveaxis(np.abs(weights[name]), 1, 0)
        total: np.ndarray = x.reshape(len(x), -1).sum(1) * norms[path]
        return total

    return of


def input_norms(module: nn.Module, context: Context) -> dict[str, np.ndarray]:
    """Of every convolution and linear layer, the norm of each input channel over the example batches."""
    training = context.training
    assert training is not None
    squares: dict[str, torch.Tensor] = {}
    hooks = []

    def watch(path: str, axis: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().movedim(axis, 0).flatten(1).double()
            squares[path] = squares.get(path, torch.zeros(())) + x.square().sum(1).cpu()

        return hook

    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            hooks.append(
                layer.register_forward_pre_hook(watch(path, -1 if isinstance(layer, nn.Linear) else 1))
            )
    try:
        with evaluating(module), torch.no_grad():
            for batch in training.batches:
                call(module, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return {path: total.sqrt().numpy() for path, total in squares.items()}
