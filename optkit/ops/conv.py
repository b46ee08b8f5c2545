"""Convolutions and pooling windows."""

from __future__ import annotations

from optkit.ops.spec import OpSpec, conv_macs, conv_transpose_macs

ROWS = (
    OpSpec(name="Conv", family="conv", weight=1, bias=2, channel_axis=lambda node: 0, macs=conv_macs),
    OpSpec(
        name="ConvTranspose",
        family="conv",
        weight=1,
        bias=2,
        channel_axis=lambda node: 1,
        macs=conv_transpose_macs,
    ),
    OpSpec(name="MaxPool", family="conv", same_grid=True),
    OpSpec(name="GlobalMaxPool", family="conv", same_grid=True),
    OpSpec(name="AveragePool", family="conv"),
    OpSpec(name="GlobalAveragePool", family="conv"),
    OpSpec(name="LpPool", family="conv"),
)
