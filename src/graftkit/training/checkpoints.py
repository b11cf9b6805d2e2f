"""The checkpoints of a run: which of them are whole, after a power cut or a full disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

from graftkit.errors import SourceError, TrainingError
from graftkit.surveying.headers import read_headers

_NAME = re.compile(r"checkpoint-(\d+)")
# The trainer writes it last.
_STATE = "trainer_state.json"


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be resumed from, or None.

    Whole means: the trainer's state is there and can be read, and every safetensors file is as long as its header
    says. One that a kill has cut is passed over, and left for the user to look at.
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


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        for weights in checkpoint.rglob("*.safetensors"):
            read_headers(weights)
    except (OSError, ValueError, SourceError):
        return False
    named = _NAME.fullmatch(checkpoint.name)
    return named is not None and isinstance(state, dict) and state.get("global_step") == int(named[1])
