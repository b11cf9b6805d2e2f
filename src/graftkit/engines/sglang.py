"""SGLang, as its LoRA manager reads an adapter. Read in ``sglang/srt/lora/`` and in the threads each fact names.

The newest of these threads are of September 2026 and say "the latest version", without its number: the facts hold
for every version up to it.
"""

from graftkit.engines._base import Engine, Fact, Feature, Stance

_THREADS = "https://github.com/sgl-project/sglang"
_FOLD = "write the scale into lora_B, and set lora_alpha to r"

ENGINE = Engine(
    name="sglang",
    title="SGLang",
    facts=(
        Fact(Feature.DORA, Stance.REFUSES, "refuses DoRA", f"{_THREADS}/pull/22125", help="merge the adapter"),
        Fact(
            Feature.OTHER_METHOD,
            Stance.REFUSES,
            "loads nothing but LoRA",
            "sglang.srt.lora.lora.LoRAAdapter",
            help="merge the adapter",
        ),
        Fact(
            Feature.ALORA,
            Stance.IGNORES,
            "ignores invocation tokens, so that the adapter acts on the whole prompt",
            f"{_THREADS}/issues/16942",
            help="serve it with an engine that knows activated LoRA (llama.cpp); it cannot be merged",
        ),
        Fact(
            Feature.MOVED_BASE,
            Stance.IGNORES,
            "adds B·A to the original base, which is not the one it was trained on",
            "sglang.srt.lora.lora_config.LoRAConfig has no init_lora_weights",
            help="convert it to a plain LoRA (GK604), or merge it",
        ),
        Fact(
            Feature.TOWERS,
            Stance.IGNORES,
            "drops LoRA on towers, or applies it to the language layer of the same number",
            f"{_THREADS}/issues/28784",
            help="merge the adapter, or leave the towers out",
        ),
        Fact(
            Feature.NO_VALUE,
            Stance.REFUSES,
            "stops with a KeyError at a layer that adapts the query and not the value",
            f"{_THREADS}/pull/28199",
            help="write tensors of zeros for v_proj at these layers, or merge the adapter",
        ),
        Fact(
            Feature.RSLORA,
            Stance.IGNORES,
            "scales by lora_alpha / r, which is sqrt(r) times too weak",
            f"{_THREADS}/issues/40835",
            help=_FOLD,
        ),
        Fact(
            Feature.RANK_PATTERN,
            Stance.IGNORES,
            "scales every layer by lora_alpha / r",
            "sglang.srt.lora.lora.LoRAAdapter",
            help=_FOLD,
        ),
        Fact(
            Feature.ALPHA_PATTERN,
            Stance.IGNORES,
            "scales every layer by lora_alpha / r",
            "sglang.srt.lora.lora.LoRAAdapter",
            help=_FOLD,
        ),
    ),
)
