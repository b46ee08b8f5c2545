"""A seed and one thread; and nothing here is collected where torch or its exporter is missing."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnxscript") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # Small tensors on a shared machine: more threads wait for each other.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
