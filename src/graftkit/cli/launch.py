"""Start the processes of one training run through accelerate."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

# Values of accelerate's distributed_type under which the processes share the model out; they are left as they are.
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
# "multi_gpu" means one process a device, whatever the devices; accelerate warns where the others are not given.
_DDP = ("--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
_KILLED = 2


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``graft`` with these arguments in several processes on this machine, and wait for them.

    accelerate's default configuration file, if it exists, says how the processes share the model out; without it
    they use DDP. Ctrl-C is passed on to the processes, which save and stop, however long that takes.

    Returns:
        The exit status of the first process that failed, 0 if none did, 2 if it was killed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = ["--num_processes", str(processes)]
    if not _shards_the_model():
        flags += _DDP
        _use_cpu_without_accelerator()
    args = launch_command_parser().parse_args([*flags, "--module", "graftkit.cli.main", *arguments])
    args.signals_to_handle = "SIGTERM,SIGHUP,SIGQUIT"  # torchrun would kill them 30 seconds after Ctrl-C
    before = signal.signal(signal.SIGINT, _pass_on)
    try:
        launch_command(args)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else _KILLED
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def without_launch(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without every ``--launch``, written as one word with its number or as two."""
    values = {at + 1 for at, argument in enumerate(arguments) if argument == "--launch"}
    kept = enumerate(arguments)
    return [argument for at, argument in kept if at not in values and argument.partition("=")[0] != "--launch"]


def _shards_the_model() -> bool:
    """Check whether accelerate's configuration has the processes share the model out."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not Path(default_config_file).is_file():
        return False
    kind: Any = load_config_from_file(None).distributed_type
    return str(getattr(kind, "value", kind)) in _SHARDING


def _use_cpu_without_accelerator() -> None:
    """Select the CPU backend, without which processes on a machine without an accelerator do not connect."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """Pass a signal on to the processes: only a terminal sends it to all of them itself."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)
