"""llama.cpp: its converter ``convert_lora_to_gguf.py``, and what its graphs do with what was converted.

Read in the source that llama-cpp-python 0.3.36 ships (commit 0c1e57098), and run with it; lines are those of that
commit. Its own versions are build numbers, which the files do not name; nor do the facts. Which weights a graph
multiplies without looking for an adapter is read from the source itself (`graftkit.engines.releases`).
"""

from collections.abc import Iterator

from packaging.version import Version

from graftkit.engines.base import Engine, Fact, Feature, Remedy, Stance
from graftkit.engines.facts._shared import ignores_moved_base, refuses_unmerged
from graftkit.engines.releases.table import ClassSupport

_CONVERTER = "convert_lora_to_gguf.py"
_GRAPH = "src/llama-graph.cpp"
_SCALE = "src/llama-adapter.h:53"
_OTHER_TENSORS = "stops in the converter: “Not a lora_A or lora_B tensor”"
_MERGED = "then convert the merged model"


def _stops(feature: Feature) -> Fact:
    return Fact(feature, Stance.REFUSES, _OTHER_TENSORS, f"{_CONVERTER}:479", remedy=Remedy.MERGE, help=_MERGED)


_CONFIGURATION = (
    Fact(Feature.PEFT_FILES, Stance.TAKES, "converts PEFT's files", _CONVERTER),
    _stops(Feature.DORA),
    _stops(Feature.BIAS),
    _stops(Feature.MODULES_TO_SAVE),
    _stops(Feature.TRAINABLE_TOKENS),
    _stops(Feature.OTHER_METHOD),
    refuses_unmerged(Feature.NO_WEIGHTS, _OTHER_TENSORS, f"{_CONVERTER}:479"),
    Fact(Feature.EMPTY_BIAS, Stance.TAKES, "reads tensors, not the option for biases", f"{_CONVERTER}:460; run"),
    Fact(
        Feature.TRAINED_NORMS,
        Stance.IGNORES,
        "converts norms, and skips them when it loads the adapter",
        f"{_CONVERTER}:476, src/llama-adapter.cpp:290; run",
        remedy=Remedy.MERGE,
        help=_MERGED,
    ),
    Fact(Feature.ALORA, Stance.TAKES, "takes invocation tokens", f"{_CONVERTER}:429"),
    ignores_moved_base(f"{_CONVERTER}:528 reads lora_alpha, and not the initializer"),
    Fact(Feature.REGEX_TARGETS, Stance.TAKES, "reads the names of tensors, not targets", f"{_CONVERTER}:460"),
    Fact(
        Feature.RSLORA,
        Stance.IGNORES,
        "scales by lora_alpha / rank, which is sqrt(r) times too weak",
        _SCALE,
        remedy=Remedy.CONVERT,
    ),
    Fact(Feature.RANK_PATTERN, Stance.TAKES, "scales each layer by lora_alpha over that layer's own rank", _SCALE),
    Fact(
        Feature.ALPHA_PATTERN,
        Stance.IGNORES,
        "scales every layer by the one lora_alpha",
        f"{_CONVERTER}:528 reads only lora_alpha",
        remedy=Remedy.CONVERT,
    ),
)

_SITES = (
    Fact(Feature.EMBEDDING, Stance.TAKES, "takes LoRA on the token embeddings", f"{_GRAPH}:2401; run"),
    Fact(Feature.LM_HEAD, Stance.TAKES, "takes LoRA on an output layer that is not tied", f"{_GRAPH}:1520"),
    Fact(
        Feature.TIED_HEAD,
        Stance.REFUSES,
        "stops at an output layer that is tied to the embeddings",
        f"{_CONVERTER}:508, https://github.com/ggml-org/llama.cpp/issues/9065",
        remedy=Remedy.MERGE,
        help=_MERGED,
    ),
    Fact(
        Feature.LINEAR,
        Stance.REFUSES,
        "stops in the converter, which splits and transposes this projection",
        f"{_CONVERTER}:179; run",
        remedy=Remedy.MERGE,
        help=_MERGED,
        names=frozenset({"kv_b_proj"}),
    ),
    Fact(Feature.LINEAR, Stance.TAKES, "takes LoRA on linears", f"{_GRAPH}:1520"),
    Fact(Feature.NO_LAYER, Stance.TAKES, "takes LoRA on modules outside layers", f"{_GRAPH}:1520"),
    Fact(
        Feature.STACKED_EXPERTS,
        Stance.REFUSES,
        "stops in the converter, which has no name for experts as PEFT stacks them",
        "conversion/base.py:630, conversion/qwen.py:156; run",
        remedy=Remedy.CONVERT,
    ),
    Fact(Feature.ROUTER, Stance.TAKES, "takes LoRA on routers", f"{_GRAPH}:2039, src/models/gemma4.cpp:321; run"),
    Fact(
        Feature.TOWERS,
        Stance.IGNORES,
        "leaves towers out when it converts, and says nothing",
        "conversion/base.py:1391; run",
        remedy=Remedy.MERGE,
        help="then convert both parts of the merged model",
    ),
    Fact(
        Feature.KEY_IS_VALUE,
        Stance.TAKES,
        "makes the values from the adapted keys",
        "src/models/gemma4.cpp:246; run",
    ),
    Fact(Feature.NO_VALUE, Stance.TAKES, "takes a query without a value", f"{_GRAPH}:1520; run"),
)


def _by_class(feature: Feature, support: ClassSupport | None, name: str | None) -> Iterator[Fact]:
    """Yield what follows from the graph of an architecture: which weights it multiplies past any adapter."""
    if feature is Feature.MODEL_CLASS and support is None:
        says = "has no converter for this class"
        yield Fact(
            feature, Stance.REFUSES, says, f"{_CONVERTER}:401", help="serve it with an engine that knows it"
        )
    elif feature is Feature.MODEL_CLASS and support is not None:
        yield Fact(feature, Stance.TAKES, "takes LoRA on this architecture", support.source)
    if support is None or feature not in _MULTIPLIED:
        return
    if name in support.raw:
        says = f"multiplies by {name} without looking for an adapter"
        yield Fact(feature, Stance.IGNORES, says, support.source, remedy=Remedy.MERGE, help=_MERGED)
    elif name in support.mixed:
        yield Fact(
            feature, Stance.UNKNOWN, f"looks for an adapter of {name} in some branches only", support.source
        )


_MULTIPLIED = frozenset({Feature.LINEAR, Feature.NO_VALUE, Feature.NO_LAYER, Feature.LM_HEAD, Feature.EMBEDDING})

ENGINE = Engine(
    name="llama_cpp",
    title="llama.cpp",
    facts=(*_CONFIGURATION, *_SITES),
    dialect="llama.cpp",
    table=Version("0.3.36"),
    by_class=_by_class,
)
