"""One real batch out of a trainer's data, without touching its sampler or any random state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel

# Rows that are looked at, spread over the data, so that the batch holds every modality that the data has.
_CANDIDATES = 32
# What TRL's preference collators add for the trainer's own use (trl.trainer.dpo_trainer.DPOTrainer._compute_loss).
_NOT_FOR_THE_MODEL = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps"})
_MEDIA = ("image", "video", "audio")
_IGNORED = -100


def real_batch(loader: Any, model: PeftModel, processor: Any, *, rows: int) -> dict[str, Any] | None:
    """Keyword arguments for the model, made from the trainer's data by the trainer's own collator.

    For supervised data it is the batch that the trainer makes of these rows. For preferences it is the chosen and
    the rejected texts with labels on the completions; for prompts alone, the prompts with every token learned. Of
    rows with several samples packed into them, it is the longest sample: with a cache, models do not part them.

    Args:
        loader: the trainer's data loader. It is not iterated: rows are taken from its dataset.
        model: decides which keys can be handed on.
        processor: turns prompts into tokens.
        rows: how many rows; fewer where there are fewer.

    Returns:
        tensors of shape (rows, …), or (2 * rows, …) for preferences; None where the data cannot be looked into
        without consuming it.
    """
    with random_state_kept():
        chosen = _chosen_rows(loader.dataset, rows)
        if not chosen:
            return None
        collated = loader.collate_fn(chosen)
        if isinstance(collated, Mapping):
            return _accepted(_unpacked(_with_labels(collated)), model)
        if isinstance(collated, Sequence) and collated and "prompt" in collated[0]:
            return _accepted(_from_prompts(collated, processor), model)
    return None


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's global generators come out as they went in."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _chosen_rows(dataset: Any, rows: int) -> list[Any]:
    """Rows that together hold every kind of content that the rows looked at hold."""
    candidates = _candidates(dataset)
    chosen: list[Any] = []
    covered: set[str] = set()
    for row in candidates:
        if len(chosen) < rows and not _kinds(row) <= covered:
            chosen.append(row)
            covered |= _kinds(row)
    rest = (row for row in candidates if not any(row is taken for taken in chosen))
    # A collator may change the rows it is given, and a plain list of them would keep the change.
    return [dict(row) if isinstance(row, Mapping) else row for row in [*chosen, *rest][:rows]]


def _candidates(dataset: Any) -> list[Any]:
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        size = len(dataset)
        places = sorted({at * size // _CANDIDATES for at in range(_CANDIDATES)}) if size else []
        return [dataset[place] for place in places]
    if hasattr(dataset, "take"):  # a stream of the datasets library: taking begins it anew
        return list(dataset.take(_CANDIDATES))
    inner = getattr(dataset, "dataset", None)
    return _candidates(inner) if inner is not None else []


def _kinds(row: Any) -> set[str]:
    """The columns that hold something, and the kinds of media in its messages."""
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
    """The batch with labels on its completions, where it marks them instead."""
    if "completion_mask" not in batch or "labels" in batch:
        return dict(batch)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, _IGNORED)
    return {**{name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}, "labels": labels}


def _unpacked(batch: dict[str, Any]) -> dict[str, Any]:
    """The longest sample by itself, where positions that begin anew say that a row holds several.

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
    """(row, start, end) of every sample."""
    for row, places in enumerate(positions):
        starts = [at for at, place in enumerate(places) if place == 0 or at == 0]
        for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
            yield row, start, end


def _from_prompts(rows: Sequence[Mapping[str, Any]], processor: Any) -> dict[str, Any]:
    """The rows' prompts as the model's inputs, each of their tokens learned."""
    prompts = [_prompt(row) for row in rows]
    if isinstance(prompts[0], str):
        made = processor(text=prompts, padding=True, return_tensors="pt")
    else:
        made = processor.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
    batch = dict(made)
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, _IGNORED)
    return {**batch, "labels": labels}


def _prompt(row: Mapping[str, Any]) -> Any:
    """The row's prompt, with its pictures in its messages, as TRL's GRPO puts them there."""
    from trl.data_utils import prepare_multimodal_messages

    images = row.get("images") or ([row["image"]] if row.get("image") is not None else None)
    if images is None or isinstance(row["prompt"], str):
        return row["prompt"]
    return prepare_multimodal_messages(row["prompt"], images=images)


def _accepted(batch: Mapping[str, Any], model: PeftModel) -> dict[str, Any]:
    """Without what the model's forward does not take, where it says what it takes."""
    import inspect

    base: Any = model.get_base_model()
    parameters = inspect.signature(type(base).forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(batch)
    return {name: value for name, value in batch.items() if name in parameters}
