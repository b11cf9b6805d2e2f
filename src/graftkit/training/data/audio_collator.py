"""Samples with sound, read when they are asked for, and a collator for them, which TRL has none for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from graftkit.errors import DataError
from graftkit.training.data.audio_columns import columns_of_files
from graftkit.training.data.audio_file import SoundFile

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

_IGNORED = -100


@dataclass(frozen=True)
class AudioCollator:
    """Rows of sound and text -> a batch with labels.

    A row has ``audio`` (one) or ``audios`` (several): float arrays of samples in [-1, 1], or mappings with
    ``array`` and ``sampling_rate``. Its text is ``prompt`` and ``completion``, as strings with the processor's
    placeholders or as messages, or ``messages`` or ``text`` alone. The completion, or the assistant's turns, are
    learned; of ``text`` everything but the placeholders.

    As in TRL's collator for pictures, strings are taken as they are: a completion spells its own end. Nothing is
    cut to a ``max_length``, which would part sounds from their tokens.

    Attributes:
        processor: a transformers processor that takes ``text`` and ``audio``.
        sampling_rate: of the arrays, in Hz.
        chat_template: instead of the processor's own; for ``messages`` it marks what the assistant says.
        text_field: the column of plain text.
        completion_only: whether a prompt stays out of the loss; the sound's tokens always do.
    """

    processor: Any
    sampling_rate: int = 16_000
    chat_template: str | None = None
    text_field: str = "text"
    completion_only: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch: ids, mask and labels of shape (B, T), and the processor's features.

        Raises:
            DataError: ``data-audio``: sounds of another rate than the processor's, or more or fewer than the text
                has places for.
        """
        sounds = [self._sounds(row) for row in rows]
        if "messages" in rows[0]:
            return self._from_messages(rows, sounds)
        if "prompt" not in rows[0]:
            return self._from_plain([row[self.text_field] for row in rows], sounds)
        texts = [self._texts(row, len(sound)) for row, sound in zip(rows, sounds, strict=True)]
        return self._from_texts([t[0] for t in texts], [t[1] for t in texts], sounds)

    def _sounds(self, row: Mapping[str, Any]) -> list[Any]:
        given = row["audios"] if "audios" in row else [row["audio"]]
        return [_samples(sound, self.sampling_rate) for sound in given or () if sound is not None]

    def _texts(self, row: Mapping[str, Any], sounds: int) -> tuple[str, str]:
        from trl.data_utils import common_prefix_length

        if isinstance(row["prompt"], str):
            return row["prompt"], row["completion"]
        prompt = _with_sounds(row["prompt"], sounds)
        before = self._render(prompt, add_generation_prompt=True)
        whole = self._render([*prompt, *_with_sounds(row["completion"], 0)])
        # Where a template renders a prompt alone differently, the completion begins where the two part, as in TRL.
        shared = common_prefix_length(before, whole)
        return whole[:shared], whole[shared:]

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = self.processor.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, **options
        )
        return text

    def _from_texts(self, prompts: list[str], completions: list[str], sounds: list[list[Any]]) -> dict[str, Any]:
        import torch
        from trl.trainer.utils import flush_left

        before = self._processed(prompts, sounds, "left")
        after = self.processor(
            text=completions, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False
        )
        # Beside ids and mask there may be token types: whatever is as long as the prompt is continued.
        along = [name for name, value in before.items() if value.shape == before["input_ids"].shape]
        joined = {n: torch.cat((before[n], after.get(n, torch.zeros_like(after["input_ids"]))), 1) for n in along}
        asked = torch.zeros_like(before["attention_mask"]) if self.completion_only else _of_text(before)
        learned = torch.cat((asked, after["attention_mask"]), 1)
        others = [name for name in along if name != "attention_mask"]
        mask, learned, *rest = flush_left(joined["attention_mask"], learned, *(joined[name] for name in others))
        batch = {**before, **dict(zip(others, rest, strict=True)), "attention_mask": mask}
        return {**batch, "labels": batch["input_ids"].masked_fill(learned == 0, _IGNORED)}

    def _from_plain(self, texts: list[str], sounds: list[list[Any]]) -> dict[str, Any]:
        batch = self._processed(texts, sounds, "right")
        return {**batch, "labels": batch["input_ids"].masked_fill(_of_text(batch) == 0, _IGNORED)}

    def _processed(self, texts: list[str], sounds: list[list[Any]], side: str) -> dict[str, Any]:
        token = getattr(self.processor, "audio_token", None)
        for text, row in zip(texts, sounds, strict=True):
            if isinstance(token, str):
                _check_places(text.count(token), len(row))
        flat = [sound for row in sounds for sound in row]
        return dict(
            self.processor(
                text=texts,
                audio=flat or None,
                padding=True,
                padding_side=side,
                return_tensors="pt",
                add_special_tokens=False,
                sampling_rate=self.sampling_rate,
            )
        )

    def _from_messages(self, rows: Sequence[Mapping[str, Any]], sounds: list[list[Any]]) -> dict[str, Any]:
        output = self.processor.apply_chat_template(
            [_filled(row["messages"], sound) for row, sound in zip(rows, sounds, strict=True)],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs={
                "padding": True,
                "padding_side": "right",
                "add_special_tokens": False,
                "sampling_rate": self.sampling_rate,
            },
        )
        batch = dict(output)
        learned = batch.pop("assistant_masks")
        return {**batch, "labels": batch["input_ids"].masked_fill(learned == 0, _IGNORED)}


