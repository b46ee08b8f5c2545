"""What each training recipe costs and brings: handwritten digits and rendered words, before, in one shot and after training.

    python -m optkit.benchmarks.training
    python -m optkit.benchmarks.training --net separable int8-qat    # those rows alone
    python -m optkit.benchmarks.training --steps                     # what a step costs

Data are scikit-learn's digits (1797 pictures, enlarged to 16x16): 1000 to train on, 797 to test on, the same for all; and
words in the fonts of the system (``benchmarks/words.py``), of which those of the test are never trained on. The metric is
the share of right answers, whole words where words are read, its drop paired with the float network's, with a 95 % interval. Latency is CPU time
of the compiled artifact on one thread at batch 1, in turn with ONNX Runtime on the float network's file; compiled for
single inputs and, for the column at batch 32, for as many.
Writes ``benchmarks/results/training.json`` and ``.md``. Needs optkit[torch], scikit-learn and Pillow.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import optkit
from optkit.bench import speedup
from optkit.benchmarks import digits, words
from optkit.compiler import machine
from optkit.evaluate import Comparison, Evaluator, compare
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.training_export import draft, loaded
from optkit.training_loop import Fit
from optkit.training_session import TrainingSession

RESULTS = Path(__file__).resolve().parent / "results"
# The quickest first.
_NETS = ("separable", "residual", "reader")
# Recipes whose steps are compared with plain ones.
_STEPS = ("int8-qat", "prune-2-4", "prune-gradual")


@dataclass(frozen=True, slots=True)
class Case:
    """One row."""

    net: str
    recipe: str
    label: str
    epochs: int
    overrides: tuple[str, ...] = ()
    rate: float = 1e-3
    student: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Tells it from the others."""
        return self.net, self.recipe, self.label

    @property
    def networks(self) -> list[str]:
        """Of which it needs the float one."""
        return [self.net, self.student] if self.student else [self.net]


