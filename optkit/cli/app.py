"""The commands together, and what becomes of an error: a message, a hint and an exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import optkit
from optkit.cli import (
    bench,
    compile,
    diff,
    doctor,
    eval,
    finalize,
    inspect,
    kernels,
    plan,
    prune,
    quantize,
    recipe,
    targets,
)
from optkit.errors import OptkitError, UsageError

# What typer raises for wrong options; it does not export the class under a name of its own.
_Misused: type[Any] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for _name, _command, _help in (
    ("compile", compile.compile, "Build, measure and judge candidates; write the artifact."),
    ("quantize", quantize.quantize, "Quantize and write ONNX; nothing is measured."),
    ("prune", prune.prune, "Remove channels or weights, and measure what it is worth."),
    ("eval", eval.evaluate, "Compute a metric, alone or against another model."),
    ("diff", diff.diff, "Say how far the outputs of two models are apart."),
    ("bench", bench.bench, "Time a run, alone or in turn with another model."),
    ("finalize", finalize.finalize, "Finish an artifact on the device that it is for."),
    ("inspect", inspect.inspect, "Show what is in a model or artifact."),
    ("plan", plan.plan, "Say what a model would take on a target, and cost there."),
    ("targets", targets.targets, "List the hardware that can be compiled for."),
    ("doctor", doctor.doctor, "Check this machine, and a model."),
):
    app.command(_name, short_help=_help)(_command)
app.add_typer(recipe.app, name="recipe")
app.add_typer(kernels.app, name="kernels")


def _version(value: bool) -> None:
    if value:
        print(f"optkit {optkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile trained models for the hardware they will run on, and prove that they are faster and still right.

    Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 asked wrongly, 3 done but a limit
    was missed, 4 not possible on this machine, 5 a gate was inconclusive, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the value is the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, as_json = "--debug" in given, "--json" in given
    previous = _terminate_politely()
    try:
        command = typer.main.get_command(app)
        code = command.main(given or ["--help"], prog_name="optkit", standalone_mode=False) or 0
        sys.stdout.flush()
        if code == 130:
            print("interrupted", file=sys.stderr)
        return int(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OptkitError as error:
        if debug:
            _print_traceback()
        return _report(error, as_json)
    except _Misused as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "optkit")
        message = str(error.format_message()).strip().rstrip(".")
        message = message[:1].lower() + message[1:]
        return _report(UsageError(message, hint=f"{where} --help lists the options"), as_json)
    except BrokenPipeError:
        # The reader has what it wanted; what is left in the buffer would make the interpreter complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if debug:
            _print_traceback()
        place = f"{error.filename}: " if error.filename else ""
        full = "make room where it is written, and in $OPTKIT_CACHE and $TMPDIR"
        hint = full if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        return _report(OptkitError(f"{place}{error.strerror or error}", hint=hint), as_json)
    except MemoryError:
        return _report(
            OptkitError("not enough memory", hint="see --memory, and optkit quantize for large models"),
            as_json,
        )
    except Exception as error:  # noqa: BLE001  (the one place that turns a defect into an exit code)
        if debug:
            _print_traceback()
            return 1
        text = str(error).strip().partition("\n")[0]
        defect = OptkitError(
            f"{type(error).__name__}: {text}",
            hint="this is a defect of optkit: run again with --debug and report what it prints",
        )
        return _report(defect, as_json)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _terminate_politely() -> Any:
    """Let SIGTERM end the program by an exception, so that temporary files go away; what handled it before."""
    try:
        return signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    except ValueError:  # not the main thread
        return None


def _report(error: OptkitError, as_json: bool) -> int:
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    if as_json:
        kind = type(error).__name__
        document = {
            "error": {"type": kind, "message": str(error), "hint": error.hint},
            "exit_code": error.exit_code,
        }
        print(json.dumps(document, indent=2))
    return error.exit_code


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()
