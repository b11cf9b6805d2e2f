"""What has to be true of a run before it starts: its processes have joined, and nothing asked for is left out."""

from __future__ import annotations

import os
from typing import Any

from graftkit.env import asked_by_environment
from graftkit.errors import TrainingError


def check_processes_joined(args: Any) -> None:
    """Check that this process has joined all those that were started with it.

    If accelerate finds no accelerator and is not set to use the CPU, each process trains alone on all of the
    data, and overwrites the others' files.

    Args:
        args: the trainer's, made in this process.

    Raises:
        TrainingError: ``processes-apart``.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == args.world_size:
        return
    raise TrainingError(
        f"{started} processes were started, and this one has joined a group of {args.world_size}",
        why="accelerate found no accelerator, and is not set to use the CPU",
        help="args: {use_cpu: true}, or graft train RECIPE --launch N; DeepSpeed on the CPU needs "
        "ddp_backend: gloo and its settings in accelerate's configuration",
        code="processes-apart",
    )


def check_checkpointing(args: Any) -> None:
    """Check that DeepSpeed does not turn activation checkpointing into the re-entrant kind.

    Under ZeRO-3 TRL makes whatever options checkpointing was given re-entrant, with at most a line in the log; the
    gradients are then wrong on models whose layers share keys and values. Without options transformers takes the
    other kind, which works under ZeRO-3 (``trl.trainer.sft_trainer.SFTTrainer.__init__``,
    ``transformers.PreTrainedModel.activation_checkpointing_enable``).

    Raises:
        TrainingError: ``recomputation``.
    """
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin is not None else 0
    if stage == 3 and args.activation_checkpointing and args.activation_checkpointing_kwargs:
        raise TrainingError(
            "under ZeRO-3 these options would make activation checkpointing re-entrant",
            where=f"args.activation_checkpointing_kwargs: {args.activation_checkpointing_kwargs}",
            why="TRL does that to any options, and some models then get wrong gradients (GK202)",
            help="leave activation_checkpointing_kwargs out: checkpointing is then not re-entrant",
            code="recomputation",
        )


def check_parallelism(trainer: Any) -> None:
    """Check that FSDP or DeepSpeed, where asked for, is in effect.

    accelerate 1.15 knows FSDP on accelerators only (``accelerate.state.AcceleratorState``): on the CPU it ignores
    the request.

    Raises:
        TrainingError: ``parallelism-off``.
    """
    asked = {
        "FSDP": trainer.is_fsdp_enabled or asked_by_environment("ACCELERATE_USE_FSDP"),
        "DEEPSPEED": trainer.is_deepspeed_enabled or asked_by_environment("ACCELERATE_USE_DEEPSPEED"),
    }
    actual = trainer.accelerator.distributed_type.value
    missing = next((name for name, wanted in asked.items() if wanted and name != actual), None)
    if missing is not None:
        raise TrainingError(
            f"{missing} was asked for and is not in effect",
            where=f"accelerate: {actual}, {trainer.args.world_size} processes on {trainer.args.device.type}",
            why="accelerate uses it between processes on accelerators, and DeepSpeed on a CPU without use_cpu",
            help="start the processes with accelerate launch on such a machine; instead of FSDP, on any device: "
            "args: {model_init_kwargs: {distributed_config: {fsdp_size: N}}, save_only_model: true}",
            code="parallelism-off",
        )