CASES = (
    Case("separable", "int8-qat", "QAT int8", 8, rate=3e-4),
    Case("separable", "int4-qat", "QAT w4a8", 12),
    Case("reader", "int8-qat", "QAT int8", 2, rate=3e-4),
    Case("reader", "int4-qat", "QAT w4a8", 3, rate=1e-3),
    Case("reader", "prune-structured", "channels, heads and features 50 % + distillation", 6, rate=3e-3),
    Case("reader", "qat-prune-distil", "the same + QAT int8", 6, rate=3e-3),
    Case("residual", "int8-qat", "QAT int8", 4, rate=3e-4),
    Case("residual", "prune-structured", "channels 50 % + distillation", 12, rate=3e-3),
    Case(
        "residual", "prune-structured", "as narrow as makes it 1.8x as fast + distillation", 12,
        ("passes.prune-structured.speedup=1.8",), 3e-3,
    ),
    Case("residual", "qat-prune-distil", "channels 50 % + distillation + QAT int8", 12, rate=3e-3),
    Case(
        "residual", "nas-latency", "searched to be 2.5x as fast + distillation", 12,
        ("passes.search-architecture.speedup=2.5",), 3e-3,
    ),
    Case("residual", "prune-gradual", "80 % zeros, gradual", 10),
    Case("residual", "prune-2-4", "2:4, SparseGPT", 4),
    Case("residual", "lottery-ticket", "80 % zeros, lottery ticket", 24, rate=3e-3),
    Case("residual", "self-distil", "average of itself as teacher", 4),
    Case("residual", "distil", "separable student, outputs", 40, rate=3e-3, student="separable"),
    Case(
        "residual", "distil-feature", "separable student, outputs and features", 40,
        ("passes.distil-features.layers=[a=a2, c=b2]",), 3e-3, "separable",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """What a network is trained for.

    Attributes:
        right: Which test pictures the outputs of a network are right for.
        score: The same for one picture's outputs and label.
    """

    make: Callable[[], nn.Module]
    data: Any
    loader: Callable[[Any], Any]
    loss: Callable[[Any, Any], torch.Tensor]
    train: Callable[[nn.Module, Any, int], nn.Module]
    right: Callable[[nn.Module, Any], np.ndarray]
    score: Callable[[np.ndarray, np.ndarray], float]
    epochs: int


def tasks() -> dict[str, Task]:
    """By network."""
    pictures, texts = digits.Digits.load(), words.Words.load()
    found = {
        name: Task(
            make, pictures, digits.Loader, F.cross_entropy, digits.train, digits.right, lambda out, y: float(out[0].argmax() == y), epochs
        )
        for name, make, epochs in (("residual", digits.Residual, 12), ("separable", digits.Separable, 40))
    }  # fmt: skip
    found["reader"] = Task(
        words.Reader, texts, words.batches, words.loss, words.train, words.right, lambda out, y: float((words.read(out)[0] == y).all()), 10
    )  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases, or those whose network or recipe is named; other rows from this machine stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("recipes", nargs="*", help="recipes to run; all without")
    parser.add_argument("--net", default=",".join(_NETS), help="networks to run them on, with commas between")
    parser.add_argument(
        "--steps", action="store_true", help="measure what a training step costs, and nothing else"
    )
    parser.add_argument(
        "--missing", action="store_true", help="leave out what was measured on this machine before"
    )
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    nets = asked.net.split(",")
    if unknown := [n for n in nets if n not in _NETS]:
        parser.error(f"no network is called {', '.join(unknown)}; there are {', '.join(_NETS)}")
    torch.set_num_threads(1)
    results = _Results(RESULTS, asked.seed)
    known = tasks()
    cases = [c for c in CASES if not asked.steps and c.net in nets and (not asked.recipes or c.recipe in asked.recipes)]  # fmt: skip
    cases.sort(key=lambda c: _NETS.index(c.net))
    if asked.missing:
        cases = [c for c in cases if c.key not in results.rows]
    floats, files = dict[str, nn.Module](), dict[str, Path]()
    with tempfile.TemporaryDirectory(prefix="optkit-") as folder:
        for case in cases:
            for name in case.networks:
                if name in floats:
                    continue
                torch.manual_seed(asked.seed)
                with results.timed(f"float {name}"):
                    floats[name] = known[name].train(known[name].make(), known[name].data, known[name].epochs)
                results.trained(name, _mark(floats[name]))
                files[name] = _file(floats[name], known[name].data, Path(folder) / f"{name}.onnx")
            torch.manual_seed(asked.seed)
            with results.timed(" ".join(case.key)):
                row = _row(case, known, floats, files, Path(folder))
            results.take(case, row)
            print(_line(row), file=sys.stderr, flush=True)
    for net in nets if asked.steps or not asked.recipes else ():
        for recipe in _STEPS:
            name = f"{net}, {recipe}"
            if asked.missing and name in results.ratios:
                continue
            # What it weighs has no part in what a step costs.
            with results.timed(f"step {name}"):
                ratio = overhead(known[net].make(), recipe, known[net])
            results.step(name, ratio)
            print(f"{name}: {ratio:.2f}x a plain step", file=sys.stderr, flush=True)
    print((RESULTS / "training.md").read_text(encoding="utf-8"))
    return 0


class _Results:
    """The files, written anew with every row. What another machine measured is not kept.

    Attributes:
        rows: By network, recipe and label.
        ratios: What a step costs.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._place, self._seed = folder, folder / "training.json", seed
        kept: dict[str, Any] = json.loads(self._place.read_text()) if self._place.exists() else {}
        if kept.get("machine") != machine() or kept.get("seed") != seed:
            kept = {}
        self.rows: dict[tuple[str, str, str], dict[str, Any]] = {
            (r["net"], r["recipe"], r["label"]): r for r in kept.get("rows", ())
        }
        self.ratios: dict[str, float] = kept.get("step_over_plain_step", {})
        self._marks: dict[str, str] = kept.get("floats", {})
        self._seconds: dict[str, int] = kept.get("seconds_each", {})

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count CPU time, with that of processes that are started: what it takes where nothing else runs."""
        before = sum(os.times()[:4])
        yield
        self._seconds[what] = round(sum(os.times()[:4]) - before)

    def trained(self, name: str, mark: str) -> None:
        """A float network: rows that were measured beside another one go."""
        if self._marks.get(name, mark) != mark:
            self.rows = {k: r for k, r in self.rows.items() if name not in (r["net"], r["student"])}
        self._marks[name] = mark

    def take(self, case: Case, row: dict[str, Any]) -> None:
        """A row."""
        self.rows[case.key] = row
        self._write()

    def step(self, name: str, ratio: float) -> None:
        """What a step of a network with a recipe costs."""
        self.ratios[name] = round(ratio, 3)
        self._write()

    def _write(self) -> None:
        result = {
            "schema": 1,
            "step_over_plain_step": self.ratios,
            "seed": self._seed,
            "machine": machine(),
            "versions": {name: version(name) for name in ("torch", "onnxruntime", "scikit-learn")}
            | {"optkit": optkit.__version__},
            "python": platform.python_version(),
            "floats": self._marks,
            "seconds": sum(self._seconds.values()),
            "seconds_each": self._seconds,
            "rows": [self.rows[c.key] for c in CASES if c.key in self.rows],
        }
        self._folder.mkdir(exist_ok=True)
        self._place.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (self._folder / "training.md").write_text(page(result), encoding="utf-8")


def _mark(net: nn.Module) -> str:
    """Tells one float network from another."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def _file(net: nn.Module, data: Any, path: Path) -> Path:
    """The float network as a user of ONNX Runtime has it: exported, batch norms folded by the runtime itself."""
    save(loaded(draft(net, (data.x[:4],), ("batch",))), path)
    return path


def _row(
    case: Case, known: dict[str, Task], floats: dict[str, nn.Module], files: dict[str, Path], folder: Path
) -> dict[str, Any]:
    task, teacher = known[case.net], floats[case.net]
    data = task.data
    module = copy.deepcopy(floats[case.student] if case.student else teacher)
    options: dict[str, Any] = {"overrides": case.overrides}
    if case.student:
        # From scratch: what the same network learns from labels alone is in ``floats``.
        module, options["teacher"] = known[case.student].make(), teacher
    base = case.student or case.net
    before = task.right(floats[base], data)
    shot = None
    if case.student is None and case.recipe not in ("self-distil", "prune-gradual", "lottery-ticket"):
        once = copy.deepcopy(module)
        optkit.training(once, case.recipe, example=[(data.x[:256],)], **options)
        shot = float(task.right(once, data).mean())
    start = time.process_time()
    done = optkit.finetune(
        module,
        case.recipe,
        task.loader(data),
        task.loss,
        fit=Fit(epochs=case.epochs, learning_rate=case.rate),
        **options,
    )
    seconds = time.process_time() - start
    out = folder / f"{case.net}-{case.recipe}-{base}"
    artifact, report = done.trained.compile(data=_batches(data, 1), out=out)
    evaluator = Evaluator(
        samples=lambda: (
            ({"x": x[None].numpy()}, y.numpy()) for x, y in zip(data.test_x, data.test_y, strict=True)
        ),
        score=lambda outputs, label: task.score(next(iter(outputs.values())), label),
        metric="accuracy",
    )
    reference = ReferenceSession(files[base])
    with artifact.session(threads=1) as session:
        after = evaluator.scores(session.run)
        drop: Comparison = compare(evaluator, before.tolist(), after, None)
        feeds = [{"x": data.test_x[:1].numpy()}]
        timed = speedup(reference.run, session.run, feeds, rounds=400, budget=6.0)
    # An overhead of the calls that both pay would hide what the network itself gains: a batch shows it.
    artifact, _ = done.trained.compile(data=_batches(data, 32), out=out)
    with artifact.session(threads=1) as session:
        batch = speedup(reference.run, session.run, [{"x": data.test_x[:32].numpy()}], rounds=60, budget=10.0)
    reference.close()
    return {
        **asdict(case), "n": drop.n, "before": drop.reference, "one_shot": shot, "after": drop.candidate, "drop": drop.drop,
        "ci95": drop.ci95, "bytes_before": files[base].stat().st_size, "bytes": report.manifest.size.after,
        "reference_ms": timed.reference.median * 1e3, "ms": timed.candidate.median * 1e3, "speedup": timed.ratio,
        "speedup_ci95": timed.ci95, "speedup_batch_32": batch.ratio, "train_seconds": round(seconds, 1),
    }  # fmt: skip


def _batches(data: Any, together: int) -> list[dict[str, np.ndarray]]:
    """Inputs by so many, for compile to measure on."""
    return [{"x": x.numpy()} for x in data.x[: 8 * together].split(together)]


def _line(row: dict[str, Any]) -> str:
    return f"{row['net']} {row['label']}: {row['before']:.4f} -> {row['after']:.4f}, {row['speedup']:.2f}x, {row['train_seconds']} s"


def overhead(net: nn.Module, recipe: str, task: Task, rounds: int = 40) -> float:
    """CPU time of a training step with the session over that of a plain one, the median of pairs in turn."""
    rows = slice(0, 50)
    x, y = task.data.x[rows], task.data.y[rows]
    plain, compressed = copy.deepcopy(net).train(), copy.deepcopy(net).train()
    session = optkit.training(compressed, recipe, example=(x,), steps=10 * rounds)
    optimizers = [torch.optim.AdamW(m) for m in (plain.parameters(), session.parameters())]

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, run: TrainingSession | None) -> float:
        start = time.process_time()
        outputs = module(x)
        loss: Any = task.loss(outputs, y)
        if run is not None:
            loss = run.loss(loss, (x,), outputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if run is not None:
            run.step()
        return time.process_time() - start

    ratios = []
    for _ in range(rounds):
        before = step(plain, optimizers[0], None)
        ratios.append(step(compressed, optimizers[1], session) / before)
    return float(np.median(ratios[5:]))


def page(result: dict[str, Any]) -> str:
    """The table."""
    head = (
        "| network | recipe | what | before % | one shot % | after % | drop, points (95 %) | kB | latency ms | speed-up (95 %) "
        "| at batch 32 | training CPU s |"
    )
    lines = [
        "# Training recipes",
        "",
        "scikit-learn's digits at 16x16, 797 test pictures, for `residual` and `separable`; rendered words, 800 of which no word was "
        "trained on, for `reader`, convolutions and transformer blocks. See `benchmarks/training.py` for how it is measured. The reference is "
        "ONNX Runtime on the float network of the row, one thread. `distil` rows compare with the same student trained on labels. "
        "Zeros make nothing faster here: what their rows gain, `self-distil`, which has none, gains from exact rewrites too.",
        "",
        f"{result['machine'].get('processor', '').strip()}; "
        + ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        + f"; a run of all takes {result['seconds']} s.",
        "",
        head,
        "|" + "---|" * 12,
    ]
    for r in result["rows"]:
        shot = "" if r["one_shot"] is None else f"{100 * r['one_shot']:.1f}"
        low, high = (100 * v for v in r["ci95"])
        slow, fast = r["speedup_ci95"]
        lines.append(
            f"| {r['student'] or r['net']} | {r['recipe']} | {r['label']} | {100 * r['before']:.1f} | {shot} | {100 * r['after']:.1f} "
            f"| {100 * r['drop']:+.1f} ({low:+.1f} to {high:+.1f}) | {r['bytes_before'] / 1e3:.0f} -> {r['bytes'] / 1e3:.0f} "
            f"| {r['reference_ms']:.3f} -> {r['ms']:.3f} | {r['speedup']:.2f} ({slow:.2f} to {fast:.2f}) "
            f"| {r['speedup_batch_32']:.2f} | {r['train_seconds']} |"
        )
    if result["step_over_plain_step"]:
        lines += ["", "A training step over a plain one, CPU time: "]
        lines[-1] += (
            "; ".join(f"{name} {ratio:.2f}x" for name, ratio in result["step_over_plain_step"].items()) + "."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
