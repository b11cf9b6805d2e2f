"""The checkpoints of a run: which are complete, after a power cut or a full disk, and how they were written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from graftkit.errors import SourceError, TrainingError
from graftkit.surveying.checkpoint.headers import read_headers
from graftkit.training.distributed.sharding import Sharding

_NAME = re.compile(r"checkpoint-(\d+)")
# The first process writes it last, and does not wait for the random states of the others.
_STATE = "trainer_state.json"
_RANDOM_STATE = re.compile(r"rng_state_(\d+)\.pth")
# What the first process writes of the optimizer where nothing is sharded.
_OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")
# What torch.save writes.
_ARCHIVES = (".pt", ".pth", ".bin")
# DeepSpeed's folder of a step, and the file that names it (DeepSpeedEngine.save_checkpoint).
_STEP, _LATEST = "global_step*", "latest"
_MODEL, _OPTIMIZER = "*mp_rank_*_model_states.pt", "*zero_pp_rank_*_optim_states.pt"
# Of the model only ZeRO-3 makes a file for each process (DeepSpeedEngine._get_ckpt_name).
_MODEL_SHARDS = "*zero_pp_rank_*_model_states.pt"
# FSDP's: files, or folders of shards (accelerate.utils.fsdp_utils).
_FSDP = ("pytorch_model_fsdp*", "optimizer_*", "optimizer.bin")
# torch.distributed.checkpoint writes it last, when every process has written its shards.
_SHARDS_INDEX = ".metadata"


@dataclass(frozen=True)
class CheckpointInfo:
    """How a checkpoint was written.

    Attributes:
        processes: how many trained together.
        resumable: whether the optimizer and its schedule are there; ``save_only_model`` leaves them out.
    """

    processes: int
    sharding: Sharding
    resumable: bool


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None.

    In a complete one the trainer's state can be read, every safetensors file is as long as its header says, every
    file of torch's ends as such files do, and no process's shard is missing. All processes are assumed to write
    into one folder. A checkpoint that was cut short is skipped, and stays for the user to look at.
    """
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return next((path for _, path in sorted(found, reverse=True) if _is_complete(path)), None)


def checkpoint_to_resume(folder: Path) -> Path:
    """Return the newest complete checkpoint.

    Raises:
        TrainingError: ``nothing-to-resume``.
    """
    found = last_complete_checkpoint(folder)
    if found is None:
        raise TrainingError(
            "there is no complete checkpoint to resume from",
            where=str(folder),
            help="start without --resume; args: {save_steps: 100} makes checkpoints",
            code="nothing-to-resume",
        )
    return found


def read_info(checkpoint: Path) -> CheckpointInfo:
    """Return how a complete checkpoint was written, from the names of its files."""
    sharding = _sharding(checkpoint)
    files = (checkpoint / name for name in _OPTIMIZER_FILES)
    resumable = sharding is not Sharding.NONE or all(file.is_file() for file in files)
    # One process writes rng_state.pth, several write one file each (Trainer._save_rng_state).
    return CheckpointInfo(max(1, len(_ranks(checkpoint))), sharding, resumable)


def _ranks(checkpoint: Path) -> list[int]:
    return sorted(int(m[1]) for p in checkpoint.iterdir() if (m := _RANDOM_STATE.fullmatch(p.name)))


def _sharding(checkpoint: Path) -> Sharding:
    step = next(checkpoint.glob(_STEP), None)
    if step is not None:
        stages = {_MODEL_SHARDS: Sharding.ZERO_3, _OPTIMIZER: Sharding.ZERO_2}
        return next((stage for files, stage in stages.items() if any(step.glob(files))), Sharding.ZERO_0)
    return Sharding.FSDP if any(any(checkpoint.glob(files)) for files in _FSDP) else Sharding.NONE


def _is_complete(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        _check_files(checkpoint.rglob("*"))
        has_shards = _has_all_shards(checkpoint)
    except (OSError, ValueError, SourceError, BadZipFile):
        return False
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    return has_shards and isinstance(state, dict) and state.get("global_step") == step


def _check_files(files: Iterable[Path]) -> None:
    """Open every file whose format marks its end; nothing of torch's is unpickled."""
    for file in files:
        if file.suffix == ".safetensors":
            read_headers(file)
        elif file.suffix in _ARCHIVES:
            ZipFile(file).close()  # its directory comes last


def _has_all_shards(checkpoint: Path) -> bool:
    """Check that each process's random state is there, and its shards under DeepSpeed or FSDP.

    Raises:
        OSError: DeepSpeed had not yet named its folder.
    """
    ranks = _ranks(checkpoint)
    if ranks != [*range(len(ranks))] or len(ranks) == 1:
        return False
    if any(checkpoint.glob(_STEP)):
        step = checkpoint / (checkpoint / _LATEST).read_text(encoding="utf-8").strip()
        shards = {len([*step.glob(files)]) for files in (_OPTIMIZER, _MODEL_SHARDS)}
        return any(step.glob(_MODEL)) and shards <= {0, max(1, len(ranks))}
    folders = (p for files in _FSDP for p in checkpoint.glob(files) if p.is_dir())
    return all((folder / _SHARDS_INDEX).is_file() for folder in folders)
