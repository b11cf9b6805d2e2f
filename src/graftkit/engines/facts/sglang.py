"""SGLang, as its LoRA manager reads an adapter.

Read in ``sglang/srt/lora/`` of version 0.5.23, whose lines are given, and in the threads that each fact names; not
run. The newest of these threads are of September 2026 and say "the latest version", without its number: the facts
hold for every version up to 0.5.23.
"""

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftkit.engines.base import Engine, Fact, Feature, Remedy, Stance
from graftkit.engines.facts._shared import (
    ignores_invocation_tokens,
    ignores_moved_base,
    ignores_patterns,
    refuses_unmerged,
)
from graftkit.engines.releases.table import ClassSupport

_THREADS = "https://github.com/sgl-project/sglang"
_LORA = "sglang/srt/lora"
_SCALE = f"{_LORA}/lora.py:71"

_CONFIGURATION = (
    Fact(Feature.PEFT_FILES, Stance.TAKES, "reads PEFT's files", f"{_LORA}/lora.py:143"),
    Fact(
        Feature.DORA,
        Stance.REFUSES,
        "refuses DoRA",
        f"{_LORA}/lora_manager.py:349, {_THREADS}/pull/22125",
        remedy=Remedy.MERGE,
    ),
    Fact(
        Feature.OTHER_METHOD, Stance.REFUSES, "loads nothing but LoRA", f"{_LORA}/lora.py:67", remedy=Remedy.MERGE
    ),
    refuses_unmerged(Feature.NO_WEIGHTS, "loads nothing but LoRA", f"{_LORA}/lora.py:67"),
    ignores_invocation_tokens(f"{_THREADS}/issues/16942"),
    ignores_moved_base(f"{_LORA}/lora_config.py:43 reads no init_lora_weights"),
    Fact(Feature.EMPTY_BIAS, Stance.TAKES, "reads no option for biases", f"{_LORA}/lora_config.py:43"),
    Fact(
        Feature.TRAINABLE_TOKENS,
        Stance.IGNORES,
        "skips trained tokens, whose embeddings no target names",
        f"{_LORA}/lora.py:179",
        remedy=Remedy.MERGE,
    ),
    Fact(
        Feature.MODULES_TO_SAVE,
        Stance.IGNORES,
        "skips embeddings and output layers that no target names",
        f"{_LORA}/lora.py:179",
        remedy=Remedy.MERGE,
        names=frozenset({"embed_tokens", "lm_head"}),
    ),
    Fact(
        Feature.REGEX_TARGETS,
        Stance.REFUSES,
        "takes target_modules as a list, and raises at a regular expression",
        f"{_LORA}/utils.py:293",
        remedy=Remedy.CONVERT,
    ),
    Fact(
        Feature.RSLORA,
        Stance.IGNORES,
        "scales by lora_alpha / r, which is sqrt(r) times too weak",
        f"{_SCALE}, {_THREADS}/issues/40835",
        remedy=Remedy.CONVERT,
    ),
    *ignores_patterns(_SCALE),
)

_SITES = (
    Fact(Feature.LINEAR, Stance.TAKES, "takes LoRA on linears", f"{_LORA}/lora_manager.py:1154"),
    Fact(
        Feature.STACKED_EXPERTS,
        Stance.REFUSES,
        "raises at experts as PEFT stacks them, whose names match no target",
        f"{_LORA}/mem_pool.py:983",
        remedy=Remedy.CONVERT,
    ),
    Fact(
        Feature.ROUTER,
        Stance.REFUSES,
        "raises at routers, whose sizes it does not know",
        f"{_LORA}/mem_pool.py:983, {_LORA}/utils.py:274",
        remedy=Remedy.MERGE,
        models=frozenset({"mixtral", "qwen3_moe", "gpt_oss"}),
    ),
    Fact(
        Feature.TOWERS,
        Stance.IGNORES,
        "drops LoRA on towers, or applies it to the language layer of the same number",
        f"{_LORA}/lora.py:176, {_THREADS}/issues/28784",
        remedy=Remedy.MERGE,
        help="or leave the towers out",
    ),
    Fact(
        Feature.NO_LAYER,
        Stance.IGNORES,
        "drops tensors whose names have no layer's number",
        f"{_LORA}/lora.py:176",
        remedy=Remedy.MERGE,
    ),
    Fact(
        Feature.KEY_IS_VALUE,
        Stance.IGNORES,
        "gives the values a copy of the key's weight, which the key's adapter does not reach",
        "sglang/srt/models/gemma4_mm.py:970",
        remedy=Remedy.CONVERT,
        help="it writes each k_proj pair a second time, as v_proj",
    ),
    Fact(
        Feature.NO_VALUE,
        Stance.REFUSES,
        "stops with a KeyError at a layer that adapts the query and not the value",
        f"{_LORA}/lora.py:299, {_THREADS}/pull/28199",
        remedy=Remedy.CONVERT,
        help="it writes zeros for v_proj at these layers",
    ),
)


def _by_class(feature: Feature, support: ClassSupport | None, _: str | None) -> Iterator[Fact]:
    """Yield what follows from a class of its own: its LoRA manager refuses none of them."""
    if feature is Feature.MODEL_CLASS and support is not None:
        if support.lora is False:
            says = "says that this class does not support LoRA, and does not refuse it"
            yield Fact(feature, Stance.UNKNOWN, says, support.source)
        else:
            yield Fact(feature, Stance.TAKES, "takes LoRA on this class", support.source)


ENGINE = Engine(
    name="sglang",
    title="SGLang",
    version=Version("0.5.23"),
    known=SpecifierSet("<0.5.24"),
    facts=(*_CONFIGURATION, *_SITES),
    dialect="sglang",
    by_class=_by_class,
)
