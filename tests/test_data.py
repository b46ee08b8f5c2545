"""Calibration data: the same every time, one batch at a time, and checked against the model."""

from __future__ import annotations

import contextlib
import logging
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.data import (
    CalibrationData,
    Feeds,
    TensorSpec,
    draw,
    load_function,
    specs,
    spelled,
    trial_sizes,
    validate,
)
from optkit.errors import DataError
from optkit.reference import ReferenceSession
from optkit.testing import parse

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 3] image, int64[N] label) => (float[N, 3] y) { y = Identity(image) }
"""


def _model(source: str = MODEL) -> ir.Model:
    return ir.from_onnx_text(source)


def _batch(i: int, n: int = 2) -> Feeds:
    return {"image": np.full((n, 3), i, np.float32), "label": np.full(n, i)}


def _read(data: CalibrationData) -> None:
    """One pass; ``list`` would make two, the first to ask for the length."""
    for _ in data:
        pass


def _marks(data: CalibrationData) -> list[int]:
    return [int(feeds["label"][0]) for feeds in data]


def _folder(path: Path, n: int = 5) -> Path:
    path.mkdir()
    for i in range(n):
        np.savez(path / f"{i:02}.npz", **_batch(i))
    return path


def _script(path: Path, body: str) -> str:
    path.write_text(f"import numpy as np\n{body}\n")
    return f"{path}:batches"


GOOD = """
def batches():
    for i in range(4):
        yield {"image": np.full((2, 3), i, np.float32), "label": np.full(2, i)}
