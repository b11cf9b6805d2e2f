"""Moshi: two audio streams and one of text, and a depth decoder trained on all three."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftkit.families._base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_TOKENS = 8


def _example_inputs(
    model: PreTrainedModel, batch_size: int, generator: torch.Generator, _modalities: frozenset[str]
) -> dict[str, torch.Tensor]:
    """Return text tokens and both streams' audio codes, with labels for text and for audio.

    Shapes, for ``batch_size`` B, T steps and Q codebooks, all int64: ``input_ids``, ``attention_mask`` and
    ``text_labels`` (B, T); ``user_audio_codes``, ``moshi_audio_codes`` and ``audio_labels`` (B, Q, T). The
    audio encoder turns waveforms into codes and gets no gradient from the loss; codes skip it. The text-only
    model takes ``labels`` instead.
    """
    import torch

    config = model.config
    text = torch.randint(3, config.vocab_size, (batch_size, _TOKENS), generator=generator)
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    if not hasattr(model, "depth_decoder"):
        return {**batch, "labels": text.clone()}
    shape = (batch_size, config.num_codebooks, _TOKENS)

    def codes() -> torch.Tensor:
        return torch.randint(0, config.audio_vocab_size, shape, generator=generator)

    # The depth decoder is given the batch's mask for its own, differently shaped input: leave it out.
    del batch["attention_mask"]
    return {
        **batch,
        "user_audio_codes": codes(),
        "moshi_audio_codes": codes(),
        "text_labels": text.clone(),
        "audio_labels": codes(),
    }


FAMILY = Family(name="moshi", model_types=("moshi",), example_inputs=_example_inputs)
