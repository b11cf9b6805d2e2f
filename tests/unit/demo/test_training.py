from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from graftkit.demo import digits, processor, training
from graftkit.errors import GraftError
from graftkit.twins.twin import twin

BOTH = r".*(language_model.*\.(q|k|v|o|gate|up|down)_proj|vision_tower.*_proj\.linear)"
FEW = training.TrainingSettings(steps=16, batch_size=32, warmup_steps=2, log_every=4)


@pytest.fixture(scope="module")
def split() -> digits.DigitSplit:
    return digits.load_digit_split()


@pytest.fixture(scope="module")
def made() -> Any:
    return processor.digit_processor()


@pytest.fixture(scope="module")
def original() -> Any:
    return twin("google/gemma-4-E2B-it", overrides=processor.config_overrides())


@pytest.fixture
def base(original: Any) -> Any:
    return copy.deepcopy(original)


def _lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules=BOTH, **options)


def _quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def run(original: Any, made: Any, split: digits.DigitSplit) -> training.TrainingRun:
    return training.train(
        copy.deepcopy(original), made, split.train, peft_config=_lora(), settings=FEW, console=_quiet()
    )


def test_loss_falls(run: training.TrainingRun) -> None:
    assert [step for step, _ in run.losses] == [4, 8, 12, 16]
    assert run.losses[-1][1] < 0.75 * run.losses[0][1]
    assert (run.steps, run.model.training) == (16, False)


def test_token_types_of_every_picture_reached_the_model(run: training.TrainingRun) -> None:
    assert run.image_tokens == FEW.steps * FEW.batch_size * processor.SOFT_TOKENS


def test_both_towers_were_trained(run: training.TrainingRun) -> None:
    # lora_B starts at zero: what is not zero now was moved by a gradient.
    moved = [name for name, p in run.model.named_parameters() if "lora_B" in name and p.any()]
    still = [name for name, p in run.model.named_parameters() if "lora_B" in name and not p.any()]
    assert any("vision_tower" in name for name in moved)
    assert any("language_model" in name for name in moved)
    assert still == []


def test_the_model_gets_its_own_forward_back(run: training.TrainingRun) -> None:
    assert "forward" not in vars(run.model.get_base_model())


def test_an_attached_adapter_is_trained_in_place_without_output(
    base: Any, made: Any, split: digits.DigitSplit, capfd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(base, _lora())
    two = training.TrainingSettings(steps=2, batch_size=4, log_every=1)
    done = training.train(model, made, split.train, settings=two, description="two steps")
    printed = capfd.readouterr()
    assert done.model is model
    assert printed.out == ""
    assert "two steps" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_same_seed_same_run(base: Any, made: Any, split: digits.DigitSplit) -> None:
    two = training.TrainingSettings(steps=2, batch_size=4, log_every=1, seed=3)
    first, second = (
        training.train(
            copy.deepcopy(base), made, split.train, peft_config=_lora(), settings=two, console=_quiet()
        ).losses
        for _ in range(2)
    )
    assert first == second


def test_threads_are_as_many_after_as_before(made: Any, base: Any, split: digits.DigitSplit) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        training.predict(base, made, split.held_out.select(range(4)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_missing_token_types_stop_the_run(
    base: Any, made: Any, split: digits.DigitSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(made), "create_mm_token_type_ids", lambda self, ids: [[0] * len(i) for i in ids])
    with pytest.raises(GraftError) as caught:
        training.train(base, made, split.train, peft_config=_lora(), settings=FEW, console=_quiet())
    assert caught.value.code == "demo-image-tokens"
    assert not base.base_model._forward_pre_hooks


def test_a_diverged_run_stops(base: Any, made: Any, split: digits.DigitSplit) -> None:
    with torch.no_grad():
        base.model.language_model.norm.weight.fill_(float("nan"))
    with pytest.raises(GraftError) as caught:
        training.train(base, made, split.train, peft_config=_lora(), settings=FEW, console=_quiet())
    assert caught.value.code == "demo-diverged"


def test_a_base_model_needs_a_config(base: Any, made: Any, split: digits.DigitSplit) -> None:
    with pytest.raises(ValueError, match="peft_config"):
        training.train(base, made, split.train, settings=FEW)


def test_accuracy_counts_the_right_tokens(run: training.TrainingRun, made: Any, split: digits.DigitSplit) -> None:
    rows = split.held_out.select(range(50))
    answers = training.predict(run.model, made, rows)
    right = sum(a == b for a, b in zip(answers, rows["completion"], strict=True))
    assert training.accuracy(run.model, made, rows) == right / 50
    assert training.predict(run.model, made, rows, batch_size=7) == answers
    assert right / 50 > 0.15  # already better than guessing
