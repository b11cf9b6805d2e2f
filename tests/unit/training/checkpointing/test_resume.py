"""How a checkpoint was written, whether a shard is missing, and which run can resume it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from graftkit.errors import TrainingError
from graftkit.training.checkpointing.checkpoints import CheckpointInfo, last_complete_checkpoint, read_info
from graftkit.training.checkpointing.interrupt import launcher_is_gone
from graftkit.training.checkpointing.resume import check_resumable
from graftkit.training.distributed.sharding import Sharding, sharding_of

STATES = ("optimizer.pt", "scheduler.pt")
ZERO = tuple(f"global_step10/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))
ZERO_2 = ("latest", "global_step10/mp_rank_00_model_states.pt", *ZERO)
ZERO_3 = ("latest", *(f"global_step10/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2)), *ZERO)
FSDP = ("optimizer.bin", "pytorch_model_fsdp.bin", "scheduler.pt")


def random_states(processes: int) -> tuple[str, ...]:
    return tuple(f"rng_state_{rank}.pth" for rank in range(processes))


def checkpoint(folder: Path, files: Sequence[str]) -> Path:
    """Step 10's, with these files beside the adapter."""
    made = folder / "checkpoint-10"
    made.mkdir(parents=True)
    save_file({"a": torch.ones(64)}, made / "adapter_model.safetensors")
    for name in files:
        file = made / name
        file.parent.mkdir(exist_ok=True)
        if name == "latest":
            file.write_text("global_step10")
        else:
            torch.save({"a": torch.ones(64)}, file)
    (made / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    return made


def save_shards(made: Path, name: str) -> Path:
    """Write what FSDP saves with SHARDED_STATE_DICT."""
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"a": torch.ones(64)}, checkpoint_id=made / name)
    return made / name


def run_of(
    processes: int = 2, zero: int | None = None, fsdp: dict[str, Any] | None = None, rank: int = 0
) -> SimpleNamespace:
    plugin = None if zero is None else SimpleNamespace(zero_stage=zero)
    return SimpleNamespace(
        world_size=processes, process_index=rank, deepspeed_plugin=plugin, fsdp_plugin_args=fsdp
    )


WAYS = [
    pytest.param((*STATES, "rng_state.pth"), CheckpointInfo(1, Sharding.NONE, True), id="one process"),
    pytest.param((*STATES, *random_states(3)), CheckpointInfo(3, Sharding.NONE, True), id="DDP"),
    pytest.param((*ZERO_2, *random_states(2)), CheckpointInfo(2, Sharding.ZERO_2, True), id="ZeRO-2"),
    pytest.param((*ZERO_3, *random_states(2)), CheckpointInfo(2, Sharding.ZERO_3, True), id="ZeRO-3"),
    pytest.param((*ZERO_2[:2], *random_states(2)), CheckpointInfo(2, Sharding.ZERO_0, True), id="DeepSpeed alone"),
    pytest.param((*FSDP, *random_states(2)), CheckpointInfo(2, Sharding.FSDP, True), id="FSDP"),
    pytest.param((), CheckpointInfo(1, Sharding.NONE, False), id="the adapter alone"),
]


@pytest.mark.parametrize(("files", "expected"), WAYS)
def test_who_wrote_it(tmp_path: Path, files: Sequence[str], expected: CheckpointInfo) -> None:
    made = checkpoint(tmp_path, files)
    assert last_complete_checkpoint(tmp_path) == made
    assert read_info(made) == expected


