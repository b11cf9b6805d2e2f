"""The table of known twins: what is written is read back, and an entry knows what it was made from."""

from __future__ import annotations

import dataclasses

import pytest

from graftkit.families._known_twins import KnownTwin, known_twin, read_known_twins
from graftkit.files import write_text
from graftkit.twins import write_known

ENTRY = KnownTwin(
    "BertForMaskedLM",
    "bert",
    "0123456789ab",
    kept=("hidden_size", "text_config.hidden_size"),
    batch={"text": {"input_ids": 'tokens("x")', "labels": "targets()"}},
    unreached={"not_read": ("bert.pooler.dense",)},
)


def test_what_is_written_is_read_back(tmp_path):
    bare = dataclasses.replace(ENTRY, class_name="A", kept=(), batch={}, unreached={})
    path = write_text(tmp_path / "known.toml", write_known.to_toml([ENTRY, bare]))
    assert read_known_twins(path) == {"A": bare, "BertForMaskedLM": ENTRY}
    assert list(read_known_twins(path)) == ["A", "BertForMaskedLM"]


def test_a_class_that_is_not_in_the_table_is_not_known():
    assert known_twin("NoSuchClass") is None


def test_entries_that_were_not_asked_for_stay(tmp_path):
    path = write_text(tmp_path / "known.toml", write_known.to_toml([ENTRY]))
    assert write_known.write(path, ["llama"]) == []
    entries = read_known_twins(path)
    assert entries["BertForMaskedLM"] == ENTRY
    assert entries["LlamaForCausalLM"].model_type == "llama"


def test_a_type_without_a_class_has_no_entry(tmp_path):
    path = tmp_path / "known.toml"
    assert write_known.write(path, ["blt_patcher"]) == ["blt_patcher"]
    assert not path.exists()


@pytest.mark.parametrize(("types", "expected"), [("bert", 1), ("llama", 0)])
def test_an_entry_made_from_other_sources_is_stale(tmp_path, types, expected):
    path = write_text(tmp_path / "known.toml", write_known.to_toml([ENTRY]))
    assert write_known.main(["--types", types, "--check", "--to", str(path)]) == expected


def test_an_entry_that_was_just_made_is_not_stale(tmp_path):
    path = tmp_path / "known.toml"
    assert write_known.main(["--types", "llama", "--to", str(path)]) == 0
    assert write_known.main(["--types", "llama", "--check", "--to", str(path)]) == 0
