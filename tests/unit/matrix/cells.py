"""Cells for tests that need no model."""

from __future__ import annotations

from typing import Any

from graftkit.matrix.cell import PROOF, Cell, Check, Verdict


def cell(model_type: str = "llama", check: Check = Check.TWIN, **fields: Any) -> Cell:
    given: dict[str, Any] = {
        "model_class": "LlamaForCausalLM",
        "modalities": ("text",),
        "method": "lora",
        "verdict": Verdict.PROVEN,
        "message": "it holds",
        "versions": {"graftkit": "1", "transformers": "5.0"},
        **fields,
    }
    return Cell(model_type=model_type, check=check, **given)


def proof(model_type: str, broken: Check | None = None, **fields: Any) -> list[Cell]:
    """Return the cells of a proof, of which one failed and what follows was not reached."""
    at = len(PROOF) if broken is None else PROOF.index(broken)
    verdicts = [Verdict.PROVEN] * at + [Verdict.FAILED] + [Verdict.UNKNOWN] * len(PROOF)
    return [
        cell(model_type, check, verdict=verdict, **fields) for check, verdict in zip(PROOF, verdicts, strict=False)
    ]
