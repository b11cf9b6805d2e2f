"""Check that `max_length` leaves every row its tokens, its images, and something to learn.

## Why it matters

TRL cuts sequences at 1,024 tokens unless `max_length` says otherwise, without a warning. What is behind the cut is
not learned: often the end of an answer, which teaches the model not to stop. A row whose prompt fills the sequence
is dropped, or learned with an empty loss. A row that loses placeholders of its image no longer fits the image, and
training stops at that row.

## Example

Conversations of 400 to 3,000 tokens with `assistant_only_loss: true` and no `max_length`: half of the rows are
cut, and in those that begin with a long document no answer is left.

## How safe that is

A larger `max_length` takes memory that grows with the longest rows. The figures are those of a sample, evenly
spread over the data; its size is a setting. Cut rows are a warning. It is an error if rows lose placeholders,
since training will fail, or if more rows than a setting allows keep nothing to learn. If rows are packed with
"bfd_split" or "wrapped", nothing is cut: the rest goes into another sequence.

## Sources

- trl: SFTConfig.max_length, DPOConfig.max_length
- trl: trl.trainer.sft_trainer.SFTTrainer._prepare_dataset, DataCollatorForVisionLanguageModeling
- trl: trl.trainer.dpo_trainer.DPOTrainer._prepare_dataset, DataCollatorForPreference
- trl: trl.data_utils.pack_dataset
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftkit.checks.chat.conversations import TemplateRefusalError
from graftkit.checks.chat.templates import trained_template
from graftkit.checks.engine.context import CheckContext, UndecidableError
from graftkit.checks.engine.rule import Observation, Rule, Setting, failed, passed, unknown
from graftkit.checks.rows.cut import Cut
from graftkit.checks.rows.sequences import Row, Tokenizer, prepared_sequences
from graftkit.data.sample_rows import size_of, spread_rows
from graftkit.findings import Severity, Source
from graftkit.recipes.row_options import RowOptions
from graftkit.recipes.trainers import TrainerName
from graftkit.surveying.sources.local_processor import tokenizer_of
from graftkit.text import percent

_IMAGES = ("image", "images")
_AUDIO = ("audio", "audios")
_SHARES = (0.95, 0.99, 1.0)


def _check(context: CheckContext) -> Observation:
    training, options = context.training, context.training.rows
    if training.trainer == TrainerName.GRPO:
        return passed("grpo cuts no prompt; completions end at max_completion_length")
    rows = _sample(context)
    if not rows:
        return unknown("no row can be read without consuming the data")
    if any(name in rows[0] for name in _AUDIO):
        return passed("rows with audio are not cut", rows=len(rows))
    prepared = prepared_sequences(rows)
    if prepared is not None and (seen := _of_prepared(Cut.of(prepared, options), context)) is not None:
        return seen
    found = Cut.of(prepared or _sequences(context, rows), options)
    return _verdict(found, options, context, _evidence(found, options, context))


def _sample(context: CheckContext) -> list[Row]:
    rows = context.training_rows
    costly = any(name in row for row in spread_rows(rows, 1) for name in _IMAGES)
    return spread_rows(rows, RULE.limit(context.settings, "rows_with_images" if costly else "rows"))


def _sequences(context: CheckContext, rows: Sequence[Row]) -> Any:
    """Return the sequences of rows that are not tokenized yet.

    Raises:
        UndecidableError: there is no tokenizer, or it cannot make them.
    """
    options = context.training.rows
    try:
        template = trained_template(context) if options.assistant_only else None
    except TemplateRefusalError as refusal:
        raise UndecidableError(f"there is no loss mask (see GK206): {refusal}") from refusal
    processor = context.processor
    if context.given.recipe is not None and not any(name in rows[0] for name in _IMAGES):
        processor = tokenizer_of(processor)  # what `graft train` loads for text
    return Tokenizer(processor, options, template).sequences(rows, context.training.trainer)


def _evidence(found: Cut, options: RowOptions, context: CheckContext) -> dict[str, Any]:
    return {
        "rows": len(found.lengths),
        "rows_in_data": size_of(context.training_rows),
        "max_length": options.max_length,
        "longest": found.longest,
        "cut": found.cut,
        "nothing_left": found.nothing_left,
        "lost_media": found.lost_media,
        "keeps": {f"{100 * share:.0f} %": found.length_keeping(share) for share in _SHARES},
        "lengths": found.histogram(),
    }


def _verdict(found: Cut, options: RowOptions, context: CheckContext, evidence: dict[str, Any]) -> Observation:
    rows = len(found.lengths)
    key = "args.max_length" if context.given.recipe is not None else None
    if found.lost_media:
        message = (
            f"{_share(found.lost_media, rows)} lose placeholders of their images: training stops at such a row"
        )
        return failed(message, key=key, help=_help(found, 1.0), severity=Severity.ERROR, **evidence)
    if found.nothing_left:
        allowed = RULE.limit(context.settings, "nothing_left")
        severity = Severity.ERROR if found.nothing_left > allowed * rows else None
        message = f"{_share(found.nothing_left, rows)} keep no token to learn{_limit(options)}"
        return failed(message, key=key, help=_help(found), severity=severity, **evidence)
    if found.cut:
        message = f"{_share(found.cut, rows)} are cut{_limit(options)}"
        return failed(message, key=key, help=_help(found), **evidence)
    within = "" if options.max_length is None else f", of {options.max_length:,} that are kept"
    if options.splits and options.max_length is not None and found.longest > options.max_length:
        within = f"; packing splits longer ones at {options.max_length:,}"
    return passed(f"the longest row has {found.longest:,} tokens{within}", **evidence)


def _share(number: int, rows: int) -> str:
    return f"{percent(number / rows)} of the rows ({number:,} of {rows:,})"


def _limit(options: RowOptions) -> str:
    return "" if options.max_length is None else f" at max_length = {options.max_length:,}"


def _help(found: Cut, *shares: float) -> str:
    kept = ", ".join(f"{found.length_keeping(share):,} keeps {100 * share:.0f} %" for share in shares or _SHARES)
    return f"args: {{max_length: TOKENS}}, where {kept} of the rows whole; max_length: null cuts none"


def _of_prepared(found: Cut, context: CheckContext) -> Observation | None:
    """Decide on rows that the trainer has tokenized, by those it dropped and those that are as long as it cuts.

    None for preferences of which none was dropped: TRL cuts them later.
    """
    options = context.training.rows
    evidence = _evidence(found, options, context)
    rows, limit = len(found.lengths), options.max_length
    preferences = context.training.trainer == TrainerName.DPO
    if not preferences and (limit is None or options.packing is not None):
        return unknown("the rows were tokenized before; what was cut cannot be seen", **evidence)
    full, dropped = found.lengths.count(limit), _dropped(context.training_rows)
    evidence |= {"dropped": dropped} if preferences else {"dropped": dropped, "cut": full}
    if dropped:
        total = dropped + (size_of(context.training_rows) or 0)
        severity = Severity.ERROR if dropped > RULE.limit(context.settings, "nothing_left") * total else None
        return failed(
            f"{_share(dropped, total)} were dropped: they keep no token to learn{_limit(options)}",
            severity=severity,
            **evidence,
        )
    if preferences:
        return None
    if full == rows:
        return unknown(f"all rows have exactly {limit:,} tokens; whether they were cut cannot be seen", **evidence)
    if full:
        return failed(f"{_share(full, rows)} have exactly {limit:,} tokens, where TRL cuts", **evidence)
    return passed(f"the longest row has {found.longest:,} tokens, of {limit:,} that are kept", **evidence)


def _dropped(rows: Any) -> int:
    """Return how many rows TRL filtered out, as its last step, since nothing of them is learned.

    A filter of the datasets library keeps the table and lists the rows that remain.
    """
    from datasets import Dataset

    return rows.data.num_rows - len(rows) if isinstance(rows, Dataset) else 0


RULE = Rule(
    code="GK214",
    title="max_length cuts nothing off the rows",
    severity=Severity.WARNING,
    needs=("training", "rows"),
    check=_check,
    help="a larger max_length; null cuts nothing",
    since="0.1.0",
    settings={
        "rows": Setting(1000, "rows of the sample"),
        "rows_with_images": Setting(64, "rows of the sample where rows have images"),
        "nothing_left": Setting(0.05, "largest share of rows without a token to learn that is a warning, 0 to 1"),
        "clipped": Setting(0.1, "largest accepted share of grpo's completions that end at their greatest length"),
    },
    source=Source.INTROSPECTION,
)
