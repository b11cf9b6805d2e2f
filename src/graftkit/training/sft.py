"""Supervised fine-tuning through TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftkit.training.audio import AudioCollator
from graftkit.training.base import Base
from graftkit.training.data import Data

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import SFTTrainer


def sft_trainer(base: Base, data: Data, args: Any, callbacks: Sequence[TrainerCallback]) -> SFTTrainer:
    """TRL's trainer for this base and data; it attaches the planned adapter itself."""
    from trl import SFTTrainer

    return SFTTrainer(
        model=base.model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=base.processor,
        peft_config=base.peft_config,
        callbacks=list(callbacks),
        data_collator=_collator(base, data, args),
    )


def _collator(base: Base, data: Data, args: Any) -> AudioCollator | None:
    """None leaves the choice to TRL; for sound, which it does not know, rows go to our collator as they are."""
    if "audio" not in data.modalities:
        return None
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    args.remove_unused_columns = False
    args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
    template = getattr(base.processor, "chat_template", None)
    marked = template is None or has_generation_markers(template)
    rate = getattr(getattr(base.processor, "feature_extractor", None), "sampling_rate", 16_000)
    return AudioCollator(base.processor, rate, None if marked else get_training_chat_template(base.processor))
