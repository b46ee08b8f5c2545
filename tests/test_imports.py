from __future__ import annotations

import json
import subprocess
import sys

import pytest

import optkit

HEAVY = [
    "numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "torch", "pydantic", "yaml", "typer", "rich", "click",
    "google.protobuf", "ml_dtypes",
]  # fmt: skip


def _loaded_by(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded after ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import optkit",
        "import optkit; dir(optkit); optkit.__version__",
        "import optkit.errors, optkit.registry",
        "from optkit.passes import PASSES; list(PASSES); 'cast' in PASSES",
        "from optkit.backends import BACKENDS; list(BACKENDS)",
        "from optkit.kernels import *",
        "from optkit.targets import TARGETS; list(TARGETS)",
        "import optkit; optkit.OptkitError; optkit.Target",
    ],
)
def test_names_are_listed_without_loading_anything_heavy(code):
    assert _loaded_by(code) == []


@pytest.mark.parametrize("name", optkit.__all__)
def test_every_public_name_resolves(name):
    assert getattr(optkit, name).__name__ in (name, "load", "compile")
    assert name in dir(optkit)


def test_public_names_are_loaded_once():
    assert optkit.Recipe is optkit.Recipe
    assert "Recipe" in vars(optkit)


def test_what_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'optkit' has no attribute 'Recipes'"):
        optkit.Recipes  # noqa: B018


def test_the_core_needs_no_torch():
    assert "torch" not in _loaded_by("import optkit.compiler, optkit.testing, optkit.cli")


@pytest.mark.needs("triton")
def test_a_process_that_compiles_kernels_loads_triton_alone():
    assert _loaded_by("import optkit.kernels.triton.worker") == []


@pytest.mark.parametrize("name", ["passes", "backends", "kernels", "recipes", "benchmarks"])
def test_folders_of_the_checkout_are_not_importable_by_their_bare_names(name):
    code = f"import importlib.util\nassert importlib.util.find_spec({name!r}) is None"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
