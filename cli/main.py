"""The `octavo` command: its sub-commands, and every error as one message and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from octavo import __version__
from octavo.cli.bench_command import bench
from octavo.cli.check_command import check
from octavo.cli.compile_command import compile_
from octavo.cli.inspect_command import inspect
from octavo.cli.models_command import models_app
from octavo.cli.order_command import order
from octavo.cli.package_command import package
from octavo.cli.passes_command import passes
from octavo.cli.plan_command import plan
from octavo.cli.profile_command import profile
from octavo.cli.render import print_error, print_message
from octavo.cli.replay_command import replay
from octavo.cli.run_command import run
from octavo.cli.sensitivity_command import sensitivity
from octavo.cli.synthesize_command import synthesize
from octavo.cli.targets_command import targets_app
from octavo.cli.verify_command import verify
from octavo.ir.errors import OctavoError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

_TRACEBACK = "--traceback"
_INTERRUPTED, _TERMINATED = 130, 143

app = typer.Typer(
    name="octavo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compile")(compile_)
for _command in (
    plan, synthesize, profile, sensitivity, order, inspect, bench, verify, check, package, run,
    replay, passes,
):  # fmt: skip
    app.command()(_command)
app.add_typer(targets_app, name="targets")
app.add_typer(models_app, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        print_message(f"octavo {__version__}")
        raise typer.Exit


@app.callback()
def _octavo(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option(_TRACEBACK, help="Show where in octavo an error arose.")
    ] = False,
) -> None:
    """Make exported models small and fast, and prove what was done.

    Exit codes: 0 done, 1 a defect of octavo, 2 a request that cannot work, 3 a goal that was not
    met (the artifact is written), 4 verification or audit failed, 5 an invalid or unsafe model.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing but the code and the output leaves."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # The flag may stand anywhere, before or after the sub-command.
    known = [argument for argument in given if argument != _TRACEBACK]
    show = len(known) < len(given)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(known, prog_name="octavo")
    except SystemExit as end:
        return _stopped(end.code if isinstance(end.code, int) else 0)
    except OctavoError as error:
        print_error(str(error))
        code = error.exit_code
        shown: Exception = error
    except Exception as error:
        if (stopped := _stop_behind(error)) is not None:
            return _stopped(stopped)
        hint = "" if show else f"\n  hint:  {_TRACEBACK} shows where it arose"
        print_error(f"{type(error).__name__}: {error}\n  why:   a defect of octavo{hint}")
        code, shown = 1, error
    else:
        return 0
    if show:
        traceback.print_exception(shown)
    return code


def command() -> None:
    """The installed command: `main`, then the end of the process."""
    code = main()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Taking every module and session apart would cost half a second more.
    os._exit(code)


def _stopped(code: int) -> int:
    if code == _INTERRUPTED:
        print_error("interrupted; nothing is left half written")
    return code


def _stop_behind(error: BaseException | None) -> int | None:
    """The exit code of the signal that arrived while native code was loading, if one did."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return _INTERRUPTED
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            return error.code
        error = error.__cause__ or error.__context__
    return None


def _terminate(number: int, frame: FrameType | None) -> None:
    # An ordinary end, so that temporary folders are removed on the way out.
    raise SystemExit(_TERMINATED)
