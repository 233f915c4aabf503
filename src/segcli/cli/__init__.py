"""The command line: one module per command, errors translated once in `main`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from segcli import __version__
from segcli.cli.bench import bench
from segcli.cli.colorize import colorize
from segcli.cli.data import app as data_app
from segcli.cli.evaluate import evaluate
from segcli.cli.inspect import inspect
from segcli.cli.models import app as models_app
from segcli.cli.predict import predict
from segcli.cli.runs import app as runs_app
from segcli.cli.train import train
from segcli.errors import Interrupted, SegcliError

app = typer.Typer(
    name="segcli",
    help="Segment folders of images with fully convolutional networks.",
    epilog="Example: segcli predict photos/ --out masks/",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich's help costs 0.2 s of start-up
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"segcli {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Segment folders of images with fully convolutional networks (FCN)."""


app.command()(predict)
app.command()(colorize)
app.command()(train)
app.command()(evaluate)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(runs_app, name="runs")
app.command()(inspect)
app.command()(bench)


def main(argv: Sequence[str] | None = None) -> Any:
    """Run the command line and exit: 0 done, 1 some inputs failed, 2 usage, 3 machine, 130 or 143 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments or "-v" in arguments
    try:
        with _interrupts_answered():
            app(arguments, prog_name="segcli")
    except SegcliError as error:
        if verbose:
            raise
        _stop(f"Error: {error}", error.exit_code)
    except MemoryError:
        if verbose:
            raise
        _stop("Error: out of memory. Close other programs, or try a smaller --batch-size or --size.", 3)
    except Interrupted as error:
        _stop(f"Interrupted. {error}".strip(), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains while exiting
        sys.exit(128 + signal.SIGPIPE)


@contextlib.contextmanager
def _interrupts_answered() -> Iterator[None]:
    """Ctrl-C raises `Interrupted` in this block, unless somebody ignores or handles it already."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(*_: Any) -> None:
    raise Interrupted


def _stop(message: str, code: int) -> None:
    from segcli.cli.terminal import printable

    print(printable(message), file=sys.stderr)
    sys.exit(code)
