"""The guard lets a good run pass untouched, and stops a bad one before it costs anything."""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import SaveStrategy
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import graftkit as gk
from graftkit.adapters.record import read_record
from graftkit.checks.rules import all_rules
from graftkit.errors import RecipeError, TrainingError
from graftkit.findings import Severity
from graftkit.modeling.autocast import without_autocast
from graftkit.recipes.settings import CheckSettings
from graftkit.training.guard.guard import Guard
from graftkit.training.guard.preflight import LEFT_TO_VERIFY, recomputes, rules_before_training

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "away", "home"]
TwinOf = Callable[[str], nn.Module]
E2B = "google/gemma-4-E2B-it"

pytestmark = [
    # What TRL and transformers say of themselves, on a CPU without a pinned memory and with an unknown vocabulary.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: at for at, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def sentence(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(4, 10)))


def texts() -> Dataset:
    chance = random.Random(0)
    return Dataset.from_list([{"text": sentence(chance)} for _ in range(16)])


def preferences() -> Dataset:
    chance = random.Random(0)
    keys = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{key: sentence(chance) for key in keys} for _ in range(16)])


COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "max_steps": 4,
}


def sft(
    folder: Path,
    model: nn.Module,
    guard: TrainerCallback | None,
    *,
    kind: type[SFTTrainer] = SFTTrainer,
    plan: gk.Plan | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    **args: Any,
) -> SFTTrainer:
    settings = {"activation_checkpointing_kwargs": {"use_reentrant": False}, **COMMON, **args}
    planned = plan or gk.plan(model, targets="attention", r=2, dropout=0.1)
    extra: dict[str, Any] = {}
    if optimizer is None:
        extra["peft_config"] = planned.peft_config
    else:
        torch.manual_seed(0)
        model = gk.attach(model, planned)
        extra["optimizers"] = (optimizer(model), None)
    return kind(
        model=model,
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=texts(),
        processing_class=tokenizer(),
        callbacks=[*([guard] if guard else []), *callbacks],
        **extra,
    )


def dpo(folder: Path, model: nn.Module, guard: TrainerCallback | None, **options: Any) -> DPOTrainer:
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), activation_checkpointing_kwargs={"use_reentrant": False}, **COMMON),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=gk.plan(model, targets="attention", r=2, dropout=0.1, **options).peft_config,
        callbacks=[guard] if guard else [],
    )


def plain(folder: Path, model: nn.Module, guard: TrainerCallback | None) -> Trainer:
    chance = random.Random(0)
    rows = [{"input_ids": chance.choices(range(4, 16), k=6)} for _ in range(16)]
    torch.manual_seed(0)
    return Trainer(
        model=gk.attach(model, gk.plan(model, targets="attention", r=2, dropout=0.1)),
        args=TrainingArguments(output_dir=str(folder), **COMMON),
        train_dataset=Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows]),
        data_collator=masked_at_random,
        callbacks=[guard] if guard else [],
    )


def masked_at_random(rows: list[Any]) -> dict[str, Any]:
    """Draws from each of the global generators."""
    batch: dict[str, Any] = default_data_collator(rows)
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    places = [int(6 * value) for value in drawn]
    batch["labels"][:, places] = -100
    return batch


