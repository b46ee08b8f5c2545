"""Writing: same model same bytes, one tensor in memory, and the old or the new on disk whatever happens."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from optkit import store
from optkit.errors import ModelError, OptkitError, UsageError
from optkit.frontend import load
from optkit.graph import digest, text
from optkit.store import detached, outline, replace_folder, save, temporary_folder


def _model(*weights: ir.TensorProtocol) -> ir.Model:
    """``y = x + w0 + w1 + ...``."""
    value = x = ir.val("x", ir.DataType.FLOAT, ["N", 64])
    initializers, nodes = [], []
    for index, tensor in enumerate(weights):
        w = ir.Value(
            name=f"w{index}",
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape),
            const_value=tensor,
        )
        initializers.append(w)
        node = ir.node("Add", [value, w], name=f"add{index}")
        value = node.outputs[0]
        value.name, value.type, value.shape = f"v{index}", x.type, x.shape
        nodes.append(node)
    graph = ir.Graph([x], [value], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def _weight(seed: int = 0, rows: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)


def _plain(count: int = 2) -> ir.Model:
    return _model(*(ir.tensor(_weight(i)) for i in range(count)))


def _lazy(array: np.ndarray, seen: list[int] | None = None) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        if seen is not None:
            seen.append(array.nbytes)
        return ir.tensor(array)

    return ir.LazyTensor(evaluate, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape), cache=False)


def _run(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros((64, 64), np.float32)})[0]


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights go to a second file."""
    monkeypatch.setattr(store, "_LARGEST_FILE", 1000)


def test_what_is_saved_is_what_was_there(tmp_path: Path):
    (path,) = save(_plain(), tmp_path / "m.onnx")
    onnx.checker.check_model(path, full_check=True)
    assert np.allclose(_run(path), _weight(0) + _weight(1))
    assert text(load(path)) == text(_plain())


def test_a_folder_gets_model_onnx(tmp_path: Path):
    assert save(_plain(), tmp_path / "a" / "b") == (tmp_path / "a" / "b" / "model.onnx",)


@pytest.mark.parametrize("limit", [1000, 1_500_000_000])
def test_the_same_model_gives_the_same_bytes(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "_LARGEST_FILE", limit)
    one, other = _plain(), _plain()
    one.metadata_props.update({"a": "1", "b": "2"})
    other.metadata_props.update({"b": "2", "a": "1"})
    a, b = save(one, tmp_path / "a"), save(other, tmp_path / "b")
    assert [digest(p) for p in a] == [digest(p) for p in b]
    # Loading adds shapes; from then on nothing changes.
    c = save(load(a[0]), tmp_path / "c")
    d = save(load(c[0]), tmp_path / "d")
    assert [digest(p) for p in c] == [digest(p) for p in d]
    assert [p.name for p in a] == ["model.onnx", "model.onnx.data"][: len(a)]


def test_saving_leaves_the_model_as_it_is(tmp_path: Path):
    model = _plain()
    tensors = [v.const_value for v in model.graph.initializers.values()]
    save(model, tmp_path)
    assert [v.const_value for v in model.graph.initializers.values()] == tensors


def test_lazy_tensors_are_evaluated_once_each(tmp_path: Path):
    seen: list[int] = []
    (path,) = save(_model(_lazy(_weight(0), seen), _lazy(_weight(1), seen)), tmp_path)
    assert len(seen) == 2
    assert np.allclose(_run(path), _weight(0) + _weight(1))


def test_only_one_tensor_is_in_memory_at_a_time(tmp_path: Path):
    import tracemalloc

    arrays = [_weight(i, rows=8192) for i in range(2)]  # 2 MiB each, counted before
    tracemalloc.start()
    save(_model(*(_lazy_copy(arrays[i % 2]) for i in range(20))), tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One evaluated tensor, and the next while the last is still bound; 20 would be 40 MiB.
    assert peak < 3 * arrays[0].nbytes


def _lazy_copy(array: np.ndarray) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.tensor(array.copy()), dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape), cache=False
    )


def test_packed_and_lazy_four_bit_weights_have_the_bytes_of_their_type(tmp_path: Path):
    values = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(ir.DataType.INT4.numpy())
    tensor = ir.tensor(values, dtype=ir.DataType.INT4)
    lazy = ir.LazyTensor(lambda: tensor, dtype=ir.DataType.INT4, shape=tensor.shape, cache=False)
    model = _plain(1)
    for name, t in (("a", tensor), ("b", lazy)):
        model.graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(t.dtype), shape=tensor.shape, const_value=t)
        )
    (path,) = save(model, tmp_path)
    found = load(path).graph.initializers
    assert found["a"].const_value.tobytes() == found["b"].const_value.tobytes() == tensor.tobytes()  # type: ignore[union-attr]


