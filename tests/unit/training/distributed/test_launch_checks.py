"""What several processes must not start with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from graftkit.errors import TrainingError
from graftkit.training.distributed.collectives import any_process
from graftkit.training.distributed.launch_checks import (
    check_checkpointing,
    check_parallelism,
    check_processes_joined,
)


def args(zero: int | None = None, **given: Any) -> SimpleNamespace:
    plugin = None if zero is None else SimpleNamespace(zero_stage=zero)
    defaults = {
        "world_size": 1,
        "device": SimpleNamespace(type="cpu"),
        "deepspeed_plugin": plugin,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": None,
    }
    return SimpleNamespace(**{**defaults, **given})


def trainer(kind: str, *, fsdp: bool = False, deepspeed: bool = False) -> SimpleNamespace:
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    return SimpleNamespace(
        is_fsdp_enabled=fsdp, is_deepspeed_enabled=deepspeed, accelerator=accelerator, args=args(world_size=2)
    )


def test_a_process_that_was_started_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_processes_joined(args())


def test_processes_that_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes_joined(args(world_size=2))


def test_a_process_that_did_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError) as caught:
        check_processes_joined(args())
    assert caught.value.code == "processes-apart"


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}, {"every_n_layers": 2}])
def test_any_option_of_recomputation_under_zero_3(options: dict[str, Any]) -> None:
    with pytest.raises(TrainingError) as caught:
        check_checkpointing(args(zero=3, activation_checkpointing_kwargs=options))
    assert caught.value.code == "recomputation"
    assert str(options) in str(caught.value.where)


@pytest.mark.parametrize(
    "fine",
    [
        args(zero=3),
        args(zero=3, activation_checkpointing_kwargs={}),
        args(zero=3, activation_checkpointing=False, activation_checkpointing_kwargs={"use_reentrant": False}),
        args(zero=2, activation_checkpointing_kwargs={"use_reentrant": False}),
        args(activation_checkpointing_kwargs={"use_reentrant": True}),
    ],
    ids=["no options", "empty options", "no recomputation", "ZeRO-2", "no DeepSpeed"],
)
def test_recomputation_that_stays_as_it_is(fine: SimpleNamespace) -> None:
    check_checkpointing(fine)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (trainer("MULTI_CPU", fsdp=True), "FSDP"),
        (trainer("MULTI_GPU", deepspeed=True), "DEEPSPEED"),
    ],
    ids=["FSDP", "DeepSpeed"],
)
def test_what_was_asked_for_and_is_not_there(made: SimpleNamespace, wanted: str) -> None:
    with pytest.raises(TrainingError) as caught:
        check_parallelism(made)
    assert caught.value.code == "parallelism-off"
    assert wanted in caught.value.what


def test_what_was_asked_of_the_launcher_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError) as caught:
        check_parallelism(trainer("MULTI_CPU"))
    assert caught.value.code == "parallelism-off"


@pytest.mark.parametrize(
    "made",
    [trainer("FSDP", fsdp=True), trainer("DEEPSPEED", deepspeed=True), trainer("MULTI_GPU"), trainer("NO")],
    ids=["FSDP", "DeepSpeed", "DDP", "one process"],
)
def test_what_is_in_effect(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    check_parallelism(made)


@pytest.mark.parametrize("here", [True, False])
def test_one_process_asks_nobody(here: bool) -> None:
    assert any_process(here, "cpu") is here
