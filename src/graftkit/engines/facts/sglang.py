"""SGLang, as its LoRA manager reads an adapter. Read in ``sglang/srt/lora/`` and in the threads each fact names.

The newest of these threads are of September 2026 and say "the latest version", without its number: the facts hold
for every version up to it.
"""

from graftkit.engines.base import (
    FOLD_SCALE,
    MERGE,
    Engine,
    Fact,
    Feature,
    Stance,
    ignores_invocation_tokens,
    ignores_moved_base,
    ignores_patterns,
)

_THREADS = "https://github.com/sgl-project/sglang"
_LOADER = "sglang.srt.lora.lora.LoRAAdapter"

ENGINE = Engine(
    name="sglang",
    title="SGLang",
    facts=(
        Fact(Feature.DORA, Stance.REFUSES, "refuses DoRA", f"{_THREADS}/pull/22125", help=MERGE),
        Fact(Feature.OTHER_METHOD, Stance.REFUSES, "loads nothing but LoRA", _LOADER, help=MERGE),
        ignores_invocation_tokens(f"{_THREADS}/issues/16942"),
        ignores_moved_base("sglang.srt.lora.lora_config.LoRAConfig has no init_lora_weights"),
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
            help=FOLD_SCALE,
        ),
        *ignores_patterns(_LOADER, _LOADER),
    ),
)
