"""vLLM, as its LoRA loader reads an adapter.

Read in the wheels of versions 0.8.5 to 0.32.0, and run with 0.32.0. Lines are those of 0.32.0 where no other
version is named. Which classes take LoRA, on which embeddings and towers, is read from the release itself
(`graftkit.engines.releases`).
"""

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftkit.engines.base import Engine, Fact, Feature, RankLimit, Remedy, Stance
from graftkit.engines.facts._shared import (
    ignores_invocation_tokens,
    ignores_moved_base,
    ignores_patterns,
    refuses_unmerged,
)
from graftkit.engines.releases.table import ClassSupport

_THREADS = "https://github.com/vllm-project/vllm"
_HELPER = "vllm/lora/peft_helper.py"
_UTILS = "vllm/lora/utils.py"
_MANAGER = "vllm/lora/model_manager.py"
_MODELS = "vllm/model_executor/models"
_GEMMA4 = frozenset({"gemma4", "gemma4_text"})
# Earlier loaders do not know rsLoRA.
_OLDEST = ">=0.6.6"
# The release that was run, cell by cell.
_RUN = SpecifierSet(">=0.32")
# Before it, the loader reads none of the fields that it now refuses or follows.
_UNREAD = SpecifierSet("<0.32")
_STACKS = "vllm/lora/model_manager.py:1252"
_OUTSIDE = (Feature.EMBEDDING, Feature.TIED_EMBEDDING, Feature.LM_HEAD, Feature.TIED_HEAD)
_FORMAT = "or start the server with --enable-mixed-moe-lora-format and set is_3d_lora_weight in the LoRA request"


def _refused(feature: Feature, says: str, source: str, versions: SpecifierSet | None = None) -> Fact:
    return Fact(feature, Stance.REFUSES, says, source, versions or SpecifierSet(), remedy=Remedy.MERGE)


_CONFIGURATION = (
    Fact(Feature.PEFT_FILES, Stance.TAKES, "reads PEFT's files", "vllm/lora/lora_model.py:197"),
    _refused(Feature.DORA, "refuses DoRA", f"{_HELPER}:66"),
    Fact(
        Feature.MODULES_TO_SAVE,
        Stance.UNKNOWN,
        "takes a classifier that is saved whole on models that classify, which nobody has compared",
        f"{_HELPER}:57",
        SpecifierSet(">=0.31"),
        names=frozenset({"classifier", "score"}),
    ),
    _refused(Feature.MODULES_TO_SAVE, "refuses modules that are saved whole", f"{_HELPER}:56"),
    _refused(Feature.TRAINED_NORMS, "refuses modules that are saved whole", f"{_HELPER}:56"),
    *(
        Fact(
            feature,
            Stance.REFUSES,
            "takes trained biases only with an option",
            "vllm/lora/peft_helper.py:123 of 0.11.0",
            SpecifierSet("<0.11.1"),
            flag="--enable-lora-bias",
        )
        for feature in (Feature.BIAS, Feature.EMPTY_BIAS)
    ),
    _refused(Feature.BIAS, "refuses trained biases", f"{_HELPER}:199", SpecifierSet(">=0.11.1")),
    Fact(
        Feature.EMPTY_BIAS,
        Stance.REFUSES,
        "refuses the option for biases, whether or not any were trained",
        f"{_HELPER}:199",
        SpecifierSet(">=0.11.1"),
        remedy=Remedy.CONVERT,
        help='it sets "bias" to "none": no bias was saved',
    ),
    refuses_unmerged(Feature.ALORA, "refuses activated LoRA", f"{_HELPER}:79", _RUN),
    ignores_invocation_tokens(f"{_THREADS}/pull/19710", _UNREAD),
    Fact(
        Feature.MOVED_BASE,
        Stance.IGNORES,
        "takes it for a plain LoRA on the original base, which is not the one it was trained on",
        f"{_HELPER}:89",
        _RUN,
        remedy=Remedy.CONVERT,
        names=frozenset({"lora_ga"}),
    ),
    Fact(
        Feature.MOVED_BASE,
        Stance.REFUSES,
        "refuses initializers that move the base",
        f"{_HELPER}:70",
        _RUN,
        remedy=Remedy.CONVERT,
    ),
    ignores_moved_base(f"{_HELPER} of 0.31.0 has no init_lora_weights", _UNREAD),
    refuses_unmerged(Feature.REPLICATION, "refuses replicated layers", f"{_HELPER}:81", _RUN),
    _refused(Feature.BLOCK_DIAGONAL, "refuses block-diagonal LoRA", f"{_HELPER}:83", _RUN),
    refuses_unmerged(Feature.QALORA, "refuses QALoRA", f"{_HELPER}:85", _RUN),
    Fact(
        Feature.TRAINABLE_TOKENS,
        Stance.REFUSES,
        "refuses trained tokens: their tensor is an “unsupported LoRA weight”",
        f"{_UTILS}:220, {_THREADS}/issues/36501",
        remedy=Remedy.MERGE,
        help="untied tokens can be converted to a LoRA on the embeddings",
    ),
    _refused(Feature.OTHER_METHOD, "loads nothing but LoRA", f"{_UTILS}:220"),
    refuses_unmerged(Feature.NO_WEIGHTS, "loads nothing but LoRA", f"{_UTILS}:220"),
    Fact(
        Feature.REGEX_TARGETS,
        Stance.TAKES,
        "reads the names of tensors, not targets",
        "vllm/lora/lora_model.py:246",
    ),
    Fact(Feature.RSLORA, Stance.TAKES, "scales by alpha / sqrt(r)", f"{_HELPER}:117"),
    Fact(Feature.RANK_PATTERN, Stance.TAKES, "follows per-layer ranks", f"{_HELPER}:131", _RUN),
    Fact(Feature.ALPHA_PATTERN, Stance.TAKES, "follows per-layer scales", f"{_HELPER}:131", _RUN),
    *ignores_patterns(f"{_HELPER} of 0.31.0 has no patterns", _UNREAD),
)

