"""Audio samples, read when they are needed, and a collator for them: TRL has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from graftkit.data.audio_columns import file_columns
from graftkit.data.audio_file import AudioFile
from graftkit.errors import DataError
from graftkit.families import IGNORED_LABEL

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


@dataclass(frozen=True)
class AudioCollator:
    """Makes a batch with labels of rows of audio and text.

    A row has ``audio`` (one) or ``audios`` (several): float arrays of samples in [-1, 1], or mappings with
    ``array`` and ``sampling_rate``. Its text is ``prompt`` and ``completion``, as strings with the processor's
    placeholders or as messages, or ``messages`` or ``text`` alone. Labels are on the completion or the
    assistant's turns; of ``text`` on everything but the placeholders.

    As in TRL's collator for images, strings are taken as they are: a completion must contain its end token.
    Nothing is cut to a ``max_length``, which would separate audio from its tokens.

    Attributes:
        processor: a transformers processor that takes ``text`` and ``audio``.
        sampling_rate: of the arrays, in Hz.
        chat_template: instead of the processor's own; for ``messages`` it marks what the assistant says.
        text_field: the column of plain text.
        completion_only: whether a prompt stays out of the loss; audio tokens always do.
    """

    processor: Any
    sampling_rate: int = 16_000
    chat_template: str | None = None
    text_field: str = "text"
    completion_only: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ids, mask and labels of shape (B, T), and the processor's features.

        Raises:
            DataError: ``data-audio``: a sampling rate other than the processor's, or more or fewer arrays than the
                text has placeholders.
        """
        audio = [self._audio(row) for row in rows]
        if "messages" in rows[0]:
            return self._from_messages(rows, audio)
        if "prompt" not in rows[0]:
            batch = self._processed([row[self.text_field] for row in rows], audio, "right")
            return _with_labels(batch, _text_mask(batch))
        texts = [self._texts(row, len(arrays)) for row, arrays in zip(rows, audio, strict=True)]
        return self._from_texts([t[0] for t in texts], [t[1] for t in texts], audio)

    def _audio(self, row: Mapping[str, Any]) -> list[Any]:
        cells = row["audios"] if "audios" in row else [row["audio"]]
        return [_samples(cell, self.sampling_rate) for cell in cells or () if cell is not None]

    def _texts(self, row: Mapping[str, Any], count: int) -> tuple[str, str]:
        from trl.data_utils import common_prefix_length

        if isinstance(row["prompt"], str):
            return row["prompt"], row["completion"]
        prompt = _with_placeholders(row["prompt"], count)
        before = self._render(prompt, add_generation_prompt=True)
        whole = self._render([*prompt, *_with_placeholders(row["completion"], 0)])
        # If a template renders a prompt alone differently, the completion begins where they differ, as in TRL.
        shared = common_prefix_length(before, whole)
        return whole[:shared], whole[shared:]

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = self.processor.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, **options
        )
        return text

    def _from_texts(self, prompts: list[str], completions: list[str], audio: list[list[Any]]) -> dict[str, Any]:
        import torch
        from trl.trainer.utils import flush_left

        before = self._processed(prompts, audio, "left")
        after = self.processor(text=completions, return_tensors="pt", **_padding("right"))
        # Besides ids and mask there may be token types: whatever is as long as the prompt is continued.
        along = [name for name, value in before.items() if value.shape == before["input_ids"].shape]
        joined = {n: torch.cat((before[n], after.get(n, torch.zeros_like(after["input_ids"]))), 1) for n in along}
        prompt = torch.zeros_like(before["attention_mask"]) if self.completion_only else _text_mask(before)
        learned = torch.cat((prompt, after["attention_mask"]), 1)
        others = [name for name in along if name != "attention_mask"]
        mask, learned, *rest = flush_left(joined["attention_mask"], learned, *(joined[name] for name in others))
        batch = {**before, **dict(zip(others, rest, strict=True)), "attention_mask": mask}
        return _with_labels(batch, learned)

    def _processed(self, texts: list[str], audio: list[list[Any]], side: str) -> dict[str, Any]:
        token = getattr(self.processor, "audio_token", None)
        for text, arrays in zip(texts, audio, strict=True):
            if isinstance(token, str):
                _check_placeholders(text.count(token), len(arrays))
        flat = [array for arrays in audio for array in arrays]
        options = {**_padding(side), "sampling_rate": self.sampling_rate}
        return dict(self.processor(text=texts, audio=flat or None, return_tensors="pt", **options))

    def _from_messages(self, rows: Sequence[Mapping[str, Any]], audio: list[list[Any]]) -> dict[str, Any]:
        output = self.processor.apply_chat_template(
            [_filled(row["messages"], arrays) for row, arrays in zip(rows, audio, strict=True)],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs={**_padding("right"), "sampling_rate": self.sampling_rate},
        )
        batch = dict(output)
        return _with_labels(batch, batch.pop("assistant_masks"))