@pytest.mark.parametrize(
    ("files", "lost"),
    [
        pytest.param((*STATES, *random_states(2)), "rng_state_1.pth", id="DDP, the last process's"),
        pytest.param((*STATES, *random_states(3)), "rng_state_1.pth", id="DDP, one in between"),
        pytest.param((*ZERO_2, *random_states(2)), "latest", id="ZeRO, the step's name"),
        pytest.param((*ZERO_2, *random_states(2)), ZERO[0], id="ZeRO-2, a part of the optimizer"),
        pytest.param((*ZERO_2, *random_states(2)), ZERO_2[1], id="ZeRO-2, the model"),
        pytest.param((*ZERO_3, *random_states(2)), ZERO_3[2], id="ZeRO-3, a part of the model"),
        pytest.param((*ZERO_3, *random_states(2)), "rng_state_1.pth", id="ZeRO-3, a random state"),
    ],
)
def test_a_shard_that_is_missing(tmp_path: Path, files: Sequence[str], lost: str) -> None:
    made = checkpoint(tmp_path, files)
    (made / lost).unlink()
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize("left", [0.0, 0.5, 0.99], ids=["empty", "half", "all but the end"])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state_1.pth", "training_args.bin", ZERO[1]])
def test_a_file_of_torch_that_was_cut(tmp_path: Path, name: str, left: float) -> None:
    file = checkpoint(tmp_path, (*STATES, *ZERO_2, "training_args.bin", *random_states(2))) / name
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * left)])
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_shards_that_fsdp_had_not_finished(tmp_path: Path, name: str) -> None:
    made = checkpoint(tmp_path, random_states(2))
    shards = save_shards(made, name)
    assert last_complete_checkpoint(tmp_path) == made
    assert read_info(made).sharding is Sharding.FSDP
    (shards / ".metadata").unlink()
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (run_of(), Sharding.NONE),
        (run_of(zero=0), Sharding.ZERO_0),
        (run_of(zero=1), Sharding.ZERO_2),
        (run_of(zero=2), Sharding.ZERO_2),
        (run_of(zero=3), Sharding.ZERO_3),
        (run_of(fsdp={"fsdp_version": 2}), Sharding.FSDP),
    ],
    ids=["DDP", "DeepSpeed alone", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP"],
)
def test_how_a_run_shards(args: SimpleNamespace, expected: Sharding) -> None:
    assert sharding_of(args) is expected


def test_fsdp_that_only_the_launcher_knows_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding_of(run_of()) is Sharding.FSDP


@pytest.mark.parametrize(
    ("files", "args"),
    [
        pytest.param((*STATES, *random_states(2)), run_of(), id="DDP"),
        pytest.param((*ZERO_2, *random_states(2)), run_of(zero=1), id="ZeRO-1 from ZeRO-2"),
        pytest.param((*ZERO_3, *random_states(2)), run_of(zero=3), id="ZeRO-3"),
    ],
)
def test_what_fits_is_silent(
    tmp_path: Path, files: Sequence[str], args: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    check_resumable(checkpoint(tmp_path, files), args)
    assert not caplog.records


@pytest.mark.parametrize(
    ("files", "args", "named"),
    [
        pytest.param(
            (*STATES, *random_states(2)), run_of(zero=3), (Sharding.NONE, Sharding.ZERO_3), id="DDP to ZeRO-3"
        ),
        pytest.param((*ZERO_2, *random_states(2)), run_of(), (Sharding.ZERO_2, Sharding.NONE), id="ZeRO-2 to DDP"),
        pytest.param(
            (*ZERO_2, *random_states(2)), run_of(zero=3), (Sharding.ZERO_2, Sharding.ZERO_3), id="ZeRO-2 to ZeRO-3"
        ),
        pytest.param((*FSDP, *random_states(2)), run_of(), (Sharding.FSDP, Sharding.NONE), id="FSDP to DDP"),
        pytest.param((*ZERO_3, *random_states(2)), run_of(4, zero=3), ("2", "4"), id="ZeRO-3, 2 to 4"),
        pytest.param((), run_of(1), ("save_only_model",), id="an adapter alone"),
        pytest.param(("optimizer.pt", "rng_state.pth"), run_of(1), ("save_only_model",), id="no schedule"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, files: Sequence[str], args: SimpleNamespace, named: Sequence[str]
) -> None:
    with pytest.raises(TrainingError) as caught:
        check_resumable(checkpoint(tmp_path, files), args)
    assert caught.value.code == "cannot-resume"
    assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)], ids=["the first process", "the others"])
def test_another_number_under_ddp_is_logged_once(
    tmp_path: Path, rank: int, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_resumable(checkpoint(tmp_path, (*STATES, *random_states(2))), run_of(4, rank=rank))
    assert [record.args for record in caplog.records] == lines * [("checkpoint-10", 2, 4)]


@pytest.mark.parametrize(
    ("launched", "child_of", "gone"),
    [
        pytest.param(True, os.getppid() + 1, True, id="another parent than at first"),
        pytest.param(True, os.getppid(), False, id="the launcher lives"),
        pytest.param(False, os.getppid() + 1, False, id="started by a shell that may end"),
    ],
)
def test_a_launcher_that_was_killed(
    launched: bool, child_of: int, gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launcher_is_gone(child_of) is gone
