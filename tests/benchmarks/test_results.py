"""What the harnesses write down."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from optkit.benchmarks import goals
from optkit.benchmarks.machine import processor, versions
from optkit.benchmarks.results import CpuResult, Machine, ModelResult, Row, Versus, markdown, read, write


def _result(speedup: float, *, models: tuple[str, ...] = ("a",), version: str = "1") -> CpuResult:
    machine = Machine(
        processor={"name": "chip", "flags": ["avx2"], "architecture": "x"}, versions={"optkit": version}
    )
    reference = Row(
        name="ORT fp32", bytes=2_000_000, note="", make_seconds=0, error=None, cpu_ms=3, metric=0.5, n=9
    )
    row = Row(
        name="optkit",
        bytes=1_000_000,
        note="",
        make_seconds=1,
        error=None,
        cpu_ms=1.5,
        p99_ms=2,
        speedup=speedup,
        speedup_ci95=(1.9, 2.1),
        metric=0.49,
        drop=0.01,
        drop_ci95=(-0.01, 0.02),
        n=9,
        verdict="inconclusive",
        roofline=0.62,
        formats={"int8": 1.0},
    )
    failed = Row(name="peer", bytes=None, note="", make_seconds=0.1, error="ValueError: no | shape")
    kept = {
        "kind": "test",
        "requirement": "x==1",
        "accurate": True,
        "metric": "accuracy",
        "calibration": 4,
        "rounds": 9,
        "versus": (
            Versus(
                ours="optkit",
                peer="NNCF, hint f32",
                ratio=1.2,
                ci95=(1.1, 1.3),
                drop=-0.0025,
                drop_ci95=(-0.015, 0.01),
            ),
        ),
    }
    return CpuResult(
        machine=machine,
        models=tuple(ModelResult(name=name, rows=(reference, row, failed), **kept) for name in models),
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    result = _result(2.0)
    write(result, tmp_path)
    assert read(tmp_path / "cpu.json") == result


def test_the_page_shows_speed_metric_and_failure() -> None:
    page = markdown(_result(2.0))
    assert "| ORT fp32 | 3.00 | 1 | 0.5000 | - | - | - | 2.00 |  |" in page
    assert (
        "| optkit | 1.50 | 2.00 [1.90, 2.10] | 0.4900 | +0.0100 [-0.0100, +0.0200] | inconclusive | 62 % | 1.00 |  |"
        in page
    )
    assert "| peer | - | - | - | - | - | - | - | failed: ValueError: no / shape |" in page
    against = "\n\n* optkit over NNCF, hint f32: 1.20 [1.10, 1.30], of the metric it loses -0.0025 [-0.0150, +0.0100] to that\n"
    assert page.endswith(against)


def test_the_table_of_goals_says_what_is_reached_and_what_is_not() -> None:
    models = _result(2.0, models=("other", "mobilenetv2_shaped")).models
    first, second = goals.table(models).splitlines()[2:]
    assert first.startswith(
        "| mobilenetv2_shaped | 2.00x [1.90, 2.10] (goal 2.9) | 1.20x [1.10, 1.30] (goal 1.5), NNCF, hint f32 | - | "
    )
    assert "of accuracy, n = 9: inconclusive | -0.0025 [-0.0150, +0.0100] | 62 % |" in first
    assert first.endswith("| ORT fp32, peer, accuracy (inconclusive) |")
    assert second.startswith("| other | 2.00x [1.90, 2.10] (goal 1) |")
    assert second.endswith("| accuracy (inconclusive) |")


@pytest.mark.parametrize(("ratio", "missed"), [(1.0, []), (0.985, []), (0.97, ["peer"])])
def test_a_goal_is_reached_up_to_what_two_sessions_differ_by(ratio: float, missed: list[str]) -> None:
    (model,) = _result(2.0).models
    row = model.rows[1].model_copy(update={"verdict": "met"})
    versus = (model.versus[0].model_copy(update={"ratio": ratio}),)
    model = model.model_copy(update={"rows": (model.rows[0], row), "versus": versus})
    assert goals.short(model) == missed


@pytest.mark.parametrize(
    ("interval", "missed"),
    [
        ((0.001, 0.004), ["the peer's metric, by 0.0025"]),
        ((0.0, 0.005), ["the peer's metric, by 0.0025 (undecided)"]),
        ((-0.01, 0.015), ["the peer's metric, by 0.0025 (undecided)"]),
        (None, ["the peer's metric (not compared)"]),
    ],
)
def test_a_metric_below_the_best_stock_peers_is_a_goal_missed(
    interval: tuple[float, float] | None, missed: list[str]
) -> None:
    (model,) = _result(2.0).models
    row = model.rows[1].model_copy(update={"verdict": "met"})
    versus = (model.versus[0].model_copy(update={"drop": 0.0025, "drop_ci95": interval}),)
    model = model.model_copy(update={"rows": (model.rows[0], row), "versus": versus})
    assert goals.short(model) == missed


def test_what_is_lost_to_a_peer_is_of_the_samples_that_both_saw() -> None:
    from optkit.benchmarks.cpu import _versus
    from optkit.evaluate import Evaluator

    evaluator = Evaluator(samples=list, score=lambda outputs, label: 0.0, metric="accuracy")
    rows = [
        Row(name=name, bytes=1, note="", make_seconds=0, error=None, cpu_ms=cpu_ms, verdict="met")
        for name, cpu_ms in (("ORT fp32", 4.0), ("optkit", 1.0), ("peer", 2.0))
    ]
    times = {row.name: np.full((4, 2), row.cpu_ms) for row in rows}
    scores = {"ORT fp32": [1.0] * 6, "optkit": [0.5, 0.75, 1.0, 1.0, 0.0, 0.0], "peer": [1.0] * 4}
    (found,) = _versus(rows, times, np.arange(4), evaluator, scores)
    assert (found.ours, found.peer, found.ratio) == ("optkit", "peer", 2.0)
    # Student's t of 0.5, 0.25, 0, 0: mean 0.1875, deviation 0.2394, 3 degrees of freedom.
    assert found.drop == pytest.approx(0.1875)
    assert found.drop_ci95 == pytest.approx(
        (0.1875 - 3.182 * 0.2394 / 2, 0.1875 + 3.182 * 0.2394 / 2), rel=0.02
    )
    (unknown,) = _versus(rows, times, np.arange(4), evaluator, {"optkit": [1.0]})
    assert unknown.drop is None


def test_a_model_that_optkit_failed_on_is_a_row_too() -> None:
    (model,) = _result(2.0).models
    failed = Row(name="optkit", bytes=None, note="", make_seconds=0, error="no | way")
    model = model.model_copy(update={"rows": (model.rows[0], failed)})
    assert goals.table([model]).splitlines()[2].endswith("| failed: no / way |")


def test_a_new_run_replaces_its_models_and_keeps_the_rest() -> None:
    older, newer = _result(2.0, models=("a", "b")), _result(3.0, models=("b", "c"))
    merged = newer.merged_into(older)
    assert [(m.name, m.rows[1].speedup) for m in merged.models] == [("a", 2.0), ("b", 3.0), ("c", 3.0)]


def test_a_run_that_was_held_to_one_core_keeps_the_rows_of_others() -> None:
    older, newer = _result(2.0, models=("a",)), _result(3.0, models=("b",))
    held = newer.machine.model_copy(update={"processor": {**newer.machine.processor, "cores": 1}})
    merged = newer.model_copy(update={"machine": held}).merged_into(older)
    assert [m.name for m in merged.models] == ["a", "b"]
    other = newer.machine.model_copy(update={"processor": {**newer.machine.processor, "name": "another"}})
    found = newer.model_copy(update={"machine": other}).merged_into(older)
    assert [m.name for m in found.models] == ["b"]


def test_results_of_other_versions_are_not_mixed() -> None:
    older, newer = _result(2.0, models=("a",)), _result(3.0, models=("b",), version="2")
    assert newer.merged_into(older) == newer


def test_a_machine_is_described_without_naming_it() -> None:
    import socket

    shown = f"{processor()} {versions()}"
    assert processor()["name"]
    assert "onnxruntime" in versions()
    assert socket.gethostname() not in shown
    assert "/" not in versions()["python"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_an_array_that_came_and_went() -> None:
    from optkit.benchmarks.memory import Peak

    size = 64 << 20
    with Peak(interval=0.001) as peak:
        before = peak.anonymous
        x = np.ones(size // 8)
        for _ in range(20):
            x += 1
        del x
    assert peak.anonymous - before > 0.9 * size


def test_a_large_model_is_made_in_pieces_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    from optkit.benchmarks import large

    monkeypatch.setattr(large, "_WIDTH", 32)
    monkeypatch.setattr(large, "_INNER", 64)
    monkeypatch.setattr(large, "_PIECE", 1000)  # not a divisor: the last piece is shorter
    path = large.make(tmp_path, size=2 * 2 * 32 * 64 * 4 / 1e9)
    assert (tmp_path / "model.onnx.data").stat().st_size == 2 * 2 * 32 * 64 * 4
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones((3, 32), np.float32)})
    assert y.shape == (3, 32)
    assert np.isfinite(y).all()
    assert y.std() == pytest.approx(1, abs=0.2)  # the last layer normalisation
