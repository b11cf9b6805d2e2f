"""``sign()``: write beside an adapter what it was trained on and what it should answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.adapters.file import CONFIG_NAME, RECORD_NAME, AdapterFile, read_adapter
from graftkit.adapters.record import AdapterRecord, BaseRecord, Dialect, write_record
from graftkit.checks.adapter_files.saved_adapter import TensorData
from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.runner import run
from graftkit.checks.rules import all_rules
from graftkit.errors import AdapterError, SourceError
from graftkit.modeling.unwrapping import peft_model_of
from graftkit.serving.signing.expected import NoAnswersError, expected_answers
from graftkit.serving.signing.sections import base_record, plan_record, tokenizer_record, versions
from graftkit.serving.signing.vocabulary import Vocabulary
from graftkit.text import describe

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

_log = logging.getLogger(__name__)

# The saved adapter is the one in memory.
_SAME_AS_IN_MEMORY = "GK403"


def sign(
    model: nn.Module,
    tokenizer: Any,
    folder: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    prompts: Sequence[str] = (),
) -> AdapterRecord:
    """Write ``graftkit.json`` beside a saved adapter: its base, its tokenizer, and what it should answer.

    ``graft check`` then tells another base, tokenizer or chat template, and ``graft probe`` whether a server
    applies the adapter. The file has a few kilobytes; stock PEFT does not read it. The model is left as it was:
    its modes, its hooks, and all random states.

    The prompts are a handful of fixed, short texts, so that nothing of the training data is published.

    Args:
        model: the PEFT model with the adapter active, as it was trained or loaded again.
        tokenizer: the tokenizer or processor that it was trained with; None for a model without one.
        folder: the adapter's folder, with this adapter's weights.
        base: hub id or folder of the base; None for what the model was loaded from.
        revision: branch, tag or commit of a hub id.
        prompts: texts beside the fixed ones, such as those that show the adapter's effect. They are published.

    Returns:
        What was written. ``unknown`` says why a section is missing.

    Raises:
        AdapterError: as ``read_adapter``; ``sign-no-adapter``: the model has no active adapter;
            ``sign-other-adapter``: the one in the folder is not the one in memory.
        OutputError: the file cannot be written.
    """
    file = read_adapter(folder)
    adapted = peft_model_of(model)
    if adapted is None:
        raise AdapterError(
            "the model has no adapter",
            where=type(model).__name__,
            why="what it answers with the adapter is part of what is written",
            help="PeftModel.from_pretrained(base, folder), then gk.sign(model, tokenizer, folder)",
            code="sign-no-adapter",
        )
    _check_same(adapted, file)
    record = make_record(adapted, tokenizer, base=base, revision=revision, prompts=prompts)
    write_record(file.folder, record)
    return record


class Signer:
    """Signs the adapters that one run saves: what does not change from save to save is found out once."""

    def __init__(self) -> None:
        self._vocabulary: Vocabulary | None = None

    def sign(self, model: PeftModel, processor: Any, folder: Path) -> None:
        """Write the record beside the adapter that a trainer has just saved; a failure is logged, no more.

        Run it on one process: it neither waits for the others nor makes them wait.

        Args:
            processor: the trainer's tokenizer or processor, or None.
            folder: the trainer's; an adapter that is not PEFT's "default" lies in a folder of its name.
        """
        active = model.active_adapters
        place = folder if active == ["default"] or not active else folder / active[0]
        if not (place / CONFIG_NAME).is_file():
            return
        try:
            write_record(place, make_record(model, processor, vocabulary=self._vocabulary_of(processor)))
        except Exception as error:
            _log.warning("%s was not written: %s", RECORD_NAME, describe(error))

    def _vocabulary_of(self, processor: Any) -> Vocabulary | None:
        if processor is None:
            return None
        if self._vocabulary is None or not self._vocabulary.is_of(processor):
            self._vocabulary = Vocabulary(processor)
        return self._vocabulary


def make_record(
    model: PeftModel,
    processor: Any,
    *,
    base: str | None = None,
    revision: str | None = None,
    prompts: Sequence[str] = (),
    unknown: Mapping[str, str] | None = None,
    vocabulary: Vocabulary | None = None,
) -> AdapterRecord:
    """Return the record of a live model's active adapter; a section that cannot be made says why in ``unknown``.

    Args:
        processor, base, revision, prompts: as for :func:`sign`.
        unknown: sections to leave out, with the reason.
        vocabulary: the processor's; None to read it.
    """
    reasons, vocabulary = dict(unknown or {}), vocabulary or Vocabulary(processor)
    sections: dict[str, Callable[[], Any]] = {
        "plan": lambda: plan_record(model),
        "base": lambda: base_record(model, base, revision),
        "tokenizer": lambda: tokenizer_record(processor, vocabulary),
        "expected": lambda: expected_answers(model, processor, prompts, vocabulary),
    }
    if processor is None:
        reasons.setdefault("tokenizer", "none was given")
    made: dict[str, Any] = {}
    for name, make in sections.items():
        if name in reasons:
            continue
        try:
            made[name] = make()
        except NoAnswersError as error:
            reasons[name] = str(error)
        except SourceError as error:
            reasons[name] = ": ".join(filter(None, (error.what, error.why)))
        except Exception as error:  # a tokenizer's own code may raise anything
            reasons[name] = describe(error)
    if isinstance(found := made.get("base"), BaseRecord) and found.fingerprint is None:
        reasons["base.fingerprint"] = "its safetensors files are not on this machine"
    return AdapterRecord(dialect=Dialect.PEFT, versions=versions(), unknown=reasons, **made)


def _check_same(model: PeftModel, file: AdapterFile) -> None:
    rules = [rule for rule in all_rules() if rule.code == _SAME_AS_IN_MEMORY]
    given = Inputs(folder=file.folder, adapter=file, data=TensorData(file), model=model)
    report = run(rules, CheckContext(given))
    if report.errors:
        raise AdapterError(
            "the folder has another adapter than the model",
            where=str(file.folder),
            why=report.errors[0].message,
            help="load that adapter, or save this one: model.save_pretrained(folder)",
            code="sign-other-adapter",
        )
