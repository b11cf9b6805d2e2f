"""Several processes that train together, started by accelerate."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

# What accelerate's own configuration may say that this command leaves as it is.
_SHARED_OUT = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
# "multi_gpu" is its word for one process a device, whatever the devices; the rest is what it warns of otherwise.
_DDP = ("--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
_KILLED = 2


def launch(words: Sequence[str], processes: int) -> int:
    """Run ``graft`` with these words in so many processes on this machine, and wait for them.

    accelerate's default configuration file, where there is one, says how the processes share the model out;
    without one they are DDP's. Ctrl-C is left to the processes, which save and stop, however long that takes.

    Returns:
        The exit status of the first process to fail, 0 where none did, 2 for one that was killed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = ["--num_processes", str(processes)]
    if not _shared_out():
        flags += _DDP
        _use_cpu_without_accelerator()
    args = launch_command_parser().parse_args([*flags, "--module", "graftkit.cli.main", *words])
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


def _shared_out() -> bool:
    """Whether accelerate's configuration has the processes share the model out."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not Path(default_config_file).is_file():
        return False
    kind: Any = load_config_from_file(None).distributed_type
    return str(getattr(kind, "value", kind)) in _SHARED_OUT


def _use_cpu_without_accelerator() -> None:
    """Without this, processes that find no accelerator do not find each other either."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def _pass_on(number: int, _frame: FrameType | None) -> None:
    """The terminal tells every process of its group; another sender may have told only this one."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)
