"""Keep the checkout's folders from being importable as top-level packages; shared fixtures."""

from __future__ import annotations

import importlib.util
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


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for package in marker.args:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"needs the package {package}")


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
