"""Rows of text for a causal model, and batches of them as collators build them: single, padded, packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftkit.families import IGNORED_LABEL
from graftkit.modeling.entry import parts_to_run

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def reason_without_text(model: PeftModel) -> str | None:
    """Return why rows of plain text do not test this model, or None."""
    base: Any = model.get_base_model()
    if not generates(base):
        return "it generates no text"
    if base.config.is_encoder_decoder:
        return "an encoder-decoder takes its text in two parts"
    if getattr(base.config, "is_decoder", None) is False:
        return "it is an encoder"
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        return "its adapter puts virtual tokens before every row"
    return None


def generates(base: Any) -> bool:
    """Check whether the model generates text with its own forward, not with those of its parts."""
    can_generate = getattr(base, "can_generate", None)
    return callable(can_generate) and bool(can_generate()) and not parts_to_run(base)


def text_rows(model: PeftModel, lengths: Sequence[int], *, seed: int = 0) -> list[torch.Tensor]:
    """Return one row of random text tokens for each length, int64 of shape (1, length), on the model's device.

    Lengths are at most 12. No row has a placeholder of an image or of audio.

    Raises:
        BuildError: ``twin``: no text is known for the model's class.
    """
    from graftkit.twins.example_batch import example_batch

    base: Any = model.get_base_model()
    ids = example_batch(base, batch_size=len(lengths), seed=seed, modalities=["text"])["input_ids"]
    return [row[None, :length] for row, length in zip(ids, lengths, strict=True)]


def single(row: torch.Tensor) -> dict[str, Any]:
    """Return a batch of one sample, (1, T), in which every token is learned."""
    import torch

    return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone(), "use_cache": False}


def padded(rows: Sequence[torch.Tensor], pad: int) -> dict[str, Any]:
    """Return one batch of all samples, (B, T), padded on the right with a token that is masked and not learned."""
    import torch

    width = max(row.shape[1] for row in rows)
    fill = torch.nn.functional.pad
    ids = torch.cat([fill(row, (0, width - row.shape[1]), value=pad) for row in rows])
    mask = torch.cat([fill(torch.ones_like(row), (0, width - row.shape[1])) for row in rows])
    labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def packed_sequences(rows: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return all samples in one row, (1, sum of T): positions restart with each, no attention mask."""
    import torch

    positions = torch.cat([torch.arange(row.shape[1], device=row.device) for row in rows])[None]
    return {"input_ids": torch.cat(list(rows), dim=1), "position_ids": positions, "use_cache": False}


def packed_for_trl(rows: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return :func:`packed_sequences` with the boundaries that TRL's padding-free collator adds, int32.

    Source: ``trl.trainer.sft_trainer.DataCollatorForLanguageModeling.torch_call``.
    """
    import torch

    sizes = torch.tensor([row.shape[1] for row in rows], dtype=torch.int32, device=rows[0].device)
    ends = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    index = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32, device=sizes.device), sizes)[None]
    longest = int(sizes.max())
    return {
        **packed_sequences(rows),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": index,
    }
