"""The demo's data: scikit-learn's 1,797 handwritten digits, as questions a vision-language model answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import datasets
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

PROMPT = "<bos><|image|> digit"
"""The question put to the model; the processor replaces ``<|image|>`` by one token per soft token."""

IMAGE_SIDE = 8
"""Width and height of a digit, in pixels."""

_HELD_OUT = 360
_MAX_INK = 16  # load_digits counts dark pixels in 4x4 blocks of the original scan: 0 (blank) to 16


@dataclass(frozen=True)
class DigitSplit:
    """The digits in two disjoint parts with the same share of every digit.

    Both are ``datasets.Dataset`` objects in TRL's prompt/completion format with the columns
    ``images`` (a list of one 8x8 RGB picture), ``prompt`` (always :data:`PROMPT`) and ``completion``
    (``"0"`` to ``"9"``).
    """

    train: datasets.Dataset
    held_out: datasets.Dataset


def load_digit_split() -> DigitSplit:
    """Load the digits and keep 360 of them out of training, stratified by digit; the split is always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, rest = train_test_split(list(range(len(labels))), test_size=_HELD_OUT, random_state=0, stratify=labels)
    return DigitSplit(train=_dataset(pixels, labels, train), held_out=_dataset(pixels, labels, rest))


def to_image(ink: NDArray[np.float64]) -> Image:
    """Return one digit as an 8x8 RGB picture, white on black.

    Args:
        ink: 64 values in row order, each 0 (blank) to 16 (full ink).
    """
    import numpy as np
    from PIL import Image

    grey = np.rint(ink.reshape(IMAGE_SIDE, IMAGE_SIDE) * (255 / _MAX_INK)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def to_grey(image: Image) -> tuple[tuple[int, ...], ...]:
    """Return the picture as rows of grey levels, 0 (black) to 255 (white), for a report to draw."""
    grey = image.convert("L")
    flat: list[int] = list(grey.tobytes())
    return tuple(tuple(flat[at : at + grey.width]) for at in range(0, len(flat), grey.width))


def _dataset(pixels: NDArray[np.float64], labels: NDArray[np.int64], rows: Sequence[int]) -> datasets.Dataset:
    from datasets import Dataset, Features, Image, List, Value

    columns: dict[str, list[Any]] = {
        "images": [[to_image(pixels[row])] for row in rows],
        "prompt": [PROMPT] * len(rows),
        "completion": [str(labels[row]) for row in rows],
    }
    features = Features({"images": List(Image()), "prompt": Value("string"), "completion": Value("string")})
    return Dataset.from_dict(columns, features=features)