def test_a_tensor_that_is_not_what_it_says_is_an_error_and_leaves_no_file(tmp_path: Path):
    lazy = ir.LazyTensor(
        lambda: ir.tensor(_weight()), dtype=ir.DataType.FLOAT, shape=ir.Shape([3, 64]), cache=False
    )
    with pytest.raises(ModelError, match="has 16384 bytes instead of the 768"):
        save(_model(lazy), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small_limit")
def test_large_models_have_their_weights_in_a_second_file(tmp_path: Path):
    files = save(_plain(), tmp_path)
    assert [p.name for p in files] == ["model.onnx", "model.onnx.data"]
    assert np.allclose(_run(files[0]), _weight(0) + _weight(1))
    assert files[0].stat().st_size < 1000


@pytest.mark.usefixtures("small_limit")
def test_a_model_can_be_saved_over_the_files_it_is_mapped_from(tmp_path: Path):
    first = save(_plain(), tmp_path)
    expected = _run(first[0])
    for _ in range(3):
        model = load(first[0])
        model.graph.initializers["w0"].const_value = _lazy(_weight(0))
        files = save(model, tmp_path)
        assert np.array_equal(_run(files[0]), expected)
    # The data of the model before is gone; exactly what the file names is there.
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("small_limit")
def test_a_save_that_is_stopped_between_its_two_files_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, _ = save(_plain(), tmp_path)
    expected, calls = _run(path), []

    def stop(source: object, target: object) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        os.rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(_model(ir.tensor(_weight(5))), tmp_path)
    assert np.array_equal(_run(path), expected)


def _fails_like(tmp_path: Path) -> None:
    before = {p.name: digest(p) for p in tmp_path.iterdir()}
    with pytest.raises(OptkitError, match="cannot write") as caught:
        save(_model(*(ir.tensor(_weight(9, rows=512)) for _ in range(4))), tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "are needed" in str(caught.value.hint)
    assert {p.name: digest(p) for p in tmp_path.iterdir()} == before


def test_a_file_that_grows_too_large_leaves_the_old_one_and_says_so(tmp_path: Path):
    save(_plain(), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        _fails_like(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        save(_plain(1), disk)
        _fails_like(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptkitError, match="cannot write"):
        save(_plain(), tmp_path / "file" / "m.onnx")


def test_detached_weights_go_to_onnx_runtime_without_a_copy():
    content, weights = detached(_plain())
    assert len(content) < 1000
    options = onnxruntime.SessionOptions()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(t.numpy()) for t in weights.values()]
    options.add_external_initializers(list(weights), values)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.zeros((64, 64), np.float32)})[0]
    assert np.allclose(found, _weight(0) + _weight(1))


def test_an_outline_has_types_and_shapes_of_weights_alone():
    proto = outline(_plain())
    assert len(proto.SerializeToString()) < 1000
    assert not proto.graph.initializer
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    assert {i.name for i in inferred.graph.value_info} >= {"w0", "w1", "v0"}


# -- folders


def _fill(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(content)
    return folder


def _content(folder: Path) -> tuple[str, str]:
    return (folder / "manifest.json").read_text(), (folder / "sub" / "file").read_text()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_put_in_place_and_replaced_whole(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not exchange:
        monkeypatch.setattr(store, "_exchange", lambda a, b: False)
    final = tmp_path / "parent" / "build"
    for content in ("one", "two", "three"):
        with temporary_folder(final) as folder:
            assert folder.parent == final.parent
            replace_folder(_fill(folder / "new", content), final)
        assert _content(final) == (content, content)
        assert [p.name for p in final.parent.iterdir()] == ["build"]


def test_without_replacing_nothing_stays(tmp_path: Path):
    with temporary_folder(tmp_path / "build") as folder:
        _fill(folder / "new", "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", ["file", "foreign"])
def test_what_is_not_an_artifact_is_never_overwritten(make: str, tmp_path: Path):
    final = tmp_path / "mine"
    if make == "file":
        final.write_text("precious")
    else:
        final.mkdir()
        (final / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match=r"is a file|holds other things"), temporary_folder(final):
        pass
    with pytest.raises(UsageError):
        replace_folder(_fill(tmp_path / "new", "x"), final)
    assert "precious" in (final if make == "file" else final / "thesis.tex").read_text()


def test_an_empty_folder_can_be_filled_and_a_link_is_followed(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with temporary_folder(tmp_path / "link") as folder:
        replace_folder(_fill(folder / "new", "x"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "empty") == ("x", "x")


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path):
    dead, alive = tmp_path / ".build.tmp-1-0", tmp_path / ".build.tmp-2-0"
    dead.mkdir()
    alive.mkdir()
    (dead / "junk").write_text("x")
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with temporary_folder(tmp_path / "build"):
            assert not dead.exists()
            assert alive.exists()
    finally:
        os.close(handle)


def test_a_folder_that_was_put_aside_is_put_back(tmp_path: Path):
    _fill(tmp_path / ".build.old", "old")
    with temporary_folder(tmp_path / "build"):
        assert _content(tmp_path / "build") == ("old", "old")


_ENDLESS = """
import sys
from pathlib import Path
from optkit.store import replace_folder, temporary_folder
final, n = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    n += 1
    with temporary_folder(final) as folder:
        new = folder / "new"
        new.mkdir()
        (new / "sub").mkdir()
        (new / "manifest.json").write_text(str(n))
        (new / "sub" / "file").write_text(str(n))
        replace_folder(new, final)
"""


def test_a_process_killed_at_any_moment_leaves_a_whole_folder(tmp_path: Path):
    final = tmp_path / "build"
    with temporary_folder(final) as folder:
        replace_folder(_fill(folder / "new", "0"), final)
    probe = tmp_path / "probe"
    shutil.copytree(final, probe)
    if not store._exchange(final, probe):
        pytest.skip("this file system cannot exchange two folders in one step")
    shutil.rmtree(probe)
    random = np.random.default_rng(0)
    for _ in range(6):
        command = [sys.executable, "-c", _ENDLESS, str(final)]
        path = os.pathsep.join(p for p in sys.path if p)
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(float(random.uniform(0.005, 0.05)))
        child.kill()
        child.wait()
        child.stdout.close()
        manifest, file = _content(final)
        assert manifest == file
    with temporary_folder(final):
        assert len(list(tmp_path.iterdir())) == 2