def _padding(side: str) -> dict[str, Any]:
    return {"padding": True, "padding_side": side, "add_special_tokens": False}


def read_audio_at(rows: Dataset, sampling_rate: int) -> Dataset:
    """Read the rows' audio files at this rate, in Hz, whenever a row is taken; arrays stay as they are."""
    names = file_columns(rows)
    return rows.with_transform(partial(_read_files, names=names, sampling_rate=sampling_rate)) if names else rows


def _read_files(batch: Mapping[str, Any], names: Iterable[str], sampling_rate: int) -> dict[str, Any]:
    return {**batch, **{name: [_read_cell(cell, sampling_rate) for cell in batch[name]] for name in names}}


def _read_cell(cell: Any, sampling_rate: int) -> Any:
    if isinstance(cell, list):
        return [_read_cell(one, sampling_rate) for one in cell]
    return None if cell is None else AudioFile.of(cell, "a row").read(sampling_rate)


def _samples(cell: Any, sampling_rate: int) -> Any:
    """Return a cell as an array: it is one, or has one under ``array``."""
    import numpy as np

    if isinstance(cell, (list, tuple, np.ndarray)):
        return np.asarray(cell, dtype=np.float32)
    if cell["sampling_rate"] != sampling_rate:
        raise DataError(
            f"an array has {cell['sampling_rate']} samples a second, and the processor takes {sampling_rate}",
            help="name the audio file instead, which is read at any rate, or resample the array",
            code="data-audio",
        )
    return np.asarray(cell["array"], dtype=np.float32)


def _with_placeholders(messages: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the messages in parts; without any placeholder, put them before the user's first text."""
    in_parts = [{**m, "content": _parts(m["content"])} for m in messages]
    first = next((m for m in in_parts if m["role"] == "user"), None)
    if first is not None and not _placeholders(in_parts):
        first["content"] = [*({"type": "audio"} for _ in range(count)), *first["content"]]
    return in_parts


def _filled(messages: Sequence[Mapping[str, Any]], arrays: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the messages with the arrays in their placeholders, in order."""
    rest = iter(arrays)
    filled = _with_placeholders(messages, len(arrays))
    _check_placeholders(_placeholders(filled), len(arrays))
    for message in filled:
        message["content"] = [
            {"type": "audio", "audio": next(rest)} if part["type"] == "audio" else part
            for part in message["content"]
        ]
    return filled


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


def _placeholders(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(part["type"] == "audio" for message in messages for part in message["content"])


def _check_placeholders(placeholders: int, arrays: int) -> None:
    if placeholders != arrays:
        raise DataError(
            f"a row has {placeholders} placeholders for audio, and {arrays} audio samples",
            help="as many placeholders as audio samples; or none in messages, and the audio comes first",
            code="data-audio",
        )


def _text_mask(batch: Mapping[str, Any]) -> Any:
    """Return (B, T): 1 on tokens of text, 0 on padding and audio."""
    mask, types = batch["attention_mask"], batch.get("mm_token_type_ids")
    return mask if types is None else mask * (types == 0)


def _with_labels(batch: dict[str, Any], learned: Any) -> dict[str, Any]:
    return {**batch, "labels": batch["input_ids"].masked_fill(learned == 0, IGNORED_LABEL)}
