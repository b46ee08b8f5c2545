"""Ceilings, and the share of them that a latency reaches."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit import roofline
from optkit.backends.base import Executed
from optkit.backends.onnxruntime import OnnxRuntime
from optkit.probes import probes
from optkit.report import Ceilings
from optkit.roofline import against, ceilings, measure, moved, weights_read

MACHINE = Ceilings(
    operations={"fp32": 100e9, "int8": 400e9}, sources={"fp32": "a", "int8": "b"}, bytes=10e9, stretched=1.0, loaded=False
)  # fmt: skip


def _ran(fmt: str, macs: int) -> Executed:
    return Executed(name="n", op="Conv", where="cpu", format=fmt, macs=macs, seconds=1.0)


def test_operations_bound_a_run_of_many() -> None:
    # 2 x 50 M at 100 G/s is 1 ms; 2 x 400 M at 400 G/s is 2 ms; 1000 weights are nothing.
    found = against(
        [_ran("fp32", 50_000_000), _ran("int8", 400_000_000), _ran("int32", 0)], 1000, 0, 6e-3, MACHINE
    )
    assert found is not None
    assert (found.bound, found.floor_ms, found.share) == ("compute", pytest.approx(3.0), pytest.approx(0.5))


@pytest.mark.parametrize(("fmt", "milliseconds"), [("fp32", 4.1), ("int8", 1.1)])
def test_bytes_bound_a_run_that_reads_much(fmt: str, milliseconds: float) -> None:
    # 10 M weights at 4 or 1 byte, and 1 MB in and out, at 10 GB/s.
    found = against([_ran(fmt, 10_000_000)], 10_000_000, 1_000_000, 8.2e-3, MACHINE)
    assert found is not None
    assert found.bound == "memory"
    assert found.floor_ms == pytest.approx(milliseconds)


def test_what_caches_hold_is_read_faster_than_memory() -> None:
    machine = MACHINE.model_copy(update={"cached": {1_000_000: 40e9, 20_000_000: 20e9}})
    found = [against([], 0, size, 1.0, machine) for size in (1_000_000, 2_000_000, 20_000_001)]
    assert [f.floor_ms for f in found if f] == pytest.approx([0.025, 0.1, 2.0000001])


def test_arithmetic_without_a_ceiling_has_no_share() -> None:
    assert against([_ran("fp64", 10)], 0, 0, 1.0, MACHINE) is None


def test_a_run_without_products_is_bound_by_what_it_moves() -> None:
    found = against([], 0, 20_000_000, 4e-3, MACHINE)
    assert found is not None
    assert (found.bound, found.share) == ("memory", pytest.approx(0.5))


def test_weights_are_counted_once_and_tables_not_at_all() -> None:
    model = ir.from_onnx_text("""
    <ir_version: 10, opset_import: ["" : 21]>
    g (int64[2] i, float[2, 3] x) => (float[2, 3] y)
    <float[9, 3] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[3, 3] w = {0,0,0,0,0,0,0,0,0},
     int8[3, 3] q = {0,0,0,0,0,0,0,0,0}, float s = {1}, float[3] b = {0,0,0}> {
      e = Gather(table, i)
      p = MatMul(e, w)
      t = MatMul(p, w)
      d = DequantizeLinear(q, s)
      f = Transpose(d)
      u = Gemm(t, f, b)
      l = MatMul(u, x)
      y = Add(u, x)
    }
    """)
    assert weights_read(model) == 9 + 9 + 3


def test_bytes_are_those_of_what_goes_in_and_out() -> None:
    assert moved({"x": np.zeros(3, np.float32)}, {"y": np.zeros((2, 2), np.int64)}) == 12 + 32


@pytest.mark.parametrize("integer", [False, True])
def test_a_probe_multiplies_as_it_says(integer: bool) -> None:
    for probe in probes(integer=integer):
        run = OnnxRuntime().runner(probe.model, probe.feeds, "int8" if integer else "fp32")
        assert run is not None
        (y,) = run()
        graph = ir.from_proto(onnx.load_from_string(probe.model)).graph
        out, weight = y.size, graph.initializers["w"].const_value.size
        contracted = weight // graph.initializers["w"].shape[0 if probe.name == "Conv" else 1]
        assert probe.macs == out * contracted


def test_a_backend_has_no_runner_for_arithmetic_that_it_lacks() -> None:
    probe = probes(integer=False)[0]
    assert OnnxRuntime().runner(probe.model, probe.feeds, "bf16") is None


def test_the_machine_is_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(roofline, "_BUDGET", 0.0)
    found = ceilings("chip")
    assert set(found.operations) >= {"fp32", "int8"}
    assert all(rate > 1e8 for rate in found.operations.values())
    assert found.bytes > 1e8
    assert all(rate > 1e8 for rate in found.cached.values())
    (file,) = (tmp_path / "roofline").iterdir()
    monkeypatch.setattr(roofline, "measure", lambda: pytest.fail("measured again"))
    assert ceilings("chip") == found
    file.write_text("{}")
    monkeypatch.setattr(roofline, "measure", lambda: MACHINE)
    assert ceilings("chip") == MACHINE
    assert ceilings("another chip") == MACHINE
    assert len(list((tmp_path / "roofline").iterdir())) == 2


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(roofline, "measure", lambda: MACHINE)
    assert ceilings() == MACHINE


def test_measuring_takes_a_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_TRIED", {"fp32": ("onnxruntime",)})
    start = time.process_time()
    found = measure()
    assert time.process_time() - start < 5
    assert found.sources["fp32"].startswith("onnxruntime ")
    assert found.stretched > 0.5
