"""How the processes of a run shard the adapter and the optimizer's state, and how the adapter is saved in full."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from graftkit.env import asked_by_environment


class Sharding(StrEnum):
    """What processes that train together shard."""

    NONE = "one process or DDP"
    FSDP = "FSDP"
    ZERO_0 = "DeepSpeed without ZeRO"
    ZERO_2 = "ZeRO-1 or ZeRO-2"
    ZERO_3 = "ZeRO-3"


# By DeepSpeed's stage. Checkpoints of the first and the second one look alike.
_STAGES = (Sharding.ZERO_0, Sharding.ZERO_2, Sharding.ZERO_2, Sharding.ZERO_3)


def sharding_of(args: Any) -> Sharding:
    """Return how a run shards; ``args`` are the trainer's, made in this process."""
    if args.deepspeed_plugin is not None:
        return _STAGES[args.deepspeed_plugin.zero_stage]
    # The trainer reads the one, and accelerate the other.
    fsdp = args.fsdp_plugin_args is not None or asked_by_environment("ACCELERATE_USE_FSDP")
    return Sharding.FSDP if fsdp else Sharding.NONE


def save_full_adapter(trainer: Any, folder: Path) -> None:
    """Save the adapter as one file, from the first process; a collective.

    By default FSDP writes one file for each process's shard, which no ``PeftModel`` loads.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
