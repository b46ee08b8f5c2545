"""The imports of every module, read without running any, keep to the layers of CONTRIBUTING.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {name: ROOT / name for name in ("passes", "backends", "kernels", "recipes", "benchmarks")}

# A module may import those of its own layer and of lower ones.
LAYERS = {
    1: ["errors", "registry"],
    2: [
        "graph", "origin", "ops", "formats", "microscaling", "qdq", "placement", "rewrite", "targets", "data", "npz", "store", "reference", "dims",
        "propagation", "inference", "saturation", "unsigned", "arithmetic", "closeness", "golden", "masks", "deciding", "words",
        "multiplies", "protobuf", "decompositions", "control_flow",
    ],
    3: ["kernels", "training_sharded"],
    4: ["passes", "backends"],
    5: ["recipe", "recipes"],
    6: [
        "frontend", "exporting", "onnxfile", "opset", "equivalence", "pipeline", "legalize", "training", "compilation", "compiler", "request", "evaluate",
        "bench", "report", "artifact", "search", "candidate", "repair", "page", "sentences", "testing", "freshness", "roofline", "probes", "cost", "sharing",
        "estimate", "finish", "planning", "seen", "sized", "progress", "workbench",
        "training_session", "training_loop", "training_export", "training_run", "training_start", "training_callbacks",
        "readback", "reporting", "functions", "narrowing", "latency_table", "sparsity", "pruning", "torch",
    ],
    7: ["cli", "benchmarks", "__main__"],
}  # fmt: skip
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
HEAVY = {
    "torch": ("passes", "exporting", "frontend", "training", "torch", "kernels/triton", "benchmarks"),
    "tensorrt": ("backends/tensorrt", "benchmarks"),
    "tensorrt_rtx": ("backends/tensorrt",),
    "openvino": ("backends/openvino", "benchmarks"),
    "coremltools": ("backends/coreml", "benchmarks"),
    "triton": ("kernels/triton", "torch", "benchmarks"),
    "ai_edge_litert": ("backends/litert", "benchmarks"),
    "coreai": ("backends/coreai",),
    "coreai_onnx": ("backends/coreai",),
    "flatbuffers": ("backends/litert",),
}


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "optkit").rglob("*.py")):
        part = path.relative_to(ROOT / "optkit").with_suffix("").parts
        if part[0] not in FOLDERS:  # the links to the folders at the top
            yield ".".join(("optkit", *part)), path
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            yield ".".join(("optkit", name, *path.relative_to(folder).with_suffix("").parts)), path


MODULES = {name.removesuffix(".__init__"): path for name, path in _modules()}


def _imports(path: Path, *, types: bool) -> Iterator[tuple[int, str]]:
    """``(line, module)`` of each import; those under TYPE_CHECKING only where ``types``."""

    def visit(nodes: list[ast.stmt]) -> Iterator[tuple[int, str]]:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                if types:
                    yield from visit(node.body)
                yield from visit(node.orelse)
                continue
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                assert node.module is not None
                yield node.lineno, node.module
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            for field in ("body", "orelse", "finalbody"):
                yield from visit(getattr(node, field, []))
            for handler in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                yield from visit(handler.body)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")).body)


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_layer():
    assert {part for m in MODULES if (part := _part(m))} <= set(LAYER)


def test_imports_go_up_the_layers_only():
    wrong = [
        f"{path}:{line}: {_part(module)} imports {name}"
        for module, path in MODULES.items()
        for line, name in _imports(path, types=False)
        if name.split(".")[0] == "optkit" and LAYER.get(_part(name), 0) > LAYER.get(_part(module), 0)
    ]
    assert not wrong


def test_the_package_itself_imports_none_of_its_modules():
    assert [name for _, name in _imports(MODULES["optkit"], types=False) if name.startswith("optkit")] == []


def test_passes_and_backends_do_not_know_each_other():
    other = {"passes": "optkit.backends", "backends": "optkit.passes"}
    wrong = [
        f"{path}:{line}: {name}"
        for module, path in MODULES.items()
        for line, name in _imports(path, types=True)
        if _part(module) in other and f"{name}.".startswith(other[_part(module)] + ".")
    ]
    assert not wrong


def test_nothing_below_imports_the_command_line_or_the_benchmarks():
    wrong = [
        f"{path}:{line}: {name}"
        for module, path in MODULES.items()
        for line, name in _imports(path, types=True)
        if LAYER.get(_part(module), 0) < 7 and f"{name}.".startswith(("optkit.cli.", "optkit.benchmarks."))
    ]
    assert not wrong


def test_heavy_packages_are_imported_where_they_belong_alone():
    wrong = [
        f"{path}:{line}: {name}"
        for module, path in MODULES.items()
        for line, name in _imports(path, types=False)
        if (allowed := HEAVY.get(name.split(".")[0])) is not None
        and not module.removeprefix("optkit.").replace(".", "/").startswith(allowed)
    ]
    assert not wrong


def test_folders_at_the_top_are_imported_by_their_full_names():
    wrong = [
        f"{path}:{line}: import it as optkit.{name}"
        for path in MODULES.values()
        for line, name in _imports(path, types=True)
        if name.split(".")[0] in FOLDERS
    ]
    assert not wrong


@pytest.mark.parametrize("backend", sorted(p.parent.name for p in FOLDERS["backends"].glob("*/__init__.py")))
def test_backends_do_not_import_each_other(backend):
    others = {p.parent.name for p in FOLDERS["backends"].glob("*/__init__.py")} - {backend}
    wrong = [
        f"{path}:{line}: {name}"
        for module, path in MODULES.items()
        if module.startswith(f"optkit.backends.{backend}")
        for line, name in _imports(path, types=True)
        if any(f"{name}.".startswith(f"optkit.backends.{other}.") for other in others)
    ]
    assert not wrong


def test_no_module_is_named_for_what_it_is_instead_of_what_is_in_it():
    assert not {"utils", "helpers", "common", "misc"} & {m.rpartition(".")[2] for m in MODULES}


def test_every_module_says_what_it_is_and_reads_types_late():
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{module} has no docstring"
        code = [n for n in tree.body if not isinstance(n, ast.Expr)]
        if code:
            assert isinstance(code[0], ast.ImportFrom), module
            assert code[0].module == "__future__", module
