"""A driver that pretends to be CUDA's, on the memory of the host."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    """The library; its source is ``device/libcuda.c``."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so"
    source = Path(__file__).resolve().parent / "device" / "libcuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library
