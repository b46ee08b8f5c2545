"""Architecture search in a trained module: widths, depth, kernels and separable convolutions, by measured latency."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from optkit.passes.base import Attached, Context, TorchPass

Kind = Literal["width", "depth", "kernel", "separable"]


class SearchArchitecture(TorchPass):
    """Find the architecture inside of a module that stays closest to it and runs ``speedup`` times as fast, measured.

    The supernet is the trained module itself, whose weights all architectures share (Cai et al., "Once-for-All", 2020,
    arXiv:1908.09791): a narrower layer has the most important of its units, a smaller kernel the centre of the larger one,
    a separable convolution the nearest product of the two (``twin.separable``). Each one tried is compiled and timed in
    turn with the module itself; those fast enough learn from its outputs for a few steps and are judged by the batches
    that they did not see. An evolution chooses what to try (``evolve``). Training, with distillation, comes after.

    Attributes:
        speedup: How many times as fast the compiled module is to be, measured on this machine.
        closeness: Share of the variance of the module's outputs that the architecture must explain, after the few steps;
            None: as close as found.
        choices: What may change: widths of groups of units, whole blocks left out, kernels, separable convolutions in
            place of plain ones.
        trials: How many architectures are compiled and timed.
        population: How many of the best ones further ones are made from.
        tune: Steps that each one which is fast enough learns for.
        rate: Learning rate of these steps.
        criterion: Of importance, as for ``prune-structured``.
        multiple: Kept widths are a multiple of it; None: as the target runs fast.
        least: Share of each group that stays at least.
        targets: Globs, or ``re:`` expressions, of weights or module paths.
        ignore: The same, for what stays.
    """

    name: ClassVar[str] = "search-architecture"
    exact: ClassVar[bool] = False

    speedup: float = Field(default=2.0, gt=1)
    closeness: float | None = Field(default=None, gt=0, le=1)
    choices: tuple[Kind, ...] = Field(default=("width", "depth", "kernel", "separable"), min_length=1)
    trials: int = Field(default=24, ge=1)
    population: int = Field(default=8, ge=2)
    tune: int = Field(default=40, ge=0)
    rate: float = Field(default=1e-3, gt=0)
    criterion: Literal["magnitude", "norm-scale", "taylor", "wanda"] = "magnitude"
    multiple: int | None = Field(default=None, ge=1)
    least: float = Field(default=0.1, ge=0, le=1)
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

    def attach(self, module: Any, context: Context) -> Attached:
        """Search, and give the module the architecture that was found."""
        from optkit.passes.architecture.work import attach

        return attach(self, module, context)
