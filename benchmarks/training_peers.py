"""Pruning and quantization-aware training here, by torch-pruning, torchao and NNCF: the same network, data and epochs.

    pip install 'optkit[benchmarks]' torch-pruning torchao nncf
    python -m optkit.benchmarks.training_peers

Handwritten digits and the networks of ``benchmarks/digits.py``. Each tool trains as its guide says, for as many epochs and
at the same learning rate, and its result runs where the guide puts it: torch-pruning and torchao in ONNX Runtime (the
latter by ``convert_pt2e`` and ``torch.onnx.export``), NNCF in OpenVINO, ours where ``compile`` puts it, which tries both: for
single pictures and, in the last column, told by ``data`` that pictures come by 32. Latency is CPU time on one thread in turn
with ONNX Runtime on the float network's file, each in four processes of its own, one after the other. Writes ``benchmarks/results/training_peers.json`` and
``.md``; a tool that is not installed leaves its rows as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import optkit
from optkit.bench import median_ratio
from optkit.benchmarks import peers_openvino
from optkit.benchmarks.apart import in_turn, keep
from optkit.benchmarks.digits import Digits, Loader, Residual, Separable, fit, right, train
from optkit.benchmarks.machine import processor
from optkit.evaluate import Evaluator, Run, compare
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.training_export import draft, loaded
from optkit.training_loop import Fit

RESULTS = Path(__file__).resolve().parent / "results"
NETS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "separable": Separable}
# Epochs and learning rate of each job, the same for all tools.
_PRUNE, _QAT = (12, 3e-3), (4, 3e-4)
_RATIOS = (0.5, 0.75)
# Processes that each network is timed in, how often in each, and calls that are not counted before each.
_SEATINGS, _ROUNDS, _SETTLE = 4, 150, 2
_PACKAGES = ("torch", "onnxruntime", "openvino", "torch-pruning", "torchao", "nncf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("tools", nargs="*", help="tools to run; all without")
    given = parser.parse_args(arguments)
    seed = given.seed
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = Digits.load()
    place = RESULTS / "training_peers.json"
    kept = json.loads(place.read_text()) if place.exists() else {"rows": [], "versions": {}}
    rows = {(r["network"], r["job"], r["tool"]): r for r in kept["rows"]}
    with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
        for name, make in NETS.items():
            net = train(make(), data, 12)
            bench = _Bench(name, net, data, Path(folder) / name)
            for job, tool, work in _work(name, net, data, bench.folder):
                if given.tools and tool not in given.tools:
                    continue
                torch.manual_seed(seed)
                with _quiet():
                    row = bench.row(job, tool, work)
                rows[name, job, tool] = row
                print(_line(row), file=sys.stderr, flush=True)
    installed = {p: version(p) for p in _PACKAGES if find_spec(p.replace("-", "_"))}
    result = {
        "schema": 1, "seed": seed, "processor": processor(), "versions": kept["versions"] | installed, "rows": list(rows.values()),
    }  # fmt: skip
    place.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "training_peers.md").write_text(page(result), encoding="utf-8")
    return 0


# Takes how many pictures come together; what it gives opens the network in any process.
Opened = Callable[[int], Callable[[], Run]]
Work = Callable[[], tuple[Opened, int | None]]


def _work(name: str, net: nn.Module, data: Digits, folder: Path) -> Iterator[tuple[str, str, Work]]:
    """Job, tool, and what gives the trained network as something to run, with its parameters where they are fewer."""
    if name == "residual":
        for ratio in _RATIOS:
            job, override = f"prune {ratio:.0%} of the channels", f"passes.prune-structured.ratio={ratio}"
            yield job, "optkit", partial(_ours, net, data, folder, "prune-structured", _PRUNE, override)
            if find_spec("torch_pruning"):
                yield job, "torch-pruning", partial(_torch_pruning, net, data, folder, ratio)
    yield "QAT int8", "optkit", partial(_ours, net, data, folder, "int8-qat", _QAT)
    if find_spec("torchao"):
        yield "QAT int8", "torchao", partial(_torchao, net, data, folder)
    if find_spec("nncf"):
        yield "QAT int8", "NNCF", partial(_nncf, net, data, folder)


class _Bench:
    """Accuracy and latency beside the float network."""

    def __init__(self, name: str, net: nn.Module, data: Digits, folder: Path) -> None:
        folder.mkdir()
        self.folder, self._name, self._data = folder, name, data
        self._before = right(net, data)
        save(loaded(draft(net, (data.x[:4],), ("batch",))), folder / "float.onnx")

    def row(self, job: str, tool: str, work: Work) -> dict[str, Any]:
        """Train and measure."""
        data = self._data
        evaluator = Evaluator(
            samples=lambda: (
                ({"x": x[None].numpy()}, int(y)) for x, y in zip(data.test_x, data.test_y, strict=True)
            ),
            score=lambda outputs, label: float(next(iter(outputs.values())).argmax() == label),
            metric="accuracy",
        )
        opened, parameters = work()
        one = opened(1)
        after = evaluator.scores(one())
        drop = compare(evaluator, self._before.tolist(), after, None)
        timed, ci95 = self._speedup(one, 1, _ROUNDS)
        batch, _ = self._speedup(opened(32), 32, _ROUNDS // 4)
        return {
            "network": self._name, "job": job, "tool": tool, "before": drop.reference, "after": drop.candidate, "ci95": drop.ci95,
            "parameters": parameters, "speedup": timed, "speedup_ci95": ci95, "speedup_batch_32": batch,
        }  # fmt: skip

    def _speedup(
        self, open_: Callable[[], Run], together: int, rounds: int
    ) -> tuple[float, tuple[float, float]]:
        feeds = keep([{"x": self._data.test_x[:together].numpy()}], self.folder / "feeds.npz")
        openers: dict[str, Callable[[], Run]] = {
            "float": partial(_file, self.folder / "float.onnx"),
            "this": open_,
        }
        times = in_turn(openers, feeds, seatings=_SEATINGS, rounds=rounds, settle=_SETTLE)
        return median_ratio(times["float"], times["this"])


def _ours(
    net: nn.Module, data: Digits, folder: Path, recipe: str, how: tuple[int, float], *overrides: str
) -> tuple[Opened, int | None]:
    module = copy.deepcopy(net)
    plan = Fit(epochs=how[0], learning_rate=how[1])
    done = optkit.finetune(module, recipe, Loader(data), F.cross_entropy, fit=plan, overrides=overrides)
    out = folder / "-".join(["ours", recipe, *overrides]).replace("=", "-")

    def opened(together: int) -> Callable[[], Run]:
        batches = [{"x": x.numpy()} for x in data.x[: 8 * together].split(together)]
        done.trained.compile(data=batches, out=out)
        return partial(_artifact, out)

    return opened, sum(p.numel() for p in module.parameters()) if "prune" in recipe else None


def _torch_pruning(net: nn.Module, data: Digits, folder: Path, ratio: float) -> tuple[Opened, int | None]:
    pruning = importlib.import_module("torch_pruning")
    module = copy.deepcopy(net)
    pruner = pruning.pruner.MagnitudePruner(
        module, data.x[:4], importance=pruning.importance.GroupMagnitudeImportance(), pruning_ratio=ratio,
        ignored_layers=[module.head], round_to=16,
    )  # fmt: skip
    pruner.step()
    train(module, data, _PRUNE[0])
    return _onnx(module, data, folder / f"pruned-{ratio}.onnx"), sum(p.numel() for p in module.parameters())


def _torchao(net: nn.Module, data: Digits, folder: Path) -> tuple[Opened, int | None]:
    pt2e = importlib.import_module("torchao.quantization.pt2e")
    steps = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    free = ({0: torch.export.Dim("batch", min=2)},)
    graph = torch.export.export(copy.deepcopy(net).train(), (data.x[:4],), dynamic_shapes=free).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    module = steps.prepare_qat_pt2e(graph, quantizer)
    _tune(module, data)
    pt2e.move_exported_model_to_eval(module)
    return _onnx(steps.convert_pt2e(module), data, folder / "torchao.onnx"), None


def _nncf(net: nn.Module, data: Digits, folder: Path) -> tuple[Opened, int | None]:
    peers_openvino.core()
    # It compiles kernels of its own first, which it does not wait for otherwise.
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"
    nncf = importlib.import_module("nncf")
    module = nncf.quantize(copy.deepcopy(net), nncf.Dataset([x[None] for x in data.x[:300]]))
    module.train()
    _tune(module, data)
    module.eval()
    ov = importlib.import_module("openvino")
    path = folder / "nncf.xml"
    ov.save_model(
        ov.convert_model(nncf.strip(module, example_input=data.x[:4]), example_input=data.x[:4]),
        str(path),
        compress_to_fp16=False,
    )

    return lambda _: partial(_openvino, path), None


def _tune(module: nn.Module, data: Digits) -> None:
    epochs, rate = _QAT
    fit(module, Loader(data), F.cross_entropy, epochs, rate=rate)


def _onnx(module: nn.Module, data: Digits, path: Path) -> Opened:
    free = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.onnx.export(module, (data.x[:4],), dynamo=True, dynamic_shapes=free, verbose=False)
    assert program is not None
    program.save(str(path))

    return lambda _: partial(_file, path)


def _artifact(folder: Path) -> Run:
    return optkit.load(folder).session(threads=1).run


def _file(path: Path) -> Run:
    session = ReferenceSession(path)
    (name,) = session.inputs
    return lambda feeds: session.run({name: next(iter(feeds.values()))})


def _openvino(path: Path) -> Run:
    session = peers_openvino.Session(path, ["y"], "f32")
    name = str(session.compiled.input(0).any_name)
    return lambda feeds: session.run({name: next(iter(feeds.values()))})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    said = io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _line(row: Mapping[str, Any]) -> str:
    return f"{row['network']}, {row['job']}, {row['tool']}: {row['after']:.4f}, {row['speedup']:.2f}x"


def page(result: Mapping[str, Any]) -> str:
    """The table."""
    lines = [
        "# Training for compression, here and by others",
        "",
        "Written by `python -m optkit.benchmarks.training_peers`; see there for how. Speed-ups are over ONNX Runtime on the float "
        "network's file, one thread, in turn.",
        "",
        f"{result['processor']['name']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}; seed {result['seed']}.",
        "",
        "| network | job | tool | accuracy % | drop, points (95 %) | parameters | speed-up (95 %) | at batch 32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(result["rows"], key=lambda r: (r["network"], r["job"], r["tool"] != "optkit")):
        low, high = (100 * v for v in r["ci95"])
        slow, fast = r["speedup_ci95"]
        lines.append(
            f"| {r['network']} | {r['job']} | {r['tool']} | {100 * r['after']:.1f} | {100 * (r['before'] - r['after']):+.1f} "
            f"({low:+.1f} to {high:+.1f}) | {r['parameters'] or ''} | {r['speedup']:.2f} ({slow:.2f} to {fast:.2f}) | {r['speedup_batch_32']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
