"""Values and layers that are rounded while they are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from optkit.formats import Format
from optkit.passes.quantization.learned import TINY, rounded, rounded_folded, spread
from optkit.passes.quantization.observers import Histogram
from optkit.qdq import scale_zero

# Shares of the largest weight tried as the range of a channel where there are few steps.
_SHARES = np.linspace(1.0, 0.4, 25)


def _emit(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """QuantizeLinear and DequantizeLinear, as nodes of the exported graph."""
    q = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero), dtype=zero.dtype, shape=x.shape, version=13
    )
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (q, scale, zero), dtype=x.dtype, shape=x.shape, version=13
    )


def _hooked(layer: nn.Module | None) -> bool:
    """Whether somebody wants to see what goes into the layer, or comes out of it."""
    return layer is not None and bool(layer._forward_hooks or layer._forward_pre_hooks)


class FakeQuantize(nn.Module):
    """A value on an integer grid, per tensor.

    Args:
        fmt: Of up to 8 bits.

    Attributes:
        rectifies: It is given what the ReLU in front of it was given, and does its work too.
    """

    zero: torch.Tensor
    step: torch.Tensor

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self.fmt, self.rectifies = fmt, False
        self._relu: nn.Module | None = None
        # One element and not a scalar, which cannot be sharded.
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("zero", torch.zeros(()))
        self._zero = 0  # what the buffer holds, so that no step waits for the device to say
        self.observer: Histogram | None = Histogram("mse", 99.99)

    def absorb(self, relu: nn.Module | None) -> None:
        """Do the work of a ReLU, of the module where it is one, in whose place this is called from now on."""
        self.rectifies = True
        # Kept beside the registered modules, because others own it.
        object.__setattr__(self, "_relu", relu)

    def observed(self) -> bool:
        """Take the range that was seen; whether there was one of finite numbers."""
        seen, self.observer = self.observer, None
        if seen is None or not seen.finite:
            return False
        scale, zero = scale_zero(*seen.limits(self.fmt), self.fmt)
        with torch.no_grad():
            self.log_scale.fill_(math.log(float(scale)))
            self.zero.fill_(float(zero))
        self._zero = int(zero)
        return True

    @property
    def scale(self) -> torch.Tensor:
        """Of one step."""
        return self.log_scale.exp().clamp_min(TINY).reshape(())

    def store(self) -> None:
        """Fix the grid: from now on the exported graph has a pair here."""
        self.register_buffer("step", self.scale.detach().clone())
        # No buffer: export takes integer buffers without axes for numbers of the code.
        kind = torch.int8 if self.fmt.low < 0 else torch.uint8
        self.zero_stored = nn.Parameter(self.zero.to(kind), requires_grad=False)
        self.log_scale.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round; before training, only look."""
        exporting = torch.compiler.is_exporting() and hasattr(self, "step")
        together = self.rectifies and self.observer is None and not exporting and not _hooked(self._relu)
        if self.rectifies and not together:
            x = x.relu() if self._relu is None else self._relu(x)
        if self.observer is not None:
            self.observer.add(x.detach().float().cpu().numpy())
            return x
        if exporting:
            return _emit(x, self.step, self.zero_stored)
        fmt = self.fmt
        return rounded(x, self.log_scale, self._zero, fmt.low, fmt.high, None, rectified=together)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._zero = int(self.zero)


