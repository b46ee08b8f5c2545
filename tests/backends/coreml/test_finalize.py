"""``optkit finalize`` for Core ML, on a Mac that pretends: its half of coremltools answers as its sources say, from the reference evaluator.

Whether a real Mac answers so was never tried.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import optkit
from optkit.cli import main
from optkit.errors import BackendUnavailableError, ModelError, UsageError
from optkit.finish import finalize
from optkit.testing import parse

pytestmark = pytest.mark.needs("coremltools")

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
LINEAR = HEAD + "g (float[n, 8] x) => (float[n, 4] y) { h = MatMul(x, w) y = Relu(h) }"


@pytest.fixture(scope="module", params=["mac-m4"])
def compiled(request, tmp_path_factory) -> Path:
    return _compiled(tmp_path_factory.mktemp("compiled") / "out", request.param)


def _compiled(out: Path, where: str, **options) -> Path:
    weight = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    overrides = [f"options.{name}={value}" for name, value in options.items()]
    recipe = "coreml-fp16"
    optkit.compile(parse(LINEAR, w=weight), target=where, recipe=recipe, overrides=overrides, out=out)
    return out


@pytest.fixture
def artifact(compiled, tmp_path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "artifact"))


class Mac:
    """The classes of coremltools that need macOS, and the machine.

    Attributes:
        chip: As sysctl names it.
        loads: Packages that were loaded.
        predictions: Calls of predict.
        factor: What every output comes out as.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from optkit.backends.coreml import finalize as steps
        from optkit.backends.coreml.quiet import ct

        self.chip, self.loads, self.predictions, self.factor = "Apple M4 Pro", 0, 0, 1.0
        self.given: list[dict] = []
        mac = self

        class Model:
            def __init__(self, path: str, compute_units) -> None:
                from optkit.backends.coreml.reference.machine import Machine
                from optkit.backends.coreml.reference.program import Package

                mac.loads += 1
                self._path, self._machine = path, Machine(Package(Path(path)).functions["main"])
                assert compute_units in ct.ComputeUnit

            def get_compiled_model_path(self) -> str:
                return self._path

            def make_state(self):
                self._machine.reset()
                return State(self._machine.state)

            def predict(self, data, state=None):
                mac.predictions += 1
                mac.given.append(dict(data))
                arrays = {k: v if isinstance(v, np.ndarray) else _pixels(v) for k, v in data.items()}
                return {k: v * mac.factor for k, v in self._machine.run(arrays).items()}

        monkeypatch.setattr("platform.system", lambda: "Darwin")
        monkeypatch.setattr("platform.mac_ver", lambda: ("26.0", ("", "", ""), "arm64"))
        monkeypatch.setattr(ct.models, "MLModel", Model)
        monkeypatch.setattr(ct.models.compute_plan, "MLComputePlan", _plan(ct.models))
        monkeypatch.setattr(steps, "_RUNS", 5)
        monkeypatch.setattr(
            steps.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, f"{mac.chip}\n", "")
        )


class State:
    """As coremltools' MLState."""

    def __init__(self, held: dict[str, np.ndarray]) -> None:
        self._held = held

    def read_state(self, name: str) -> np.ndarray:
        return self._held[name].copy()

    def write_state(self, name: str, value: np.ndarray) -> None:
        assert self._held[name].shape == value.shape and value.dtype == np.float16
        self._held[name] = value


def _pixels(picture) -> np.ndarray:
    array = np.asarray(picture, np.float32)
    return array[None, None] if array.ndim == 2 else array.transpose(2, 0, 1)[None]


def _plan(models) -> type:
    """Convolutions, products and what follows them on the Neural Engine, casts on the processor."""
    plan, devices = models.compute_plan, models.compute_device
    engine, processor = (
        object.__new__(k) for k in (devices.MLNeuralEngineComputeDevice, devices.MLCPUComputeDevice)
    )

    class Plan:
        def __init__(self, path: str) -> None:
            from optkit.backends.coreml.reference.program import Package

            block = Package(Path(path)).functions["main"].block
            operations = [
                plan.MLModelStructureProgramOperation(
                    inputs={}, operator_name=f"ios18.{o.kind}", blocks=[], __proxy__=None,
                    outputs=[plan.MLModelStructureProgramNamedValueType(name=v.name, type=plan.MLModelStructureProgramValueType()) for v in o.outputs],
                )
                for o in block.operations
            ]  # fmt: skip
            function = plan.MLModelStructureProgramFunction(
                inputs=[], block=plan.MLModelStructureProgramBlock(inputs=[], operations=operations, output_names=[])
            )  # fmt: skip
            program = plan.MLModelStructureProgram(functions={"main": function})
            self.model_structure = plan.MLModelStructure(neuralnetwork=None, program=program, pipeline=None)

        @classmethod
        def load_from_path(cls, path: str, compute_units):
            return cls(path)

        def get_compute_device_usage_for_mlprogram_operation(self, operation):
            kind = operation.operator_name.partition(".")[2]
            if kind == "const":
                return None
            where = [processor] if kind == "cast" else [engine, processor]
            return plan.MLComputePlanDeviceUsage(
                preferred_compute_device=where[0], supported_compute_devices=where
            )

        def get_estimated_cost_for_mlprogram_operation(self, operation):
            return plan.MLComputePlanCost(weight=0.25)

    return Plan


