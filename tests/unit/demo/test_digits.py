from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from graftkit.demo import digits


@pytest.fixture(scope="module")
def split() -> digits.DigitSplit:
    return digits.load_digit_split()


def _picture(row: dict) -> bytes:
    return row["images"][0].tobytes()


def test_split_holds_every_digit_once(split: digits.DigitSplit) -> None:
    assert (len(split.train), len(split.held_out)) == (1437, 360)
    trained = Counter(_picture(row) for row in split.train)
    held_out = Counter(_picture(row) for row in split.held_out)
    assert sum(trained.values()) + sum(held_out.values()) == 1797
    assert not trained & held_out


def test_split_is_stratified(split: digits.DigitSplit) -> None:
    counts = Counter(split.held_out["completion"])
    assert sorted(counts) == list("0123456789")
    assert max(counts.values()) - min(counts.values()) <= 3


def test_the_split_is_always_the_same(split: digits.DigitSplit) -> None:
    again = digits.load_digit_split()
    assert [*map(_picture, again.held_out)] == [*map(_picture, split.held_out)]


def test_rows_are_prompt_completion_and_one_rgb_picture(split: digits.DigitSplit) -> None:
    row = split.train[0]
    assert set(row) == {"images", "prompt", "completion"}
    assert row["prompt"] == digits.PROMPT
    (picture,) = row["images"]
    assert (picture.mode, picture.size) == ("RGB", (8, 8))


def test_pictures_keep_every_level_of_ink() -> None:
    ink = np.arange(64) % 17
    grey = digits.to_grey(digits.to_image(ink.astype(float)))
    assert [round(level * 16 / 255) for row in grey for level in row] == list(ink)
