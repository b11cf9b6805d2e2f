"""What is quoted is safe to print and short; an error is cut to what it says first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.text import (
    count,
    describe,
    first_line,
    percent,
    printable,
    quoted,
    shortened,
    size,
    some,
    suggest,
    table,
)


@pytest.mark.parametrize(
    ("error", "line", "full"),
    [
        pytest.param(ValueError("no such\nadvice"), "no such", "ValueError: no such", id="the first line"),
        pytest.param(OSError("\n  late \nmore"), "late", "OSError: late", id="the first that says something"),
        pytest.param(TimeoutError(), "", "TimeoutError", id="one that says nothing"),
        pytest.param(KeyError("k"), "'k'", "KeyError: 'k'", id="a key"),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str, full: str) -> None:
    assert (first_line(error), describe(error)) == (line, full)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        pytest.param("q_proj", "q_proj", id="a name"),
        pytest.param("", "''", id="an empty one"),
        pytest.param("\x1b[2J", "'\\x1b[2J'", id="what a terminal would obey"),
        pytest.param(["a"], "['a']", id="another object"),
        pytest.param("a" * 200, "a" * 117 + "...", id="a long one"),
    ],
)
def test_quoting(given: object, shown: str) -> None:
    assert quoted(given) == shown


def test_some_of_a_list() -> None:
    assert some("abc") == "a, b, c"
    assert some("abcde") == "a, b, c and 2 more"
    assert some(["a\n", "b"], 1) == "'a\\n' and 1 more"


def test_suggestions() -> None:
    names = {"q_proj": 1, "k_proj": 2, "router": 3}
    assert suggest("qproj", names) == "did you mean q_proj?"
    assert suggest("x_proj", names, 3) == "did you mean q_proj or k_proj?"
    assert suggest("embedding", names) is None


def test_printable_text_keeps_its_lines_and_has_an_end() -> None:
    assert printable("a\nb\x07\ud800") == "a\nb\\x07\\xd800"
    assert len(printable("\x00" * 1000)) == 1000
    assert printable(printable("\x1b" * 600)) == printable("\x1b" * 600)


def test_counts() -> None:
    assert [count(n) for n in (0, 999, 1000, 1_234_567, 62_500_000_000)] == ["0", "999", "1 k", "1.23 M", "62.5 B"]
    assert [count(n) for n in (99_949, 99_950, 999_499, 999_500, 999_999)] == [
        "99.9 k",
        "100 k",
        "999 k",
        "1 M",
        "1 M",
    ]


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 62_500_000_000)] == ["0 B", "999 B", "1 kB", "62.5 GB"]
    assert [size(n) for n in (999_499_999, 999_999_999)] == ["999 MB", "1 GB"]


def test_percents() -> None:
    assert [percent(share) for share in (0.0, 0.00012, 0.931, 1.0)] == ["0 %", "0.012 %", "93.1 %", "100 %"]
    assert [percent(share) for share in (9.994, 9.996, 123.4)] == ["999 %", "1,000 %", "12,300 %"]


_WORDS = st.text("abc._0", min_size=1, max_size=70)
_CELLS = st.lists(_WORDS, max_size=6).map(" ".join)


@given(st.lists(st.tuples(_CELLS, st.integers(0, 10**6), _CELLS, _CELLS), max_size=5))
def test_a_table_fits_and_breaks_no_word(rows: list[tuple[str, int, str, str]]) -> None:
    titles = ("tower", ">sites", "first", "because")
    lines = table(titles, rows, 80).splitlines()
    assert max(map(len, lines)) <= 80
    given_words = [word for row in rows for cell in row for word in str(cell).split()]
    for shown in " ".join(lines[2:]).split():
        start, cut, end = shown.partition("…")
        assert any(
            w == shown or (cut and w.startswith(start) and w.endswith(end) and start and end) for w in given_words
        )
    assert sum(len(line.split()) for line in lines[2:]) == len(given_words)


def test_a_table_that_fits_is_as_it_is() -> None:
    shown = table(("name", ">sites", "why"), [("q_proj", 16, "a reason"), ("lm_head", 1, "")], 80)
    assert shown.splitlines() == [
        "name     sites  why",
        "────────────────────────",
        "q_proj      16  a reason",
        "lm_head      1",
    ]


@given(st.text("ab.", max_size=90), st.integers(3, 40))
def test_a_long_word_keeps_both_ends(word: str, longest: int) -> None:
    shown = shortened(word, longest)
    assert len(shown) == min(len(word), longest)
    start, cut, end = shown.partition("…")
    assert shown == word if not cut else word.startswith(start) and word.endswith(end) and start and end