@pytest.fixture
def mac(monkeypatch) -> Mac:
    return Mac(monkeypatch)


def test_each_step_is_done_once_and_written_down(artifact, mac):
    found = finalize(artifact)
    manifest = json.loads((artifact / "manifest.json").read_text())
    evidence = manifest["evidence"]
    assert evidence["compiled"] and evidence["ran_on_device"] and evidence["timed_on_device"]
    assert not evidence["proxy_compiled"]
    assert [step.partition(":")[0] for step in manifest["deferred"]] == ["accuracy of Core ML itself"]
    assert found.device == {
        "device": "Apple M4 Pro",
        "macos": "26.0",
        "coremltools": found.device["coremltools"],
    }
    assert found.cosine == pytest.approx(1) and found.batches[0]["runs"] == 5
    assert found.batches[0]["inputs"] == {"x": [1, 8]}
    calls = mac.predictions
    assert finalize(artifact).batches == found.batches
    assert mac.predictions == calls
    finalize(artifact, force=True)
    assert mac.predictions == 2 * calls


def test_the_plan_is_written_beside_what_was_predicted(artifact, mac):
    finalize(artifact)
    plan = json.loads((artifact / "plan.json").read_text())["found"]
    rows = {row["op"]: row for row in plan["operations"]}
    assert plan["preferred"] == {"CPU": 2, "Neural Engine": 2}
    assert rows["ios18.linear"]["preferred"] == "Neural Engine" and rows["ios18.linear"]["cost"] == 0.25
    # A range runs on the Neural Engine at its default size; casts from float32 were not predicted there.
    assert rows["ios18.linear"]["predicted"] == ["Neural Engine", "GPU", "CPU"]
    assert rows["ios18.cast"]["predicted"] == ["GPU", "CPU"]
    assert plan["predictions"] == plan["held"] == 4


def test_a_package_for_a_phone_is_compiled_and_compared_by_a_mac_and_not_timed_as_the_phone(tmp_path, mac):
    out = _compiled(tmp_path / "out", "iphone15")
    found = finalize(out)
    manifest = json.loads((out / "manifest.json").read_text())
    evidence = manifest["evidence"]
    assert evidence["proxy_compiled"] and not evidence["compiled"]
    assert not evidence["ran_on_device"] and not evidence["timed_on_device"]
    assert len(found.left) == 2 and "on iphone15" in found.left[1]
    assert manifest["deferred"] == list(found.left)


def test_other_numbers_are_refused_with_the_output_and_not_called_a_run(artifact, mac):
    mac.factor = -1.0
    with pytest.raises(ModelError, match=r"output 'y' of batch 0\.0 has cosine -1\.00000"):
        finalize(artifact)
    evidence = json.loads((artifact / "manifest.json").read_text())["evidence"]
    assert evidence["compiled"] and not evidence["ran_on_device"]


def test_records_of_another_mac_are_not_taken(artifact, mac):
    finalize(artifact)
    calls = mac.predictions
    mac.chip = "Apple M4 Max"
    assert finalize(artifact).device["device"] == "Apple M4 Max"
    assert mac.predictions == 2 * calls


def test_a_package_for_another_mac_is_refused(artifact, mac):
    mac.chip = "Apple M1"
    with pytest.raises(UsageError, match=r"for mac-m4 \(M4\), this Mac has Apple M1"):
        finalize(artifact)
    assert mac.loads == 0


