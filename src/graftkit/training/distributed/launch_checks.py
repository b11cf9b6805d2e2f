"""Several processes that train together: whether they found each other, and what they have to agree on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from graftkit.errors import TrainingError
from graftkit.training.checkpointing.checkpoints import Sharing
from graftkit.training.distributed.collectives import summed

# DeepSpeed's stages, as its checkpoints tell them apart.
_STAGES = (Sharing.ZERO_0, Sharing.ZERO_2, Sharing.ZERO_2, Sharing.ZERO_3)


def check_together(args: Any) -> None:
    """Check that this process is in touch with all that were started beside it.

    Where accelerate finds no accelerator and was not told to use the CPU, each process believes that it is alone,
    trains on all of the data, and writes over the others' files.

    Args:
        args: the trainer's, made in this process.

    Raises:
        TrainingError: ``processes-apart``.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == args.world_size:
        return
    raise TrainingError(
        f"{started} processes were started, and this one is in touch with {args.world_size}",
        why="accelerate found no accelerator to join them over, and was not told to use the CPU",
        help="args: {use_cpu: true}, or graft train RECIPE --launch N; DeepSpeed on the CPU needs "
        "ddp_backend: gloo and its settings in accelerate's configuration",
        code="processes-apart",
    )


def check_recomputation(args: Any) -> None:
    """Check that DeepSpeed does not bring re-entrant activation checkpointing with it.

    Under ZeRO-3 TRL changes whatever options checkpointing was given to the re-entrant kind, and says at most a
    line in the log; the gradients are then wrong on models whose layers share keys and values. Without options
    transformers takes the other kind, which works under ZeRO-3 (``trl.trainer.sft_trainer.SFTTrainer.__init__``,
    ``transformers.PreTrainedModel.activation_checkpointing_enable``).

    Raises:
        TrainingError: ``recomputation``.
    """
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0
    if stage == 3 and args.activation_checkpointing and args.activation_checkpointing_kwargs:
        raise TrainingError(
            "ZeRO-3 would turn these options into re-entrant activation checkpointing",
            where=f"args.activation_checkpointing_kwargs: {args.activation_checkpointing_kwargs}",
            why="TRL does that wherever options are given, and some models then get wrong gradients (GK202)",
            help="leave activation_checkpointing_kwargs out: checkpointing is then of the non-re-entrant kind",
            code="recomputation",
        )


def sharing_of(args: Any) -> Sharing:
    """How this run's processes share out what a checkpoint holds.

    Args:
        args: the trainer's, made in this process.
    """
    if args.deepspeed_plugin is not None:
        return _STAGES[args.deepspeed_plugin.zero_stage]
    # The trainer reads the one, and accelerate the other.
    fsdp = args.fsdp_plugin_args is not None or _in_environment("ACCELERATE_USE_FSDP")
    return Sharing.FSDP if fsdp else Sharing.NONE


def check_parallelism(trainer: Any) -> None:
    """Check that FSDP or DeepSpeed, where it was asked for, is in effect.

    accelerate 1.15 knows FSDP on accelerators only (``accelerate.state.AcceleratorState``): on the CPU it goes on
    without, and says nothing.

    Raises:
        TrainingError: ``parallelism-off``.
    """
    asked = {
        "FSDP": trainer.is_fsdp_enabled or _in_environment("ACCELERATE_USE_FSDP"),
        "DEEPSPEED": trainer.is_deepspeed_enabled or _in_environment("ACCELERATE_USE_DEEPSPEED"),
    }
    actual = trainer.accelerator.distributed_type.value
    missing = next((name for name, wanted in asked.items() if wanted and name != actual), None)
    if missing is not None:
        raise TrainingError(
            f"{missing} was asked for and is not in effect",
            where=f"accelerate: {actual}, {trainer.args.world_size} processes on {trainer.args.device.type}",
            why="accelerate takes it up between processes on accelerators; DeepSpeed on a CPU without use_cpu",
            help="start the processes with accelerate launch on such a machine; in place of FSDP, on any device: "
            "args: {model_init_kwargs: {distributed_config: {fsdp_size: N}}, save_only_model: true}",
            code="parallelism-off",
        )


def any_asked(here: bool, args: Any) -> bool:
    """Whether any process says yes; a collective where there is more than one."""
    if args.world_size == 1:
        return here
    import torch

    return bool(summed(torch.tensor([float(here)], device=args.device)).item())


def launcher_is_gone(parent: int) -> bool:
    """Whether the launcher was killed and had no chance to end this process, which would train on unseen.

    torchrun, which accelerate starts processes with, puts each into a session of its own
    (``torch.distributed.elastic.multiprocessing.subprocess_handler``): what kills the launcher's process group
    does not reach them, and a run that resumes theirs would share its folder with them.

    Args:
        parent: the process that this one was a child of when it began.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent


def save_whole(trainer: Any, folder: Path) -> None:
    """Save the adapter in one file, on the first process; a collective, whatever shares the parameters out.

    FSDP's default keeps each process's part in a file of its own, which no ``PeftModel`` loads.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()


def _in_environment(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
