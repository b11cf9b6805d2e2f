"""vLLM, as its LoRA loader reads an adapter.

Read in ``vllm/lora/`` (peft_helper, lora_model, utils, model_manager), in the API documentation of versions
0.10.0, 0.11.0, 0.14.0 and 0.22.1, and in the threads that each fact names. 0.32.0 is the version that was run.
"""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftkit.engines.base import (
    MERGE,
    Engine,
    Fact,
    Feature,
    RankLimit,
    Stance,
    ignores_invocation_tokens,
    ignores_moved_base,
    ignores_patterns,
)

_THREADS = "https://github.com/vllm-project/vllm"
_NAMES = "vllm.lora.utils.parse_fine_tuned_lora_name"
_HELPER = "vllm.lora.peft_helper.PEFTHelper"
# Earlier loaders do not know rsLoRA.
_OLDEST = ">=0.6.6"

ENGINE = Engine(
    name="vllm",
    title="vLLM",
    version=Version("0.32.0"),
    known=SpecifierSet(f"{_OLDEST},<0.33"),
    facts=(
        Fact(Feature.DORA, Stance.REFUSES, "refuses DoRA", f"{_HELPER}._validate_features", help=MERGE),
        Fact(
            Feature.MODULES_TO_SAVE,
            Stance.REFUSES,
            "refuses modules that are saved whole",
            f"{_HELPER}._validate_features",
            help=MERGE,
        ),
        Fact(
            Feature.BIAS,
            Stance.REFUSES,
            "takes trained biases only with an option",
            "https://docs.vllm.ai/en/v0.10.0/api/vllm/lora/peft_helper.html",
            SpecifierSet("<0.11"),
            flag="--enable-lora-bias",
        ),
        Fact(
            Feature.BIAS,
            Stance.REFUSES,
            "refuses trained biases",
            f"{_THREADS}/pull/25807",
            SpecifierSet(">=0.12"),
            help=MERGE,
        ),
        ignores_invocation_tokens(f"{_THREADS}/pull/19710"),
        ignores_moved_base(f"{_HELPER} has no init_lora_weights"),
        Fact(
            Feature.TRAINABLE_TOKENS,
            Stance.REFUSES,
            "refuses trained tokens: their tensor is an “unsupported LoRA weight”",
            f"{_THREADS}/issues/36501",
            help=MERGE,
        ),
        Fact(Feature.OTHER_METHOD, Stance.REFUSES, "loads nothing but LoRA", _NAMES, help=MERGE),
        Fact(
            Feature.TOWERS,
            Stance.IGNORES,
            "loads LoRA on towers and projectors, and applies it only with an option",
            f"{_THREADS}/issues/31479",
            SpecifierSet(">=0.22"),
            help="where the model's class supports it; else merge the adapter",
            flag="--enable-tower-connector-lora",
        ),
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
            f"{_THREADS}/issues/34186",
            help="re-key the tensors to the class that is served (GK502)",
        ),
        Fact(
            Feature.KEY_IS_VALUE,
            Stance.IGNORES,
            "gives the values a copy of the key's weight, which the key's adapter does not reach",
            f"{_THREADS}/pull/41944, and run with 0.32.0",
            SpecifierSet(">=0.19"),
            help="write each k_proj pair a second time, as v_proj",
        ),
        Fact(
            Feature.STACKED_EXPERTS,
            Stance.UNKNOWN,
            "takes LoRA on stacked experts for some model classes, and silently drops it for others",
            f"{_THREADS}/pull/50252",
            help="compare its outputs with and without the adapter, or merge it",
        ),
        Fact(
            Feature.NO_VALUE,
            Stance.TAKES,
            "takes a query without a value",
            "vllm.lora.model_manager.LoRAModelManager._create_merged_loras_inplace",
        ),
        Fact(Feature.RSLORA, Stance.TAKES, "scales by alpha / sqrt(r)", f"{_THREADS}/pull/6909"),
        *ignores_patterns(f"{_HELPER} has no rank_pattern", f"{_HELPER} has no alpha_pattern"),
    ),
    ranks=(
        RankLimit(
            default=16,
            largest=512,
            flag="--max-lora-rank {}",
            steps=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            source="https://docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/",
            versions=SpecifierSet(">=0.14"),
        ),
    ),
)