@pytest.mark.parametrize(
    ("name", "chip", "device"),
    [
        ("mac-m4", "Apple M4", True),
        ("mac-m4", "Apple M4 Max", True),
        ("mac-m1", "Apple M4", False),
        ("ipad-m4", "Apple M4", False),
        ("apple-ane", "Apple M2", True),
        ("apple-ane", "Intel(R) Core(TM) i7", False),
    ],
)
def test_which_macs_are_the_device_of_a_target(name, chip, device):
    from optkit.backends.coreml.finalize import is_device
    from optkit.targets import target

    assert is_device(target(name), chip) is device


def test_each_listed_size_is_compared_and_timed(tmp_path, mac):
    found = finalize(_compiled(tmp_path / "out", "mac-m4", shapes="{n: [2, 5]}"))
    assert [b["inputs"]["x"] for b in found.batches] == [[2, 8], [5, 8]]


def test_a_state_is_kept_over_steps_in_a_row_and_compared_at_each(tmp_path, mac):
    text = (
        HEAD
        + "g (float[2, 8] x, float[2, 8] k) => (float[2, 8] y, float[2, 8] l) { l = Add(x, k) y = Relu(l) }"
    )
    overrides = ["options.states={k: l}"]
    optkit.compile(
        parse(text), target="mac-m4", recipe="coreml-fp32", overrides=overrides, out=tmp_path / "out"
    )
    finalize(tmp_path / "out")
    compared = json.loads((tmp_path / "out" / "verified.json").read_text())["found"]["outputs"]
    assert [o["batch"] for o in compared] == ["0.0", "0.1", "0.2", "0.3"]


@pytest.mark.needs("PIL")
@pytest.mark.parametrize(("color", "channels"), [("RGB", 3), ("BGR", 3), ("G", 1)])
def test_pictures_are_handed_over_as_pictures_red_first(color, channels, tmp_path, mac):
    text = HEAD + "g (float[1, %d, 6, 5] x) => (float[1, %d, 6, 5] y) { y = Relu(x) }"
    picture = {"scale": 0.5, "bias": [-1.0] * channels, "color": color}
    optkit.compile(
        parse(text % (channels, channels)), target="mac-m4", recipe="coreml-fp32",
        overrides=[f"options.pictures={json.dumps({'x': picture})}"], out=tmp_path / "out",
    )  # fmt: skip
    from optkit.backends.coreml.session import MacSession

    with MacSession(tmp_path / "out", "ALL") as session:
        pixels = np.arange(channels * 30, dtype=np.float32).reshape(1, channels, 6, 5)
        session.run({"x": pixels * np.float32(0.5) - 1})
    (given,) = mac.given[-1].values()
    red_first = pixels[:, ::-1] if color == "BGR" else pixels
    assert given.mode == ("L" if color == "G" else "RGB") and given.size == (5, 6)
    np.testing.assert_array_equal(_pixels(given), red_first)


def test_elsewhere_it_says_that_a_mac_is_needed(artifact, monkeypatch, capsys):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(BackendUnavailableError, match="Core ML runs only on Macs, this is Linux"):
        finalize(artifact)
    assert main(["finalize", str(artifact)]) == 4
    assert "copy the artifact's folder to a Mac" in capsys.readouterr().err


def test_the_command_says_what_was_measured_and_what_is_left(artifact, mac, capsys):
    assert main(["finalize", str(artifact)]) == 0
    said = capsys.readouterr()
    assert "measured on Apple M4 Pro, macOS 26.0" in said.err
    assert "still to be done: accuracy of Core ML itself" in said.err
    assert said.out.strip() == str(artifact)
    assert json.loads((artifact / "device.json").read_text())["device"]["macos"] == "26.0"


def test_what_stands_in_has_what_the_real_interface_has():
    """The names that are used exist in the installed coremltools, whose classes refuse to be made on Linux."""
    import inspect

    from optkit.backends.coreml.quiet import ct

    plan = ct.models.compute_plan.MLComputePlan
    assert list(inspect.signature(plan.load_from_path).parameters) == ["path", "compute_units"]
    for name in (
        "get_compute_device_usage_for_mlprogram_operation",
        "get_estimated_cost_for_mlprogram_operation",
        "model_structure",
    ):
        assert hasattr(plan, name)
    model = ct.models.MLModel
    assert {"compute_units"} <= inspect.signature(model.__init__).parameters.keys()
    assert list(inspect.signature(model.predict).parameters) == ["self", "data", "state"]
    assert hasattr(model, "get_compiled_model_path") and hasattr(model, "make_state")
    assert SimpleNamespace(**{u.name: u for u in ct.ComputeUnit}).CPU_AND_NE
