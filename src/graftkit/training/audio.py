"""A collator for samples with sound, which TRL has none for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_IGNORED = -100


@dataclass(frozen=True)
class AudioCollator:
    """Rows of sound and text -> a batch with labels.

    A row has ``audio`` (one) or ``audios`` (several): float arrays of samples in [-1, 1], or what a ``datasets``
    audio column gives. Its text is ``prompt`` and ``completion``, as strings with the processor's placeholders or
    as messages, or ``messages`` alone; only the completion, or the assistant's turns, are learned.

    Attributes:
        processor: a transformers processor that takes ``text`` and ``audio``.
        sampling_rate: of the arrays, in Hz.
        chat_template: instead of the processor's own; for ``messages`` it marks what the assistant says.
    """

    processor: Any
    sampling_rate: int = 16_000
    chat_template: str | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch: ids, mask and labels of shape (B, T), and the processor's features."""
        sounds = [self._sounds(row) for row in rows]
        if "messages" in rows[0]:
            return self._from_messages(rows, sounds)
        texts = [self._texts(row, len(sound)) for row, sound in zip(rows, sounds, strict=True)]
        return self._from_texts([t[0] for t in texts], [t[1] for t in texts], sounds)

    def _sounds(self, row: Mapping[str, Any]) -> list[Any]:
        given = row["audios"] if "audios" in row else [row["audio"]]
        return [_samples(sound) for sound in given]

    def _texts(self, row: Mapping[str, Any], sounds: int) -> tuple[str, str]:
        if isinstance(row["prompt"], str):
            return row["prompt"], row["completion"]
        prompt = _with_sounds(row["prompt"], sounds)
        before = self._render(prompt, add_generation_prompt=True)
        whole = self._render([*prompt, *_with_sounds(row["completion"], 0)])
        return before, whole.removeprefix(before)

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = self.processor.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, **options
        )
        return text

    def _from_texts(self, prompts: list[str], completions: list[str], sounds: list[list[Any]]) -> dict[str, Any]:
        import torch
        from trl.trainer.utils import flush_left

        common = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        flat = [sound for row in sounds for sound in row]
        before = self.processor(
            text=prompts, audio=flat, padding_side="left", sampling_rate=self.sampling_rate, **common
        )
        after = self.processor(text=completions, padding_side="right", **common)
        # Beside ids and mask there may be token types: whatever is as long as the prompt is continued.
        along = [name for name, value in before.items() if value.shape == before["input_ids"].shape]
        joined = {n: torch.cat((before[n], after.get(n, torch.zeros_like(after["input_ids"]))), 1) for n in along}
        learned = torch.cat((torch.zeros_like(before["attention_mask"]), after["attention_mask"]), 1)
        others = [name for name in along if name != "attention_mask"]
        mask, learned, *rest = flush_left(joined["attention_mask"], learned, *(joined[name] for name in others))
        batch = {**before, **dict(zip(others, rest, strict=True)), "attention_mask": mask}
        return {**batch, "labels": batch["input_ids"].masked_fill(learned == 0, _IGNORED)}

    def _from_messages(self, rows: Sequence[Mapping[str, Any]], sounds: list[list[Any]]) -> dict[str, Any]:
        output = self.processor.apply_chat_template(
            [_filled(row["messages"], sound) for row, sound in zip(rows, sounds, strict=True)],
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "padding": True,
                "padding_side": "right",
                "return_tensors": "pt",
                "add_special_tokens": False,
                "sampling_rate": self.sampling_rate,
            },
        )
        batch = dict(output)
        learned = batch.pop("assistant_masks")
        return {**batch, "labels": batch["input_ids"].masked_fill(learned == 0, _IGNORED)}


def _samples(sound: Any) -> Any:
    """The array of a ``datasets`` audio value, old form or new, or the array itself."""
    import numpy as np

    if hasattr(sound, "get_all_samples"):
        return sound.get_all_samples().data.numpy().mean(0)
    return np.asarray(sound["array"] if isinstance(sound, Mapping) else sound, dtype=np.float32)


def _with_sounds(messages: Sequence[Mapping[str, Any]], sounds: int) -> list[dict[str, Any]]:
    """The messages with that many placeholders before the first user's text, where they have none of their own."""
    told = [{**m, "content": _blocks(m["content"])} for m in messages]
    present = sum(block["type"] == "audio" for m in told for block in m["content"])
    first = next((m for m in told if m["role"] == "user"), None)
    if first is not None and not present:
        first["content"] = [*({"type": "audio"} for _ in range(sounds)), *first["content"]]
    return told


def _blocks(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _filled(messages: Sequence[Mapping[str, Any]], sounds: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages with the sounds themselves in their placeholders, in order."""
    waiting = iter(sounds)
    told = _with_sounds(messages, len(sounds))
    for message in told:
        message["content"] = [
            {"type": "audio", "audio": next(waiting)} if block["type"] == "audio" else block
            for block in message["content"]
        ]
    return told