def outcome(trainer: Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, get_peft_model_state_dict(trainer.model)


def error_codes(guard: Guard) -> set[str]:
    return {finding.code for finding in guard.report if finding.severity is Severity.ERROR}


@pytest.mark.parametrize("make", [sft, dpo, plain], ids=["sft", "dpo", "a plain Trainer"])
def test_a_good_run_is_the_same_with_and_without_it(
    make: Callable[..., Trainer], tmp_path: Path, twin_of: TwinOf
) -> None:
    guard = Guard()
    losses, adapter = outcome(make(tmp_path / "with", twin_of(E2B), guard))
    expected, other = outcome(make(tmp_path / "without", twin_of(E2B), None))
    assert len(losses) == 4
    assert losses == expected
    assert adapter.keys() == other.keys()
    assert all(torch.equal(adapter[name], other[name]) for name in other)
    seen = {finding.code: finding.severity for finding in guard.report}
    assert {code: seen[code] for code in ("GK201", "GK203")} == {"GK201": Severity.OK, "GK203": Severity.OK}
    assert not guard.report.at_or_above(Severity.WARNING)


def test_an_accumulated_run_under_autocast_is_the_same_too(tmp_path: Path, twin_of: TwinOf) -> None:
    options = {"bf16": True, "gradient_accumulation_steps": 2, "max_steps": 2, "packing": True, "max_length": 16}
    guard = Guard(settings=CheckSettings(rules={"GK210": {"severity": "info"}}))
    losses, adapter = outcome(sft(tmp_path / "with", twin_of(E2B), guard, **options))
    expected, other = outcome(sft(tmp_path / "without", twin_of(E2B), None, **options))
    assert losses == expected
    assert all(torch.equal(adapter[name], other[name]) for name in other)
    assert {finding.code: finding.severity for finding in guard.report}["GK205"] is Severity.OK
    assert not guard.report.at_or_above(Severity.WARNING)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padding-free"])
def test_packed_samples_are_no_reason_to_stop(packing: bool, tmp_path: Path, twin_of: TwinOf) -> None:
    guard = Guard()
    options = {"packing": packing, "padding_free": not packing, "max_steps": 1}
    sft(tmp_path, twin_of("qwen3"), guard, max_length=16 if packing else None, **options).train()
    seen = {finding.code: finding.severity for finding in guard.report}
    assert (seen["GK201"], seen["GK205"]) == (Severity.OK, Severity.OK)


def test_without_half_precision_weights_the_rules_see_no_autocast(twin_of: TwinOf) -> None:
    model = gk.attach(twin_of("qwen3"), gk.plan(twin_of("qwen3"), targets="attention", r=2))
    ids = torch.arange(8)[None]
    exact = model(input_ids=ids).logits
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
        rounded = model(input_ids=ids).logits
        with without_autocast(model):
            seen = model(input_ids=ids).logits
        again = model(input_ids=ids).logits
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(seen, exact)
    assert torch.equal(again, rounded)
    assert not torch.equal(rounded, exact)


def test_what_would_take_a_second_model_is_left_to_verify() -> None:
    run = {rule.code for rule in rules_before_training()}
    assert {"GK201", "GK202", "GK203", "GK205", "GK306", "GK101"} <= run
    assert {rule.code for rule in all_rules()} - run >= LEFT_TO_VERIFY


class Recorder(TrainerCallback):
    """Count the steps that were begun."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize("asked", [True, False])
def test_arguments_of_a_release_before_the_option_s_newer_name_are_read(tmp_path: Path, asked: bool) -> None:
    """Frameworks pin transformers: before 5.23 only gradient_checkpointing is an argument."""
    args = SFTConfig(output_dir=str(tmp_path), activation_checkpointing=asked, bf16=False)
    assert recomputes(args) is asked
    older = argparse.Namespace(**{k: v for k, v in vars(args).items() if not k.startswith("activation_")})
    assert recomputes(older) is asked


def test_reentrant_checkpointing_is_refused_before_the_first_step(tmp_path: Path, twin_of: TwinOf) -> None:
    recorder, guard = Recorder(), Guard()
    trainer = sft(
        tmp_path,
        twin_of(E2B),
        guard,
        callbacks=(recorder,),
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert caught.value.code == "guard"
    assert "use_reentrant" in str(caught.value.help)
    assert recorder.steps == 0
    assert any(f.code == "GK202" and f.severity is Severity.ERROR for f in guard.report)


def test_an_adapted_tower_that_the_data_does_not_feed_is_refused(tmp_path: Path, e2b: nn.Module) -> None:
    plan = gk.plan(e2b, targets="attention", scope=["language", "vision"], r=2)
    guard = Guard(plan)
    with pytest.raises(TrainingError) as caught:
        sft(tmp_path, e2b, guard, plan=plan).train()
    assert caught.value.code == "guard"
    assert "vision" in str(caught.value.help)
    assert "GK203" in error_codes(guard)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
@pytest.mark.parametrize("attached", [True, False], ids=["gk.attach", "by the trainer"])
def test_an_initializer_without_its_data_is_refused_before_the_first_step(
    tmp_path: Path, twin_of: TwinOf, init: str, attached: bool
) -> None:
    model = twin_of("qwen3")
    plan = gk.plan(model, targets="attention", r=2, init_lora_weights=init)
    recorder, guard = Recorder(), Guard(plan)
    optimizer = (lambda m: torch.optim.AdamW(m.parameters())) if attached else None
    trainer = sft(tmp_path, model, guard, plan=plan, callbacks=(recorder,), optimizer=optimizer)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert caught.value.code == "guard"
    assert error_codes(guard) == {"GK213"}
    assert recorder.steps == 0


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_an_initializer_that_has_had_its_data_is_let_pass(tmp_path: Path, twin_of: TwinOf, init: str) -> None:
    model = twin_of("qwen3")
    plan = gk.plan(model, targets="attention", r=2, init_lora_weights=init)
    batches = [gk.example_batch(model, seed=seed, batch_size=4) for seed in range(2)]
    adapted = gk.initialize(model, plan, batches)
    guard = Guard(plan)
    SFTTrainer(
        model=adapted,
        args=SFTConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=texts(),
        processing_class=tokenizer(),
        callbacks=[guard],
    ).train()
    assert not guard.report.errors
    assert "GK213" in {finding.code for finding in guard.report}


def test_a_moved_base_is_refused_as_a_reference(tmp_path: Path, twin_of: TwinOf) -> None:
    guard = Guard()
    with pytest.raises(TrainingError) as caught:
        dpo(tmp_path, twin_of("qwen3"), guard, init_lora_weights="pissa").train()
    assert caught.value.code == "guard"
    assert "GK213" in error_codes(guard)


def test_a_model_without_an_adapter_is_refused(tmp_path: Path, twin_of: TwinOf) -> None:
    trainer = Trainer(
        model=twin_of("qwen3"),
        args=TrainingArguments(output_dir=str(tmp_path), **COMMON),
        train_dataset=Dataset.from_list([{"input_ids": [4, 5], "labels": [4, 5]}]),
        callbacks=[Guard()],
    )
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert caught.value.code == "no-adapter"


def test_an_ignored_rule_stops_nothing(tmp_path: Path, e2b: nn.Module) -> None:
    plan = gk.plan(e2b, targets="attention", scope=["language", "vision"], r=2)
    guard = Guard(plan, settings=CheckSettings(ignore=("GK203", "GK211")))
    sft(tmp_path, e2b, guard, plan=plan, max_steps=1).train()
    assert "GK203" not in {finding.code for finding in guard.report}


def test_settings_for_an_unknown_rule_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        Guard(settings=CheckSettings(ignore=("GK999",)))
    assert caught.value.code == "settings"


def test_warnings_are_written_once_to_the_log_and_to_stderr(
    tmp_path: Path, twin_of: TwinOf, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = Guard(settings=CheckSettings(rules={"GK210": {"severity": "warning"}}))
    with caplog.at_level(logging.WARNING, "graftkit"):
        sft(tmp_path, twin_of(E2B), guard, gradient_accumulation_steps=2, max_steps=1).train()
    assert [record.levelname for record in caplog.records if "GK210" in record.message] == ["WARNING"]
    assert capsys.readouterr().err.count("warning GK210") == 1


# ---- while training ----


def test_curves_show_each_tower_by_step(tmp_path: Path, twin_of: TwinOf) -> None:
    guard = Guard()
    trainer = sft(tmp_path, twin_of(E2B), guard)
    trainer.train()
    assert [step.step for step in guard.steps] == [1, 2, 3, 4]
    assert {curve["label"] for curve in guard.curves["Gradient norm"]} == {"language"}
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    seen = [value for _, value in guard.curves["Gradient norm"][0]["points"]]
    assert seen == pytest.approx(logged, rel=1e-4)
    updates = [value for _, value in guard.curves["Update per step, relative to the weights"][0]["points"]]
    assert updates
    assert all(0 < value < 1 for value in updates)


def test_only_every_so_many_steps_are_measured(tmp_path: Path, twin_of: TwinOf) -> None:
    guard = Guard(every=2)
    sft(tmp_path, twin_of(E2B), guard).train()
    assert [step.step for step in guard.steps] == [2, 4]


def test_the_share_of_clamped_activations_is_measured(tmp_path: Path, e2b: nn.Module) -> None:
    batch = gk.example_batch(e2b, modalities=("text", "image"))
    guard = Guard()
    trainer = Trainer(
        model=gk.attach(e2b, gk.plan(e2b, targets="attention", scope=["vision"], r=2)),
        args=TrainingArguments(output_dir=str(tmp_path), **{**COMMON, "max_steps": 2}),
        train_dataset=Dataset.from_list([{"row": 0}, {"row": 1}, {"row": 2}, {"row": 3}]),
        data_collator=lambda _rows: dict(batch),
        callbacks=[guard],
    )
    trainer.args.remove_unused_columns = False
    trainer.train()
    shares = {curve["label"]: curve["points"] for curve in guard.curves["Clamped activations"]}
    assert set(shares) == {"vision"}
    assert shares["vision"]
    assert all(0 < share < 1 for _, share in shares["vision"])
    assert not any(module._forward_hooks for module in e2b.modules())


@pytest.mark.parametrize("every", [1, 3], ids=["on the step itself", "at the next measured step"])
def test_a_run_that_diverges_is_stopped(every: int, tmp_path: Path, twin_of: TwinOf) -> None:
    guard = Guard(every=every)
    trainer = sft(
        tmp_path, twin_of(E2B), guard, learning_rate=1e30, max_steps=9, save_strategy="steps", save_steps=1
    )
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert caught.value.code in {"not-finite", "saved-adapter"}
    assert trainer.state.global_step < 9


class Poison(TrainerCallback):
    """Makes one weight of the adapter NaN, in one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step - 1:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "lora_B" in name).view(-1)[0] = math.nan


