"""``first_recipe()``: a commented recipe for a model, a data file and a GPU, chosen from what these are."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.data.load import COLUMNS, MODALITIES, read_rows
from graftkit.errors import DataError, PlanError
from graftkit.planning.plan import Plan, plan
from graftkit.recipes.trainers import TrainerName
from graftkit.recipes.write import Start, initial_recipe
from graftkit.surveying.sites import ModelMap
from graftkit.surveying.survey import survey
from graftkit.text import size

if TYPE_CHECKING:
    from datasets import Dataset

# Of a GPU's memory, what weights, gradients and the optimizer may take: the rest is for activations, which depend
# on the length of the rows, and for the driver.
_SHARE = 0.7
_GIB = 2**30
# Names that data sets give to what a trainer's column holds; the first that the data has is taken.
_NAMES = {
    "messages": ("conversations", "conversation", "chat"),
    "prompt": ("instruction", "question", "input", "query", "problem"),
    "completion": ("response", "output", "answer", "target", "solution"),
    "text": ("content", "document", "body"),
    "chosen": ("chosen_response", "preferred"),
    "rejected": ("rejected_response", "dispreferred"),
}
_ANSWERS = ("solution", "label", "target", "ground_truth")
# Where nobody says which trainer: that with the most particular columns first.
_ORDER = (TrainerName.DPO, TrainerName.SFT, TrainerName.GRPO)
# Fewer rows than this are not worth a held-out share.
_FEW = 100


@dataclass(frozen=True)
class FirstRecipe:
    """A recipe, and why it is as it is.

    Attributes:
        text: YAML with comments.
        reasons: one sentence for each choice.
    """

    text: str
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"recipe": self.text, "reasons": list(self.reasons)}


def first_recipe(
    model: str,
    data: str | Path,
    *,
    home: str | Path = ".",
    trainer: TrainerName | None = None,
    gpu_memory: float | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> FirstRecipe:
    """Write a recipe that trains a model on a data file.

    Args:
        model: as ``survey`` takes it. Its weights are not read.
        data: as a recipe's ``data.path``: relative paths are relative to ``home``.
        home: the folder that the recipe will be in.
        trainer: None for the one whose columns the data has.
        gpu_memory: GiB of the GPU that it will be trained on; the base is quantized where 16 bit do not fit.

    Raises:
        DataError: as ``read_rows``, or ``data-columns``: no trainer, or not the one named, finds its columns.
        PlanError: ``gpu-memory``: the model does not fit, not even in 4 bit.
        SourceError, BuildError: the model cannot be surveyed.
    """
    rows, _ = read_rows(str(data), "train", Path(home) / Path(data).expanduser())
    chosen, columns, why = _trainer(rows.column_names, trainer, str(data))
    model_map = survey(model, trust_remote_code=trust_remote_code, revision=revision)
    scope = _scope(model_map)
    quantization, cost = _quantization(model_map, scope, gpu_memory)
    shown = sorted({MODALITIES[name] for name in rows.column_names if name in MODALITIES})
    reward, rewarded = _reward(rows, columns) if chosen is TrainerName.GRPO else ("", None)
    start = Start(
        model=model,
        data=str(data),
        columns=columns,
        scope=scope,
        quantization=quantization,
        reward=reward,
        eval_share=Start.eval_share if len(rows) >= _FEW else None,
        other_modalities=bool(shown),
    )
    reasons = (why, _left_out(rows.column_names, columns, chosen), rewarded, _adapted(scope), cost)
    return FirstRecipe(initial_recipe(chosen, start), tuple(reason for reason in reasons if reason))


def _left_out(present: Collection[str], columns: Mapping[str, str], trainer: TrainerName) -> str | None:
    """Name the columns that the trainer will not read: a prompt may need what is in one of them."""
    read = {name for names in COLUMNS[trainer] for name in names} | {*columns.values(), *MODALITIES}
    others = [name for name in present if name not in read]
    return f"not read: {', '.join(others)}" if others and trainer is not TrainerName.GRPO else None


def _adapted(scope: tuple[str, ...] | None) -> str:
    return "adapted: the language tower" if scope else "adapted: every tower that each batch feeds"


def _trainer(
    present: Collection[str], wanted: TrainerName | None, path: str
) -> tuple[TrainerName, dict[str, str], str]:
    """Return a trainer, the columns to rename for it, and why it was chosen."""
    for trainer in _ORDER if wanted is None else (wanted,):
        for names in COLUMNS[trainer]:
            taken = _renamed(names, present, grpo=trainer is TrainerName.GRPO)
            if taken is not None:
                found = ", ".join(
                    f"{theirs} as {name}" if theirs != name else name for name, theirs in taken.items()
                )
                return trainer, {n: t for n, t in taken.items() if n != t}, f"{trainer}: the data has {found}"
    needed = [" + ".join(names) for t in (_ORDER if wanted is None else (wanted,)) for names in COLUMNS[t]]
    raise DataError(
        f"{wanted or 'no trainer'} does not find its columns" if wanted else "no trainer finds its columns",
        where=path,
        why=f"needed are {' or '.join(needed)}; the data has {', '.join(present)}",
        help="rename them, or begin with graft train --init and say data: {columns: {prompt: question}}",
        code="data-columns",
    )


def _renamed(names: tuple[str, ...], present: Collection[str], *, grpo: bool) -> dict[str, str] | None:
    """Return the trainer's column -> the data's, for grpo with the answer; None where one is missing."""
    found: dict[str, str] = {}
    wanted = {name: (name, *_NAMES.get(name, ())) for name in names}
    if grpo:
        wanted["answer"] = ("answer", *_ANSWERS)
    for name, known in wanted.items():
        theirs = next((one for one in known if one in present and one not in found.values()), None)
        if theirs is None:
            return None
        found[name] = theirs
    return found


def _scope(model_map: ModelMap) -> tuple[str, ...] | None:
    """Return the language tower where there are others too: the rest of such a model is seldom what is meant."""
    towers = {tower.name for tower in model_map.towers if tower.sites and tower.name != "head"}
    return ("language",) if "language" in towers and len(towers) > 1 else None


def _quantization(
    model_map: ModelMap, scope: tuple[str, ...] | None, gpu_memory: float | None
) -> tuple[str | None, str | None]:
    """Return whether to quantize the base, and what that costs."""
    if gpu_memory is None:
        return None, None
    room = gpu_memory * _GIB * _SHARE
    for quantization, said in ((None, "16 bit"), ("4bit", "4 bit")):
        needed = _planned(model_map, scope, quantization).memory.total
        if needed <= room:
            return quantization, f"{said}: {size(needed)} of {gpu_memory:g} GiB, the rest is for activations"
    raise PlanError(
        "the model does not fit on this GPU",
        where=model_map.model.name,
        why=f"in 4 bit it takes {size(needed)} besides activations, and {size(math.floor(room))} are for that",
        help="a larger --gpu-memory, a smaller model, or graft train --launch on several GPUs with FSDP",
        code="gpu-memory",
    )


def _planned(model_map: ModelMap, scope: tuple[str, ...] | None, quantization: str | None) -> Plan:
    return plan(model_map, targets="all-linear", scope=scope, r=16, alpha=32, quantization=quantization)


def _reward(rows: Dataset, columns: Mapping[str, str]) -> tuple[str, str]:
    """Return the built-in reward that fits the answers."""
    answers = rows[columns.get("answer", "answer")][:_FEW]
    if all(_is_number(answer) for answer in answers):
        return "number_match", "reward: number_match, since the answers are numbers"
    return "exact_match", "reward: exact_match, since not all answers are numbers"


def _is_number(value: Any) -> bool:
    try:
        float(str(value).replace(",", ""))
    except ValueError:
        return False
    return True
