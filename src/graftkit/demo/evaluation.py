"""Measure what a model reads on the digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.forward import logits_of

if TYPE_CHECKING:
    import datasets
    from torch import nn
    from transformers import ProcessorMixin

_BATCH_SIZE = 128


def model_inputs(processor: ProcessorMixin, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows' prompts and pictures as keyword arguments of the model's forward.

    Args:
        processor: made by :func:`graftkit.demo.processor.digit_processor`.
        rows: columns ``prompt`` and ``images``. All prompts have the same length, so nothing is padded.
    """
    return dict(
        processor(
            text=list(rows["prompt"]),
            images=list(rows["images"]),
            return_tensors="pt",
            add_special_tokens=False,  # the prompt contains them
        )
    )


def predict(model: nn.Module, processor: ProcessorMixin, digits: datasets.Dataset) -> tuple[str, ...]:
    """Return the token that the model finds likeliest after each prompt, out of the whole vocabulary."""
    answers: list[str] = []
    for rows in digits.iter(_BATCH_SIZE):
        likeliest = logits_of(model, model_inputs(processor, rows))[:, -1].argmax(-1)
        answers += processor.tokenizer.convert_ids_to_tokens(likeliest.tolist())
    return tuple(answers)


def accuracy(model: nn.Module, processor: ProcessorMixin, digits: datasets.Dataset) -> float:
    """Return the share of rows, 0 to 1, whose likeliest next token is the row's ``completion``."""
    expected: list[str] = digits["completion"]
    pairs = zip(predict(model, processor, digits), expected, strict=True)
    return sum(answer == right for answer, right in pairs) / len(expected)
