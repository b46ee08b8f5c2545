"""Unstructured and N:M pruning."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from optkit.passes.base import Attached, Context, TorchPass

# Weights an output below which a layer has nothing to spare.
FEWEST = 16


def checked_pattern(text: str) -> str:
    """``any``, or N:M; for pydantic."""
    n, colon, m = text.partition(":")
    if text != "any" and not (colon and n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
        raise ValueError("write any, or N:M as in 2:4")
    return text


class PruneWeights(TorchPass):
    """Set single weights of convolutions and linear layers to 0 and keep them there.

    Gradual pruning follows Zhu and Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878, eq. 1: the share of zeros
    rises as ``s (1 - (1 - t)^3)``. Rewinding follows Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019,
    arXiv:1803.03635, with the weights of an early step (Frankle et al. 2020, arXiv:1912.05671); differs from them in that
    the optimizer keeps its state.
    Layers with fewer than 16 weights an output, such as depthwise convolutions, stay whole.
    Few runtimes are faster for zeros: ``optkit prune --sparsity`` measures it.

    Attributes:
        sparsity: Share of the weights that become 0; N:M patterns bring their own.
        pattern: ``any``, or ``2:4``: of each four weights along the inputs, two stay.
        criterion: ``magnitude``; ``taylor``: ``(w g)^2`` (Molchanov et al. 2019), which needs ``loss=``; ``wanda``: weight
            times norm of its input, within an output (Sun et al. 2024, arXiv:2306.11695); ``sparsegpt``: what stays makes
            up for what goes (Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1).
        scope: Whether ``magnitude`` and ``taylor`` compare within a layer or over all of them.
        begin: Share of the steps at which pruning starts.
        end: Share at which it is complete; 0 prunes at once, before training.
        every: Steps between two updates.
        rewind: Share of the steps whose weights are gone back to after each round, or None. 0: those before training.
        rounds: Rounds of training, pruning and rewinding; training goes on for one more.
        targets: Globs, or ``re:`` expressions, of module paths.
        ignore: The same, for what stays.
    """

    name: ClassVar[str] = "prune-weights"
    exact: ClassVar[bool] = False

    sparsity: float = Field(default=0.8, gt=0, lt=1)
    pattern: Annotated[str, AfterValidator(checked_pattern)] = "any"
    criterion: Literal["magnitude", "taylor", "wanda", "sparsegpt"] = "magnitude"
    scope: Literal["layer", "all"] = "layer"
    begin: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=0.0, ge=0, le=1)
    every: int = Field(default=10, ge=1)
    rewind: float | None = Field(default=None, ge=0, lt=1)
    rounds: int = Field(default=3, ge=1)
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> PruneWeights:
        late = self.end > 0 or self.rewind is not None
        if late and self.criterion != "magnitude":
            raise ValueError(
                f"{self.criterion} looks at the example inputs once: leave end at 0 and rewind out"
            )
        if self.end and self.begin >= self.end:
            raise ValueError("begin must come before end")
        if self.end and self.rewind is not None:
            raise ValueError("rewind prunes in rounds: leave end at 0")
        if self.pattern != "any" and self.scope == "all":
            raise ValueError("an N:M pattern is the same in every layer: leave scope out")
        return self

    def attach(self, module: Any, context: Context) -> Attached:
        """Choose weights now, or get ready to."""
        from optkit.passes.pruning.masks import attach

        return attach(self, module, context)
