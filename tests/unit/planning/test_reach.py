"""What no gradient reaches is left out of a plan unless its name is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

import graftkit as gk
from graftkit.errors import PlanError
from graftkit.planning.decisions import Caution, LeftAlone, Shortfall
from graftkit.planning.explain import explain
from graftkit.progress import Progress
from graftkit.twins.reach import NoGradient
from graftkit.twins.reaching.known import Evidence
from graftkit.twins.write_known import entry_for

POOLER = "bert.pooler"


@pytest.fixture
def big_bird() -> nn.Module:
    """Its masked-language head does not read its pooler."""
    return gk.twin("big_bird")


def test_all_linear_leaves_a_pooler_out_that_the_loss_does_not_read(big_bird: nn.Module) -> None:
    plan = gk.plan(big_bird)
    skipped = {s.path: s for s in plan.skipped}[POOLER]
    assert skipped.cause is LeftAlone.NO_GRADIENT
    assert plan.reach.unreached[POOLER] is NoGradient.NOT_READ
    assert not plan.warnings
    data = json.loads(json.dumps(plan.to_dict()))
    assert {"path": POOLER, "reason": skipped.reason} in data["skipped"]
    assert data["reach"]["unreached"] == {POOLER: "not_read"}
    row = next(row for row in plan.coverage if row.tower == "language" and row.role == "other")
    assert (row.sites, row.adapted, dict(row.reasons)) == (1, 0, {skipped.reason: 1})


@pytest.mark.parametrize("target", [POOLER, "pooler", r".*pooler"])
def test_a_name_adapts_it_with_a_warning(big_bird: nn.Module, target: str) -> None:
    plan = gk.plan(big_bird, targets=["all-linear", target])
    assert POOLER in {a.path for a in plan.attached}
    (warning,) = plan.warnings
    assert (warning.caution, warning.sites) == (Caution.NO_GRADIENT, (POOLER,))
    assert plan.to_dict()["warnings"] == [warning.to_dict()]
    assert warning.message in str(plan)
    assert explain(plan, POOLER).warning == warning.message


def test_each_planned_tensor_gets_a_gradient_from_stock_peft(big_bird: nn.Module) -> None:
    batch = gk.example_batch(big_bird)
    adapted = get_peft_model(big_bird, gk.plan(big_bird).peft_config)
    tensors = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    for tensor in tensors:
        nn.init.normal_(tensor, std=0.1)
    adapted(**batch).loss.backward()
    assert tensors
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in tensors)


def test_a_role_that_means_only_such_sites_is_refused_with_the_cause() -> None:
    model = gk.twin("squeezebert")  # its attention is made of grouped convolutions
    with pytest.raises(PlanError) as raised:
        gk.plan(model)
    assert raised.value.code == "target-no-gradient"
    plan = gk.plan(model, targets=["all-linear", "embeddings"])
    assert [unmet.cause for unmet in plan.unmet] == [Shortfall.NO_GRADIENT]


def test_the_full_model_s_last_layer_is_meant_and_not_the_twin_s() -> None:
    plan = gk.plan("llava", scope="all")
    left = {s.path for s in plan.skipped if s.cause is LeftAlone.NO_GRADIENT}
    assert left
    assert all(path.startswith("model.vision_tower.encoder.layers.23.") for path in left)


def test_a_configuration_that_reads_the_last_layer_loses_nothing() -> None:
    from transformers import LlavaConfig

    plan = gk.plan(LlavaConfig(vision_feature_layer=-1), scope="all")
    assert not plan.reach.unreached
    assert plan.reach.evidence is not Evidence.NONE


def test_the_table_holds_for_configurations_that_make_the_same_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPVisionConfig, LlavaConfig

    entry = entry_for("llava")
    assert entry.unreached
    monkeypatch.setattr("graftkit.twins.reaching.known.known_twin", {entry.class_name: entry}.get)
    smaller = LlavaConfig(
        vision_config=CLIPVisionConfig(**LlavaConfig().vision_config.to_dict() | {"num_hidden_layers": 12})
    )
    plans = [gk.plan("llava", scope="all"), gk.plan(smaller, scope="all")]
    assert [plan.reach.evidence for plan in plans] == [Evidence.TABLE, Evidence.TABLE]
    assert all(".layers.11." in path for path in plans[1].reach.unreached)
    other = gk.plan(LlavaConfig(vision_feature_layer=-1), scope="all")
    assert (other.reach.evidence, other.reach.unreached) == (Evidence.TWIN, {})


def test_what_only_a_kernel_computes_is_not_called_dead() -> None:
    plan = gk.plan("mra")
    assert plan.reach.evidence is Evidence.NONE
    assert any("attention.self.query" in a.path for a in plan.attached)


def test_a_module_that_is_no_transformers_model_is_adapted_whole() -> None:
    plan = gk.plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), scope="all")
    assert len(plan.attached) == 2
    assert plan.reach.evidence is Evidence.NONE
    assert plan.reach.reason


# ---- classes that no table knows ----


class SpareConfig(PretrainedConfig):
    model_type = "spare"

    def __init__(self, hidden_size: int = 16, vocab_size: int = 32, **kwargs: Any) -> None:
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        super().__init__(**kwargs)


class SpareModel(PreTrainedModel):
    """Uses one of its two linears."""

    config_class = SpareConfig

    def __init__(self, config: SpareConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.used = nn.Linear(config.hidden_size, config.hidden_size)
        self.spare = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.used(self.embed_tokens(input_ids)))


class BrokenModel(SpareModel):
    def forward(self, input_ids: torch.Tensor) -> BaseModelOutputWithPooling:
        raise RuntimeError("not today")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what graftkit keeps on disk about classes."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    return tmp_path


def test_an_unknown_class_is_tried_on_its_twin_once(kept: Path) -> None:
    steps: list[Progress] = []
    model = SpareModel(SpareConfig())
    first = gk.plan(model, scope="all", on_progress=steps.append)
    assert first.reach.evidence is Evidence.TWIN
    assert first.reach.unreached == {"spare": NoGradient.NOT_CALLED}
    assert [a.path for a in first.attached] == ["used"]
    assert steps
    assert list(kept.rglob("*.json"))
    steps.clear()
    again = gk.plan(model, scope="all", on_progress=steps.append)
    assert again.reach == first.reach
    assert not steps


def test_what_was_kept_is_found_again_where_it_cannot_be_read(kept: Path) -> None:
    first = gk.plan(SpareModel(SpareConfig()), scope="all")
    files = list(kept.rglob("*.json"))
    assert files
    for file in files:
        file.write_text("{", encoding="utf-8")
    assert gk.plan(SpareModel(SpareConfig()), scope="all").reach == first.reach


def test_without_a_twin_nothing_is_left_out_and_the_plan_says_so(kept: Path) -> None:
    plan = gk.plan(BrokenModel(SpareConfig()), scope="all")
    assert plan.reach.evidence is Evidence.NONE
    assert {a.path for a in plan.attached} == {"used", "spare"}
    assert plan.reach.reason is not None
    assert plan.reach.reason in str(plan)