_BASE = (
    # Before 0.20 LoRA had an unquantized input of its own; since 0.24 it is handed the original one again.
    Fact(
        Feature.FP8_EXPERTS,
        Stance.TAKES,
        "computes LoRA on experts from the original activations",
        f"{_THREADS}/issues/42007",
        SpecifierSet(">=0.19,<0.20"),
    ),
    Fact(
        Feature.FP8_EXPERTS,
        Stance.IGNORES,
        "computes LoRA on experts from activations in FP8, without their scales",
        f"{_THREADS}/issues/42007",
        SpecifierSet(">=0.20,<0.24"),
        help="serve with 0.24 or newer, or with a base in 16 bit",
    ),
    Fact(
        Feature.FP8_EXPERTS,
        Stance.TAKES,
        "computes LoRA on experts from the original activations",
        f"{_THREADS}/pull/42120, vllm/model_executor/layers/fused_moe/modular_kernel.py:1411 of 0.24.0",
        SpecifierSet(">=0.24"),
    ),
    Fact(
        Feature.FP8_BASE,
        Stance.TAKES,
        "adds LoRA to the output of a linear in FP8, from the original activations",
        "vllm/lora/layers/base_linear.py:211",
        SpecifierSet(">=0.20"),
    ),
)

_SITES = (
    Fact(Feature.LINEAR, Stance.TAKES, "takes LoRA on linears", f"{_UTILS}:233"),
    Fact(
        Feature.STACKED_EXPERTS,
        Stance.REFUSES,
        "refuses experts as transformers stacks them",
        f"{_STACKS}; run",
        _RUN,
        remedy=Remedy.CONVERT,
        help=_FORMAT,
        models=frozenset({*_GEMMA4, "ernie4_5_moe", "granitemoe", "olmoe", "qwen2_moe", "qwen3_moe"}),
    ),
    Fact(
        Feature.STACKED_EXPERTS,
        Stance.IGNORES,
        "finds no module of that name, because its own is block_sparse_moe, and serves the base",
        f"{_MODELS}/mixtral.py:246; run",
        _RUN,
        remedy=Remedy.CONVERT,
        models=frozenset({"mixtral"}),
    ),
    Fact(
        Feature.STACKED_EXPERTS,
        Stance.TAKES,
        "takes experts as transformers stacks them",
        f"{_MODELS}/gpt_oss.py:1414; run",
        _RUN,
        models=frozenset({"gpt_oss"}),
    ),
    Fact(
        Feature.ROUTER,
        Stance.IGNORES,
        "finds no module of that name, because its own is block_sparse_moe.gate, and serves the base",
        f"{_MODELS}/mixtral.py:246; run",
        _RUN,
        remedy=Remedy.CONVERT,
        models=frozenset({"mixtral"}),
    ),
    Fact(
        Feature.ROUTER,
        Stance.IGNORES,
        "uses the router without its adapter",
        f"{_MANAGER}:517, {_MODELS}/qwen3_moe.py:205; run",
        _RUN,
        remedy=Remedy.MERGE,
        models=frozenset({"qwen3_moe"}),
    ),
    Fact(
        Feature.ROUTER,
        Stance.TAKES,
        "takes LoRA on routers",
        f"{_MODELS}/gemma4.py:361, {_MODELS}/gpt_oss.py:383; run",
        _RUN,
        models=frozenset({*_GEMMA4, "gpt_oss", "olmoe", "qwen2_moe"}),
    ),
    Fact(
        Feature.ROUTER,
        Stance.REFUSES,
        "knows no module of that name, because its own is gate",
        "vllm/lora/lora_model.py:268; run",
        _RUN,
        remedy=Remedy.MERGE,
        models=frozenset({"granitemoe"}),
    ),
    # The class of several modalities holds Gemma4ForCausalLM, which names no embeddings either.
    *(
        Fact(
            feature,
            Stance.REFUSES,
            "takes no LoRA on embeddings or output layers of this class",
            f"{_MODELS}/gemma4.py:1402 and gpt_oss.py:1411 have no embedding_modules; run",
            _RUN,
            remedy=Remedy.MERGE,
            models=frozenset({*_GEMMA4, "gpt_oss"}),
        )
        for feature in _OUTSIDE
    ),
    Fact(
        Feature.TOWERS,
        Stance.IGNORES,
        "loads LoRA on towers and projectors, and applies it only with an option",
        "vllm/config/lora.py:58 of 0.14.0",
        SpecifierSet(">=0.14"),
        help="where the model's class supports it; else merge the adapter",
        flag="--enable-tower-connector-lora",
    ),
    Fact(Feature.NO_LAYER, Stance.TAKES, "takes LoRA on modules outside layers", f"{_UTILS}:233"),
    Fact(
        Feature.INNER_NAMES,
        Stance.IGNORES,
        "keeps the linears inside wrappers, and accepts only their own names",
        f"{_THREADS}/issues/41754",
        help="gk.migrate(adapter, base, out) names the linears inside",
    ),
    Fact(
        Feature.OTHER_PREFIX,
        Stance.IGNORES,
        "compares only the last part of a name when it loads, and finds no such module later",
        f"vllm/lora/lora_model.py:268, {_THREADS}/issues/34186",
        help="re-key the tensors to the class that is served (GK502)",
    ),
    Fact(
        Feature.KEY_IS_VALUE,
        Stance.IGNORES,
        "gives the values a copy of the key's weight, which the key's adapter does not reach",
        f"{_THREADS}/pull/41944; run",
        SpecifierSet(">=0.19"),
        remedy=Remedy.CONVERT,
        help="it writes each k_proj pair a second time, as v_proj",
    ),
    Fact(Feature.NO_VALUE, Stance.TAKES, "takes a query without a value", f"{_MANAGER}:860"),
)


