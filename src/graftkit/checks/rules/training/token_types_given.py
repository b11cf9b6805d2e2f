"""Check that the batch says which tokens are images, if the model's mask depends on it.

## Why it matters

Some models let the tokens of an image attend to each other in both directions. Without token types they use a
causal mask for all tokens, without an error: training then uses another mask than inference.

## Example

A custom collator passes on `input_ids` and `pixel_values`, and drops the `mm_token_type_ids` that the processor
of Gemma 4 26B returns.

## How safe that is

The key changes the mask to the one that the model was trained with.

## Sources

- transformers: masking_utils.create_causal_mask
- transformers: ProcessorMixin.create_mm_token_type_ids
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.checks.probes.forward import compare, tolerance
from graftkit.findings import Severity
from graftkit.modeling.outputs import outputs_of
from graftkit.text import first_line

if TYPE_CHECKING:
    from torch import Tensor

_KEYS = ("mm_token_type_ids", "token_type_ids")
# What processors write for the tokens of each modality; text is 0 (transformers.ProcessorMixin).
_TYPES = {"image": 1, "video": 2, "audio": 3}
_FLAG = "use_bidirectional_attention"


def _check(context: CheckContext) -> Observation:
    base: Any = context.model.get_base_model()
    key = next((name for name in _KEYS if name in inspect.signature(type(base).forward).parameters), None)
    config = getattr(base, "config", None)
    if key is None or config is None:
        return passed("the model takes no token types")
    types = _types(config, context.batch)
    if types is None or not types.any():
        return passed("the batch has only text tokens", key=key)
    given = context.batch.get(key)
    if given is not None and bool(((given.cpu() > 0) == (types > 0)).all()):
        return passed(f"the batch has {key}", key=key)
    return _compared(context, key, types, config)


def _types(config: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """Return the type of every token, (B, T) int64, by the configuration's placeholders; None without text."""
    import torch

    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        return None
    types = torch.zeros_like(ids, device="cpu")
    for modality, value in _TYPES.items():
        for ending in ("token_id", "token_index"):
            token = getattr(config, f"{modality}_{ending}", None)
            if isinstance(token, int):
                types[ids.cpu() == token] = value
    return types


def _compared(context: CheckContext, key: str, types: Tensor, config: Any) -> Observation:
    right = outputs_of(context.model, {**context.batch, key: types})
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    evidence: dict[str, Any] = {"key": key, _FLAG: getattr(text, _FLAG, None)}
    fault = f"the batch has no {key}" if key not in context.batch else f"{key} marks other tokens than the images'"
    try:
        seen = outputs_of(context.model, context.batch)
    except ValueError as error:
        return failed(f"{fault}: {first_line(error)}", where=key, **evidence)
    apart, allowed = compare(right, seen).difference, tolerance(context.model)
    evidence |= {"difference": apart, "tolerance": allowed}
    if apart > allowed:
        return failed(f"{fault}, and with the right types the logits differ by {apart:.1e}", where=key, **evidence)
    if not _reads(context, key, right, types):
        return passed(f"the logits do not depend on {key}", **evidence)
    return unknown(f"{fault}; the model reads it, and this batch does not show what it does", **evidence)


def _reads(context: CheckContext, key: str, right: Mapping[str, Tensor], types: Tensor) -> bool:
    """Check whether the logits depend on the types at all: on none, or on those of an image in every token."""
    import torch

    for other in (torch.zeros_like(types), torch.ones_like(types)):
        try:
            seen = outputs_of(context.model, {**context.batch, key: other})
        except Exception:  # a model that reads them may fail in any way on types that fit no image
            return True
        if compare(right, seen).difference > tolerance(context.model):
            return True
    return False


RULE = Rule(
    code="GK204",
    title="the batch says which tokens are images",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    help="pass on what the processor returns; return_mm_token_type_ids=True adds the key",
    since="0.1.0",
)
