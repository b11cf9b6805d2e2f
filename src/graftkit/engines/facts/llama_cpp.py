"""llama.cpp: its converter ``convert_lora_to_gguf.py``, and ``llama-adapter.h``, which scales what it wrote.

Read in both files as of 2026. Its versions are build numbers, which the files do not name; nor do the facts.
"""

from graftkit.engines.base import FOLD_SCALE, Engine, Fact, Feature, Stance, ignores_moved_base

_CONVERTER = "convert_lora_to_gguf.py"
_SCALE = "llama-adapter.h: llama_adapter_lora_weight::get_scale"
_OTHER_TENSORS = "stops in the converter: “Not a lora_A or lora_B tensor”"
_MERGE = "merge the adapter, and convert the merged model"

ENGINE = Engine(
    name="llama_cpp",
    title="llama.cpp",
    facts=(
        Fact(Feature.DORA, Stance.REFUSES, _OTHER_TENSORS, _CONVERTER, help=_MERGE),
        Fact(Feature.BIAS, Stance.REFUSES, _OTHER_TENSORS, _CONVERTER, help=_MERGE),
        Fact(Feature.MODULES_TO_SAVE, Stance.REFUSES, _OTHER_TENSORS, _CONVERTER, help=_MERGE),
        Fact(Feature.TRAINABLE_TOKENS, Stance.REFUSES, _OTHER_TENSORS, _CONVERTER, help=_MERGE),
        Fact(Feature.OTHER_METHOD, Stance.REFUSES, _OTHER_TENSORS, _CONVERTER, help=_MERGE),
        Fact(Feature.ALORA, Stance.TAKES, "takes invocation tokens", _CONVERTER),
        Fact(Feature.EMBEDDING, Stance.TAKES, "takes LoRA on the token embeddings", _CONVERTER),
        ignores_moved_base(f"{_CONVERTER} reads lora_alpha, and not the initializer"),
        Fact(
            Feature.TIED_HEAD,
            Stance.REFUSES,
            "stops in the converter at an output layer that is tied to the embeddings",
            "https://github.com/ggml-org/llama.cpp/issues/9065",
            help=_MERGE,
        ),
        Fact(
            Feature.TOWERS,
            Stance.REFUSES,
            "has no place for towers: the converter knows only the language model's tensors",
            "https://github.com/ggml-org/llama.cpp/issues/23047",
            help="leave the towers out, or merge the adapter and convert both parts of the merged model",
        ),
        Fact(
            Feature.RSLORA,
            Stance.IGNORES,
            "scales by lora_alpha / rank, which is sqrt(r) times too weak",
            _SCALE,
            help=FOLD_SCALE,
        ),
        Fact(
            Feature.RANK_PATTERN,
            Stance.TAKES,
            "scales each layer by lora_alpha over that layer's own rank",
            _SCALE,
        ),
        Fact(
            Feature.ALPHA_PATTERN,
            Stance.IGNORES,
            "scales every layer by the one lora_alpha",
            f"{_CONVERTER} reads only lora_alpha",
            help="write the scale into lora_B, and leave one lora_alpha",
        ),
    ),
)
