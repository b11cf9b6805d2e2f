"""The arguments that decide how TRL makes sequences of tokens of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Sources: trl.SFTConfig, trl.DPOConfig. GRPOConfig has no such argument: its prompts are not cut.
_MAX_LENGTH = 1024


@dataclass(frozen=True)
class RowOptions:
    """How TRL makes sequences of rows.

    Attributes:
        max_length: the tokens of a sequence that are kept; None for all.
        keep_end: whether the end of a sequence that is cut is kept, not its start.
        packing: TRL's strategy ("bfd", "bfd_split", "wrapped"), None where each row stays by itself.
        completion_only: whether a prompt stays out of the loss; None where the data decides.
        assistant_only: whether the template's generation marks decide which tokens the loss is on.
        text_field: the column of plain text.
    """

    max_length: int | None = _MAX_LENGTH
    keep_end: bool = False
    packing: str | None = None
    completion_only: bool | None = None
    assistant_only: bool = False
    text_field: str = "text"

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> RowOptions:
        """Read the arguments of ``SFTConfig`` or ``DPOConfig``, with TRL's defaults for those left out."""
        return cls(
            max_length=args.get("max_length", _MAX_LENGTH),
            keep_end=args.get("truncation_mode") == "keep_end",
            packing=str(args.get("packing_strategy") or "bfd") if args.get("packing") else None,
            completion_only=args.get("completion_only_loss"),
            assistant_only=bool(args.get("assistant_only_loss")),
            text_field=str(args.get("dataset_text_field") or "text"),
        )

    @property
    def splits(self) -> bool:
        """Whether what is beyond ``max_length`` goes into another sequence.

        Source: ``trl.data_utils.pack_dataset``.
        """
        return self.packing in {"bfd_split", "wrapped"}

    @property
    def kept(self) -> slice:
        """The part of a sequence that is kept. Packing whole rows ("bfd") always keeps the start."""
        if self.max_length is None or self.splits:
            return slice(None)
        at_end = self.keep_end and self.packing is None
        return slice(-self.max_length, None) if at_end else slice(self.max_length)
