"""Which networks of the families are pruned, here and by torch-pruning, and whether what comes out is right.

    pip install 'optkit[families]' torch-pruning
    python -m optkit.benchmarks.pruning_peers --only vision,text

Half of every group goes, widths in any number. torch-pruning (Fang et al., arXiv:2301.12900) runs as its guide says:
``MagnitudePruner`` on the example, the layers that make the outputs ignored, heads of attention named. It prunes a network
where the pruned module runs on the example, gives outputs of the old shapes and has lost parameters. Ours is held to more:
the pruned graph runs at every size at which the family is run, and gives what the whole graph gives with the removed units
at zero. Writes ``benchmarks/results/pruning_peers.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

from optkit.benchmarks.bounded import bounded
from optkit.benchmarks.families.catalogue import KINDS, Built, build, table
from optkit.benchmarks.machine import processor
from optkit.errors import OptkitError
from optkit.exporting.eager import quiet
from optkit.exporting.export import export
from optkit.exporting.proof import others
from optkit.exporting.signature import Signature
from optkit.frontend import proved
from optkit.passes.base import Context
from optkit.passes.pruning.choose import choose
from optkit.passes.pruning.dependencies import Dependencies
from optkit.passes.pruning.prepare import prepare
from optkit.passes.pruning.structured import PruneChannels, PruneStructured
from optkit.passes.pruning.surgery import remove_from_copy
from optkit.reference import ReferenceSession
from optkit.targets import target

RESULTS = Path(__file__).resolve().parent / "results"
_RATIO = 0.5
# CPU seconds that either tool may take for a network; some of theirs do not end within ten times as many. By the clock, what
# the machine is busy with would count.
_SECONDS, _BYTES, _HOUR = {"ours": 200, "theirs": 60}, 6 << 30, 3600
# Relative to the largest value: sums over fewer numbers are taken in another order.
_CLOSE = 1e-3
# Layers at the end that torch-pruning is told to leave alone, until the outputs have their old shapes.
_ENDS = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--only", default=",".join(KINDS), help=f"kinds or families; kinds: {', '.join(KINDS)}"
    )
    parser.add_argument("--missing", action="store_true", help="leave out those that have a row")
    asked = parser.parse_args(arguments)
    given = asked.only.split(",")
    wanted = [(k, n) for k in KINDS for n in table(k) if k in given or n in given]
    if not wanted:
        parser.error(f"no family or kind is called {', '.join(given)}")
    place = RESULTS / "pruning_peers.json"
    rows = {r["name"]: r for r in json.loads(place.read_text())["rows"]} if place.exists() else {}
    for kind, name in wanted:
        if asked.missing and name in rows:
            continue
        rows[name] = {"name": name, "kind": kind}
        for tool in ("ours", "theirs"):
            rows[name][tool] = _apart(kind, name, tool)
            print(f"{name}, {tool}: {rows[name][tool]}", file=sys.stderr, flush=True)
        _write(place, rows)
    return 0


def _write(place: Path, rows: Mapping[str, Any]) -> None:
    result = {
        "schema": 1,
        "processor": processor(),
        "versions": {n: version(n) for n in ("torch", "torch-pruning", "transformers", "onnxruntime")},
        "rows": [rows[n] for k in KINDS for n in table(k) if n in rows],
    }
    place.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "pruning_peers.md").write_text(page(result), encoding="utf-8")


def _apart(kind: str, name: str, tool: str) -> dict[str, Any]:
    """In a process of its own: tools may take all memory or time."""
    try:
        found, _ = bounded(_work, kind, name, tool, seconds=_HOUR, memory=_BYTES)
    except OptkitError as error:
        return {"failed": str(error), "stopped": True}
    made: dict[str, Any] = found
    return made


class _TooLong(BaseException):
    """No Exception, which tools catch."""


def _limit(seconds: int) -> None:
    """Let this process raise when it has used so much more CPU time, and end it where that is no use."""

    def over(*_: Any) -> None:
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        raise _TooLong(f"stopped: beyond {seconds} CPU seconds")

    signal.signal(signal.SIGXCPU, over)
    used = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + 2 * seconds))


def _work(kind: str, name: str, tool: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    try:
        with quiet():
            built = build(table(kind)[name])
            _limit(_SECONDS[tool])
            return _ours(built, name) if tool == "ours" else _theirs(built)
    except _TooLong as error:
        return {"failed": str(error), "stopped": True}
    except Exception as error:  # noqa: BLE001  (the other tool raises whatever it meets)
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _ours(built: Built, name: str) -> dict[str, Any]:
    """Prune the exported graph; then the module itself, as training does."""
    exported = export(built.module, built.inputs, built.dynamic, name=name)
    model = proved(exported).model
    more, _ = others(exported)
    feeds = [exported.feeds(exported.tensors), *(exported.feeds(o.tensors) for o in more)]
    context = Context(target=target("cpu"))
    prepare(model, context)
    found, groups, importance = PruneChannels(ratio=_RATIO, multiple=1).ranked(model)
    gone = choose(groups, importance, _RATIO, 1, together=False, least=0.0)
    pruned, masked = remove_from_copy(model, found, gone), _masked(model, found, gone)
    before, after = _parameters(model), _parameters(pruned)
    small, whole = ReferenceSession(pruned), ReferenceSession(masked)
    worst = 0.0
    for batch in feeds:
        ours, expected = small.run(batch), whole.run(batch)
        for key, array in expected.items():
            if ours[key].shape != array.shape:
                return {"failed": f"output {key!r} is {list(ours[key].shape)}, and was {list(array.shape)}"}
            worst = max(worst, _apart_by(ours[key], array))
    result = {"parameters": [before, after], "groups": len(groups), "sizes": len(feeds), "error": worst}
    if worst > _CLOSE:
        result["failed"] = f"differs from the whole graph with the units at zero by {worst:.1e}"
    return result | {"module": _module(built)}


def _masked(model: ir.Model, found: Dependencies, gone: set[int]) -> ir.Model:
    """The whole graph with everything that belongs to removed units at zero."""
    other = model.clone()
    for value in found.weights:
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        if array.dtype.kind != "f":
            continue
        for axis, labels in enumerate(found.axes[value]):
            if isinstance(labels, np.ndarray):
                lost = [i for i, unit in enumerate(found.labels.roots(labels).tolist()) if unit in gone]
                array[(slice(None),) * axis + (lost,)] = 0
        other.graph.initializers[str(value.name)].const_value = ir.tensor(array, name=value.name)
    return other


def _module(built: Built) -> str:
    """What becomes of the module itself: empty where it is pruned, else why not."""
    import optkit

    module = copy.deepcopy(built.module)
    recipe = {"recipe": 1, "passes": [{PruneStructured.name: {"ratio": _RATIO, "multiple": 1}}]}
    before = sum(p.numel() for p in module.parameters())
    try:
        optkit.training(module, recipe, example=built.inputs)
    except (OptkitError, TypeError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]
    return "" if sum(p.numel() for p in module.parameters()) < before else "nothing was pruned"


def _theirs(built: Built) -> dict[str, Any]:
    pruning = importlib.import_module("torch_pruning")
    signature = Signature(built.module, built.inputs)
    layers = _order(built.module, signature)
    reason = "no layers"
    expected = _shapes(_called(built.module, signature))
    for ends in range(1, min(_ENDS, len(layers)) + 1):
        module = copy.deepcopy(built.module)
        heads = _heads(module)
        pruner = pruning.pruner.MagnitudePruner(
            module, tuple(signature.tensors), importance=pruning.importance.MagnitudeImportance(), pruning_ratio=_RATIO,
            ignored_layers=[module.get_submodule(n) for n in layers[-ends:]], num_heads=heads,
            forward_fn=lambda m, _: _tensors(_called(m, signature)),
        )  # fmt: skip
        before = sum(p.numel() for p in module.parameters())
        pruner.step()
        for owner in module.modules():
            _follow(owner, pruner, heads)
        after = sum(p.numel() for p in module.parameters())
        try:
            shapes = _shapes(_called(module, signature))
        except Exception as error:  # noqa: BLE001  (what a network with wrong sizes raises)
            reason = f"the pruned module does not run: {' '.join(str(error).split())[:200]}"
            continue
        if shapes != expected:
            reason = "outputs have other shapes"
        elif after == before:
            reason = "nothing was pruned"
        else:
            return {"parameters": [before, after], "ends": ends}
    return {"failed": reason}


def _called(module: nn.Module, signature: Signature) -> Any:
    """The outputs; of copies of the inputs, as caches are written to."""
    args, kwargs = signature.arguments([t.clone() for t in signature.tensors])
    return module(*args, **kwargs)


def _order(module: nn.Module, signature: Signature) -> list[str]:
    """Layers with weights in the order in which they are called."""
    called: dict[str, None] = {}
    handles = [
        part.register_forward_hook(lambda *_, path=path: called.setdefault(path))
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.modules.conv._ConvNd)
    ]
    with torch.no_grad():
        _called(module, signature)
    for handle in handles:
        handle.remove()
    return list(called)


def _heads(module: nn.Module) -> dict[nn.Module, int]:
    """Projections of attention and how many heads they have, as far as the modules say so."""
    found: dict[nn.Module, int] = {}
    for owner in module.modules():
        count = next((v for n in ("num_attention_heads", "num_heads", "n_heads") if type(v := getattr(owner, n, None)) is int), 0)  # fmt: skip
        for part in owner.children():
            if count and isinstance(part, nn.Linear) and part.out_features % count == 0:
                found[part] = count
    return found


def _follow(owner: nn.Module, pruner: Any, heads: Mapping[nn.Module, int]) -> None:
    """Widths of heads, which the guide leaves to the user to set."""
    mine = [p for p in owner.children() if p in heads]
    if mine:
        width = mine[0].out_features
        for name in ("all_head_size", "embed_dim", "inner_dim"):
            if type(getattr(owner, name, None)) is int:
                setattr(owner, name, width)
        for name in ("attention_head_size", "head_dim"):
            if type(getattr(owner, name, None)) is int:
                setattr(owner, name, width // pruner.num_heads[mine[0]])


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """Those that depend on weights: its tracing follows gradients."""
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.grad_fn is not None]


def _shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


def _parameters(model: ir.Model) -> int:
    return sum(
        int(np.prod(v.shape.numpy())) for v in model.graph.initializers.values() if v.shape is not None
    )


def _apart_by(found: np.ndarray, expected: np.ndarray) -> float:
    if expected.dtype.kind != "f":
        return float(np.mean(found != expected)) if expected.size else 0.0
    largest = float(np.abs(expected).max(initial=0))
    return float(np.abs(found - expected).max(initial=0)) / max(largest, 1e-6)


_TOOLS = (("here", "ours"), ("torch-pruning", "theirs"))


def page(result: Mapping[str, Any]) -> str:
    """The table."""
    rows = result["rows"]
    ours = [r for r in rows if "failed" not in r["ours"]]
    theirs = [r for r in rows if "failed" not in r["theirs"]]
    alone = [r["name"] for r in theirs if "failed" in r["ours"]]
    lines = [
        "# Pruning of model families, here and by torch-pruning",
        "",
        *(line for line in (__doc__ or "").split("\n\n")[2:3]),
        "",
        f"{result['processor']['name']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}.",
        "",
        f"{len(rows)} of {sum(len(table(k)) for k in KINDS)} families were run. Pruned: {len(ours)} of {len(rows)} here, {len(theirs)} of {len(rows)} by torch-pruning; by it alone: "
        f"{', '.join(alone) or 'none'}. The module itself, ready to be trained on: "
        f"{sum(not r['ours'].get('module', '-') for r in rows)} of {len(rows)}.",
        "",
        "Stopped by the limits of this benchmark on time or memory, so nothing is known of them: "
        + (
            ", ".join(f"{r['name']} ({who})" for r in rows for who, key in _TOOLS if r[key].get("stopped"))
            or "none"
        )
        + ".",
        "",
        "| family | kind | parameters left, graph | error against units at zero | module | parameters left, torch-pruning |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        own, other = r["ours"], r["theirs"]
        error = f"{own['error']:.0e} at {own['sizes']} sizes" if "error" in own else ""
        module = "pruned" if own.get("module") == "" else "fails" if "module" in own else ""
        lines.append(f"| {r['name']} | {r['kind']} | {_left(own)} | {error} | {module} | {_left(other)} |")
    lines += ["", "## What fails here", ""]
    for r in rows:
        for what, why in (("graph", r["ours"].get("failed")), ("module", r["ours"].get("module"))):
            if why:
                lines.append(f"* **{r['name']}**, {what}: {why}".replace("<", "‹").replace(">", "›"))
    return "\n".join(lines) + "\n"


def _left(found: Mapping[str, Any]) -> str:
    if "failed" in found:
        return "fails"
    before, after = found["parameters"]
    return f"{after / before:.0%}"


if __name__ == "__main__":
    raise SystemExit(main())
