"""What is kept of a class was made from the sources that are installed: else its twin is of another model."""

from __future__ import annotations

import dataclasses

import pytest
from tests.families.turns import in_turns

from graftkit.families._known_twins import KNOWN_TWINS, known_twins, to_toml
from graftkit.files import write_text
from graftkit.matrix.wanted import wanted
from graftkit.twins.write_known import stale

BY_TYPE = {entry.model_type: entry for entry in known_twins().values()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", in_turns(BY_TYPE, always=wanted()))
def test_an_entry_is_of_the_installed_sources(model_type: str) -> None:
    """``make families TYPES=…`` makes an entry again."""
    assert stale(KNOWN_TWINS, [model_type]) == {}


def test_no_type_has_two_entries() -> None:
    assert len(BY_TYPE) == len(known_twins())


def test_an_entry_of_other_sources_is_found(tmp_path) -> None:
    other = dataclasses.replace(BY_TYPE["llama"], sources="0123456789ab")
    table = write_text(tmp_path / "known.toml", to_toml([other, BY_TYPE["bert"]]))
    assert stale(table, ["llama", "bert"]) == {"LlamaForCausalLM": "llama"}
