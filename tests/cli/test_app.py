"""The frame of all commands: help, errors, exit codes, streams, signals."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

HEAVY = (
    "coremltools",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "pydantic",
    "rich",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "yaml",
)
COMMANDS = (
    "compile",
    "quantize",
    "prune",
    "eval",
    "bench",
    "finalize",
    "inspect",
    "plan",
    "targets",
    "recipe",
    "doctor",
)

# Says that it has begun, then takes its time.
SLOW = """
import pathlib, time
import numpy as np

def samples():
    pathlib.Path("began").touch()
    for _ in range(1000):
        time.sleep(0.05)
        yield {"x": np.zeros((1, 32), np.float32)}, 0

def score(outputs, label):
    return 1.0
"""

NOISY = """
import os
import numpy as np

print("while loading")
METRIC = "noise"

def samples():
    print("samples")
    for _ in range(4):
        os.write(1, b"from below\\n")
        yield {"x": np.ones((1, 32), np.float32)}, 0

def score(outputs, label):
    print("score")
    return 1.0
"""


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [(["--help"], []), (["--version"], []), ([], []), (["compile", "--help"], ["pydantic"]), (["recipe", "--help"], ["pydantic"])],
)  # fmt: skip
def test_help_imports_nothing_heavy(arguments, allowed):
    # Newer versions of typer read options with pydantic.
    program = f"""
