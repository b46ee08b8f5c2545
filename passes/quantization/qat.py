"""Quantization-aware training."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from optkit.passes.base import Attached, Context, TorchPass


class QuantizeAware(TorchPass):
    """Train with the rounding of integers in the forward pass, so that the network learns to live with it.

    Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, eq. 1 to 3 and section 2.2: the step size of
    each quantizer is trained by gradient, scaled by ``1 / sqrt(values * largest integer)``.
    Differs from the paper: the logarithm of the step is what is trained, so that an optimizer such as Adam, whose steps
    do not shrink with the gradient, moves it by a share of itself; zero points stay as observed before training, and so do
    the steps of the module's own inputs, which no training changes.

    Pairs go where ``quantize-static`` would put them: the placement's rows are read on the exported graph.
    A batch norm behind a layer is folded into the weights that are quantized while it goes on learning (Jacob et al.
    2018, arXiv:1712.05877, section 3.2, with the running variance in place of the batch's for the folded factor).

    On a target whose u8 x s8 products saturate in 16 bits, weights are trained in 7 bits (-63 to 63) except those of depthwise
    convolutions: what saturates depends on weights that are still to be trained.

    Attributes:
        placement: Name of the backend's rows.
        weight_bits: Width of the weights, symmetric, per output channel.
        outer_bits: The same for layers that have no other before them, or none behind them, where it is more: few weights,
            on which the whole input or output depends (as in the paper, section 3).
        activation_bits: 8, or None to leave activations in float.
        targets: Globs, or ``re:`` expressions, of module paths or operators to quantize.
        ignore: The same, for what stays in float.
        freeze_ranges: Share of the steps after which step sizes stay as they are.
        freeze_batch_norm: Share of the steps after which batch norms use their running statistics, as deployed.
        freeze_layers: Share of the steps after which weights freeze layer by layer, the first layer first, the last
            one with the last step: later layers learn to correct the rounding of earlier ones. None: all train on.
    """

    name: ClassVar[str] = "quantize-aware"
    exact: ClassVar[bool] = False

    placement: str = "default"
    weight_bits: Literal[8, 4] = 8
    outer_bits: Literal[8, 4] = 8
    activation_bits: Literal[8] | None = 8
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    freeze_ranges: float = Field(default=0.8, ge=0, le=1)
    freeze_batch_norm: float = Field(default=0.5, ge=0, le=1)
    freeze_layers: float | None = Field(default=None, ge=0, le=1)

    def attach(self, module: Any, context: Context) -> Attached:
        """Trace, place, observe, then quantize in every forward pass."""
        from optkit.passes.quantization.aware import attach

        return attach(self, module, context)
