"""Distillation: a module learns from the outputs, features or relations of another one, or of itself."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from optkit.passes.base import Attached, Context, TorchPass

Source = Literal["given", "average"]


class Distil(TorchPass):
    """Learn from the outputs of a teacher.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531: cross entropy with the
    teacher's softmax at a temperature, times its square. Here as the Kullback-Leibler divergence, which has the same
    gradient. With ``progressive``, assistants come before the teacher (Mirzadeh et al. 2020, arXiv:1902.03393): the
    student learns from the smallest first, each for the same number of steps.

    Attributes:
        loss: ``kl`` over the last axis, for logits; ``mse`` for any output.
        temperature: Of both softmaxes.
        weight: Of this loss; the loss of the task gets ``1 - weight``, but for weights above 1.
        teacher: ``given``: the one handed to the training, else the module as it was when the pass was attached: the
            float model, where quantization and pruning come behind it. ``average``: a running average of the module's
            own weights (Tarvainen and Valpola 2017, arXiv:1703.01780).
        decay: Of the running average.
        progressive: Learn from the assistants first.
    """

    name: ClassVar[str] = "distil"
    exact: ClassVar[bool] = False

    loss: Literal["kl", "mse"] = "kl"
    temperature: float = Field(default=4.0, gt=0)
    weight: float = Field(default=0.7, gt=0)
    teacher: Source = "given"
    decay: float = Field(default=0.99, gt=0, lt=1)
    progressive: bool = False

    def attach(self, module: Any, context: Context) -> Attached:
        """Set the teacher up."""
        from optkit.passes.distillation.learning import Outputs

        return Outputs(self, module, context)


class DistilFeatures(TorchPass):
    """Learn from what lies inside of a teacher.

    ``features``: mean squared difference after a learned projection to the teacher's width (Romero et al., "FitNets",
    2015, arXiv:1412.6550), relative to the teacher's mean square. ``attention``: maps of squared activations, each of
    length 1 (Zagoruyko and Komodakis 2017, arXiv:1612.03928, eq. 2 with p = 2). ``similarity``: how the samples of a
    batch resemble each other (Tung and Mori 2019, arXiv:1907.09682, eq. 4).

    Attributes:
        kind: What is compared.
        layers: Module paths, ``student=teacher`` where they differ; empty: direct children of both that have the same
            name, but the last.
        weight: Of this loss.
    """

    name: ClassVar[str] = "distil-features"
    exact: ClassVar[bool] = False

    kind: Literal["features", "attention", "similarity"] = "features"
    layers: tuple[str, ...] = ()
    weight: float = Field(default=1.0, gt=0)

    def attach(self, module: Any, context: Context) -> Attached:
        """Set the teacher up; layers are found once all passes are attached."""
        from optkit.passes.distillation.learning import Features

        return Features(self, module, context)
