"""The sequences of tokens that TRL makes of rows, before it cuts them.

Sources: ``_prepare_dataset`` of ``trl.SFTTrainer`` and ``trl.DPOTrainer``, and the collators for images of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.checks.engine.context import UndecidableError
from graftkit.families import IGNORED_LABEL
from graftkit.recipes.row_options import RowOptions
from graftkit.recipes.trainers import TrainerName
from graftkit.text import describe

Row = Mapping[str, Any]
_IMAGES = ("image", "images")
_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")


@dataclass(frozen=True)
class TokenSequence:
    """One sequence.

    Attributes:
        learned: for each token, whether it counts in the loss.
        media: for each token, whether it stands for a part of an image, a video or a sound; empty without any.
    """

    learned: Sequence[bool]
    media: Sequence[bool] = ()

    def __len__(self) -> int:
        return len(self.learned)


@dataclass(frozen=True)
class Tokenizer:
    """What rows are tokenized with.

    Attributes:
        processing_class: the tokenizer or processor that the trainer has.
        template: a chat template instead of its own, or None.
    """

    processing_class: Any
    options: RowOptions
    template: str | None = None

    def sequences(self, rows: Sequence[Row], trainer: str) -> list[tuple[TokenSequence, ...]]:
        """Return each row's sequences, as they are before anything is cut: two of a preference, else one.

        Raises:
            UndecidableError: a row cannot be tokenized.
        """
        make = self._maker(rows[0], trainer)
        found = []
        for at, row in enumerate(rows):
            try:
                found.append(make(dict(row)))
            except Exception as error:  # templates and image processors may raise anything
                raise UndecidableError(
                    f"row {at + 1} of the sample cannot be tokenized: {describe(error)}"
                ) from error
        return found

    def _maker(self, first: Row, trainer: str) -> Callable[[dict[str, Any]], tuple[TokenSequence, ...]]:
        pictures = any(name in first for name in _IMAGES)
        if trainer == TrainerName.DPO:
            return self._preferences_with_images if pictures else self._preferences(first)
        return self._with_images(first) if pictures else self._text(first)

    def _text(self, first: Row) -> Callable[[dict[str, Any]], tuple[TokenSequence, ...]]:
        from trl.data_utils import is_conversational, maybe_convert_to_chatml

        # As in TRL, the first row decides what all rows are.
        first = maybe_convert_to_chatml(dict(first))
        conversational, pairs = is_conversational(first), "prompt" in first and "completion" in first
        completion_only = pairs if self.options.completion_only is None else self.options.completion_only

        def make(row: dict[str, Any]) -> tuple[TokenSequence, ...]:
            row = maybe_convert_to_chatml(row)
            whole = row["prompt"] + row["completion"] if pairs else row["messages"] if conversational else None
            if whole is None:
                whole = row[self.options.text_field]
            mask = conversational and self.options.assistant_only
            tokens = self._encoded(whole if conversational else self._ended(whole), row, assistant_mask=mask)
            learned = [bool(flag) for flag in tokens.get("assistant_masks", [1] * len(tokens["input_ids"]))]
            if pairs and completion_only:
                start = self._prompt_length(row, tokens["input_ids"])
                learned = [at >= start and flag for at, flag in enumerate(learned)]
            return (TokenSequence(learned),)

        return make

    def _preferences(self, first: Row) -> Callable[[dict[str, Any]], tuple[TokenSequence, ...]]:
        from trl.data_utils import extract_prompt, is_conversational

        has_prompt = "prompt" in first
        conversational = is_conversational(first if has_prompt else extract_prompt(dict(first)))

        def make(row: dict[str, Any]) -> tuple[TokenSequence, ...]:
            row = row if has_prompt else {**row, **extract_prompt(row)}
            wholes = [row["prompt"] + row[name] for name in ("chosen", "rejected")]
            ids = [self._encoded(w if conversational else self._ended(w), row)["input_ids"] for w in wholes]
            start = min(self._prompt_length(row, found) for found in ids)
            return tuple(TokenSequence([at >= start for at in range(len(found))]) for found in ids)

        return make

    def _prompt_length(self, row: Row, ids: Sequence[int]) -> int:
        """Return where the completion begins: where the prompt alone and the whole row differ."""
        from trl.data_utils import common_prefix_length

        options = {"add_generation_prompt": True} if isinstance(row["prompt"], list) else {}
        return int(common_prefix_length(self._encoded(row["prompt"], row, **options)["input_ids"], ids))

    def _ended(self, text: str) -> str:
        eos: str = getattr(self.processing_class, "tokenizer", self.processing_class).eos_token
        return text if text.endswith(eos) else text + eos

    def _encoded(self, content: Any, row: Row, *, assistant_mask: bool = False, **options: Any) -> dict[str, Any]:
        """Encode a text or a conversation. Source: ``trl.data_utils._tokenize``."""
        from transformers import ProcessorMixin
        from trl.data_utils import prepare_multimodal_messages

        is_processor = isinstance(self.processing_class, ProcessorMixin)
        if isinstance(content, str):
            encoded = self.processing_class(text=content)
        else:
            tools = row.get("tools")
            encoded = self.processing_class.apply_chat_template(
                prepare_multimodal_messages(content) if is_processor else content,
                chat_template=self.template,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=assistant_mask,
                **options,
                **(row.get("chat_template_kwargs") or {}),
            )
        return {name: value[0] for name, value in encoded.items()} if is_processor else dict(encoded)

    def _with_images(self, first: Row) -> Callable[[dict[str, Any]], tuple[TokenSequence, ...]]:
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        pairs = "prompt" in first and "completion" in first
        collate = DataCollatorForVisionLanguageModeling(
            processor=self.processing_class,
            max_length=None,
            completion_only_loss=pairs if self.options.completion_only is None else self.options.completion_only,
            dataset_text_field=self.options.text_field,
            assistant_only_loss=self.options.assistant_only,
            chat_template=self.template,
        )

        def make(row: dict[str, Any]) -> tuple[TokenSequence, ...]:
            batch = collate([row])
            return self._of_batch(batch, batch["labels"] != IGNORED_LABEL)

        return make

    def _preferences_with_images(self, row: dict[str, Any]) -> tuple[TokenSequence, ...]:
        from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

        batch = DataCollatorForVisionPreference(processor=self.processing_class, max_length=None)([row])
        return self._of_batch(batch, batch["completion_mask"] == 1)

    def _of_batch(self, batch: Mapping[str, Any], learned: Any) -> tuple[TokenSequence, ...]:
        import torch

        ids, present = batch["input_ids"], batch["attention_mask"].bool()
        known = [getattr(self.processing_class, name, None) for name in _PLACEHOLDERS]
        media = torch.isin(ids, torch.tensor([token for token in known if token is not None], dtype=ids.dtype))
        # Padding, which only makes the two sequences of a preference equally long, is left out.
        places = zip(learned, media, present, strict=True)
        return tuple(TokenSequence(flags[at].tolist(), taken[at].tolist()) for flags, taken, at in places)


def prepared_sequences(rows: Sequence[Row]) -> list[tuple[TokenSequence, ...]] | None:
    """Return the sequences of rows that a trainer has tokenized already; None for rows of text.

    Those of preferences are whole; others have been cut.
    """
    if "prompt_ids" in rows[0]:
        return [tuple(_completed(row, name) for name in ("chosen_ids", "rejected_ids")) for row in rows]
    if "input_ids" in rows[0]:
        return [(TokenSequence([label != IGNORED_LABEL for label in _labels(row)]),) for row in rows]
    return None


def _completed(row: Row, name: str) -> TokenSequence:
    return TokenSequence([False] * len(row["prompt_ids"]) + [True] * len(row[name]))


def _labels(row: Row) -> Sequence[int]:
    labels: Sequence[int] = row["labels"] if row.get("labels") is not None else row["input_ids"]
    return labels