import sys
from optkit.cli import main
main({arguments!r})
print("heavy:", *sorted(set({HEAVY!r}) & set(sys.modules) - {set(allowed)!r}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.endswith("heavy:\n")


def test_help_names_every_command(optkit):
    ran = optkit("--help")
    assert ran.code == 0
    assert all(re.search(rf"^  {name}\s+\S", ran.out, re.MULTILINE) for name in COMMANDS)
    assert optkit().out == ran.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_options(optkit, name):
    ran = optkit(name, "--help")
    assert ran.code == 0
    assert "Usage: optkit" in ran.out


def test_version(optkit):
    assert re.fullmatch(r"optkit \d+\.\d+\.\d+\n", optkit("--version").out)


def test_wrong_options_are_usage_errors_with_suggestions(optkit):
    ran = optkit("compile", "m.onnx", "--tagret", "cpu")
    assert (ran.code, ran.out) == (2, "")
    assert "error: no such option: --tagret" in ran.err
    assert "--target" in ran.err
    assert "hint: optkit compile --help" in ran.err
    assert optkit("compile").code == 2
    assert "compile" in optkit("compiel").err


def test_with_json_an_error_is_a_document_too(optkit):
    ran = optkit("inspect", "missing.onnx", "--json")
    assert ran.code == 2
    assert ran.json == {
        "error": {"type": "UsageError", "message": "missing.onnx: no such file", "hint": None},
        "exit_code": 2,
    }
    assert optkit("inspect", "--jsn", "--json").json["exit_code"] == 2


def test_a_defect_asks_for_debug_and_shows_a_traceback_with_it(optkit, monkeypatch):
    monkeypatch.setattr("optkit.targets.TARGETS", None)
    ran = optkit("targets")
    assert ran.code == 1
    assert ran.err.startswith("error: AttributeError: ")
    assert "--debug" in ran.err
    assert "Traceback" not in ran.err
    assert "Traceback" in optkit("targets", "--debug").err


def test_a_mistake_shows_no_traceback_unless_asked(optkit):
    assert "Traceback" not in optkit("inspect", "missing.onnx").err
    assert "Traceback" in optkit("inspect", "missing.onnx", "--debug").err


def test_stdout_is_the_result_alone_whoever_prints(process, bench_, tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    ran = process("eval", bench_ / "model.onnx", "--eval", "noisy.py", "--json")
    assert ran.code == 0, ran.err
    assert ran.json == {"model": str(bench_ / "model.onnx"), "metric": "noise", "value": 1.0, "n": 4}
    assert all(text in ran.err for text in ("while loading", "samples", "score", "from below"))


def test_no_colour_in_pipes(process, bench_):
    for arguments in (
        ["inspect", bench_ / "model.onnx"],
        ["doctor", bench_ / "model.onnx"],
        ["recipe", "show", bench_ / "recipe.yaml"],
        ["inspect", "none.onnx"],
    ):
        ran = process(*arguments)
        assert "\x1b" not in ran.out + ran.err


def test_tables_in_pipes_are_not_cut(process, bench_):
    ran = process("inspect", bench_ / "model.onnx", "--nodes", COLUMNS="40")
    assert "first  " in ran.out
    assert str(bench_ / "model.onnx") in ran.out


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_gets_a_bar_and_colour_unless_refused(command, bench_, tmp_path, colour):
    main_end, end = pty.openpty()
    arguments = command("eval", bench_ / "model.onnx", "--eval", bench_ / "eval.py")
    environment = {**os.environ, "TERM": "xterm-256color"} | ({} if colour else {"NO_COLOR": "1"})
    environment = {k: v for k, v in environment.items() if colour is False or k != "NO_COLOR"}
    child = subprocess.Popen(arguments, stdout=end, stderr=end, cwd=tmp_path, env=environment)
    os.close(end)
    shown = b""
    while chunk := _read(main_end):
        shown += chunk
    os.close(main_end)
    assert child.wait(60) == 0
    assert b"evaluate" in shown
    assert bool(re.search(rb"\x1b\[[0-9;]*(3[0-9]|38;5;\d+)[0-9;]*m", shown)) is colour


def _read(end: int) -> bytes:
    try:
        return os.read(end, 65536)
    except OSError:  # Linux ends a pty with EIO
        return b""


def test_a_closed_pipe_is_quiet(command, bench_):
    child = subprocess.Popen(
        command("inspect", bench_ / "model.onnx"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (0, b"")


def test_a_full_disk_is_an_error_of_the_disk(command, bench_, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("inspect", bench_ / "model.onnx"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device\nhint: make room")
    ran = subprocess.run(
        command(
            "compile",
            bench_ / "model.onnx",
            "-r",
            bench_ / "recipe.yaml",
            "--calib",
            "random",
            "-o",
            "/proc/build",
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "cannot write /proc/build" in ran.stderr
    assert "Traceback" not in ran.stderr


def _attentive():
    """As in a shell's foreground, also where the tests themselves run in the background of one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _started(command, bench_, folder, *more):
    (folder / "slow.py").write_text(SLOW)
    arguments = command(
        "compile",
        bench_ / "model.onnx",
        "-r",
        bench_ / "recipe.yaml",
        "--calib",
        bench_ / "calib",
        "--eval",
        "slow.py",
        "-o",
        "build",
        *more,
    )
    child = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        preexec_fn=_attentive,
    )
    deadline = time.monotonic() + 50
    while not (folder / "began").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    return child


def _digests(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "")]
)
def test_interrupted_leaves_nothing_behind_and_the_old_artifact_whole(
    command, bench_, artifact, tmp_path, number, code, said
):
    (tmp_path / "build").mkdir()
    for name, content in _digests(artifact).items():
        (tmp_path / "build" / name).write_bytes(content)
    child = _started(command, bench_, tmp_path)
    child.send_signal(number)
    out, errors = child.communicate(timeout=60)
    assert child.returncode == code
    assert out == ""
    assert said in errors
    assert "Traceback" not in errors
    assert sorted(f.name for f in tmp_path.iterdir()) == ["began", "build", "slow.py"]
    assert _digests(tmp_path / "build") == _digests(artifact)


def test_killed_half_way_leaves_the_old_artifact_and_the_next_run_cleans_up(
    command, process, bench_, artifact, tmp_path
):
    (tmp_path / "build").mkdir()
    for name, content in _digests(artifact).items():
        (tmp_path / "build" / name).write_bytes(content)
    child = _started(command, bench_, tmp_path)
    child.kill()
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert _digests(tmp_path / "build") == _digests(artifact)
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".build")], (
        "the kill came too late to prove anything"
    )
    ran = process(
        "compile",
        bench_ / "model.onnx",
        "-r",
        bench_ / "recipe.yaml",
        "--calib",
        bench_ / "calib",
        "-o",
        "build",
    )
    assert ran.code == 0, ran.err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["began", "build", "slow.py"]
