"""One batch of a trainer's data, made without touching its sampler or any random state."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.data.sample_rows import spread_rows
from graftkit.families import IGNORED_LABEL

if TYPE_CHECKING:
    from peft import PeftModel

# Rows to choose from, spread over the data, so that the batch has every modality of the data.
_CANDIDATES = 32
# What TRL's preference collators add for the trainer's own use (trl.trainer.dpo_trainer.DPOTrainer._compute_loss).
_NOT_FOR_THE_MODEL = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps"})
_MEDIA = ("image", "video", "audio")


def real_batch(loader: Any, model: PeftModel, processor: Any, *, rows: int) -> dict[str, Any] | None:
    """Return keyword arguments for the model, made of the trainer's data by the trainer's collator.

    For supervised data this is the batch that the trainer makes of these rows; for preferences, the chosen and the
    rejected texts with labels on the completions; for prompts alone, the prompts with a label on every token.
    Of rows with several packed samples it is the longest one: with a cache, models do not separate them.

    Args:
        loader: the trainer's data loader. It is not iterated: rows are taken from its dataset.
        model: arguments that its forward pass does not take are left out.
        processor: tokenizes prompts.
        rows: how many rows, at most.

    Returns:
        tensors of shape (rows, …), or (2 * rows, …) for preferences; None if the data cannot be read without
        consuming it.
    """
    with preserve_random_state():
        chosen = _chosen_rows(loader.dataset, rows, _CANDIDATES)
        made = _model_inputs(loader, chosen, processor) if chosen else None
    return None if made is None else _accepted(_unpacked(made), model)


def real_batches(loader: Any, model: PeftModel, processor: Any, *, rows: int, most: int) -> list[dict[str, Any]]:
    """Return batches as ``real_batch`` does, of rows that are spread over the data; packed rows stay whole.

    They are the same in every process, and the first one has every kind of content that the rows have. None of
    them lets the model keep a cache, as TRL's losses do not.

    Args:
        rows: rows a batch, at most.
        most: rows in all, at most.

    Returns:
        An empty list if the data cannot be read without consuming it.
    """
    with preserve_random_state():
        chosen = _chosen_rows(loader.dataset, most, most)
        parts = [chosen[start : start + rows] for start in range(0, len(chosen), rows)]
        made = [_model_inputs(loader, part, processor) for part in parts]
    return [_accepted({**batch, "use_cache": False}, model) for batch in made if batch is not None]


def _model_inputs(loader: Any, rows: list[Any], processor: Any) -> dict[str, Any] | None:
    """Return what the trainer makes of the rows, with labels; None for batches of an unknown kind."""
    collated = loader.collate_fn(rows)
    if isinstance(collated, Mapping):
        return _with_labels(collated)
    if isinstance(collated, Sequence) and collated and "prompt" in collated[0]:
        return _from_prompts(collated, processor)
    return None


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's global random states at the end."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _chosen_rows(dataset: Any, rows: int, candidates: int) -> list[Any]:
    """Return rows that together have every kind of content that so many candidates have, those kinds first."""
    found = spread_rows(dataset, candidates)
    chosen: list[Any] = []
    covered: set[str] = set()
    for row in found:
        if len(chosen) < rows and not _kinds(row) <= covered:
            chosen.append(row)
            covered |= _kinds(row)
    rest = (row for row in found if not any(row is taken for taken in chosen))
    # A collator may change its rows, and a dataset that is a plain list would keep the change.
    return [dict(row) if isinstance(row, Mapping) else row for row in [*chosen, *rest][:rows]]


def _kinds(row: Any) -> set[str]:
    """Return the columns that are not empty, and the kinds of media in the row's messages."""
    if not isinstance(row, Mapping):
        return set()
    filled = {name for name, value in row.items() if value is not None and not _is_empty(value)}
    return filled | {kind for value in row.values() if isinstance(value, list) for kind in _media(value)}


def _is_empty(value: Any) -> bool:
    return isinstance(value, (str, list, dict)) and not value


def _media(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type") in _MEDIA:
                yield str(part["type"])


def _with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a mask of the completions by labels on them."""
    if "completion_mask" not in batch or "labels" in batch:
        return dict(batch)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED_LABEL)
    return {**{name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}, "labels": labels}


def _unpacked(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the longest sample alone, if positions that restart at 0 show that a row holds several.

    Sources: ``transformers.masking_utils.find_packed_sequence_indices``, which is left out with a cache;
    ``trl.trainer.sft_trainer.DataCollatorForLanguageModeling``.
    """
    positions = batch.get("position_ids")
    if positions is None or positions.ndim != 2 or not bool((positions[:, 1:] == 0).any()):
        return batch
    row, start, end = max(_samples(positions.tolist()), key=lambda sample: sample[2] - sample[1])
    by_token = {n: v for n, v in batch.items() if getattr(v, "shape", None) == positions.shape}
    return {name: value[row : row + 1, start:end] for name, value in by_token.items()}


def _samples(positions: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    """Yield (row, start, end) of every sample."""
    for row, places in enumerate(positions):
        starts = [at for at, place in enumerate(places) if place == 0 or at == 0]
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            yield row, start, end


def _from_prompts(rows: Sequence[Mapping[str, Any]], processor: Any) -> dict[str, Any]:
    """Return the rows' prompts as the model's inputs, with a label on each of their tokens."""
    prompts = [_prompt(row) for row in rows]
    if isinstance(prompts[0], str):
        made = processor(text=prompts, padding=True, return_tensors="pt")
    else:
        made = processor.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, padding=True, return_dict=True, return_tensors="pt"
        )
    batch = dict(made)
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    return {**batch, "labels": labels}


def _prompt(row: Mapping[str, Any]) -> Any:
    """Return the row's prompt with its images in its messages, as TRL's GRPO puts them there."""
    from trl.data_utils import prepare_multimodal_messages

    images = row.get("images") or ([row["image"]] if row.get("image") is not None else None)
    if images is None or isinstance(row["prompt"], str):
        return row["prompt"]
    return prepare_multimodal_messages(row["prompt"], images=images)


def _accepted(batch: Mapping[str, Any], model: PeftModel) -> dict[str, Any]:
    """Leave out what the model's forward does not take, if its signature says what it takes."""
    base: Any = model.get_base_model()
    parameters = inspect.signature(type(base).forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(batch)
    return {name: value for name, value in batch.items() if name in parameters}
