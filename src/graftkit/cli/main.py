"""The ``graft`` command: its subcommands, its exit status, and its errors."""

from __future__ import annotations

import atexit
import gc
import io
import itertools
import os
import shlex
import sys
from collections.abc import Sequence

import typer

from graftkit._version import __version__
from graftkit.cli.group import Group
from graftkit.cli.output import INTERRUPTED, Format, InterruptError, Output, StdoutLostError
from graftkit.errors import GraftError, MissingDependencyError
from graftkit.process import collect_garbage_seldom, load_no_compiler

# 128 + SIGPIPE: the reader of stdout has gone.
_PIPE_CLOSED = 141

app = typer.Typer(
    name="graft",
    cls=Group,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Attach an adapter to any open model; know that it trains what you meant; ship it unchanged."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``graft`` and exit: 0 clean, 1 findings, 2 error, 130 interrupted."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    _start_quickly(args)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    sys.exit(_run(args) if args else _help())


def _open_closed_streams() -> None:
    """Open what was closed before the start: files that are opened later would take its number, and its text."""
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")  # a result that is written there is lost
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _start_quickly(args: Sequence[str]) -> None:
    """Skip work at import and at exit that a short command does not need."""
    if args[:1] != ["train"]:  # a recipe may ask for compiled models: torch_compile, flex attention
        load_no_compiler()
    collect_garbage_seldom()
    # The last collection takes a second, and its memory is freed with the process anyway.
    atexit.register(gc.freeze)


def _help() -> int:
    """Show the help of ``graft`` alone, which is not a success: nothing was done."""
    _run(["--help"])
    return 2


def _run(args: list[str]) -> int:
    output = Output(_format_of(args), sys.stdout)
    try:
        status = app(args=args, prog_name="graft", standalone_mode=False)
    except StdoutLostError as loss:
        return _stdout_lost(loss)
    except (InterruptError, KeyboardInterrupt, typer.Abort):
        output.error(InterruptError())
        return INTERRUPTED
    except GraftError as error:
        return _failed(output, error)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except typer.TyperException as error:
        return _failed(output, _usage_error(error, args))
    except Exception as error:
        return _failed(output, _unexpected(error))
    return status if isinstance(status, int) else 0


def _stdout_lost(loss: StdoutLostError) -> int:
    """Handle a closed pipe or a full disk: stdout takes nothing more, not even an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
    if isinstance(loss.__cause__, BrokenPipeError):
        return _PIPE_CLOSED
    sys.stderr.write(f"error: {loss}\n")
    return 2


def _failed(output: Output, error: GraftError) -> int:
    if os.environ.get("GRAFT_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    output.error(error)
    return 2


def _format_of(args: list[str]) -> Format:
    """Find the format before the arguments are parsed: a usage error is written in it too."""
    json = "--json" in args or "--format=json" in args or ("--format", "json") in itertools.pairwise(args)
    return Format.JSON if json else Format.HUMAN


def _usage_error(error: typer.TyperException, args: Sequence[str]) -> GraftError:
    from graftkit.text import printable

    context = getattr(error, "ctx", None)
    path = context.command_path if context else "graft"
    usage = " ".join(context.get_usage().split()) if context else "Usage: graft COMMAND"
    return GraftError(
        error.format_message(),
        where=printable(shlex.join(["graft", *args]), 200),
        why=f"it is called as: {usage.removeprefix('Usage: ')}",
        help=f"{path} --help says what each of them is",
        code="usage",
    )


def _unexpected(error: Exception) -> GraftError:
    from graftkit.env import failed_import, missing_dependency

    failure = failed_import(error)
    if failure is not None and failure.package != "graftkit":
        return missing_dependency(failure)
    if isinstance(error, ImportError):  # raised by a library that misses another one, and says which
        return MissingDependencyError("a package is missing", why=str(error).strip(), help="install what it names")
    return GraftError(
        "graftkit failed unexpectedly",
        why=f"{type(error).__name__}: {error}",
        help="repeat with GRAFT_DEBUG=1 and report it with the output of `graft env`",
        code="unexpected",
    )


if __name__ == "__main__":
    main()
