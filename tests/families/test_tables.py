"""What the tables of this folder say together: how many families are proven, and that every gap has a cause."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from datetime import date, timedelta
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.families.buildable import Built, built, read_buildable
from tests.families.gaps import SECTIONS, TABLE, Gap, found_gap, read_gaps, updated, written
from tests.families.turns import ALL, TURNS, VARIABLE, due_now, fix_turn, is_due
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from graftkit.matrix.cell import PROOF, Cell, Check, Verdict
from graftkit.matrix.wanted import wanted
from graftkit.surveying.sources.quiet import quiet_transformers

TEXT = TABLE.read_text(encoding="utf-8")
GAPS = read_gaps(TEXT)
BUILDABLE = read_buildable()


# ---- the count


def test_most_families_with_linears_are_proven() -> None:
    with_linears = {name for name, kind in BUILDABLE.items() if kind is Built.LINEARS}
    assert len(with_linears - GAPS.keys()) >= 0.95 * len(with_linears)


# Proven before anything else was; none of them may be lost again.
PROMISED = """
gemma4 gemma3 gemma2 olmo minimax_m2 gemma3n_text llama qwen2 qwen3 qwen3_moe qwen3_next qwen3_5
qwen3_5_moe qwen3_vl qwen3_vl_moe qwen2_5_vl qwen2_moe mistral mixtral mistral4 gpt_oss llama4
deepseek_v3 glm4_moe glm4v granite granitemoe nemotron_h phi phi3 phimoe olmo2 olmoe falcon
falcon_h1 mamba mamba2 jamba zamba2 gpt2 t5 bart bert roberta deberta-v2 modernbert whisper wav2vec2
vit dinov2 clip llava moshi ernie4_5_moe minimax lfm2 cohere2 starcoder2 opt bloom gptj stablelm
"""


def test_the_promised_families_are_proven_in_every_run() -> None:
    promised = set(PROMISED.split())
    assert sorted(promised & GAPS.keys()) == []
    assert sorted(promised - wanted().keys()) == []


# ---- the table of gaps


def test_the_table_names_no_type_that_is_gone() -> None:
    assert sorted(GAPS.keys() - set(CONFIG_MAPPING)) == []


def test_every_gap_has_a_cause() -> None:
    assert sorted(name for name, gap in GAPS.items() if not gap.cause.strip()) == []


def test_the_table_is_written_as_it_is_read() -> None:
    assert read_gaps(written(GAPS)) == GAPS
    assert written(GAPS) == TEXT


def parts_of(config: PretrainedConfig) -> set[type]:
    """Return the classes of the configurations that are declared or found inside one, its own class left out."""
    declared = {cls for cls in type(config).sub_configs.values() if cls is not AutoConfig}
    inside = [getattr(config, name, None) for name in type(config).sub_configs]
    configs = [part for part in inside if isinstance(part, PretrainedConfig)]
    found = declared | {type(part) for part in configs}
    return found.union(*map(parts_of, configs)) - {type(config)}


@cache
def parts() -> frozenset[type]:
    """Return every class of configurations that some default configuration has inside."""
    found: set[type] = set()
    for model_type in CONFIG_MAPPING:
        with suppress(Exception), quiet_transformers():  # many have no defaults
            found |= parts_of(CONFIG_MAPPING[model_type]())
    return frozenset(found)


def test_what_nobody_loads_alone_is_part_of_another_model() -> None:
    alone = {name for name, gap in GAPS.items() if gap.section == "alone"}
    assert alone
    assert sorted(name for name in alone if CONFIG_MAPPING[name] not in parts()) == []


def test_what_cannot_be_built_is_not_built() -> None:
    unbuildable = {name for name, gap in GAPS.items() if gap.section == "unbuildable"}
    assert sorted(name for name in unbuildable if BUILDABLE[name] is not Built.NOTHING) == []


# ---- the table of what can be built


def test_the_table_has_every_type() -> None:
    assert set(BUILDABLE) == set(CONFIG_MAPPING)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", Built)
def test_the_table_says_what_is_built(kind: Built) -> None:
    """A tenth of the types on each run; ``make buildable`` writes the table."""
    due = [name for name, said in BUILDABLE.items() if said is kind and due_now(name)]
    assert [name for name in due if built(name) is not kind] == []


# ---- bringing the table of gaps up to date

VERDICTS = st.lists(st.sampled_from(Verdict), min_size=len(PROOF), max_size=len(PROOF))


def cells(name: str, verdicts: list[Verdict]) -> list[Cell]:
    return [
        Cell(name, None, (), "lora", check, verdict, "", () if verdict is Verdict.PROVEN else (f"E-{check}",))
        for check, verdict in zip(PROOF, verdicts, strict=True)
    ]


@given(VERDICTS)
def test_only_a_whole_proof_leaves_no_gap(verdicts: list[Verdict]) -> None:
    found = found_gap(cells("new", verdicts))
    assert (found is None) == (set(verdicts) == {Verdict.PROVEN})
    assert updated({}, cells("new", verdicts)) == ({} if found is None else {"new": found})


def test_a_cause_is_kept_as_long_as_it_fits() -> None:
    broken = cells("old", [*[Verdict.PROVEN] * 3, Verdict.FAILED, Verdict.PROVEN, Verdict.UNKNOWN])
    gap = Gap("studied", Check.GRADIENTS, ("E-gradients",), "why", sometimes=("E-reload",))
    assert updated({"old": gap}, broken) == {"old": gap}
    assert updated({"old": Gap("studied", Check.MERGE, ("E-merge",), "why")}, broken)["old"].cause == ""
    assert updated({"old": gap}, cells("old", [Verdict.PROVEN] * 6)) == {}
    assert updated({"old": gap}, cells("other", [Verdict.PROVEN] * 6)) == {"old": gap}
    assert updated({"old": gap}, broken[:3]) == {"old": gap}


GAP = st.builds(
    Gap,
    st.sampled_from(list(SECTIONS)),
    st.sampled_from(PROOF),
    st.lists(st.text()).map(tuple),
    st.text(),
    st.lists(st.text()).map(tuple),
)


@given(st.dictionaries(st.text(), GAP))
def test_any_table_is_read_as_it_was_written(gaps: dict[str, Gap]) -> None:
    assert read_gaps(written(gaps)) == gaps


# ---- turns


@given(st.text())
def test_every_name_has_one_turn(name: str) -> None:
    assert [is_due(name, str(turn)) for turn in range(TURNS)].count(True) == 1
    assert is_due(name, ALL)


def test_turns_are_about_as_long() -> None:
    sizes = Counter(turn for name in CONFIG_MAPPING for turn in range(TURNS) if is_due(name, str(turn)))
    assert max(sizes.values()) < 1.5 * len(BUILDABLE) / TURNS


def test_ten_days_cover_everything() -> None:
    days = [date(2026, 12, 28) + timedelta(days=after) for after in range(TURNS)]
    assert {fix_turn({}, day) for day in days} == {str(turn) for turn in range(TURNS)}


def test_a_turn_that_was_asked_for_stays() -> None:
    environment = {VARIABLE: "3"}
    assert fix_turn(environment, date(2026, 1, 1)) == "3"
    with pytest.raises(ValueError, match=VARIABLE):
        fix_turn({VARIABLE: "ten"}, date(2026, 1, 1))
