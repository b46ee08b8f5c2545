"""Keep the checkout's folders from being importable as top-level packages; shared fixtures."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

_ROOT = Path(__file__).resolve().parent.parent
# The same examples in every run; `pytest --hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")
sys.path[:] = [p for p in sys.path if p not in ("", str(_ROOT))]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden")


@functools.cache
def no_gpu() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    from optkit.kernels.cuda import CudaError, Device

    try:
        Device().close()
    except CudaError as error:
        return str(error)
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if any(item.iter_markers("device")) and (why := no_gpu()) is not None:
        pytest.skip(f"needs a GPU: {why}")
    for marker in item.iter_markers("needs"):
        for package in marker.args:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs the package {package}")


@pytest.fixture
def elsewhere() -> str:
    """A processor that is not the one at hand."""
    from optkit.targets import target

    return next(name for name in ("x86-avx2", "arm64-dot") if not target(name).runs_here)


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """``golden(name, text)`` compares with tests/golden/name; ``--update-golden`` rewrites it."""

    def compare(name: str, text: str) -> None:
        path = _ROOT / "tests" / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text()

    return compare


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that pretends to be CUDA's driver, on the memory of the host; ``backends/device/libcuda.c``."""
    return _library(tmp_path_factory.mktemp("driver"), "libcuda")


@pytest.fixture(scope="session")
def hip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of HIP's runtime, compiled with AMD's header; ``backends/device/libhip.c``."""
    triton = pytest.importorskip("triton", reason="needs the package triton")
    headers = Path(triton.__file__).parent / "backends" / "amd" / "include"
    return _library(tmp_path_factory.mktemp("driver"), "libhip", f"-I{headers}")


def _library(folder: Path, name: str, *options: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = _ROOT / "tests" / "backends" / "device" / f"{name}.c"
    subprocess.run([compiler, "-shared", "-fPIC", *options, "-o", folder / f"{name}.so", source], check=True)
    return folder / f"{name}.so"
