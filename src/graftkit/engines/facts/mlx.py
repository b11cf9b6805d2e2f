"""mlx-lm, which reads adapters in files of its own: ``adapters.safetensors``, with names and axes of its own.

Read in and run with mlx-lm 0.32.2, whose lines are given.
"""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftkit.engines.base import Engine, Fact, Feature, Remedy, Stance

_LOADER = "mlx_lm/tuner/utils.py:143"


def _unknown_to_it(feature: Feature, says: str, source: str = _LOADER) -> Fact:
    return Fact(feature, Stance.REFUSES, says, source, remedy=Remedy.MERGE)


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
        _unknown_to_it(Feature.OTHER_METHOD, "has no place for methods other than LoRA"),
        _unknown_to_it(Feature.DORA, "reads DoRA of its own only"),
        _unknown_to_it(Feature.MODULES_TO_SAVE, "has no place for modules that are saved whole"),
        _unknown_to_it(Feature.TRAINED_NORMS, "has no place for norms that are saved whole"),
        _unknown_to_it(Feature.TRAINABLE_TOKENS, "has no place for trained tokens"),
        _unknown_to_it(Feature.BIAS, "has no place for trained biases"),
    ),
    dialect="mlx",
)
