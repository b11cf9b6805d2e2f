"""What is quoted is safe to print and short; an error is cut to what it says first."""

from __future__ import annotations

import pytest

from graftkit.text import count, describe, first_line, printable, quoted, size, some, suggest


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


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1000, 62_500_000_000)] == ["0 B", "999 B", "1 kB", "62.5 GB"]
