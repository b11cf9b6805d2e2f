"""Ollama, which has run llama.cpp's adapters, and no longer creates a model from one.

A model that an older version created with ADAPTER is still served.
"""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftkit.engines.base import Engine, Fact, Feature, Remedy, Stance
from graftkit.engines.facts._shared import refuses_unmerged

_THREAD = "https://github.com/generative-computing/mellea/issues/1651, https://github.com/ollama/ollama/pull/14969"

_SAYS = "refuses ADAPTER in a Modelfile"

ENGINE = Engine(
    name="ollama",
    title="Ollama",
    version=Version("0.34.1"),
    known=SpecifierSet(">=0.34"),
    facts=(
        *(
            Fact(
                feature,
                Stance.REFUSES,
                _SAYS,
                _THREAD,
                remedy=Remedy.MERGE,
                help="then convert the merged model to GGUF and name it with FROM",
            )
            for feature in (Feature.PEFT_FILES, Feature.OTHER_METHOD)
        ),
        *(
            refuses_unmerged(feature, _SAYS, _THREAD)
            for feature in (Feature.NO_WEIGHTS, Feature.ALORA, Feature.REPLICATION, Feature.QALORA)
        ),
    ),
    dialect=None,
)
