"""``graft matrix``: which families can be adapted, by which methods, and what was tried to know it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, Output, only_data_on_stdout
from graftkit.errors import GraftError

if TYPE_CHECKING:
    from graftkit.matrix.run import Trust
    from graftkit.matrix.store import Store
    from graftkit.matrix.summary import Summary

Families = Annotated[
    list[str] | None,
    typer.Option("--families", "-f", help="Model types to try. Repeat it or use commas.", show_default=False),
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", "-m", help="Methods to try; all for every one. Repeat it or use commas."),
]
Checks = Annotated[
    list[str] | None,
    typer.Option("--checks", "-c", help="Checks to show. Default: all. Repeat it or use commas."),
]


def matrix(
    families: Families = None,
    wanted: Annotated[
        bool, typer.Option("--wanted", help="Try the families that people fine-tune, and those of this year.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Try every model type of the installed transformers.")
    ] = False,
    new_since: Annotated[
        str | None,
        typer.Option(
            "--new-since", metavar="RELEASE", help="Try the types that came after that release of transformers."
        ),
    ] = None,
    methods: Methods = None,
    checks: Checks = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes side by side.")] = 1,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=1, help="Seconds without a result that end a family's process.")
    ] = 300.0,
    again: Annotated[bool, typer.Option("--again", help="Repeat cells that the store already has.")] = False,
    missing: Annotated[
        bool,
        typer.Option("--missing", help="Try only cells that the store lacks, whatever versions made the others."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the twins, their batches and adapters.")] = 0,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="The file of the cells, JSON lines. Default: one in the cache."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the store as a page.")] = None,
    pack: Annotated[
        Path | None, typer.Option("--pack", help="Write the store to another file, compressed if named .gz.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option("--compare", metavar="OLD", help="Show what changed against another store.")
    ] = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Try families with methods on their twins, check by check, and keep what comes of it.

    Cells that the store has from the same versions and the same code are not tried again (--again tries all,
    --missing none of them); an interrupted run goes on where it stopped. Without families, the store is shown.
    """
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.matrix.choose import checked_in_store, checks_named, known_types, own_store
        from graftkit.matrix.compare import compare as compare_cells
        from graftkit.matrix.store import Store

        only = checks_named(options.split(checks) or ())
        chosen = _families(families, wanted, everything, new_since)
        named = tuple(options.split(methods) or ())
        old = None if compare is None else _read(compare)
        if chosen is None:
            kept = _read(store or checked_in_store() or own_store())
            summary = _shown(kept, None, named, only)
        else:
            kept = Store(store or own_store())
            summary = _run(output, kept, chosen, named, only, seed, _trust(again, missing), jobs, time_limit)
        if html is not None:
            _write_page(kept, html)
        if pack is not None:
            kept.pack(pack)
        if old is not None:
            output.result(compare_cells(old.cells, summary.cells, known=known_types()))
        else:
            output.result(summary)
        if summary.failed:
            raise typer.Exit(1)


def _families(
    names: list[str] | None, wanted: bool, everything: bool, new_since: str | None
) -> tuple[str, ...] | None:
    """Return the families that the options mean; None where none was given.

    Raises:
        GraftError: ``usage``, ``model-type-unknown`` or ``release-unknown``.
    """
    given = [
        option
        for option, on in (
            ("--families", bool(names)),
            ("--wanted", wanted),
            ("--all", everything),
            ("--new-since", new_since is not None),
        )
        if on
    ]
    if not given:
        return None
    if given[1:]:
        raise GraftError(
            f"{' and '.join(given)} cannot be used together",
            where="graft matrix",
            why="each of them says which families are tried",
            help="give one of them",
            code="usage",
        )
    from graftkit.matrix.choose import families_named, known_types
    from graftkit.matrix.introduced import introduced
    from graftkit.matrix.wanted import wanted as wanted_types

    if names:
        return families_named(options.split(names) or ())
    if new_since is not None:
        introduced().version(new_since)  # before transformers is imported for its types
        return introduced().since(new_since, known_types())
    return tuple(name for name in known_types() if everything or name in wanted_types())


def _trust(again: bool, missing: bool) -> Trust:
    """Return which cells are not tried again.

    Raises:
        GraftError: ``usage``.
    """
    from graftkit.matrix.run import Trust

    if again and missing:
        raise GraftError("--again and --missing cannot be used together", help="give one of them", code="usage")
    return Trust.NONE if again else Trust.ALL if missing else Trust.CURRENT


def _run(
    output: Output,
    store: Store,
    families: tuple[str, ...],
    methods: tuple[str, ...],
    checks: tuple[str, ...],
    seed: int,
    trust: Trust,
    jobs: int,
    time_limit: float,
) -> Summary:
    """Make the cells that the store lacks, and return all that were asked for."""
    from graftkit.cli.progress import timed_progress
    from graftkit.matrix.cell import Check
    from graftkit.matrix.choose import methods_named
    from graftkit.matrix.run import estimate, remaining, run

    chosen = methods_named(methods or ("lora",))
    wanted = tuple(Check(check) for check in checks) or tuple(Check)
    tasks = remaining(store, families, chosen, wanted, seed=seed, trust=trust)
    cells = sum(task.cells for task in tasks)
    known = len(families) * len(chosen) * len(wanted) - cells
    if known:
        output.note(f"{known} cells are in {store.path} already (--again tries them again)")
    if tasks:
        seconds = estimate(store, tasks, jobs)
        output.note(f"{cells} cells of {len(tasks)} families, {jobs} at a time: about {_time(seconds)}")
        with timed_progress(seconds) as on_progress:
            run(store, tasks, jobs=jobs, time_limit=time_limit, on_progress=on_progress)
        store.compact()
    return _shown(store, set(families), chosen, wanted)


def _shown(store: Store, families: set[str] | None, methods: tuple[str, ...], checks: tuple[str, ...]) -> Summary:
    """Return the store's cells of these families, methods and checks; None and empty mean all."""
    from graftkit.matrix.summary import Summary

    return Summary(
        tuple(
            cell
            for cell in store.cells
            if (families is None or cell.model_type in families)
            and (not methods or "all" in methods or cell.method in methods)
            and (not checks or cell.check in checks)
        )
    )


def _read(path: Path) -> Store:
    from graftkit.matrix.store import Store

    if not path.is_file():
        raise GraftError(
            "there is no matrix yet",
            where=str(path),
            help="graft matrix --families TYPE,TYPE tries some; --wanted, --all and --new-since more",
            code="matrix-store",
        )
    return Store(path)


def _write_page(store: Store, html: Path) -> None:
    from graftkit.files import write_text
    from graftkit.matrix.page import page

    write_text(html, page(store.cells, html))


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
