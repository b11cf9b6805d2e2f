"""mlx-lm, which reads adapters in files of its own: ``adapters.safetensors``, with names and axes of its own.

Read in and run with mlx-lm 0.32.2, whose lines are given.
"""

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftkit.engines.base import Engine, Fact, Feature, Remedy, Stance
from graftkit.engines.facts._shared import refuses_unmerged
from graftkit.engines.releases.table import ClassSupport

_LOADER = "mlx_lm/tuner/utils.py:143"


def _unknown_to_it(feature: Feature, says: str, source: str = _LOADER) -> Fact:
    return Fact(feature, Stance.REFUSES, says, source, remedy=Remedy.MERGE)


def _by_class(feature: Feature, support: ClassSupport | None, _: str | None) -> Iterator[Fact]:
    """Yield what follows from the files of models that it has, one for each model type."""
    if feature is not Feature.MODEL_CLASS:
        return
    if support is None:
        help = "serve it with an engine that knows it"
        yield Fact(feature, Stance.REFUSES, "has no model of this type", "mlx_lm/utils.py:222", help=help)
    else:
        yield Fact(feature, Stance.TAKES, "takes LoRA on models of this type", support.source)


ENGINE = Engine(
    name="mlx",
    title="MLX",
    version=Version("0.32.2"),
    known=SpecifierSet("<0.33"),
    facts=(
        Fact(
            Feature.PEFT_FILES,
            Stance.REFUSES,
            "reads no adapter in PEFT's files",
            f"{_LOADER}; run",
            remedy=Remedy.CONVERT,
        ),
        *(
            Fact(feature, Stance.REFUSES, says, f"{_LOADER}; run", remedy=Remedy.CONVERT)
            for feature, says in (
                (Feature.RSLORA, "has one scale for all modules, as a number"),
                (Feature.RANK_PATTERN, "has one rank for all modules"),
                (Feature.ALPHA_PATTERN, "has one scale for all modules"),
                (Feature.REGEX_TARGETS, "reads the names of modules, and no regular expression"),
                (Feature.EMPTY_BIAS, "has no option for biases"),
                (Feature.MOVED_BASE, "adds B·A to the original base, which is not the one it was trained on"),
                (Feature.STACKED_EXPERTS, "has experts in its own form, SwitchLinear"),
            )
        ),
        Fact(Feature.LINEAR, Stance.TAKES, "takes LoRA on linears", "mlx_lm/tuner/utils.py:75; run"),
        Fact(Feature.ROUTER, Stance.TAKES, "takes LoRA on routers", "mlx_lm/tuner/utils.py:75; run"),
        Fact(Feature.EMBEDDING, Stance.TAKES, "takes LoRA on embeddings", "mlx_lm/tuner/utils.py:81; run"),
        Fact(Feature.LM_HEAD, Stance.TAKES, "takes LoRA on the output layer", "mlx_lm/tuner/utils.py:118; run"),
        Fact(
            Feature.KEY_IS_VALUE,
            Stance.TAKES,
            "makes the values from the adapted keys",
            "mlx_lm/models/gemma4_text.py; run",
        ),
        Fact(Feature.NO_VALUE, Stance.TAKES, "takes a query without a value", "mlx_lm/tuner/utils.py:118"),
        Fact(Feature.NO_LAYER, Stance.TAKES, "takes LoRA on modules outside layers", "mlx_lm/tuner/utils.py:118"),
        _unknown_to_it(
            Feature.TOWERS, "has no towers, and raises at adapters on them", "mlx_lm/tuner/utils.py:161"
        ),
        _unknown_to_it(Feature.OTHER_METHOD, "has no place for methods other than LoRA"),
        _unknown_to_it(Feature.DORA, "reads only its own form of DoRA"),
        _unknown_to_it(Feature.MODULES_TO_SAVE, "has no place for modules that are saved whole"),
        _unknown_to_it(Feature.TRAINED_NORMS, "has no place for norms that are saved whole"),
        _unknown_to_it(Feature.TRAINABLE_TOKENS, "has no place for trained tokens"),
        _unknown_to_it(Feature.BIAS, "has no place for trained biases"),
        _unknown_to_it(Feature.BLOCK_DIAGONAL, "has no block-diagonal LoRA"),
        refuses_unmerged(Feature.NO_WEIGHTS, "has no place for methods other than LoRA", _LOADER),
        refuses_unmerged(Feature.ALORA, "has no activated LoRA", _LOADER),
        refuses_unmerged(Feature.REPLICATION, "replicates no layers", _LOADER),
        refuses_unmerged(Feature.QALORA, "has no QALoRA", _LOADER),
    ),
    dialect="mlx",
    by_class=_by_class,
)
