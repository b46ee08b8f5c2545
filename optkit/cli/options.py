"""The options that several commands share, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optkit.errors import UsageError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="An .onnx or .pt2 file, a Hugging Face folder, or package.module:factory, a function that returns an "
        "nn.Module and its example inputs.",
        show_default=False,
    ),
]
ModelOrArtifact = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="As for `optkit compile`, or the folder that it wrote.",
        show_default=False,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", metavar="NAME", help="Hardware; `optkit targets` lists it.", show_default="cpu"
    ),
]
# For commands that assume no target where none is named.
NamedTarget = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", metavar="NAME", help="Hardware; `optkit targets` lists it.", show_default=False
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend", metavar="NAME", help="Runtime to compile for.", show_default="the target's best"
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="Name of a shipped recipe, or a .yaml file.",
        show_default="auto",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "-p",
        metavar="NAME",
        help="fp32, fp16, fp8, int8, int8-dyn, w4a16, nvfp4 or mxfp8: the recipe that stands for it.",
        show_default=False,
    ),
]
Calib = Annotated[
    str | None,
    typer.Option(
        "--calib",
        metavar="DATA",
        help="Calibration data: a folder of .npz files (one a batch), one .npz, file.py:function, or random.",
        show_default=False,
    ),
]
Evaluate = Annotated[
    Path | None,
    typer.Option(
        "--eval", metavar="FILE", help="A Python file with samples() and score().", show_default=False
    ),
]
MaxDrop = Annotated[
    str | None,
    typer.Option(
        "--max-drop",
        metavar="DROP",
        help="How much of the metric may be lost: 1% or, absolute, 0.01.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one value of the recipe; repeatable.", show_default=False
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        help="Seed of every random choice; the recipe's where none is given.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Stop rather than use more memory than this: 8GiB, 512MB.",
        show_default=False,
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Count what the samples cannot decide as missed.", show_default=False),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="INPUT=SIZES",
        help="Shape of an input with free axes, as in x=1x3x48x320; repeatable.",
    ),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        "--dynamic",
        metavar="AXES",
        help="Axes of a PyTorch module that stay free: batch,sequence or NAME=INPUT:AXIS; repeatable.",
        show_default=False,
    ),
]
Inputs = Annotated[
    str | None,
    typer.Option(
        "--inputs",
        metavar="DATA",
        help="Example inputs of a PyTorch module: sizes, as in x=1x3x224x224,ids=2x16:int64, an .npz with one array "
        "an input, or what --calib takes; its first batch counts.",
        show_default="what the module comes with, else --calib",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Checkpoint for a PyTorch module: .safetensors, or tensors of torch.save.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.", show_default=False)]


def source(model: str) -> Path | str:
    """The file or folder that MODEL names, or the name of a factory.

    Raises:
        UsageError: It is missing, or a folder that holds no model.
    """
    from optkit.frontend import is_torch

    path = Path(model)
    if is_torch(model):
        if path.suffix and ":" not in model and not path.exists():
            raise UsageError(f"{path}: no such file", hint=_similar(path))
        return path if path.exists() else model
    if path.is_dir():
        hint = "give its .onnx file, or the folder that holds config.json"
        if (path / "manifest.json").is_file():
            hint = f"it is an artifact already; its model is {path / 'model.onnx'}"
        raise UsageError(f"{path}: a folder, not a model", hint=hint)
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint=_similar(path))
    return path


def torch_given(
    model: Path | str,
    dynamic: list[str] | None,
    inputs: str | None,
    weights: Path | None,
    calib: str | None = None,
) -> dict[str, Any]:
    """What ``compile`` takes for a PyTorch module, from the command line.

    Raises:
        UsageError: These options were given for a graph.
    """
    from optkit.frontend import is_torch

    if not is_torch(model):
        if given := [
            n for n, v in (("--dynamic", dynamic), ("--inputs", inputs), ("--weights", weights)) if v
        ]:
            raise UsageError(
                f"{', '.join(given)}: for PyTorch modules; {model} is a graph and has its own axes and inputs",
                hint="leave it out, or start from the module",
            )
        return {}
    given_inputs = None
    # TorchScript alone comes without inputs; what comes with a module wins over calibration data.
    script = str(model).endswith((".pt", ".pth", ".ts", ".jit", ".torchscript"))
    named = inputs or (calib if script and calib != "random" else None)
    if named is not None:
        from optkit.cli.example import example

        given_inputs = example(named)
    return {"inputs": given_inputs, "dynamic_shapes": dynamic or None, "weights": weights}


def size_of(text: str) -> tuple[str, tuple[int, ...]]:
    """The input and the shape of ``--shape x=1x3x224x224``.

    Raises:
        UsageError: It is not of that form.
    """
    import re

    name, _, sizes = text.rpartition("=")
    if not name or not re.fullmatch(r"[1-9][0-9]*([x,][1-9][0-9]*)*", sizes):
        raise UsageError(f"--shape {text!r}: INPUT=SIZES is wanted", hint="for example --shape x=1x3x224x224")
    return name, tuple(int(d) for d in re.split("[x,]", sizes))


def _similar(path: Path) -> str | None:
    import difflib

    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = sorted(
        p.name for p in path.parent.iterdir() if p.suffix == ".onnx" or p.name.lower() == path.name.lower()
    )
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean {str(path.with_name(close[0]))!r}?" if close else None


def plain(record: Any) -> Any:
    """A pydantic record as it is in its file."""
    import json

    return json.loads(record.model_dump_json(by_alias=True))