"""


# -- specs


def test_specs_tell_names_types_and_shapes():
    inputs, outputs = specs(_model())
    assert [str(s) for s in (*inputs, *outputs)] == [
        "image: float32[N, 3]",
        "label: int64[N]",
        "y: float32[N, 3]",
    ]
    assert inputs[0] == TensorSpec(name="image", dtype=np.dtype(np.float32), shape=("N", 3))


# -- where batches come from


def test_a_folder_is_one_batch_a_file_in_the_order_of_names(tmp_path: Path):
    data = CalibrationData.load(_folder(tmp_path / "calib"), _model())
    assert _marks(data) == _marks(data) == [0, 1, 2, 3, 4]
    assert len(data) == 5
    assert (data.name, data.random) == ("calib", False)


def test_one_file_holds_samples_and_is_cut_into_batches_of_one(tmp_path: Path):
    np.savez(tmp_path / "c.npz", image=np.zeros((7, 3), np.float32), label=np.arange(7))
    data = CalibrationData.load(tmp_path / "c.npz", _model())
    assert _marks(data) == list(range(7))
    assert len(data) == 7


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_file_is_cut_into_batches_of_the_models_size(
    save, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    save(
        tmp_path / "c.npz",
        image=np.asfortranarray(np.arange(21, dtype=np.float32).reshape(7, 3)),
        label=np.arange(7),
    )
    with caplog.at_level(logging.WARNING):
        data = CalibrationData.load(tmp_path / "c.npz", _model(MODEL.replace("[N", "[2")))
    assert "the last 1 of 7 samples" in caplog.text
    assert [f["label"].tolist() for f in data] == [[0, 1], [2, 3], [4, 5]]
    assert next(iter(data))["image"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_one_file_whose_arrays_are_not_samples_says_what_to_do(tmp_path: Path):
    np.savez(tmp_path / "c.npz", image=np.zeros((7, 3), np.float32), label=np.arange(6))
    with pytest.raises(DataError, match="first axis counts samples") as caught:
        CalibrationData.load(tmp_path / "c.npz", _model())
    assert "put the file in a folder" in str(caught.value.hint)


def test_a_file_is_read_a_batch_at_a_time(tmp_path: Path):
    np.savez(tmp_path / "c.npz", image=np.zeros((200_000, 3), np.float32), label=np.arange(200_000))
    data = CalibrationData.load(tmp_path / "c.npz", _model())
    tracemalloc.start()
    for _ in zip(data, range(100), strict=False):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000  # the file has 4 MB


def test_a_function_is_called_anew_for_each_pass(tmp_path: Path):
    data = CalibrationData.load(_script(tmp_path / "calib.py", GOOD), _model())
    assert _marks(data) == _marks(data) == [0, 1, 2, 3]
    assert len(data) == 4
    assert data.name == "calib.py:batches"


def test_a_function_can_use_modules_beside_its_file(tmp_path: Path):
    (tmp_path / "beside_it.py").write_text("N = 3")
    reference = _script(tmp_path / "c.py", "def batches():\n    from beside_it import N\n    yield {'n': N}")
    assert len(list(CalibrationData.load(reference))) == 1


def test_lists_and_functions_in_memory_are_data_too():
    assert _marks(CalibrationData([_batch(0), _batch(1)])) == [0, 1]
    assert _marks(CalibrationData(lambda: (_batch(i) for i in range(3)))) == [0, 1, 2]


def test_a_generator_is_refused_because_it_runs_once():
    with pytest.raises(DataError, match="can be read only once") as caught:
        CalibrationData(_batch(i) for i in range(3))
    assert "the function that makes the generator" in str(caught.value.hint)


@pytest.mark.parametrize("thing", [{"x": 1}, "calib", 3, None])
def test_what_is_no_series_of_batches_is_refused(thing: object):
    with pytest.raises(DataError, match="is not a series of batches"):
        CalibrationData(thing)  # type: ignore[arg-type]


def test_random_data_must_be_asked_for_and_is_marked():
    data = CalibrationData.load("random", _model(), seed=3)
    assert data.random
    assert data.limit(2).random
    assert data.check(_model()).split()[0].random
    assert data.digest() == CalibrationData.load("random", _model(), seed=3).digest()
    assert data.digest() != CalibrationData.load("random", _model(), seed=4).digest()
    with pytest.raises(DataError, match="needs the model"):
        CalibrationData.load("random")


@pytest.mark.parametrize("hides", [True, False])
def test_booleans_leave_every_query_keys_to_see_whichever_of_the_two_hides(hides):
    taken = "NEG, s" if hides else "s, NEG"
    model = parse(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[B, 4, 8] s, bool[B, 1, 8] m) => (float[B, 4, 8] y) '
        f"{{ w = Where (m, {taken}) y = Softmax (w) }}",
        NEG=np.float32(-np.inf),
    )
    feeds = draw(model, np.random.default_rng(0), 50)
    session = ReferenceSession(model)
    assert np.isfinite(session.run(feeds)["y"]).all()
    session.close()


def test_random_indices_stay_inside_the_table_they_index():
    model = _model(
        '<ir_version: 10, opset_import: ["" : 21]> g (int64[N, T] ids, int64[N, T] attention_mask) => (float[a, b, c] y)'
        "<float[7, 2] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}> { i = Cast <to = 6> (ids) y = Gather(table, i) }"
    )
    feeds = draw(model, np.random.default_rng(0), 50)
    assert (feeds["ids"].min(), feeds["ids"].max()) == (0, 6)
    assert (feeds["attention_mask"] == 1).all()


_CACHED = (
    '<ir_version: 10, opset_import: ["" : 21]> g (int64[batch, sequence] ids, float[batch, 2, past, 4] keys, '
    'int64[batch, "%s"] attention_mask) => (int64[a, b] y) { y = Identity (ids) }'
)


@pytest.mark.parametrize("whole", ["past+sequence", "past + sequence"])
def test_an_axis_that_is_a_sum_of_others_has_their_sizes(whole: str):
    model = _named(_CACHED, whole)
    shapes = {
        k: v.shape for k, v in draw(model, np.random.default_rng(0), {"past": 5, "sequence": 3}).items()
    }
    assert shapes == {"ids": (1, 3), "keys": (1, 2, 5, 4), "attention_mask": (1, 8)}
    assert draw(model, np.random.default_rng(0), 4)["attention_mask"].shape == (4, 8)
    assert all(whole not in sizes for sizes in trial_sizes(specs(model)[0]))
    # What is said about it itself goes first.
    given = {"past": 5, "sequence": 3, whole: 7}
    assert draw(model, np.random.default_rng(0), given)["attention_mask"].shape == (1, 7)


@pytest.mark.parametrize("whole", ["longest+1", "past.length", "past**2", "past+", "0x"])
def test_an_axis_whose_name_says_nothing_is_free(whole: str):
    model = _named(_CACHED, whole)
    assert all(whole in sizes for sizes in trial_sizes(specs(model)[0]))
    assert draw(model, np.random.default_rng(0), {whole: 6, "past": 2})["attention_mask"].shape == (1, 6)


def _named(text: str, whole: str) -> ir.Model:
    """The graph, with a name for the last axis of the mask that the text form cannot hold."""
    model = _model(text.replace('"%s"', "whole"))
    value = model.graph.inputs[2]
    value.shape = ir.Shape(["batch", whole])
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such file"),
        ("empty", "no .npz files"),
        ("calib.py", "no such file"),
        ("none.py:f", "no such file"),
    ],
)
def test_a_source_that_is_not_there_says_so(name: str, message: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        CalibrationData.load(tmp_path / name, _model())


def test_a_python_file_without_a_function_is_told_how(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        CalibrationData.load(tmp_path / "calib.py", _model())
    assert caught.value.hint == f"give the function as well: {tmp_path / 'calib.py'}:batches"


# -- files that are damaged or hostile


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x04pickle", bytes(1000)])
def test_a_file_that_is_no_npz_says_so(content: bytes, tmp_path: Path):
    path = tmp_path / "c.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        CalibrationData.load(path, _model())


def test_python_objects_are_never_unpickled(tmp_path: Path):
    folder = tmp_path / "d"
    folder.mkdir()
    np.savez(folder / "c.npz", image=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"Python objects \(pickle\), which are not loaded"):
        list(CalibrationData.load(folder))


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_whatever_is_flipped_in_a_file_only_data_errors_come_out(tmp_path_factory, at: int, flip: int):
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    np.savez_compressed(path, image=np.ones((4, 3), np.float32), label=np.arange(4))
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= flip
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        list(CalibrationData.load(path, _model()))


def test_a_header_that_promises_more_than_there_is_does_not_allocate_it(tmp_path: Path):
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3)}
    )
    folder = tmp_path / "d"
    folder.mkdir()
    with zipfile.ZipFile(folder / "c.npz", "w") as archive:
        archive.writestr("image.npy", header.getvalue() + bytes(100))
    with pytest.raises(DataError, match="more bytes"):
        list(CalibrationData.load(folder))


# -- what the user's code may do wrong


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def batches():\n    raise RuntimeError('boom')", "calib.py:batches raised RuntimeError: boom"),
        (
            "def batches():\n    yield {'image': np.zeros((1, 3))}\n    raise KeyError('boom')",
            "raised KeyError",
        ),
        ("def batches():\n    return iter(())", "no batches"),
        ("def batches():\n    yield np.zeros(3)", "a batch must be a dict of arrays, not ndarray"),
        ("def batches():\n    yield {'image': [[1], [2, 3]]}", "input 'image' is not an array"),
        ("def batches():\n    yield {'image': ['a']}", "holds <U1 values, not numbers"),
        ("def batches(n):\n    yield {}", "raised TypeError"),
        ("def batches():\n    return 3", "raised TypeError"),
        ("1 / 0", "raised ZeroDivisionError"),
        ("def batch(): pass", r"no function 'batches' \(did you mean 'batch'\?\)"),
        ("def (", "raised SyntaxError"),
    ],
)
def test_mistakes_in_the_users_function_name_it(body: str, message: str, tmp_path: Path):
    with pytest.raises(DataError, match=message):
        list(CalibrationData.load(_script(tmp_path / "calib.py", body)))


def test_a_function_that_gives_other_values_the_second_time_is_noticed():
    state = np.random.default_rng(0)
    data = CalibrationData(lambda: [{"x": state.standard_normal(3)} for _ in range(3)], name="shuffled")
    _read(data)
    with pytest.raises(DataError, match="shuffled: batch 0 is not what it was the first time") as caught:
        _read(data)
    assert "random seed" in str(caught.value.hint)


def test_a_function_that_gives_fewer_batches_the_second_time_is_noticed():
    counts = iter((3, 2))
    data = CalibrationData(lambda: [_batch(i) for i in range(next(counts))])
    _read(data)
    with pytest.raises(DataError, match="gave 3 batches the first time and 2 now"):
        _read(data)


def test_a_pass_that_ends_early_is_no_difference():
    data = CalibrationData(lambda: (_batch(i) for i in range(5)))
    next(iter(data))
    assert _marks(data.limit(3)) == [0, 1, 2]
    assert _marks(data) == [0, 1, 2, 3, 4]


def test_functions_are_found_in_files(tmp_path: Path):
    assert load_function(_script(tmp_path / "a.py", "def batches():\n    return 3"))() == 3


# -- what a batch must be

INPUTS = specs(_model())[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None, "imag": np.zeros((2, 3), np.float32)}, r"unknown input 'imag' \(did you mean 'image'\?\); input 'image' is missing"),
        ({"extra": np.zeros(1)}, "unknown input 'extra'$"),
        ({"label": None}, "input 'label' is missing"),
        ({"image": np.zeros((2, 4), np.float32)}, r"input 'image' has size 4 at axis 1, not 3: \[2, 4\]"),
        ({"image": np.zeros((2, 3, 1), np.float32)}, r"has 3 axes \[2, 3, 1\], not 2"),
        ({"image": np.zeros((5, 3), np.float32)}, "'label' has size 2 at axis 0, but 'N' is 5 in 'image'"),
        ({"image": np.zeros((2, 3), np.uint8)}, "is uint8, the model takes float32"),
        ({"label": np.zeros(2, np.float32)}, "is float32, the model takes int64"),
        ({"image": np.zeros((2, 3), np.complex64)}, "is complex64, the model takes float32"),
        ({"image": np.full((2, 3), 1e300)}, "is float64 and has values that do not fit float32"),
        ({"label": np.full(2, 1 << 63, np.uint64)}, "is uint64 and has values that do not fit int64"),
        ({"image": np.array([[1, np.nan, 1], [np.inf, -np.inf, 1]], np.float32)}, "has 1 NaN and 2 infinite values of 6"),
        ({"image": np.array([["a"] * 3] * 2)}, "holds <U1 values"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit_says_where_and_why(change: dict[str, np.ndarray | None], message: str):
    feeds = {k: v for k, v in {**_batch(1), **change}.items() if v is not None}
    with pytest.raises(DataError, match=message) as caught:
        validate(feeds, INPUTS, where="calib/0003.npz")
    assert str(caught.value).startswith("calib/0003.npz: ")


def test_pixels_that_were_not_normalised_get_a_hint():
    with pytest.raises(DataError) as caught:
        validate({**_batch(1), "image": np.zeros((2, 3), np.uint8)}, INPUTS)
    assert "normalising" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [("float64", "float32"), ("float16", "float32"), ("float32", "float16"), ("int32", "int64"), ("int64", "int32"),
     ("uint8", "int64"), ("bool", "int64"), ("int64", "bool"), (">f4", "float32")],
)  # fmt: skip
def test_types_of_one_kind_are_converted_when_all_values_fit(given_: str, wanted: str):
    spec = TensorSpec(name="x", dtype=np.dtype(wanted), shape=(None,))
    found = validate({"x": np.array([0, 1, 1], given_)}, [spec])["x"]
    assert found.dtype == np.dtype(wanted)
    assert found.dtype.isnative
    assert found.tolist() == [0, 1, 1]


def test_bfloat16_and_eight_bit_floats_are_floats():
    for name in ("bfloat16", "float8_e4m3fn"):
        kind = ir.DataType.from_numpy(
            np.dtype(name) if name != "bfloat16" else ir.DataType.BFLOAT16.numpy()
        ).numpy()
        spec = TensorSpec(name="x", dtype=np.dtype(kind), shape=(2,))
        assert validate({"x": np.ones(2, np.float32)}, [spec])["x"].dtype == kind
        with pytest.raises(DataError, match="NaN"):
            validate({"x": np.array([1, np.nan], np.float32).astype(kind)}, [spec])


def test_arrays_come_out_contiguous_and_in_the_order_of_the_inputs():
    feeds = validate({"label": np.arange(4)[::2], "image": np.zeros((3, 2), np.float32).T}, INPUTS)
    assert list(feeds) == ["image", "label"]
    assert all(a.flags.c_contiguous for a in feeds.values())


def test_checking_reads_nothing_until_its_turn(tmp_path: Path):
    folder = _folder(tmp_path / "c", 3)
    (folder / "01.npz").write_bytes(b"broken")
    data = CalibrationData.load(folder, _model())
    batches = iter(data)
    assert next(batches)
    with pytest.raises(DataError, match=r"01\.npz"):
        next(batches)


# -- parts of data


@pytest.mark.parametrize(
    ("n", "fraction", "held"),
    [(8, 0.25, [3, 7]), (5, 0.5, [1, 3]), (3, 0.25, [2]), (2, 0.25, [1]), (9, 0.34, [2, 5, 8])],
)
def test_held_out_batches_are_every_kth_and_no_others(n: int, fraction: float, held: list[int]):
    data = CalibrationData([_batch(i) for i in range(n)])
    calibration, held_out = data.split(fraction)
    assert _marks(held_out) == held
    assert sorted(_marks(calibration) + held) == list(range(n))
    assert (len(calibration), len(held_out)) == (n - len(held), len(held))


def test_one_batch_cannot_be_split():
    with pytest.raises(DataError, match="one batch cannot be split"):
        CalibrationData([_batch(0)]).split()


def test_a_limit_takes_the_first_batches():
    data = CalibrationData([_batch(i) for i in range(4)])
    assert _marks(data.limit(2)) == [0, 1]
    assert (len(data.limit(2)), len(data.limit(9))) == (2, 4)
    with pytest.raises(DataError, match="leaves none"):
        data.limit(0)


def test_the_digest_sees_names_types_shapes_values_and_order():
    def of(*batches: Feeds) -> str:
        return CalibrationData(list(batches)).digest()

    x = np.arange(6, dtype=np.float32)
    digests = [
        of({"x": x}), of({"y": x}), of({"x": x.astype(np.float64)}), of({"x": x.reshape(2, 3)}), of({"x": x + 1}),
        of({"x": x}, {"x": x}), of({"x": x[:3]}, {"x": x[3:]}), of({"x": x[3:]}, {"x": x[:3]}), of({"x": x, "y": x}),
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert of({"x": x, "y": x + 1}) == of({"y": x + 1, "x": x})
    assert of({"x": x}) == of({"x": x.astype(">f4")}) == of({"x": np.repeat(x, 2)[::2]})


def test_iterating_holds_one_batch_at_a_time():
    def batches() -> Iterator[Feeds]:
        for _ in range(20):
            yield {"x": np.zeros(100_000)}

    data = CalibrationData(batches)
    list(data.limit(1))
    tracemalloc.start()
    for _ in data:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 800_000


def _counted(calls: list[int], n: int = 3):
    def batches():
        calls.append(1)
        buffer = np.zeros((1, 2), np.float32)
        for i in range(n):
            buffer += i  # the same array each time, as a careless generator would do
            yield {"x": buffer}

    return CalibrationData(batches)


def test_remembered_batches_are_made_once_and_stay_what_they_were():
    calls: list[int] = []
    data = _counted(calls).remembered()
    first = [batch["x"].copy() for batch in data]
    assert [batch["x"].tolist() for batch in data] == [x.tolist() for x in first]
    assert len(calls) == 1


def test_a_reading_that_stops_early_is_not_taken_for_all():
    calls: list[int] = []
    data = _counted(calls).remembered()
    next(iter(data))
    assert [sum(1 for _ in data) for _ in range(3)] == [3, 3, 3]
    assert len(calls) == 2


def test_batches_beyond_the_bound_are_made_anew():
    calls: list[int] = []
    data = _counted(calls).remembered(most=16)
    assert [sum(1 for _ in data) for _ in range(2)] == [3, 3]
    assert len(calls) == 2


def test_of_many_inputs_the_first_are_spelled_and_the_others_counted():
    assert spelled({"x": np.ones((1, 3)), "n": np.ones(())}) == "x [1, 3], n []"
    five = {f"in_{k}": np.ones(k) for k in range(5)}
    assert spelled(five) == "in_0 [0], in_1 [1], in_2 [2], in_3 [3], in_4 [4]"
    assert spelled({**five, "in_5": np.ones(5)}) == "in_0 [0], in_1 [1], in_2 [2], in_3 [3], 2 more"
