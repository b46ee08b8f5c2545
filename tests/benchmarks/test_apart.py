"""Models timed in processes of their own; expressions stand for what opens them, as other processes import no tests."""

from __future__ import annotations

import os
from functools import partial

import numpy as np
import pytest

from optkit.benchmarks.apart import Apart, in_turn, keep
from optkit.errors import OptkitError

NOTES = """lambda feeds: open({file!r}, "a").write(f"{{__import__('os').getpid()}} {{int(feeds['in.1'][0])}} {{feeds['a/b c'].shape}}|")"""
FAILS_AT_ONE = "lambda feeds: 1 // (1 - int(feeds['in.1'][0]))"
DIES = "lambda feeds: __import__('os')._exit(3)"


@pytest.fixture(scope="module")
def feeds(tmp_path_factory):
    batches = [{"in.1": np.array([float(k)]), "a/b c": np.ones((2, k + 1))} for k in range(3)]
    return keep(batches, tmp_path_factory.mktemp("feeds") / "feeds.npz")


def test_a_model_is_timed_in_another_process_on_the_feeds_of_the_round(feeds, tmp_path):
    file = tmp_path / "seen"
    with Apart(partial(eval, NOTES.format(file=str(file))), feeds) as one:
        cpu, wall = one.time(1, settle=2)
        one.time(5)
    assert wall > 0 and cpu >= 0
    calls = [call.split(" ", 2) for call in file.read_text().split("|")[:-1]]
    # Once to be ready, two that settle and one that counts, and one of the sixth round.
    assert [int(value) for _, value, _ in calls] == [0, 1, 1, 1, 2]
    assert [shape for _, _, shape in calls[-2:]] == ["(2, 2)", "(2, 3)"]
    assert len({pid for pid, _, _ in calls}) == 1 and int(calls[0][0]) != os.getpid()


def test_models_in_turn_have_new_processes_each_time(feeds, tmp_path):
    files = {name: tmp_path / name for name in "ab"}
    openers = {name: partial(eval, NOTES.format(file=str(file))) for name, file in files.items()}
    times = in_turn(openers, feeds, seatings=2, rounds=3, settle=1)
    assert {name: len(t) for name, t in times.items()} == {"a": 6, "b": 6}
    for file in files.values():
        calls = [call.split(" ", 2) for call in file.read_text().split("|")[:-1]]
        # To be ready, and three times one that settles and one that counts.
        assert [int(value) for _, value, _ in calls] == [0, 0, 0, 1, 1, 2, 2] * 2
        assert len({pid for pid, _, _ in calls}) == 2


def test_what_cannot_be_opened_fails_or_dies_is_said(feeds):
    with (
        pytest.raises(OptkitError, match=r"NameError: .*nothing"),
        Apart(partial(eval, "nothing"), feeds) as one,
    ):
        one.wait()
    with Apart(partial(eval, FAILS_AT_ONE), feeds) as one:
        one.time(0)
        with pytest.raises(OptkitError, match="ZeroDivisionError: "):
            one.time(1)
    with (
        pytest.raises(OptkitError, match="its process died with exit code 3"),
        Apart(partial(eval, DIES), feeds) as one,
    ):
        one.time(0)
