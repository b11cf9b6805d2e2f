"""The rules on training that need no model: types of numbers, and towers that no batch feeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from tests.unit.checks.observed import checked, seen
from torch import nn

import graftkit as gk
from graftkit.checks.engine.fixing import fix_all
from graftkit.findings import Report
from graftkit.recipes.recipe import read_recipe
from graftkit.recipes.training import Training, training_of

WARNING, OK, UNKNOWN = gk.Severity.WARNING, gk.Severity.OK, gk.Severity.UNKNOWN
E2B = "google/gemma-4-E2B-it"
FP16 = Training(precision="fp16")
ALL = {"target_modules": "all-linear"}


def config_fix(code: str, file: Path, fields: dict[str, Any], **context: Any) -> dict[str, Any]:
    """The recipe's arguments after the rule's own fix, which must leave it nothing to say."""
    with file.open("w") as stream:
        YAML().dump({"model": "llama", **fields}, stream)

    def check() -> Report:
        recipe = read_recipe(file)
        return checked([code], recipe=recipe, training=training_of(recipe), **context)

    report, applied = fix_all(check, recipe=file)
    assert [finding.severity for finding in applied] == [WARNING]
    assert applied[0].line is not None
    assert [finding.severity for finding in report] == [OK]
    return dict(read_recipe(file).args)


# ---- GK209 ----


@pytest.mark.rule_fails("GK209")
@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"dtype": "bfloat16"}, id="dtype"),
        pytest.param({"torch_dtype": "bfloat16"}, id="torch_dtype"),
        pytest.param({"text_config": {"dtype": torch.bfloat16}}, id="of the text model"),
    ],
)
def test_gk209_half_precision_for_a_bfloat16_model(config: dict[str, Any]) -> None:
    assert seen("GK209", config=config, training=FP16).severity is WARNING


@pytest.mark.rule_fails("GK209")
def test_gk209_what_bfloat16_holds_is_infinite_in_half_precision() -> None:
    largest = seen("GK209", config={"dtype": "bfloat16"}, training=FP16).evidence["largest"]
    assert torch.tensor(largest, dtype=torch.float16).isfinite()
    beyond = torch.tensor(1.1 * largest, dtype=torch.bfloat16)
    assert beyond.isfinite()
    assert beyond.to(torch.float16).isinf()


@pytest.mark.rule_fails("GK209")
def test_gk209_the_fix_trains_in_bfloat16(tmp_path: Path) -> None:
    fields = {"args": {"fp16": True, "max_steps": 3}}
    args = config_fix("GK209", tmp_path / "recipe.yaml", fields, config={"dtype": "bfloat16"})
    assert args == {"fp16": False, "bf16": True, "max_steps": 3}


@pytest.mark.parametrize(
    ("config", "precision", "verdict"),
    [
        pytest.param({"dtype": "bfloat16"}, "bf16", OK, id="bfloat16"),
        pytest.param({"dtype": "bfloat16"}, "fp32", OK, id="float32"),
        pytest.param({"dtype": "float16"}, "fp16", OK, id="made for it", marks=pytest.mark.rule_passes("GK209")),
        pytest.param({}, "fp16", UNKNOWN, id="the model does not say"),
    ],
)
def test_gk209_what_is_not_called_wrong(config: dict[str, Any], precision: str, verdict: gk.Severity) -> None:
    assert seen("GK209", config=config, training=Training(precision=precision)).severity is verdict


# ---- GK211 ----


@pytest.mark.rule_fails("GK211")
@pytest.mark.parametrize(
    "training",
    [
        pytest.param(Training(modalities=("text",), find_unused=False), id="not looked for"),
        pytest.param(Training(modalities=("text",), reentrant=True), id="re-entrant"),
        pytest.param(Training(modalities=("text", "image"), reentrant=True), id="images feed one tower of two"),
    ],
)
def test_gk211_adapters_without_a_gradient(training: Training) -> None:
    base = gk.survey(E2B)
    found = seen("GK211", base=base, peft_config=ALL, training=training)
    unfed = {"vision", "audio", "projector"} if training.modalities == ("text",) else {"audio"}
    assert (found.severity, found.evidence["unfed"]) == (
        WARNING,
        sum(s.is_linear and s.tower in unfed for s in base),
    )


@pytest.mark.rule_fails("GK211")
def test_gk211_text_gives_those_adapters_no_gradient(e2b: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    batch = gk.example_batch(e2b)
    text = {name: value for name, value in batch.items() if name in {"input_ids", "attention_mask", "labels"}}
    text = {name: value[:, :8] for name, value in text.items()}
    base = gk.survey(e2b)
    model = get_peft_model(e2b, LoraConfig(**ALL))
    model(**text).loss.backward()
    trained = (p for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n)
    without = sum(parameter.grad is None for parameter in trained)
    training = Training(modalities=("text",), find_unused=False)
    assert without >= seen("GK211", base=base, peft_config=ALL, training=training).evidence["unfed"] > 0


@pytest.mark.rule_fails("GK211")
def test_gk211_the_fix_lets_ddp_look(tmp_path: Path) -> None:
    fields = {
        "data": {"modalities": ["text"]},
        "args": {
            "ddp_find_unused_parameters": False,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    }
    args = config_fix("GK211", tmp_path / "recipe.yaml", fields, base=gk.survey(E2B), peft_config=ALL)
    assert args["ddp_find_unused_parameters"] is True
    assert args["gradient_checkpointing_kwargs"]["use_reentrant"] is False


@pytest.mark.rule_passes("GK211")
@pytest.mark.parametrize(
    ("config", "training"),
    [
        pytest.param(ALL, Training(modalities=("text",)), id="TRL lets DDP look"),
        pytest.param(ALL, Training(modalities=None, reentrant=True), id="everything is fed"),
        pytest.param(ALL, Training(modalities=("text", "image", "audio"), reentrant=True), id="all is named"),
        pytest.param(ALL, Training(modalities=("text",), reentrant=True, zero_stage=3), id="DeepSpeed"),
        pytest.param(
            {"target_modules": r".*language_model.*\.q_proj"},
            Training(modalities=("text",), find_unused=False),
            id="the language model alone",
        ),
        pytest.param(
            ALL, Training(modalities=("text",), reentrant=True, checkpointing=False), id="no checkpointing"
        ),
    ],
)
def test_gk211_passes(config: dict[str, Any], training: Training) -> None:
    assert seen("GK211", base=gk.survey(E2B), peft_config=config, training=training).severity is OK


def test_gk211_what_trl_does_is_what_the_rule_says(twin_of: Callable[[str], nn.Module]) -> None:
    """TRL's condition, read from the installed source: not given, and not re-entrant."""
    import inspect

    from trl import SFTTrainer

    source = inspect.getsource(SFTTrainer.__init__)
    assert "args.ddp_find_unused_parameters is None" in source
    assert 'not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")' in source
