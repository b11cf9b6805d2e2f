"""Check that a model computes the same with and without a cache.

## Why it matters

Training runs without a cache and generation with one: the model that is used then differs from the one that was
trained.

## Example

Gemma 4 E2B before transformers 5.5.2: layers that share keys and values found them in the cache alone, and
without one the loss was 16.2 instead of 6.8.

## How safe that is

An adapter trained before the upgrade was trained against other activations: train it again.

## Sources

- https://github.com/huggingface/transformers/issues/45242
- https://github.com/huggingface/transformers/pull/45312
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.probes.forward import compare, difference, logits_of, tolerance
from graftkit.checks.probes.text_batches import generates, reason_without_text, text_rows
from graftkit.findings import Severity
from graftkit.modeling.device import on_device_of
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.outputs import outputs_of

if TYPE_CHECKING:
    from peft import PeftModel

_TOKENS = 8


def _check(context: CheckContext) -> Observation:
    model = context.model
    base: Any = model.get_base_model()
    if not generates(base):
        return passed("the model generates nothing, so it has no cache")
    without = outputs_of(model, {**context.batch, "use_cache": False})
    whole = compare(without, outputs_of(model, {**context.batch, "use_cache": True})).difference
    allowed = tolerance(model)
    evidence: dict[str, Any] = {"difference": whole, "tolerance": allowed}
    if not whole <= allowed:
        return failed(f"logits with and without a cache differ by {whole:.1e}", **evidence)
    if base.config.is_encoder_decoder:
        step = _next_of_decoder(model, context.batch)
    elif reason_without_text(model) is not None or not _generates_as_usual(base):
        step = None
    else:
        prompt, step = _one_step(model)
        if not prompt <= allowed:
            message = f"logits with and without a cache differ by {whole:.1e}; later tokens change earlier ones"
            return passed(message, **evidence)
    if step is None:
        return passed(f"logits with and without a cache differ by {whole:.1e}", **evidence)
    evidence["difference_of_next_token"] = step
    if not step <= allowed:
        return failed(f"the next token's logits from the cache differ by {step:.1e}", **evidence)
    return passed(
        f"logits differ by {whole:.1e}, those of the next token from the cache by {step:.1e}", **evidence
    )


def _generates_as_usual(base: Any) -> bool:
    """Check whether ``generate`` is transformers' own, so that a token's logits come from the tokens before it."""
    from transformers import GenerationMixin

    return type(base).generate is GenerationMixin.generate


def _one_step(model: PeftModel) -> tuple[float, float]:
    """Return how far the logits of the first and of the second generated token are from those of one full pass.

    Only the second uses the cache. The first shows whether the full pass sees what generation sees: in a model
    that is not causal it does not.
    """
    import torch

    prompt = text_rows(model, [_TOKENS])[0]
    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about options in the model's generation settings
        made = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    whole = logits_of(model, {"input_ids": made.sequences[:, :-1], "use_cache": False})
    first, second = (logits.float().cpu() for logits in made.logits)
    return difference(whole[:, -2], first), difference(whole[:, -1], second)


def _next_of_decoder(model: PeftModel, batch: Mapping[str, Any]) -> float | None:
    """Return how far a decoder's logits of the last token from the cache are from those of one full pass.

    None where the batch has no tokens for the decoder, or one pass hands no cache to the next.
    """
    import torch

    batch = on_device_of(model, batch)
    given = {name: value for name, value in batch.items() if name != "labels" and not name.startswith("decoder_")}
    ids = batch.get("decoder_input_ids")
    if ids is None and "labels" in batch:
        ids = batch["labels"].clamp_min(0)  # any tokens do, and one that the loss ignores is none
    if ids is None or ids.ndim != 2 or ids.shape[1] < 2:
        return None
    whole = logits_of(model, {**given, "decoder_input_ids": ids, "use_cache": False})
    with evaluating(model), torch.no_grad():
        before = model(**given, decoder_input_ids=ids[:, :-1], use_cache=True)
        if getattr(before, "past_key_values", None) is None:
            return None
        last = {**given, "decoder_input_ids": ids[:, -1:], "past_key_values": before.past_key_values}
        return difference(whole[:, -1:], logits_of(model, {**last, "use_cache": True}))


RULE = Rule(
    code="GK201",
    title="logits are the same with and without a cache",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    help="upgrade transformers",
    since="0.1.0",
)
