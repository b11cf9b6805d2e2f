"""Which base, tokenizer and versions an adapter was trained with, and what it adapts."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from graftkit.adapters.fingerprints.tokenizer import sample_ids, template_hash
from graftkit.adapters.fingerprints.weights import fingerprint
from graftkit.adapters.record import BaseRecord, PlanRecord, TokenizerRecord
from graftkit.checks.chat.conversations import sample_rendering
from graftkit.checks.probes.live_adapter import adapted_layers, adapter_parameters
from graftkit.env import environment
from graftkit.modeling.sharding import full_shape
from graftkit.serving.signing.vocabulary import Vocabulary
from graftkit.surveying.checkpoint.local_weights import stored_quantization, weights_folder
from graftkit.surveying.quantized import quantization_of
from graftkit.surveying.sources.local import existing_path

if TYPE_CHECKING:
    from peft import PeftModel


def base_record(model: PeftModel, base: str | None, revision: str | None) -> BaseRecord:
    """Return what is known of the base.

    Args:
        base: hub id or folder of its files; None for the one that the model was loaded from.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: its weight files are on this machine, and cannot be read.
    """
    inner: Any = model.get_base_model()
    name = base or _loaded_from(model)
    commit = revision or getattr(inner.config, "_commit_hash", None)
    folder = None if name is None else weights_folder(name, commit)
    return BaseRecord(
        id=name,
        revision=None if name is None or existing_path(name) is not None else commit,
        model_type=getattr(inner.config, "model_type", None),
        quantization=next((q for module in inner.modules() if (q := quantization_of(module))), None),
        stored_quantization=None if folder is None else stored_quantization(folder),
        fingerprint=None if folder is None else fingerprint(folder),
    )


def tokenizer_record(processor: Any, vocabulary: Vocabulary) -> TokenizerRecord:
    """Return what tells a processor's tokenizer, of that vocabulary, and its chat template from others."""
    return TokenizerRecord(
        vocabulary=vocabulary.hash,
        ids=sample_ids(processor),
        template=template_hash(processor),
        rendering=sample_rendering(processor),
    )


def plan_record(model: PeftModel) -> PlanRecord:
    """Return what is adapted, from the live model."""
    config: Any = model.active_peft_config
    layers = adapted_layers(model)
    kept = [path for path in layers if not any(path.startswith(f"{other}.") for other in layers if other != path)]
    return PlanRecord(
        method=str(config.peft_type.value),
        r=getattr(config, "r", None),
        alpha=getattr(config, "lora_alpha", None),
        modules=len(kept),
        parameters=sum(math.prod(full_shape(p)) for p in adapter_parameters(model).values()),
        targets=dict(Counter(path.rpartition(".")[2] for path in kept)),
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = environment()["packages"]
    return {package: version for package, version in found.items() if version is not None}


def _loaded_from(model: PeftModel) -> str | None:
    inner: Any = model.get_base_model()
    names = (getattr(inner.config, "_name_or_path", None), model.active_peft_config.base_model_name_or_path)
    return next((str(name) for name in names if name), None)