class OnGrid(nn.Module):
    """A value on the grid of a quantizer, because it was chosen from values that are: a pair in the exported graph alone.

    Args:
        quantizer: Owned by another.
    """

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        object.__setattr__(self, "quantizer", quantizer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The value as it is."""
        quantizer: FakeQuantize = self.__dict__["quantizer"]
        if quantizer.observer is not None:
            quantizer.observer.add(x.detach().float().cpu().numpy())
        elif torch.compiler.is_exporting() and hasattr(quantizer, "step"):
            return _emit(x, quantizer.step, quantizer.zero_stored)
        return x


class QuantizedLayer(nn.Module):
    """A convolution or linear layer whose weights lie on a symmetric grid, per output channel, with its batch norm.

    Args:
        layer: Its parameters are taken over.
        norm: The batch norm right behind it; one that is in evaluation while the layer trains is frozen, and stays so.
        bits: Of the weights.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor
    bias_integers: torch.Tensor | None
    bias_scale: torch.Tensor
    bias_zeros: torch.Tensor

    def __init__(self, layer: Any, norm: nn.Module | None, bits: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self.norm, self.bits, self.high = norm, bits, 2 ** (bits - 1) - 1
        self.axis = 1 if isinstance(layer, _TRANSPOSED) else 0
        self.groups = layer.groups if self.axis == 1 else 1
        self.settled = False  # the norm uses its running statistics
        self.x: FakeQuantize | None = None
        self._call = _caller(layer)
        self.linear = isinstance(layer, nn.Linear)
        channels = self.weight.shape[self.axis]
        self.log_scale = nn.Parameter(
            torch.zeros(channels, device=self.weight.device, dtype=self.weight.dtype)
        )
        self._stored = False
        frozen = norm is not None and layer.training and not norm.training
        self.train(layer.training)
        if frozen:
            self.settle()
        self._init_scale()

    def read(self, quantizer: FakeQuantize) -> None:
        """The grid of the input; kept beside the registered modules, because others own it."""
        object.__setattr__(self, "x", quantizer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer and its norm."""
        if self._stored:
            return self._run_stored(x)
        norm: Any = self.norm
        if norm is None:
            return self._call(x, self._round(self.weight), self.bias)
        if self.training and not self.settled:
            gamma, std = norm.weight, self._std()
            w = rounded_folded(self.weight, self.log_scale, gamma, std, self.high, self.axis)
            out: torch.Tensor = norm(self._call(x, w, self.bias))
            return out
        factor = self._factor()
        w = self._round(self.weight * spread(factor, self.axis, self.weight.ndim))
        return self._call(x, w, self._shift(factor))

    def train(self, mode: bool = True) -> QuantizedLayer:
        """As usual, but a settled norm stays in evaluation."""
        super().train(mode)
        if self.settled and self.norm is not None:
            self.norm.eval()
        return self

    def settle(self) -> None:
        """Let the norm use its running statistics from now on."""
        self.settled = True
        self.train(self.training)

    def store(self) -> None:
        """Keep integers in place of the weights: what ``forward`` computes from now on is what is deployed."""
        with torch.no_grad():
            w: torch.Tensor = self.weight
            b: torch.Tensor | None = self.bias
            if self.norm is not None:
                factor = self._factor()
                w, b = w * spread(factor, self.axis, w.ndim), self._shift(factor)
            scale = self.log_scale.exp().clamp_min(TINY)
            if b is not None and self.x is not None:
                # Half of int32 is left to the products.
                scale = torch.maximum(scale, b.abs() / (2.0**30 * self.x.scale))
            q = (w / spread(scale, self.axis, w.ndim)).round().clamp(-self.high, self.high)
            self.register_buffer("integers", q.to(torch.int8))
            self.register_buffer("scale", scale.float())
            self.register_buffer("zeros", torch.zeros_like(scale, dtype=torch.int8))
            self.register_buffer("bias_integers", None)
            self.register_buffer("bias_scale", None)
            self.register_buffer("bias_zeros", None)
            if b is not None and self.x is not None:
                step = (self.x.scale * scale).float()
                self.bias_scale, self.bias_integers = (
                    step,
                    (b.double() / step.double()).round().to(torch.int32),
                )
                self.bias_zeros = torch.zeros_like(self.bias_integers)
                b = None
            self.bias = None if b is None else nn.Parameter(b.detach())
            del self.weight, self.log_scale
            self.norm, self._stored = None, True

    def _run_stored(self, x: torch.Tensor) -> torch.Tensor:
        exporting = torch.compiler.is_exporting()
        w = _dequantized(self.integers, self.scale, self.zeros, self.axis, exporting)
        b: torch.Tensor | None = self.bias
        if self.bias_integers is not None:
            b = _dequantized(self.bias_integers, self.bias_scale, self.bias_zeros, 0, exporting)
        if exporting and self.linear and x.ndim > 2:
            # Gemm, which runtimes have an integer kernel for, takes matrices alone.
            return self._call(x.reshape(-1, x.shape[-1]), w, b).reshape(*x.shape[:-1], w.shape[0])
        return self._call(x, w, b)

    def _factor(self) -> torch.Tensor:
        """What the norm multiplies by, with its running variance."""
        norm: Any = self.norm
        factor: torch.Tensor = (1.0 if norm.weight is None else norm.weight) / self._std()
        return factor

    def _std(self) -> torch.Tensor:
        norm: Any = self.norm
        std: torch.Tensor = torch.sqrt(norm.running_var + norm.eps)
        return std

    def _shift(self, factor: torch.Tensor) -> torch.Tensor:
        norm: Any = self.norm
        b = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        shift: torch.Tensor = b * factor if norm.bias is None else b * factor + norm.bias
        return shift

    def _round(self, w: torch.Tensor) -> torch.Tensor:
        return rounded(w, self.log_scale, 0, -self.high, self.high, self.axis)

    def _init_scale(self) -> None:
        """Largest weight of each channel, or with few steps the share of it that rounds with the least squared error."""
        with torch.no_grad():
            w: torch.Tensor = self.weight
            if self.norm is not None:
                w = w * spread(self._factor(), self.axis, w.ndim)
            rows = w.transpose(0, self.axis).flatten(1)
            top = rows.abs().amax(1)
            best, share = torch.full_like(top, math.inf), torch.ones_like(top)
            for candidate in _SHARES if self.high < 100 else ():
                s = (top * candidate / self.high).clamp_min(TINY)[:, None]
                error = ((rows / s).round().clamp(-self.high, self.high) * s - rows).square().sum(1)
                share = torch.where(error < best, float(candidate), share)
                best = torch.minimum(error, best)
            scale = torch.where(top > 0, top * share / self.high, torch.ones_like(top))
            self.log_scale.copy_(scale.clamp_min(TINY).log())


def _dequantized(
    q: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, axis: int, exporting: bool
) -> torch.Tensor:
    if exporting:
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (q, scale, zeros),
            {"axis": axis},
            dtype=scale.dtype,
            shape=q.shape,
            version=13,
        )
    return q.to(scale.dtype) * spread(scale, axis, q.ndim)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., torch.Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


def unfit(layer: Any) -> str | None:
    """Why the layer cannot be quantized, or None."""
    if isinstance(layer, nn.Linear):
        return None
    kind = next((k for k in _CONVOLUTIONS if isinstance(layer, k)), None)
    if kind is None:
        return f"a {type(layer).__name__} is neither a convolution nor a linear layer"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"it pads by {layer.padding_mode}"
    if isinstance(layer, _TRANSPOSED) and layer.groups != 1:
        return "its output channels lie in groups"
    return None


def _caller(layer: Any) -> Callable[..., torch.Tensor]:
    if isinstance(layer, nn.Linear):
        linear: Callable[..., torch.Tensor] = F.linear
        return linear
    kind = next(k for k in _CONVOLUTIONS if isinstance(layer, k))
    return _Convolution(kind, layer)


class _Convolution:
    """A convolution with the strides and pads of a layer."""

    def __init__(self, kind: type[nn.Module], layer: Any) -> None:
        self._kind = kind
        self._options: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "groups": layer.groups,
        }
        self._options["dilation"] = layer.dilation
        if isinstance(layer, _TRANSPOSED):
            self._options["output_padding"] = layer.output_padding

    def __call__(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        return _CONVOLUTIONS[self._kind](x, w, b, **self._options)
