"""The checkpoints of a run: which of them are whole, after a power cut or a full disk, and who wrote them how."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from graftkit.errors import SourceError, TrainingError
from graftkit.surveying.checkpoint.headers import read_headers

_NAME = re.compile(r"checkpoint-(\d+)")
# The first process writes it last, and does not wait for the random states of the others.
_STATE = "trainer_state.json"
_RANDOM_STATE = re.compile(r"rng_state_(\d+)\.pth")
# What the first process writes of the optimizer where nothing is shared out.
_STATES = ("optimizer.pt", "scheduler.pt")
# What torch.save writes.
_ARCHIVES = (".pt", ".pth", ".bin")
# DeepSpeed's folder of a step, and the file that names it (DeepSpeedEngine.save_checkpoint).
_STEP, _LATEST = "global_step*", "latest"
_MODEL, _OPTIMIZER = "*mp_rank_*_model_states.pt", "*zero_pp_rank_*_optim_states.pt"
# Of the model only ZeRO-3 makes a file for each process (DeepSpeedEngine._get_ckpt_name).
_MODEL_PARTS = "*zero_pp_rank_*_model_states.pt"
# FSDP's: files, or folders of parts (accelerate.utils.fsdp_utils).
_FSDP = ("pytorch_model_fsdp*", "optimizer_*", "optimizer.bin")
# torch.distributed.checkpoint writes it last, when every process has written its parts.
_PARTS_INDEX = ".metadata"


class Sharing(StrEnum):
    """How processes that train together share out the adapter and the optimizer's state."""

    NONE = "one process or DDP"
    FSDP = "FSDP"
    ZERO_0 = "DeepSpeed without ZeRO"
    ZERO_2 = "ZeRO-1 or ZeRO-2"
    ZERO_3 = "ZeRO-3"


@dataclass(frozen=True)
class Written:
    """How a checkpoint was written.

    Attributes:
        processes: how many trained together.
        sharing: how they shared out what is saved.
        trains_on: whether the optimizer and its schedule are there; ``save_only_model`` leaves them out.
    """

    processes: int
    sharing: Sharing
    trains_on: bool


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None.

    Whole means: the trainer's state is there and can be read, every safetensors file is as long as its header
    says, every file of torch's ends as such files do, and no process's part is missing. All processes are taken to
    write into one folder. A checkpoint that a kill has cut is passed over, and left for the user to look at.
    """
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return next((path for _, path in sorted(found, reverse=True) if _is_whole(path)), None)


def resume_point(folder: Path) -> Path:
    """The checkpoint to go on from.

    Raises:
        TrainingError: ``nothing-to-resume``.
    """
    found = last_whole_checkpoint(folder)
    if found is None:
        raise TrainingError(
            "there is no whole checkpoint to resume from",
            where=str(folder),
            help="start without --resume; args: {save_steps: 100} makes checkpoints",
            code="nothing-to-resume",
        )
    return found


def written(checkpoint: Path) -> Written:
    """How a whole checkpoint was written, as its files show."""
    sharing = _sharing(checkpoint)
    states = (checkpoint / name for name in _STATES)
    kept = sharing is not Sharing.NONE or all(state.is_file() for state in states)
    return Written(_processes(checkpoint), sharing, kept)


def _processes(checkpoint: Path) -> int:
    """One process writes ``rng_state.pth``, several one file each (``Trainer._save_rng_state``)."""
    return max(1, len(_ranks(checkpoint)))


def _ranks(checkpoint: Path) -> list[int]:
    return sorted(int(m[1]) for p in checkpoint.iterdir() if (m := _RANDOM_STATE.fullmatch(p.name)))


def _sharing(checkpoint: Path) -> Sharing:
    step = next(checkpoint.glob(_STEP), None)
    if step is not None:
        stages = {_MODEL_PARTS: Sharing.ZERO_3, _OPTIMIZER: Sharing.ZERO_2}
        return next((stage for files, stage in stages.items() if any(step.glob(files))), Sharing.ZERO_0)
    return Sharing.FSDP if any(any(checkpoint.glob(files)) for files in _FSDP) else Sharing.NONE


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        _check_files(checkpoint.rglob("*"))
        together = _all_took_part(checkpoint)
    except (OSError, ValueError, SourceError, BadZipFile):
        return False
    named = _NAME.fullmatch(checkpoint.name)
    of_step = named is not None and isinstance(state, dict) and state.get("global_step") == int(named[1])
    return of_step and together


def _check_files(files: Iterable[Path]) -> None:
    """Open every file that tells where it ends; nothing of torch's is unpickled."""
    for file in files:
        if file.suffix == ".safetensors":
            read_headers(file)
        elif file.suffix in _ARCHIVES:
            ZipFile(file).close()  # its directory comes last


def _all_took_part(checkpoint: Path) -> bool:
    """Whether no process's part is missing: its random state, and what DeepSpeed or FSDP gave it to keep.

    Raises:
        OSError: DeepSpeed had not yet named its folder.
    """
    ranks = _ranks(checkpoint)
    if ranks != [*range(len(ranks))] or len(ranks) == 1:
        return False
    if any(checkpoint.glob(_STEP)):
        return _shards_are_there(checkpoint / (checkpoint / _LATEST).read_text(encoding="utf-8").strip(), ranks)
    folders = (p for files in _FSDP for p in checkpoint.glob(files) if p.is_dir())
    return all((folder / _PARTS_INDEX).is_file() for folder in folders)


def _shards_are_there(step: Path, ranks: list[int]) -> bool:
    """Whether DeepSpeed's folder holds a model, and of what it shares out as many parts as there are processes."""
    parts = [len([*step.glob(files)]) for files in (_OPTIMIZER, _MODEL_PARTS)]
    return any(step.glob(_MODEL)) and set(parts) <= {0, max(1, len(ranks))}
