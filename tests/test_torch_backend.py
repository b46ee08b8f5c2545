"""``torch.compile(module, backend="optkit")`` against eager mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from optkit.errors import ModelError, UsageError

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from optkit.torch.backend import backend  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(fast)
    torch._dynamo.reset()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
    return torch.nn.Sequential(*layers).eval()


def wide():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)).eval()


def encoder():
    torch.manual_seed(0)
    return torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()


def convolutions():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.SiLU(), torch.nn.AdaptiveAvgPool2d(1)
    ).eval()  # fmt: skip


_BY_NAME = """
import torch
module, x = torch.nn.Linear(8, 4).eval(), torch.ones(2, 8)
with torch.inference_mode():
    found = torch.compile(module, backend="optkit")(x)
    torch.testing.assert_close(found, module(x))
print(torch._dynamo.backends.registry.lookup_backend("optkit").__module__)
"""


def test_the_name_leads_to_the_backend(tmp_path):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    # What pip writes of it, whichever state the installation that runs the tests was made from.
    folder = tmp_path / "entries-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: entries\nVersion: 1\n")
    line = f"optkit = {declared['torch_dynamo_backends']['optkit']}"
    (folder / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{line}\n")
    command = [sys.executable, "-W", "ignore", "-c", _BY_NAME]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["optkit.torch.backend"]


@pytest.mark.parametrize(
    ("make", "shape"), [(network, (3, 16)), (encoder, (2, 5, 16)), (convolutions, (2, 3, 12, 12))]
)
def test_it_computes_what_eager_mode_does(make, shape):
    torch.backends.mha.set_fastpath_enabled(False)
    module, x = make(), random(*shape)
    torch.testing.assert_close(torch.compile(module, backend=backend)(x), module(x), rtol=1e-4, atol=1e-5)


def test_the_fast_path_of_encoders_is_refused_with_the_switch_that_turns_it_off():
    error = _failed(
        lambda: torch.compile(encoder(), backend=backend)(random(2, 5, 16)), "fast path for encoders"
    )
    assert "set_fastpath_enabled(False)" in error.hint


def test_one_artifact_serves_all_sizes_of_an_axis(tmp_path):
    module = network()
    fast = torch.compile(module, backend=backend, options={"out": tmp_path})
    for n in (3, 5, 7, 9):
        torch.testing.assert_close(fast(random(n, 16)), module(random(n, 16)))
    # One for the first size; one for all others, which torch then knows to change.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph0", "graph1"]


def test_a_weight_that_changes_afterwards_counts(tmp_path):
    module = network()
    fast = torch.compile(module, backend=backend, options={"out": tmp_path})
    before = fast(random(3, 16))
    module[0].weight.mul_(-2)
    after = fast(random(3, 16))
    torch.testing.assert_close(after, module(random(3, 16)))
    assert not torch.allclose(before, after) and len(list(tmp_path.iterdir())) == 2


def test_options_choose_the_recipe(tmp_path):
    module = wide()
    options = {"out": tmp_path, "recipe": "int8-dynamic", "overrides": ["limits.min_cosine=0.9"]}
    found = torch.compile(module, backend=backend, options=options)(random(8, 64))
    right = module(random(8, 64))
    assert not torch.equal(found, right)
    assert torch.nn.functional.cosine_similarity(found, right).min() > 0.99
    manifest = json.loads((tmp_path / "graph0" / "manifest.json").read_text())
    assert manifest["achieved"]["formats"].keys() == {"int8"}


def test_a_recipe_that_misses_its_limits_does_not_run():
    options = {"recipe": "int8-dynamic", "overrides": ["limits.min_cosine=0.9999999"]}
    fast = torch.compile(wide(), backend=backend, options=options)
    with pytest.raises(ModelError, match="misses its limits"):
        fast(random(8, 64))


class Several(torch.nn.Module):
    def forward(self, x, flag=None):
        y = torch.relu(x)
        return {"y": y, "again": y, "nothing": None, "x": x, "sum": (y.sum(0), x + 1)}


def test_outputs_come_as_the_module_gives_them():
    x = random(3, 4)
    found, right = torch.compile(Several(), backend=backend)(x), Several()(x)
    assert found.keys() == right.keys() and found["nothing"] is None
    torch.testing.assert_close(found, right)


def test_what_torch_cannot_capture_runs_around_it():
    def function(x):
        y = torch.tanh(x) * 2
        if float(y.sum()) > 1e9:
            return y
        return torch.sigmoid(y)

    torch.testing.assert_close(torch.compile(function, backend=backend)(random(4, 4)), function(random(4, 4)))


def test_integers_and_booleans_go_in_and_out():
    torch.manual_seed(0)
    table = torch.nn.Embedding(10, 4)
    ids, mask = torch.tensor([[1, 2], [3, 9]]), torch.tensor([[True, False], [True, True]])

    def function(ids, mask):
        found = table(ids) * mask[..., None]
        return found, found.argmax(-1), ~mask

    for a, b in zip(torch.compile(function, backend=backend)(ids, mask), function(ids, mask), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


# What is refused


def _failed(call, match):
    """What torch makes of an error of its backend."""
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=match) as caught:
        call()
    assert isinstance(caught.value.inner_exception, UsageError)
    return caught.value.inner_exception


def test_training_is_refused():
    with torch.enable_grad():
        error = _failed(
            lambda: torch.compile(network(), backend=backend)(random(3, 16)), "asked for gradients"
        )
    assert "inference_mode" in error.hint


def test_a_module_in_training_mode_that_changes_its_buffers_is_refused():
    module = network().train()
    before = module[1].running_mean.clone()
    with pytest.raises(ModelError, match="changes its inputs or buffers") as caught:
        torch.compile(module, backend=backend)(random(3, 16))
    assert "eval()" in caught.value.hint
    assert torch.equal(module[1].running_mean, before)


def test_a_module_that_draws_random_numbers_is_refused():
    module = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Dropout(0.5)).train()
    with pytest.raises(ModelError, match="random numbers"):
        torch.compile(module, backend=backend)(random(3, 16))


def test_a_function_that_changes_its_input_is_refused():
    x = random(3, 16)
    with pytest.raises(ModelError, match="changes its inputs"):
        torch.compile(lambda x: x.add_(1), backend=backend)(x)
    assert torch.equal(x, random(3, 16))


def test_sizes_that_are_worked_out_from_others_are_refused():
    def function(x, n):
        return x * n

    fast = torch.compile(function, backend=backend, dynamic=True)
    error = _failed(lambda: fast(random(3, 16), 7), "not an axis of an input|not a tensor")
    assert "dynamic=False" in error.hint
    torch._dynamo.reset()
    still = torch.compile(function, backend=backend, dynamic=False)
    torch.testing.assert_close(still(random(3, 16), 7), random(3, 16) * 7)


def test_other_devices_are_refused():
    x = torch.zeros(3, 16, device="meta")
    _failed(lambda: torch.compile(torch.relu, backend=backend)(x), "tensors are on meta")


def test_bfloat16_is_refused():
    _failed(lambda: torch.compile(torch.relu, backend=backend)(random(3, 16).bfloat16()), "are bfloat16")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "h100"}, "there is no h100 here"),
        ({"recipy": "int8"}, "unknown option 'recipy'"),
        ({"target": "h10"}, "unknown target 'h10'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    _failed(lambda: torch.compile(network(), backend=backend, options=options)(random(3, 16)), said)
