"""The architectures that were served with real engines, and what an adapter can be on in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from graftkit.engines.base import Feature, Model


@dataclass(frozen=True)
class Architecture:
    """One architecture that was served, and what it has beside linears.

    Attributes:
        name: as the table of measurements calls it.
        cls, model_type: transformers' names.
        sites: site -> the feature that an adapter on it asks for, and the last part of its name.
    """

    name: str
    cls: str
    model_type: str
    sites: Mapping[str, tuple[Feature, str | None]] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        return Model(self.cls, self.model_type)


_LINEARS = {"attention, MLP": (Feature.LINEAR, "o_proj")}
_OWN_HEAD = {"embeddings": (Feature.EMBEDDING, "embed_tokens"), "output layer": (Feature.LM_HEAD, "lm_head")}
_EXPERTS = {"experts": (Feature.STACKED_EXPERTS, "experts"), "router": (Feature.ROUTER, "gate")}
_TOWERS = {"towers": (Feature.TOWERS, None)}
_KEY_IS_VALUE = {"keys that are values": (Feature.KEY_IS_VALUE, "k_proj")}
_PER_LAYER = {
    "per-layer embeddings": (Feature.EMBEDDING, "embed_tokens_per_layer"),
    "projection of per-layer inputs": (Feature.LINEAR, "per_layer_model_projection"),
}
# What was served with real engines, in tiny twins.
ARCHITECTURES = (
    Architecture("llama", "LlamaForCausalLM", "llama", {**_LINEARS, **_OWN_HEAD}),
    Architecture("qwen2", "Qwen2ForCausalLM", "qwen2", {**_LINEARS, **_OWN_HEAD}),
    Architecture("qwen3", "Qwen3ForCausalLM", "qwen3", {**_LINEARS, **_OWN_HEAD}),
    Architecture("mistral", "MistralForCausalLM", "mistral", {**_LINEARS, **_OWN_HEAD}),
    Architecture("phi3", "Phi3ForCausalLM", "phi3", {**_LINEARS, **_OWN_HEAD}),
    Architecture("granite", "GraniteForCausalLM", "granite", {**_LINEARS, **_OWN_HEAD}),
    Architecture("olmo2", "Olmo2ForCausalLM", "olmo2", {**_LINEARS, **_OWN_HEAD}),
    Architecture("gemma3", "Gemma3ForCausalLM", "gemma3_text", _LINEARS),
    Architecture("mixtral", "MixtralForCausalLM", "mixtral", {**_LINEARS, **_EXPERTS, **_OWN_HEAD}),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM", "qwen3_moe", {**_LINEARS, **_EXPERTS, **_OWN_HEAD}),
    Architecture("gpt_oss", "GptOssForCausalLM", "gpt_oss", {**_LINEARS, **_EXPERTS, **_OWN_HEAD}),
    *(
        Architecture(name, "Gemma4ForConditionalGeneration", "gemma4", {**_LINEARS, **sites, **_TOWERS})
        for name, sites in (
            ("gemma4-E2B", _PER_LAYER),
            ("gemma4-31B", _KEY_IS_VALUE),
            ("gemma4-26B-A4B", {**_KEY_IS_VALUE, **_EXPERTS}),
        )
    ),
)
# Site -> the kinds of adapter that were measured for it; the first that an architecture has counts. Adapters on
# towers were measured with the language model's.
KINDS: Mapping[str, tuple[str, ...]] = {
    "attention, MLP": ("mlp", "all-linear", "attention"),
    "experts": ("experts",),
    "router": ("router",),
    "embeddings": ("embeddings",),
    "output layer": ("head",),
    "keys that are values": ("attention",),
    "per-layer embeddings": ("per-layer-embeddings",),
    "projection of per-layer inputs": ("per-layer-projection",),
}