def _by_class(feature: Feature, support: ClassSupport | None, name: str | None) -> Iterator[Fact]:
    """Yield what follows from the attributes of a model's class, as vLLM's LoRA manager reads them."""
    if support is None:
        return
    source = support.source
    if feature is Feature.MODEL_CLASS and support.lora is not None:
        if support.lora:
            yield Fact(feature, Stance.TAKES, "takes LoRA on this class", source)
        else:
            yield _refused(feature, "does not support LoRA on this class yet", source)
    if support.embeddings is not None and feature in _OUTSIDE and support.lora:
        if name not in support.embeddings:
            yield _refused(feature, "takes no LoRA on these embeddings or output layers of this class", source)
        elif feature in {Feature.EMBEDDING, Feature.LM_HEAD}:
            yield Fact(feature, Stance.TAKES, f"takes LoRA on {name}", source)
    if feature is Feature.TOWERS and support.towers is False:
        says = "has no option that applies LoRA on the towers of this class"
        yield Fact(feature, Stance.IGNORES, says, source, remedy=Remedy.MERGE)
    if feature is Feature.TOWERS and support.towers:
        says = "applies LoRA on towers only with an option, and refuses it on a server of text alone"
        yield Fact(feature, Stance.IGNORES, says, source, flag="--enable-tower-connector-lora")


ENGINE = Engine(
    name="vllm",
    title="vLLM",
    version=Version("0.32.0"),
    known=SpecifierSet(f"{_OLDEST},<0.33"),
    facts=(*_CONFIGURATION, *_BASE, *_SITES),
    ranks=(
        RankLimit(
            default=16,
            largest=512,
            flag="--max-lora-rank {}",
            steps=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            source="vllm/config/lora.py: MaxLoRARanks",
            versions=SpecifierSet(">=0.12"),
        ),
    ),
    dialect="vllm",
    by_class=_by_class,
)
