"""The options that several commands share, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optkit.errors import UsageError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="An .onnx file.", show_default=False)]
ModelOrArtifact = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="An .onnx file, or the folder that `optkit compile` wrote.", show_default=False
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", metavar="NAME", help="Hardware; `optkit targets` lists it.", show_default="cpu"
    ),
]
Backend = Annotated[
    str | None, typer.Option("--backend", metavar="NAME", help="Runtime.", show_default="the target's best")
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
        help="fp32, int8, int8-dyn: the recipe that stands for it.",
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
    int | None, typer.Option("--seed", metavar="N", help="For every random choice.", show_default=False)
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="Stop rather than use more, as in 8GiB.", show_default=False
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="What the samples cannot decide counts as missed.", show_default=False),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="INPUT=SIZES",
        help="Shape of an input with free axes, as in x=1x3x48x320; repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.", show_default=False)]


def source(model: str) -> Path:
    """The file that MODEL names.

    Raises:
        UsageError: It is missing or a folder.
    """
    path = Path(model)
    if path.is_dir():
        hint = "give its .onnx file"
        if (path / "manifest.json").is_file():
            hint = f"it is an artifact already; its model is {path / 'model.onnx'}"
        raise UsageError(f"{path}: a folder, not a model", hint=hint)
    if path.suffix == ".pt2" or (":" in model and not path.exists()):
        from optkit.frontend import read

        read(model)  # says what can be done about PyTorch models
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint=_similar(path))
    return path


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
