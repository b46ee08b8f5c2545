"""Operators that work on each element alone."""

from __future__ import annotations

from optkit.ops.spec import OpSpec

_BINARY = ("Add", "Sub", "Mul", "Div")
_ACTIVATIONS = (
    "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Celu", "Gelu",
    "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Erf",
)  # fmt: skip
_OTHER = (
    "Abs",
    "Neg",
    "Exp",
    "Log",
    "Sqrt",
    "Reciprocal",
    "Pow",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Sin",
    "Cos",
    "Min",
    "Max",
    "Where",
    "Cast",
)

ROWS = (
    *(OpSpec(name=name, family="elementwise", activations=(0, 1)) for name in _BINARY),
    *(OpSpec(name=name, family="elementwise", activation=True) for name in _ACTIVATIONS),
    *(OpSpec(name=name, family="elementwise") for name in _OTHER),
)
