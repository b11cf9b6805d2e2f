"""Check that adapters can be trained on the kind of quantization that the base has.

## Why it matters

Kernels for serving have no backward pass: the trainer raises, or nothing is learned.

## Example

A release whose experts are in MXFP4: transformers refuses to train on it.

## How safe that is

Dequantized, the base takes its full 16-bit size.

## Sources

- https://github.com/huggingface/transformers/issues/46736
- transformers: trainer_utils.validate_quantization_for_training
"""

from __future__ import annotations

from collections.abc import Mapping

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity, Source
from graftkit.surveying.sources.quiet import quiet_transformers


def _check(context: CheckContext) -> Observation:
    given = context.config.get("quantization_config")
    if not isinstance(given, Mapping):
        return passed("the base is not quantized")
    kind = str(given.get("quant_method") or "bitsandbytes")
    if given.get("dequantize"):
        return passed(f"the {kind} weights are dequantized while loading", kind=kind)
    try:
        from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

        with quiet_transformers():
            config = AutoQuantizationConfig.from_dict(dict(given))
            # The quantizer that transformers would load the model with; nothing is loaded.
            trainable = AutoHfQuantizer.from_config(config, pre_quantized=True).is_trainable
    except Exception as error:
        # Quantizers need their own packages and devices, and raise errors of every kind without them.
        return unknown(f"{kind}: {type(error).__name__}: {error}", kind=kind)
    if trainable:
        return passed(f"adapters can be trained on a {kind} base", kind=kind)
    return failed(
        f"no adapter can be trained on a {kind} base: transformers refuses to",
        where="quantization_config",
        help=(
            f"load it with quantization_config={type(config).__name__}(dequantize=True)"
            if hasattr(config, "dequantize")
            else "use the release that is not quantized, and quantize that to train on it"
        ),
        kind=kind,
    )


RULE = Rule(
    code="GK304",
    title="adapters can be trained on the quantization of the base",
    severity=Severity.ERROR,
    needs=("config",),
    check=_check,
    help="load it with dequantize=True, or use the release that is not quantized",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
