"""The sources of samples that need nothing fetched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optkit.benchmarks import docstrings
from optkit.benchmarks.disk_files import bytes_at_both_ends
from optkit.benchmarks.docstrings import pairs
from optkit.benchmarks.speech import with_context


def test_docstring_pairs_repeat_and_are_split_by_file() -> None:
    seen, held_out = pairs(60, held_out=False), pairs(60, held_out=True)
    assert seen == pairs(60, held_out=False)
    assert len(seen) == len(held_out) == 60
    for side in (0, 1):
        assert {pair[side] for pair in seen}.isdisjoint(pair[side] for pair in held_out)


def test_who_asks_for_more_pairs_gets_those_of_few_and_the_rest_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        f'def f{i}():\n    """{i} is the number that this query asks for.\n\n    {"It is told. " * 20}{i}"""'
        for i in range(16)
    ]
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for file, half in zip(files, (lines[:8], lines[8:]), strict=True):
        file.write_text("\n".join(half))
    monkeypatch.setattr(docstrings, "_files", lambda roots, held_out: files)
    few, all_ = (pairs.__wrapped__(n, held_out=False) for n in (12, 10**6))
    assert sorted(int(query.split()[0]) for query, _ in few) == [*range(6), *range(8, 14)]
    assert set(few) < set(all_)
    assert len(all_) == 16


def test_a_short_file_is_stripped_and_padded(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b" \nab\n ")
    x = bytes_at_both_ends(path, size=4, block=16)
    assert x.tolist() == [97, 98, 256, 256, 256, 256, 97, 98]


def test_a_long_file_is_stripped_at_its_ends_only(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(b" " + b"abcdefg " + b"hijklmn" + b"\n")
    x = bytes_at_both_ends(path, size=4, block=8)
    assert bytes(x.astype(np.uint8)) == b"abcdklmn"


def test_a_frame_starts_with_the_end_of_the_one_before() -> None:
    frames = np.arange(2 * 512, dtype=np.float32).reshape(2, 512)
    x = with_context(frames)
    assert x.shape == (2, 576)
    assert not x[0, :64].any()
    np.testing.assert_array_equal(x[1, :64], frames[0, -64:])
    np.testing.assert_array_equal(x[:, 64:], frames)


def test_every_letter_of_the_text_is_printable() -> None:
    lines = pytest.importorskip("optkit.benchmarks.lines", reason="needs Pillow")
    seen, held_out = lines.words(False), lines.words(True)
    assert len(seen) > 3 * len(held_out) > 0
    assert all(word.isascii() and word.isprintable() and " " not in word for word in seen)
