"""Every model type that transformers knows: proven, or in the table of gaps with its cause.

The proof is ``prove`` of ``graftkit.matrix``: a twin, a plan for every linear and every expert of the towers that
a batch feeds, attachment of exactly that, and the contract checks (gradients, identity, merge, reload, unmerge).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from graftkit.matrix.cell import PROOF, Cell, Check, Verdict
from graftkit.matrix.prove import prove

GAPS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("gaps.toml").read_text(encoding="utf-8"))
STAGES = ("checks", "attach", "plan")


def expected_outcomes() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Model type -> (stage, codes) for every type in the table. A type listed twice is an error in it."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for stage in STAGES:
        for model_type, entry in GAPS[stage].items():
            assert model_type not in found, model_type
            found[model_type] = (stage, tuple(entry["codes"]))
    for group in GAPS["twin"]:
        for model_type in group["types"]:
            assert model_type not in found, model_type
            found[model_type] = ("twin", (group["code"],))
    return found


def outcome_of(cells: tuple[Cell, ...]) -> tuple[str, tuple[str, ...]]:
    """Return how far a proof came, as the table has it, and the codes of what did not hold."""
    missed = [cell for cell in cells if cell.verdict is not Verdict.PROVEN]
    codes = tuple(sorted({code for cell in missed for code in cell.codes}))
    if not missed:
        return "proven", ()
    first = missed[0].check
    stopped = first in (Check.TWIN, Check.PLAN) or any(code.startswith("attach") for code in codes)
    return str(first) if stopped else "checks", codes


WANTED = """
gemma4 gemma3 gemma2 olmo minimax_m2 gemma3n_text llama qwen2 qwen3 qwen3_moe qwen3_next qwen3_5
qwen3_5_moe qwen3_vl qwen3_vl_moe qwen2_5_vl qwen2_moe mistral mixtral mistral4 gpt_oss llama4
deepseek_v3 glm4_moe glm4v granite granitemoe nemotron_h phi phi3 phimoe olmo2 olmoe falcon
falcon_h1 mamba mamba2 jamba zamba2 gpt2 t5 bart bert roberta deberta-v2 modernbert whisper wav2vec2
vit dinov2 clip llava moshi ernie4_5_moe minimax lfm2 cohere2 starcoder2 opt bloom gptj stablelm
"""

EXPECTED = expected_outcomes()
PROVEN = [model_type for model_type in CONFIG_MAPPING if model_type not in EXPECTED]


@pytest.mark.filterwarnings(
    "ignore"
)  # 500 architectures warn about 500 things; what is asserted here is the outcome
@pytest.mark.parametrize("model_type", list(CONFIG_MAPPING))
def test_what_happens_is_what_the_table_says(model_type: str) -> None:
    cells = prove(model_type, checks=PROOF)
    stage, codes = outcome_of(cells)
    sometimes = GAPS["checks"].get(model_type, {}).get("sometimes", ())
    found = (stage, tuple(code for code in codes if code not in sometimes))
    said = "\n".join(f"{cell.check}: {cell.message}" for cell in cells)
    assert found == EXPECTED.get(model_type, ("proven", ())), said


def test_most_of_what_can_be_built_is_proven() -> None:
    assert len(PROVEN) >= 300


def test_the_families_people_ask_for_are_proven() -> None:
    wanted = set(WANTED.split())
    assert not wanted - set(PROVEN), sorted(wanted - set(PROVEN))


def test_the_table_names_no_type_that_is_gone() -> None:
    assert not set(EXPECTED) - set(CONFIG_MAPPING)


@pytest.mark.parametrize("stage", STAGES)
def test_every_gap_has_a_cause(stage: str) -> None:
    assert GAPS[stage]
    assert all(entry["cause"].strip() for entry in GAPS[stage].values())
