"""Ollama, which has run llama.cpp's adapters, and no longer creates a model from one.

A model that an older version created with ADAPTER is still served.
"""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftkit.engines.base import Engine, Fact, Feature, Remedy, Stance

_THREAD = "https://github.com/generative-computing/mellea/issues/1651, https://github.com/ollama/ollama/pull/14969"

ENGINE = Engine(
    name="ollama",
    title="Ollama",
    version=Version("0.34.1"),
    known=SpecifierSet(">=0.34"),
    facts=tuple(
        Fact(
            feature,
            Stance.REFUSES,
            "refuses ADAPTER in a Modelfile",
            _THREAD,
            remedy=Remedy.MERGE,
            help="then convert the merged model to GGUF and name it with FROM",
        )
        for feature in (Feature.PEFT_FILES, Feature.OTHER_METHOD)
    ),
    dialect=None,
)