def test_a_nonfinite_weight_is_named_with_the_last_good_checkpoint(tmp_path: Path, twin_of: TwinOf) -> None:
    trainer = sft(tmp_path, twin_of(E2B), Guard(), callbacks=(Poison(2),), save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert caught.value.code == "not-finite"
    assert "step 2" in str(caught.value.where)
    assert "lora_B" in str(caught.value.where)
    assert str(tmp_path / "checkpoint-1") in str(caught.value.help)


def _without(part: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for name, p in model.named_parameters() if p.requires_grad and part not in name]
        return torch.optim.AdamW(trained, lr=1e-2)

    return make


def test_untrained_tensors_are_reported(tmp_path: Path, twin_of: TwinOf) -> None:
    guard = Guard()
    sft(tmp_path, twin_of(E2B), guard, optimizer=_without("layers.0.self_attn.q_proj.lora_B")).train()
    (untrained,) = [finding for finding in guard.report if finding.severity is Severity.WARNING]
    assert untrained.code == "GK203"
    assert "layers.0.self_attn.q_proj.lora_A" in str(untrained.where), "B stays zero, so A never gets a gradient"
    assert untrained.evidence["dead"] == 2


def test_an_optimizer_that_holds_other_weights_is_stopped(tmp_path: Path, twin_of: TwinOf) -> None:
    def elsewhere(_model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-2)

    with pytest.raises(TrainingError) as caught:
        sft(tmp_path, twin_of(E2B), Guard(), optimizer=elsewhere).train()
    assert caught.value.code == "nothing-trains"
    assert "step 3" in str(caught.value.where)


def test_steps_without_a_learning_rate_do_not_count(tmp_path: Path, twin_of: TwinOf) -> None:
    guard = Guard()
    sft(tmp_path, twin_of(E2B), guard, learning_rate=0.0).train()
    assert not guard.report.at_or_above(Severity.WARNING)


def test_steps_of_an_optimizer_that_is_not_shown_do_not_count(tmp_path: Path, twin_of: TwinOf) -> None:
    class HideOptimizer(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            trainer.callback_handler.optimizer = None

    guard = Guard()
    trainer = sft(tmp_path, twin_of(E2B), guard, callbacks=(HideOptimizer(),), learning_rate=0.0)
    trainer.train()
    assert guard.steps
    assert not guard.report.at_or_above(Severity.WARNING)


@pytest.mark.parametrize("given", [{"plan": "x"}, {"settings": {"ignore": ["GK1"]}}, {"every": "10"}])
def test_arguments_of_another_type_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(TrainingError) as caught:
        Guard(**given)
    assert caught.value.code == "guard-argument"
    assert next(iter(given)) in str(caught.value.where)


# ---- at every save ----


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


def test_a_good_save_is_read_back(tmp_path: Path, twin_of: TwinOf) -> None:
    guard = Guard()
    sft(tmp_path, twin_of(E2B), guard, **SAVING).train()
    saved = {finding.code: finding for finding in guard.report if finding.code in {"GK401", "GK403", "GK503"}}
    assert {code: finding.severity for code, finding in saved.items()} == dict.fromkeys(saved, Severity.OK)
    assert saved["GK403"].evidence["compared"] == "bits"


def saving(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> type[SFTTrainer]:
    """A trainer that changes the adapter's tensors as it saves them."""

    class Saving(SFTTrainer):  # type: ignore[misc]  # trl is untyped
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            state = change(get_peft_model_state_dict(self.model))
            save_file(state, Path(str(output_dir)) / "adapter_model.safetensors")

    return Saving


class SavingNothing(SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """Writes no adapter at all."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        Path(str(output_dir)).mkdir(parents=True)


@pytest.mark.parametrize(
    ("kind", "errors"),
    [
        # Placeholders, as ZeRO-3 writes them without gathering.
        pytest.param(
            saving(lambda state: {name: t.new_empty(0) for name, t in state.items()}),
            {"GK401", "GK403", "GK503"},
            id="empty",
        ),
        pytest.param(
            saving(lambda state: {name: torch.zeros_like(t) for name, t in state.items()}), {"GK403"}, id="stale"
        ),
        pytest.param(saving(lambda state: dict([*state.items()][:-1])), {"GK403"}, id="a tensor missing"),
        pytest.param(SavingNothing, set(), id="nothing"),
    ],
)
def test_a_save_that_is_not_the_adapter_stops_the_run(
    kind: type[SFTTrainer], errors: set[str], tmp_path: Path, twin_of: TwinOf
) -> None:
    guard = Guard()
    trainer = sft(tmp_path, twin_of(E2B), guard, kind=kind, **SAVING)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert caught.value.code == "saved-adapter"
    assert error_codes(guard) == errors
    assert trainer.state.global_step == 2


def test_a_resumed_run_names_the_checkpoint_that_it_came_from(tmp_path: Path, twin_of: TwinOf) -> None:
    sft(tmp_path, twin_of(E2B), Guard(), **{**SAVING, "max_steps": 2}).train()
    trainer = sft(tmp_path, twin_of(E2B), Guard(), callbacks=(Poison(3),))
    with pytest.raises(TrainingError) as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "checkpoint-2" in str(caught.value.help)


def test_the_second_adapter_of_a_preference_run_is_read_back_too(tmp_path: Path, twin_of: TwinOf) -> None:
    model = gk.attach(twin_of(E2B), gk.plan(twin_of(E2B), targets="attention", r=2))
    assert isinstance(model, PeftModel)
    guard = Guard()
    DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(tmp_path), **{**COMMON, **SAVING, "max_steps": 2}),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        callbacks=[guard],
    ).train()
    assert (tmp_path / "checkpoint-2" / "ref").is_dir()
    saved = [finding for finding in guard.report if finding.code == "GK403"]
    assert [finding.severity for finding in saved] == [Severity.OK, Severity.OK]


def test_a_reinforced_run_is_the_same_with_and_without_it(tmp_path: Path, twin_of: TwinOf) -> None:
    def grpo(folder: Path, guard: TrainerCallback | None) -> GRPOTrainer:
        options = {**COMMON, "max_steps": 2, "num_generations": 2, "max_completion_length": 4}
        return GRPOTrainer(
            model=twin_of("qwen3"),
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            args=GRPOConfig(
                output_dir=str(folder), activation_checkpointing_kwargs={"use_reentrant": False}, **options
            ),
            train_dataset=Dataset.from_list([{"prompt": row["text"]} for row in texts()]),
            processing_class=tokenizer(),
            peft_config=gk.plan(twin_of("qwen3"), targets="attention", r=2).peft_config,
            callbacks=[guard] if guard else [],
        )

    guard = Guard()
    losses, adapter = outcome(grpo(tmp_path / "with", guard))
    expected, other = outcome(grpo(tmp_path / "without", None))
    assert losses == expected
    assert all(torch.equal(adapter[name], other[name]) for name in other)
    assert {f.code: f.severity for f in guard.report}["GK203"] is Severity.OK


@pytest.mark.parametrize("trainer", [sft, dpo], ids=["sft", "dpo"])
def test_a_checkpoint_says_what_it_answers(twin_of: TwinOf, tmp_path: Path, trainer: Any) -> None:
    """The record is the one that ``gk.sign`` would write of the adapter that was saved."""
    model = twin_of("llama")
    running = trainer(tmp_path, model, Guard())
    running.args.save_strategy, running.args.save_steps = SaveStrategy.STEPS, 4
    running.train()
    folder = tmp_path / "checkpoint-4"
    record = read_record(folder)
    assert record is not None
    assert record.expected is not None
    assert record.tokenizer is not None
    assert gk.sign(running.model, running.processing_class, folder) == record