def at_rate(rows: Dataset, sampling_rate: int) -> Dataset:
    """The rows with their files of sounds read at this rate, in Hz, whenever a row is asked for.

    Columns of arrays stay as they are.
    """
    names = columns_of_files(rows)
    return rows.with_transform(partial(_read, names=names, sampling_rate=sampling_rate)) if names else rows


def _read(batch: Mapping[str, Any], names: Iterable[str], sampling_rate: int) -> dict[str, Any]:
    return {**batch, **{name: [_heard(sound, sampling_rate) for sound in batch[name]] for name in names}}


def _heard(sound: Any, sampling_rate: int) -> Any:
    """One sound, several or none."""
    if isinstance(sound, list):
        return [_heard(one, sampling_rate) for one in sound]
    return None if sound is None else SoundFile.of(sound, "a row").read(sampling_rate)


def _samples(sound: Any, sampling_rate: int) -> Any:
    """A row's sound as an array: it is one, or has one under ``array``."""
    import numpy as np

    if isinstance(sound, (list, tuple, np.ndarray)):
        return np.asarray(sound, dtype=np.float32)
    if sound["sampling_rate"] != sampling_rate:
        raise DataError(
            f"a sound has {sound['sampling_rate']} samples a second, and the processor takes {sampling_rate}",
            help="name the sound's file instead, which is read at any rate, or resample the array",
            code="data-audio",
        )
    return np.asarray(sound["array"], dtype=np.float32)


def _with_sounds(messages: Sequence[Mapping[str, Any]], sounds: int) -> list[dict[str, Any]]:
    """The messages with that many placeholders before the first user's text, where they have none of their own."""
    told = [{**m, "content": _blocks(m["content"])} for m in messages]
    first = next((m for m in told if m["role"] == "user"), None)
    if first is not None and not _places(told):
        first["content"] = [*({"type": "audio"} for _ in range(sounds)), *first["content"]]
    return told


def _places(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(block["type"] == "audio" for message in messages for block in message["content"])


def _check_places(places: int, sounds: int) -> None:
    if places != sounds:
        raise DataError(
            f"a row has places for {places} sounds, and {sounds} sounds",
            help="as many placeholders as sounds; or none in messages, and the sounds come first",
            code="data-audio",
        )


def _of_text(batch: Mapping[str, Any]) -> Any:
    """(B, T): 1 on tokens of text, 0 on padding and on a sound's."""
    mask, types = batch["attention_mask"], batch.get("mm_token_type_ids")
    return mask if types is None else mask * (types == 0)


def _blocks(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


def _filled(messages: Sequence[Mapping[str, Any]], sounds: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages with the sounds themselves in their placeholders, in order."""
    waiting = iter(sounds)
    told = _with_sounds(messages, len(sounds))
    _check_places(_places(told), len(sounds))
    for message in told:
        message["content"] = [
            {"type": "audio", "audio": next(waiting)} if block["type"] == "audio" else block
            for block in message["content"]
        ]
    return told
