"""The road from a file to an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optkit.artifact import Artifact
from optkit.compilation import Compilation
from optkit.errors import UnsupportedOpError
from optkit.evaluate import Evaluator
from optkit.passes.base import Progress, Silent
from optkit.recipe import Recipe
from optkit.report import Report
from optkit.reporting import clocks, finish_here, write_up
from optkit.request import Batches, Request, request
from optkit.search import Choice, carry_out, choose
from optkit.sharing import share
from optkit.store import replace_folder, temporary_folder
from optkit.targets import Target


def compile(
    source: Any,
    inputs: Any = None,
    *,
    dynamic_shapes: Sequence[str] | Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    target: str | Target | None = None,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    precision: str | None = None,
    data: Batches | None = None,
    evaluate: Evaluator | str | Path | None = None,
    max_drop: str | float | None = None,
    backend: str | None = None,
    out: str | Path = "build",
    overrides: Sequence[str] = (),
    seed: int | None = None,
    goal: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> tuple[Artifact, Report]:
    """Compile a model, measure it against the reference, and write the artifact.

    Args:
        source: An ``.onnx`` file, its bytes, or a graph; or a PyTorch module, ``(module, inputs)``, an exported program, a
            ``.pt2`` or TorchScript file, a Hugging Face folder, or ``package.module:factory``.
        inputs: Example inputs of a module: a tensor, a tuple of arguments, or a dict of named ones.
        dynamic_shapes: Axes of a module's inputs that stay free: names such as ``batch`` and ``sequence``, or
            ``{input: {axis: name}}``. Each is proved at two other sizes.
        weights: A checkpoint for the module.
        target: Hardware; the recipe's, or ``cpu``.
        recipe: Name of a shipped recipe, a file, or plain data. Without one, ``precision`` names it, or ``auto``.
        precision: As on the command line: ``int8``, ``int8-dyn``, ``fp32`` …
        data: Calibration batches. Without data only exact candidates and dynamic quantization are open.
        evaluate: Samples and a score, or the file that defines them.
        max_drop: How much of the metric may be lost: ``1%`` relative, ``0.01`` absolute.
        backend: Runtime; the recipe's, or the target's best.
        out: Folder to write; an artifact that is there is replaced when the new one is complete.
        overrides: ``key=value`` changes of the recipe.
        goal: ``latency`` (the default), ``throughput`` or ``size``: what is wanted most among what keeps the limits.
        seed: For random choices; the recipe's.
        strict: Whether a gate that the samples cannot decide counts as missed.
        progress: Where to say how far long work is.

    Returns:
        The artifact and its report. ``report.missed`` says in words which limits the request did not keep; the best
        artifact that is feasible ships all the same.

    Raises:
        UsageError: The options, the recipe or the data do not fit.
        ModelError: The model cannot be read or built.
        BackendUnavailableError: A package is missing.
    """
    started = clocks()
    destination = Path(out)
    asked = request(
        source, inputs=inputs, dynamic_shapes=dynamic_shapes, weights=weights, target=target, recipe=recipe, precision=precision,
        data=data, evaluate=evaluate, max_drop=max_drop, backend=backend, out=destination, overrides=overrides, seed=seed, goal=goal,
    )  # fmt: skip
    with temporary_folder(destination) as folder:
        work = asked.work(folder, progress or Silent())
        choice = _choose(work, asked, strict=strict)
        scenario = share(work, asked.recipe, choice.best)
        report = write_up(work, asked.recipe, choice, scenario, started)
        if work.finishes(choice.best):
            report = finish_here(choice.best.folder, report, started, work.progress)
        replace_folder(choice.best.folder, destination)
    return Artifact(destination), report


def _choose(work: Compilation, asked: Request, *, strict: bool) -> Choice:
    if not asked.candidates:
        return carry_out(work, asked.recipe, strict=strict)
    try:
        choice = choose(work, asked.recipe, asked.candidates, strict=strict)
    except UnsupportedOpError as error:
        if asked.closed and asked.target.floatless:
            error.hint = f"give calibration data (--calib FOLDER): {', '.join(asked.closed)} would be tried, which quantizes"
        raise
    if asked.closed:
        choice.advice.append(
            f"with calibration data (--calib) these would be tried too: {', '.join(asked.closed)}"
        )
    if asked.evaluator is None:
        choice.advice.append(
            "with an evaluator (--eval) accuracy would be measured; what is reported is fidelity to the fp32 reference"
        )
    return choice
