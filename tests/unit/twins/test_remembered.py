"""What was found out about a class is recalled as it was, for the same class, sources and circumstances."""

from __future__ import annotations

import pytest
from transformers import BertModel, GPT2Model

from graftkit.twins.remembered import Fact, forget, recall, remember

RECIPE = {"text": {"input_ids": "tokens(12)", "attention_mask": "ones(B, T)"}}


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))


def test_what_is_remembered_is_recalled_in_its_order():
    remember(Fact.BATCH, BertModel, RECIPE)
    recalled = recall(Fact.BATCH, BertModel)
    assert recalled == RECIPE
    assert list(recalled["text"]) == list(RECIPE["text"]), "T is the length of the tokens before it"


def test_it_holds_for_its_class_fact_and_circumstances_alone():
    remember(Fact.UNREACHED, BertModel, {"reason": None}, {"hidden_size": 8})
    assert recall(Fact.UNREACHED, BertModel, {"hidden_size": 8}) == {"reason": None}
    assert recall(Fact.UNREACHED, BertModel, {"hidden_size": 9}) is None
    assert recall(Fact.UNREACHED, BertModel) is None
    assert recall(Fact.UNREACHED, GPT2Model, {"hidden_size": 8}) is None
    assert recall(Fact.KEPT, BertModel, {"hidden_size": 8}) is None


def test_what_was_found_with_other_sources_is_not_recalled(monkeypatch):
    remember(Fact.KEPT, BertModel, [])
    monkeypatch.setattr("graftkit.twins.remembered.source_hash", lambda _class: "other")
    assert recall(Fact.KEPT, BertModel) is None


def test_everything_about_a_class_is_forgotten_at_once():
    for facts in (BertModel, GPT2Model):
        remember(Fact.KEPT, facts, [])
        remember(Fact.UNREACHED, facts, {}, {"hidden_size": 8})
    forget(BertModel)
    assert recall(Fact.KEPT, BertModel) is None
    assert recall(Fact.UNREACHED, BertModel, {"hidden_size": 8}) is None
    assert recall(Fact.KEPT, GPT2Model) == []


def test_where_nothing_can_be_written_nothing_is_remembered(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "file"))
    remember(Fact.KEPT, BertModel, [])
    assert recall(Fact.KEPT, BertModel) is None
