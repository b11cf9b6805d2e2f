"""Engines are data: found by listing, told apart by version, and each fact has a source."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftkit.engines import Engine, Fact, Feature, Stance, all_engines, engine_named
from graftkit.errors import EngineError, GraftError

ENGINES = all_engines()
FACTS = [pytest.param(e, f, id=f"{e.name}: {f.feature.value} {f.versions}") for e in ENGINES for f in e.facts]


def test_the_engines_are_found() -> None:
    assert {"llama_cpp", "mlx", "ollama", "sglang", "vllm"} <= {engine.name for engine in ENGINES}


@pytest.mark.parametrize(("engine", "fact"), FACTS)
def test_a_fact_has_a_source_and_a_way_out(engine: Engine, fact: Fact) -> None:
    assert fact.source
    assert fact.says
    assert fact.stance in {Stance.TAKES, Stance.UNKNOWN} or engine.advice(fact)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.name)
def test_no_version_has_two_answers(engine: Engine) -> None:
    """Where two facts are about the same, a version must be covered by one of them at most."""
    tried = [Version(f"0.{minor}.{patch}") for minor in range(40) for patch in (0, 1, 6)]
    kinds = {(fact.feature, fact.names, model) for fact in engine.facts for model in fact.models or {None}}
    for feature, names, model in kinds:
        facts = [f for f in engine.facts if f.feature is feature and f.names == names]
        facts = [f for f in facts if (model in f.models if model else not f.models)]
        assert all(sum(f.versions.contains(v) for f in facts) <= 1 for v in tried), (feature, names, model)


@pytest.mark.parametrize(
    ("text", "name", "version"),
    [
        pytest.param("vllm", "vllm", "0.32.0", id="the newest known"),
        pytest.param("vllm==0.22", "vllm", "0.22", id="a version"),
        pytest.param(" vLLM == 0.22.1 ", "vllm", "0.22.1", id="spaces and capitals"),
        pytest.param("sglang", "sglang", "0.5.23", id="the newest known of another"),
        pytest.param("llama.cpp==b6500", "llama_cpp", "6500", id="a build"),
        pytest.param("llama-cpp", "llama_cpp", None, id="as others spell it"),
    ],
)
def test_an_engine_by_name(text: str, name: str, version: str | None) -> None:
    engine = engine_named(text)
    assert engine.name == name
    assert engine.version == (None if version is None else Version(version))


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        pytest.param("vlm", "engine-unknown", "vllm", id="misspelt"),
        pytest.param("tgi", "engine-unknown", "vllm", id="not known"),
        pytest.param("", "engine-unknown", "vllm", id="nothing"),
        pytest.param("vllm==new", "engine-version", "vllm==0.32.0", id="no version"),
        pytest.param("sglang==;", "engine-version", "sglang==", id="no version of one that has none"),
    ],
)
def test_what_names_no_engine(text: str, code: str, named: str) -> None:
    with pytest.raises(EngineError) as caught:
        engine_named(text)
    assert caught.value.code == code
    assert named in str(caught.value.help)
    assert isinstance(caught.value, GraftError)


def test_an_option_of_old_versions_is_gone_from_new_ones() -> None:
    old, new = engine_named("vllm==0.11.0").fact(Feature.BIAS), engine_named("vllm==0.11.1").fact(Feature.BIAS)
    assert (old.flag, new.flag) == ("--enable-lora-bias", None)
    assert old.stance is new.stance is Stance.REFUSES


@pytest.mark.parametrize(
    "version", [pytest.param("0.5.0", id="too old"), pytest.param("0.33.0", id="newer than what was read")]
)
def test_a_version_that_was_not_read_is_unknown(version: str) -> None:
    engine = engine_named(f"vllm=={version}")
    assert {engine.fact(feature).stance for feature in Feature} == {Stance.UNKNOWN}
    assert engine.rank_limit is None


def test_a_release_candidate_is_its_release() -> None:
    assert engine_named("vllm==0.32.0rc1").fact(Feature.DORA).stance is Stance.REFUSES


def test_a_feature_without_a_fact_is_unknown() -> None:
    engine = Engine("none", "None", Version("1"), SpecifierSet(), facts=())
    fact = engine.fact(Feature.DORA)
    assert fact.stance is Stance.UNKNOWN
    assert "DoRA" in fact.says
