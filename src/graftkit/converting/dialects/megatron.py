"""Megatron's and NeMo's own checkpoints: recognised, to say which of their exports can be read.

Sources: ``megatron/core/dist_checkpointing`` (a pickled ``common.pt``, and PyTorch's ``.metadata`` beside
``.distcp`` files), NeMo's ``.nemo`` archives (``model_weights.ckpt``), ``mp_rank_*/model_optim_rng.pt`` of
Megatron-LM; ``examples/conversion/adapter/README.md`` in Megatron Bridge for the export.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas
from graftkit.converting.dialects._base import DialectFormat
from graftkit.errors import AdapterError

_FILES = ("latest_checkpointed_iteration.txt", "latest_train_state.pt", ".metadata", "common.pt", "metadata.json")
_PATTERNS = ("*.distcp", "*.nemo", "mp_rank_*", "iter_*", "weights/*.distcp")


@dataclass(frozen=True)
class MegatronDialect(DialectFormat):
    """Sharded or archived checkpoints, whose descriptions are pickles."""

    name: ClassVar[str] = "megatron"
    writes: ClassVar[bool] = False

    def recognises(self, folder: Path) -> bool:
        return any((folder / name).is_file() for name in _FILES) or any(any(folder.glob(p)) for p in _PATTERNS)

    def base_of(self, folder: Path) -> str | None:
        """Refuse the folder: see :meth:`read`."""
        raise _pickled(folder)

    def read(self, folder: Path, base: ConvertBase) -> Deltas:
        """Refuse the folder.

        Raises:
            AdapterError: ``adapter-pickle``.
        """
        del base
        raise _pickled(folder)


def _pickled(folder: Path) -> AdapterError:
    return AdapterError(
        "this is a checkpoint of Megatron or NeMo, whose parts only a pickle describes",
        where=str(folder),
        why="reading a pickle can run code",
        help="export it with the tool that wrote it, and convert the export: Megatron Bridge's is "
        "examples/conversion/adapter/export_adapter.py",
        code="adapter-pickle",
    )


DIALECT = MegatronDialect()
