"""Supervised fine-tuning through TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftkit.training.data.audio_collator import AudioCollator, at_rate
from graftkit.training.data.load import Data
from graftkit.training.model import Base
from graftkit.training.trainers.assistant_mask import OwnTemplate, check_template, marked_template

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import SFTTrainer


def sft_trainer(base: Base, data: Data, args: Any, callbacks: Sequence[TrainerCallback]) -> SFTTrainer:
    """TRL's trainer for this base and data; it attaches the planned adapter itself.

    Raises:
        TrainingError: ``no-chat-template``: messages, and no template for them or for the loss that is asked for.
    """
    from trl import SFTTrainer

    if args.chat_template_path is None:
        check_template(base.processor, data.train)
    sound = "audio" in data.modalities
    marked = _marked(base, data, args) if args.assistant_only_loss or (sound and _has_messages(data)) else None
    if marked is not None:
        callbacks = [*callbacks, OwnTemplate(base.processor)]
        base.processor.chat_template = marked
    if sound:
        _leave_rows_alone(args)
    rate = getattr(getattr(base.processor, "feature_extractor", None), "sampling_rate", 16_000)
    whole = args.completion_only_loss is False
    collator = AudioCollator(base.processor, rate, marked, args.dataset_text_field, not whole) if sound else None
    trainer = SFTTrainer(
        model=base.model,
        args=args,
        train_dataset=at_rate(data.train, rate) if sound else data.train,
        eval_dataset=at_rate(data.held_out, rate) if sound and data.held_out is not None else data.held_out,
        processing_class=base.processor,
        peft_config=base.peft_config,
        callbacks=list(callbacks),
        data_collator=collator,
    )
    if marked is not None:
        _keep(trainer, marked)
    return trainer


def _has_messages(data: Data) -> bool:
    return "messages" in data.train.column_names


def _marked(base: Base, data: Data, args: Any) -> str | None:
    """None where the user names a template, which TRL reads itself."""
    return None if args.chat_template_path is not None else marked_template(base.processor, data.train)


def _leave_rows_alone(args: Any) -> None:
    """Sound, which TRL does not know, goes to our collator as it is."""
    args.remove_unused_columns = False
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}


def _keep(trainer: Any, template: str) -> None:
    """For the batches and evaluations to come, when the processor has its own template back."""
    trainer.chat_template = template
    if hasattr(trainer.data_collator, "chat_template") and not isinstance(trainer.data_collator, AudioCollator):
        trainer.data_collator.chat_template = template
