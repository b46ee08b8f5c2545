"""What each training recipe costs and brings: handwritten digits and rendered words, before, in one shot and after training.

    python -m optkit.benchmarks.training
    python -m optkit.benchmarks.training --net separable int8-qat    # those rows alone
    python -m optkit.benchmarks.training --steps                     # what a step costs

Data are scikit-learn's digits (1797 pictures, enlarged to 16x16): 1000 to train on, 797 to test on, the same for all; and
words in the fonts of the system (``benchmarks/words.py``), of which those of the test are never trained on. The metric is
the share of right answers, whole words where words are read, its drop paired with the float network's, with a 95 % interval. Latency is CPU time
of the compiled artifact on one thread at batch 1, in turn with ONNX Runtime on the float network's file; compiled for
single inputs and, for the column at batch 32, for as many. Rows are worked out side by side, each on a core of its own.
Writes ``benchmarks/results/training.json`` and ``.md``. Needs optkit[torch], scikit-learn and Pillow.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
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
from optkit.benchmarks.cores import cores, usable
from optkit.evaluate import Comparison, Evaluator, compare
from optkit.reference import ReferenceSession
from optkit.store import save
from optkit.targets.host import machine
from optkit.training_export import draft, loaded
from optkit.training_loop import Fit
from optkit.training_session import TrainingSession

RESULTS = Path(__file__).resolve().parent / "results"
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


@functools.cache
def task_of(name: str) -> Task:
    """Of a network."""
    if name == "reader":
        return Task(
            words.Reader, words.Words.load(), words.batches, words.loss, words.train, words.right,
            lambda out, y: float((words.read(out)[0] == y).all()), 10,
        )  # fmt: skip
    make, epochs = {"residual": (digits.Residual, 12), "separable": (digits.Separable, 40)}[name]
    return Task(
        make, digits.Digits.load(), digits.Loader, F.cross_entropy, digits.train, digits.right,
        lambda out, y: float(out[0].argmax() == y), epochs,
    )  # fmt: skip


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
    results = _Results(RESULTS, asked.seed)
    cases = [c for c in CASES if not asked.steps and c.net in nets and (not asked.recipes or c.recipe in asked.recipes)]  # fmt: skip
    if asked.missing:
        cases = [c for c in cases if c.key not in results.rows]
    steps = [
        (net, recipe)
        for net in (nets if asked.steps or not asked.recipes else ())
        for recipe in _STEPS
        if not (asked.missing and f"{net}, {recipe}" in results.ratios)
    ]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="optkit-") as folder, cores() as pool:
        for job in _jobs(pool, cases, steps, results, Path(folder)):
            print(job, file=sys.stderr, flush=True)
    if (set(cases), len(steps)) == (set(CASES), len(_STEPS) * len(_NETS)):
        results.took(time.monotonic() - start, len(usable()))
    print((RESULTS / "training.md").read_text(encoding="utf-8"))
    return 0


def _jobs(
    pool: Executor, cases: Sequence[Case], steps: Sequence[tuple[str, str]], results: _Results, folder: Path
) -> Iterator[str]:
    """Do everything, as many jobs at a time as there are cores, the longest first; says what is done."""
    seed = results.seed
    networks = sorted({n for c in cases for n in c.networks}, key=lambda n: -results.seconds(f"float {n}"))
    todo = sorted(cases, key=lambda c: -results.seconds(" ".join(c.key)))
    trained = set[str]()
    running: dict[Future[Any], Any] = {
        pool.submit(_counted, _float, name, seed, folder): name for name in networks
    }
    running |= {pool.submit(_counted, overhead, *step): step for step in steps}
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            what, (found, seconds) = running.pop(future), future.result()
            if isinstance(what, Case):
                results.take(what, found, seconds)
                yield _line(found)
            elif isinstance(what, tuple):
                results.step(", ".join(what), found, seconds)
                yield f"{', '.join(what)}: {found:.2f}x a plain step"
            else:
                results.trained(what, found, seconds)
                trained.add(what)
        ready = [c for c in todo if trained.issuperset(c.networks)]
        todo = [c for c in todo if c not in ready]
        running |= {pool.submit(_counted, _row, c, seed, folder): c for c in ready}


def _counted(job: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """With its CPU time, that of processes that it starts included: what it takes where nothing else runs."""
    torch.set_num_threads(1)
    before = sum(os.times()[:4])
    found = job(*arguments)
    return found, sum(os.times()[:4]) - before


class _Results:
    """The files, written anew with every row. What another machine measured is not kept.

    Attributes:
        rows: By network, recipe and label.
        ratios: What a step costs.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self._folder, self._place = folder, folder / "training.json"
        kept: dict[str, Any] = json.loads(self._place.read_text()) if self._place.exists() else {}
        if kept.get("machine") != machine() or kept.get("seed") != seed:
            kept = {}
        self.rows: dict[tuple[str, str, str], dict[str, Any]] = {
            (r["net"], r["recipe"], r["label"]): r for r in kept.get("rows", ())
        }
        self.ratios: dict[str, float] = kept.get("step_over_plain_step", {})
        self._marks: dict[str, str] = kept.get("floats", {})
        self._seconds: dict[str, int] = kept.get("seconds_each", {})
        self._whole: dict[str, float] = kept.get("whole", {})

    def seconds(self, what: str) -> float:
        """CPU time that a job took before; much where it is not known."""
        return self._seconds.get(what, math.inf)

    def trained(self, name: str, mark: str, seconds: float) -> None:
        """A float network: rows that were measured beside another one go."""
        if self._marks.get(name, mark) != mark:
            self.rows = {k: r for k, r in self.rows.items() if name not in (r["net"], r["student"])}
        self._marks[name] = mark
        self._seconds[f"float {name}"] = round(seconds)

    def take(self, case: Case, row: dict[str, Any], seconds: float) -> None:
        """A row."""
        self.rows[case.key] = row
        self._seconds[" ".join(case.key)] = round(seconds)
        self._write()

    def step(self, name: str, ratio: float, seconds: float) -> None:
        """What a step of a network with a recipe costs."""
        self.ratios[name] = round(ratio, 3)
        self._seconds[f"step {name}"] = round(seconds)
        self._write()

    def took(self, seconds: float, cores: int) -> None:
        """How long a run of all was, side by side on so many cores."""
        self._whole = {"cores": cores, "minutes": round(seconds / 60, 1)}
        self._write()

    def _write(self) -> None:
        result = {
            "schema": 1,
            "step_over_plain_step": self.ratios,
            "seed": self.seed,
            "machine": machine(),
            "versions": {name: version(name) for name in ("torch", "onnxruntime", "scikit-learn")}
            | {"optkit": optkit.__version__},
            "python": platform.python_version(),
            "floats": self._marks,
            "seconds": sum(self._seconds.values()),
            "seconds_each": self._seconds,
            "whole": self._whole,
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


def _float(name: str, seed: int, folder: Path) -> str:
    """Train a network and leave it in ``folder``; gives what tells it from others."""
    task = task_of(name)
    torch.manual_seed(seed)
    net = task.train(task.make(), task.data, task.epochs)
    torch.save(net.state_dict(), folder / f"{name}.pt")
    _file(net, task.data, folder / f"{name}.onnx")
    return _mark(net)


def _trained(name: str, folder: Path) -> nn.Module:
    net = task_of(name).make().eval()
    net.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return net


def _row(case: Case, seed: int, folder: Path) -> dict[str, Any]:
    task = task_of(case.net)
    floats = {name: _trained(name, folder) for name in case.networks}
    files = {name: folder / f"{name}.onnx" for name in case.networks}
    torch.manual_seed(seed)
    data, teacher = task.data, floats[case.net]
    module = copy.deepcopy(floats[case.student] if case.student else teacher)
    options: dict[str, Any] = {"overrides": case.overrides}
    if case.student:
        # From scratch: what the same network learns from labels alone is in ``floats``.
        module, options["teacher"] = task_of(case.student).make(), teacher
    base = case.student or case.net
    before = task.right(floats[base], data)
    shots = list[float]()

    def begun(changed: nn.Module) -> nn.Module:
        # Before its first step: what the recipe did in one shot.
        if case.student is None and case.recipe not in ("self-distil", "prune-gradual", "lottery-ticket"):
            shots.append(float(task.right(changed, data).mean()))
        return changed

    start = time.process_time()
    done = optkit.finetune(
        module,
        case.recipe,
        task.loader(data),
        task.loss,
        fit=Fit(epochs=case.epochs, learning_rate=case.rate),
        wrap=begun,
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
        **asdict(case), "n": drop.n, "before": drop.reference, "one_shot": shots[0] if shots else None, "after": drop.candidate, "drop": drop.drop,
        "ci95": drop.ci95, "bytes_before": files[base].stat().st_size, "bytes": report.manifest.size.after,
        "reference_ms": timed.reference.median * 1e3, "ms": timed.candidate.median * 1e3, "speedup": timed.ratio,
        "speedup_ci95": timed.ci95, "speedup_batch_32": batch.ratio, "train_seconds": round(seconds, 1),
    }  # fmt: skip


def _batches(data: Any, together: int) -> list[dict[str, np.ndarray]]:
    """Inputs by so many, for compile to measure on."""
    return [{"x": x.numpy()} for x in data.x[: 8 * together].split(together)]


def _line(row: dict[str, Any]) -> str:
    return f"{row['net']} {row['label']}: {row['before']:.4f} -> {row['after']:.4f}, {row['speedup']:.2f}x, {row['train_seconds']} s"


def overhead(name: str, recipe: str, rounds: int = 40) -> float:
    """CPU time of a training step with the session over that of a plain one, the median of pairs in turn."""
    task = task_of(name)
    net, rows = task.make(), slice(0, 50)
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
        + f"; a run of all takes {result['seconds']} CPU seconds"
        + (
            f", {whole['minutes']:g} minutes on {whole['cores']} cores."
            if (whole := result["whole"])
            else "."
        ),
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
