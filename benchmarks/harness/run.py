"""The run of some benchmarks, or of all: one table, one file, and what changed."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.console import Console

from .contest import Device, Gap, Setting, Size
from .machine import machine_in_words, versions
from .ratios import Verdict, compared
from .results import (
    FOLDER,
    PAGE,
    STORE,
    Origin,
    Result,
    as_json,
    checked_in_results,
    kept_results,
    merged,
    results_of,
)
from .tables import WIDTH, as_page, change_text, print_table

TURNS = 5
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("__")))


@dataclass(frozen=True)
class Outcome:
    """The results of one benchmark; whether it ran to its end."""

    results: tuple[Result, ...]
    whole: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep what was measured at full size.

    Returns:
        0 if every benchmark ran to its end, whatever its figures; 1 if one failed. A figure that got worse is
        said, and is no failure: on a busy machine it may be the machine's.
    """
    options = _options(arguments)
    setting = Setting(Size.QUICK if options.quick else Size.FULL, Device(options.device), options.folder)
    _be_quiet()
    console, log = Console(width=WIDTH), Console(stderr=True, width=WIDTH)
    origin = Origin(date.today().isoformat(), machine_in_words(setting.device), tuple(versions().items()))
    outcomes = [_measured(name, setting, options.turns, origin, log) for name in options.only]
    results = [result for outcome in outcomes for result in outcome.results]
    print_table(console, results)
    _say_changes(console, results)
    if setting.size is Size.FULL:
        whole = [result for outcome in outcomes if outcome.whole for result in outcome.results]
        _keep(merged(kept_results(), whole))
    return 0 if all(outcome.whole for outcome in outcomes) else 1


def _be_quiet() -> None:
    """Leave the progress and the warnings of libraries out of what is printed."""
    os.environ |= dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1")
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    warnings.simplefilter("ignore")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    every = ",".join(NAMES)
    parser.add_argument(
        "only", nargs="?", type=_names, default=NAMES, metavar="NAMES", help=f"{every}; all if none"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is kept")
    parser.add_argument("--turns", type=_at_least_one, default=TURNS, help="turns that are counted")
    parser.add_argument("--device", choices=[device.value for device in Device], default=Device.CPU.value)
    parser.add_argument("--folder", type=Path, help="where large files are written")
    return parser.parse_args(arguments)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := sorted(set(names) - set(NAMES)):
        raise argparse.ArgumentTypeError(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return names


def _at_least_one(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("at least one turn")
    return count


def _measured(name: str, setting: Setting, turns: int, origin: Origin, log: Console) -> Outcome:
    """Run one benchmark; where it fails, say why. What is kept of it then stays as it was."""
    results: list[Result] = []
    try:
        for result in _results(name, setting, turns, origin, log):
            results.append(result)
    except Exception:
        log.print(f"{name} failed:\n{traceback.format_exc()}", style="red", markup=False, soft_wrap=True)
        return Outcome(tuple(results), whole=False)
    return Outcome(tuple(results), whole=True)


def _results(name: str, setting: Setting, turns: int, origin: Origin, log: Console) -> Iterator[Result]:
    for asked in importlib.import_module(f"benchmarks.{name}").contests(setting):
        held = []
        if not isinstance(asked, Gap):
            for turn in asked.turns(turns):
                held.append(turn)
                log.print(f"{name}, {asked.size}: turn {len(held)} of {turns}", highlight=False)
        yield from results_of(name, asked, held, origin)


def _say_changes(console: Console, results: Sequence[Result]) -> None:
    kept = {result.identity: result for result in checked_in_results() if result.ratio is not None}
    for result in results:
        before = kept.get(result.identity)
        if result.ratio is None or before is None:
            continue
        verdict = compared(result.ratio, before.ratio, result.row.figure)
        if verdict in (Verdict.WORSE, Verdict.BETTER):
            style = "bold red" if verdict is Verdict.WORSE else "green"
            console.print(change_text(result, kept, verdict), style=style, highlight=False)


def _keep(results: Sequence[Result]) -> None:
    from graftkit.files import write_text

    write_text(STORE, as_json(results))
    write_text(PAGE, as_page(results))


if __name__ == "__main__":
    sys.exit(main())
