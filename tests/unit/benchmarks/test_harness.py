"""Ratios are taken turn by turn, keep their spread, and are compared with those that were kept."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from benchmarks.harness.contest import Contest, Figure, Figures, Gap, Row, in_turns
from benchmarks.harness.processes import CommandError, cold, told
from benchmarks.harness.ratios import Spread, Verdict, compared, misses, ratios
from benchmarks.harness.results import (
    PAGE,
    STORE,
    Origin,
    Result,
    as_json,
    checked_in_results,
    from_json,
    kept_results,
    merged,
    results_of,
)
from benchmarks.harness.run import NAMES
from benchmarks.harness.tables import WIDTH, as_page, print_table, ratio_text
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

ROW = Row("merge", "cp", Figure.SECONDS, aim=1.3)
TODAY = Origin("2026-01-02", "a processor, 2 cores, 8 GiB of memory", (("Python", "3.11.7"), ("torch", "2.13.0")))
LATER = replace(TODAY, date="2026-02-03")


def turn(ours: float, peer: float, figure: Figure = Figure.SECONDS) -> dict[str, Figures]:
    return {"graftkit": {figure: ours}, "cp": {figure: peer}}


def result(ratio: Spread | None = None, *, size: str = "4 GB", row: Row = ROW, origin: Origin = TODAY) -> Result:
    if ratio is None:
        return Result("merge", size, row, origin, why="no GPU")
    return Result("merge", size, row, origin, 5, ratio, ratio.median, 1.0)


def flat(ratio: float) -> Spread:
    return Spread(ratio, ratio, ratio)


# ---- turns and ratios ----


def test_sides_alternate_and_the_first_turns_are_not_counted() -> None:
    ran: list[str] = []

    def side(name: str) -> Figures:
        ran.append(name)
        return {Figure.SECONDS: float(len(ran))}

    turns = in_turns({"graftkit": lambda: side("g"), "cp": lambda: side("c")}, after=lambda: ran.append("|"))
    counted = list(turns(2))
    assert "".join(ran) == "g|c|" * 3
    assert [each["graftkit"][Figure.SECONDS] for each in counted] == [5, 9]


def test_a_ratio_is_that_of_one_turn() -> None:
    # The machine gets slower on the way: figures of different turns have other ratios.
    turns = [turn(2, 4), turn(9, 3), turn(40, 10), turn(70, 70), turn(90, 60)]
    assert ratios(turns, ROW) == Spread(0.5, 1.5, 4.0)


def test_a_row_names_its_sides() -> None:
    turns = [{"a": {Figure.PEAK: 6.0}, "b": {Figure.PEAK: 3.0}, "graftkit": {Figure.PEAK: 1.0}}]
    assert ratios(turns, Row("", "b", Figure.PEAK, ours="a")).median == 2.0


@pytest.mark.parametrize(("ours", "peer"), [(1.0, 0.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_no_ratio_is_made_of_what_is_no_figure(ours: float, peer: float) -> None:
    with pytest.raises(ValueError):
        ratios([turn(1, 1), turn(ours, peer)], ROW)


@given(
    st.lists(st.tuples(*2 * [st.floats(1e-3, 1e3)]), min_size=1, max_size=9),
    st.sampled_from([figure for figure in Figure if not figure.more_is_better]),
    st.floats(0.1, 10),
)
def test_the_spread_is_in_order_and_knows_no_unit(
    pairs: list[tuple[float, float]], figure: Figure, unit: float
) -> None:
    row = replace(ROW, figure=figure)
    found = ratios([turn(*pair, figure) for pair in pairs], row)
    scaled = ratios([turn(ours * unit, peer * unit, figure) for ours, peer in pairs], row)
    assert found.min <= found.median <= found.max
    assert (scaled.min, scaled.median, scaled.max) == pytest.approx((found.min, found.median, found.max))


@pytest.mark.parametrize(
    ("figure", "ratio", "missed"),
    [
        (Figure.SECONDS, 1.29, False),
        (Figure.SECONDS, 1.31, True),
        (Figure.RATE, 1.31, False),
        (Figure.RATE, 1.29, True),
    ],
)
def test_an_aim_is_a_limit_on_the_side_that_is_worse(figure: Figure, ratio: float, missed: bool) -> None:
    assert misses(flat(ratio), 1.3, figure) is missed
    assert not misses(flat(ratio), None, figure)


# ---- what got worse ----


@pytest.mark.parametrize(
    ("now", "kept", "verdict"),
    [
        (flat(1.2), None, Verdict.NEW),
        (flat(1.2), flat(1.2), Verdict.SAME),
        (flat(1.2), flat(1.0), Verdict.WORSE),
        (flat(0.8), flat(1.0), Verdict.BETTER),
        (Spread(1.1, 1.2, 1.35), flat(1.0), Verdict.SAME),
        (flat(1.2), Spread(0.9, 1.0, 1.15), Verdict.SAME),
        (Spread(1.4, 1.5, 1.6), Spread(0.9, 1.0, 1.1), Verdict.WORSE),
    ],
)
def test_a_change_is_one_beyond_both_spreads(now: Spread, kept: Spread | None, verdict: Verdict) -> None:
    opposite = {Verdict.WORSE: Verdict.BETTER, Verdict.BETTER: Verdict.WORSE}
    assert compared(now, kept, Figure.SECONDS) is verdict
    assert compared(now, kept, Figure.RATE) is opposite.get(verdict, verdict)


@given(*2 * [st.lists(st.floats(0.1, 10), min_size=3, max_size=3).map(Spread.of)])
def test_one_got_worse_where_the_other_way_round_it_got_better(now: Spread, kept: Spread) -> None:
    pair = compared(now, kept, Figure.SECONDS), compared(kept, now, Figure.SECONDS)
    assert pair in [(Verdict.SAME, Verdict.SAME), (Verdict.WORSE, Verdict.BETTER), (Verdict.BETTER, Verdict.WORSE)]


# ---- what is kept ----


def test_results_of_a_contest_and_of_a_gap() -> None:
    contest = Contest("4 GB", (ROW,), in_turns({}))
    (measured,) = results_of("merge", contest, [turn(2, 1), turn(9, 3), turn(4, 1)], TODAY)
    assert (measured.ratio, measured.ours, measured.theirs, measured.turns) == (Spread(2, 3, 4), 4, 1, 3)
    (gap,) = results_of("merge", Gap("4 GB", (ROW,), "no GPU"), [], TODAY)
    assert (gap.ratio, gap.why, gap.identity) == (None, "no GPU", measured.identity)


def test_what_is_written_is_read() -> None:
    results = (
        result(Spread(1, 2, 3)),
        result(size="8 GB"),
        result(flat(1), row=replace(ROW, ours="x"), origin=LATER),
    )
    assert from_json(as_json(results)) == results


def test_a_benchmark_that_ran_replaces_its_results_and_no_others() -> None:
    other = replace(result(flat(1)), benchmark="attach")
    old, new = result(flat(1), size="3 GB"), result(flat(2), origin=LATER)
    assert merged([other, old], [new]) == (other, new)
    assert merged([other, old], []) == (other, old)


def test_what_is_not_measured_here_does_not_replace_what_was_elsewhere() -> None:
    elsewhere, gap = result(flat(1)), result(origin=LATER)
    assert merged([elsewhere], [gap]) == (elsewhere,)
    assert merged([replace(elsewhere, size="other")], [gap]) == (gap,)
    assert merged([result()], [gap]) == (gap,)


def test_compared_is_what_was_committed(tmp_path: Path) -> None:
    store = tmp_path / "results.json"
    assert checked_in_results(store) == ()
    committed, written = (result(flat(1)),), (result(flat(2)),)
    store.write_text(as_json(committed), encoding="utf-8")
    assert checked_in_results(store) == committed
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    for command in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "x")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    store.write_text(as_json(written), encoding="utf-8")
    assert checked_in_results(store) == committed
    assert kept_results(store) == written


# ---- what is shown ----


def test_the_table_is_no_wider_than_80_columns_and_marks_what_is_missing() -> None:
    row = Row("a merge that has a long name and many words", "a peer of as many words", Figure.PEAK)
    stream = StringIO()
    print_table(Console(file=stream, width=WIDTH), [result(flat(1234.5), row=row), result(size="8 GB")])
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "1234" in text
    assert "8 GB: no GPU" in text


def test_the_page_has_a_line_for_each_row_and_for_each_origin() -> None:
    results = [result(flat(1.5)), result(size="8 GB"), result(flat(1), size="2 GB", origin=LATER)]
    page = as_page(results).splitlines()
    assert [line.count("|") for line in page if line.startswith("| merge")] == [10, 10, 10]
    assert sum(line.startswith("- 2026-") for line in page) == 2
    assert any("1.50 (missed)" in line and "≤ 1.3" in line for line in page)


@pytest.mark.parametrize(("ratio", "text"), [(0.9912, "0.991"), (1.004, "1.00"), (12.34, "12.3"), (196.2, "196")])
def test_a_ratio_has_three_digits(ratio: float, text: str) -> None:
    assert ratio_text(ratio) == text


# ---- processes ----


def test_a_process_is_measured_with_its_children() -> None:
    grows = "x = bytearray(300_000_000); sum(range(3_000_000))"
    code = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grows!r}]); print('[1]\\n{{\"a\": 2}}')"
    )
    small, large = cold(sys.executable, "-c", "pass"), cold(sys.executable, "-c", code)
    assert small.figures[Figure.PEAK] < 100e6 < 300e6 < large.figures[Figure.PEAK]
    assert 0 < small.figures[Figure.CPU] < large.figures[Figure.CPU]
    assert told(large) == {"a": 2}


def test_the_memory_of_the_process_that_measures_does_not_count() -> None:
    kept = bytearray(b"x" * 300_000_000)
    assert cold(sys.executable, "-c", "pass").figures[Figure.PEAK] < 100e6 < len(kept)


def test_a_command_that_ends_otherwise_is_an_error() -> None:
    refused = "import sys; print('why', file=sys.stderr); sys.exit(3)"
    assert Figure.SECONDS in cold(sys.executable, "-c", refused, ends_with=3).figures
    with pytest.raises(CommandError, match="why"):
        cold(sys.executable, "-c", refused)
    with pytest.raises(CommandError):
        cold(sys.executable, "-c", "pass", ends_with=3)


# ---- from end to end ----


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_is_read_without_its_libraries(name: str) -> None:
    code = f"import sys, benchmarks.{name} as read; assert read.contests; print('torch' in sys.modules)"
    assert cold(sys.executable, "-c", code).stdout == "False\n"


def test_a_benchmark_runs() -> None:
    """The lightest, quick: a table, and nothing that is kept."""
    before = {file: file.read_bytes() for file in _kept_files()}
    ran = cold(sys.executable, "-m", "benchmarks", "start", "--quick", "--turns", "1")
    assert {file: file.read_bytes() for file in _kept_files()} == before
    assert "graft --help" in ran.stdout


def _kept_files() -> list[Path]:
    return [file for file in (PAGE, STORE) if file.exists()]
