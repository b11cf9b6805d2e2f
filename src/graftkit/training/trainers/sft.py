"""Supervised fine-tuning through TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftkit.training.trainers.assistant_mask import RestoreChatTemplate, check_template, template_for
from graftkit.training.trainers.audio_collator import AudioCollator, read_audio_at
from graftkit.training.trainers.inputs import TrainerInputs

if TYPE_CHECKING:
    from trl import SFTTrainer


def sft_trainer(inputs: TrainerInputs) -> SFTTrainer:
    """Make TRL's trainer, with a collator for audio and a template that marks what the assistant says.

    Raises:
        TrainingError: ``no-chat-template``: messages, and no template for them or for the loss that is asked for.
    """
    from trl import SFTTrainer

    processor, kwargs = inputs.base.processor, inputs.kwargs
    template = _marked_template(inputs)
    if template is not None:
        kwargs["callbacks"].append(RestoreChatTemplate(processor))
        processor.chat_template = template
    if "audio" in inputs.data.modalities:
        kwargs |= _audio_kwargs(inputs, template)
    trainer = SFTTrainer(**kwargs)
    if template is not None:
        _keep_template(trainer, template)
    return trainer


def _marked_template(inputs: TrainerInputs) -> str | None:
    """Return the template to train with, or None for TRL's choice: where the user names one, TRL reads it."""
    args, data, processor = inputs.args, inputs.data, inputs.base.processor
    if args.chat_template_path is not None:
        return None
    check_template(processor, data.train)
    audio_messages = "audio" in data.modalities and "messages" in data.train.column_names
    return template_for(processor, data.train) if args.assistant_only_loss or audio_messages else None


def _audio_kwargs(inputs: TrainerInputs, template: str | None) -> dict[str, Any]:
    """Pass the rows as they are to our collator: TRL does not support audio."""
    args, data, processor = inputs.args, inputs.data, inputs.base.processor
    args.remove_unused_columns = False
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", 16_000)
    completion_only = args.completion_only_loss is not False
    return {
        "train_dataset": read_audio_at(data.train, rate),
        "eval_dataset": read_audio_at(data.held_out, rate) if data.held_out is not None else None,
        "data_collator": AudioCollator(processor, rate, template, args.dataset_text_field, completion_only),
    }


def _keep_template(trainer: Any, template: str) -> None:
    """Keep the template for batches and evaluations after the processor's own is restored."""
    trainer.chat_template = template
    if hasattr(trainer.data_collator, "chat_template") and not isinstance(trainer.data_collator, AudioCollator):
        trainer.data_collator.chat_template = template
