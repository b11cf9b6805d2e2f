"""GK214: what max_length takes from rows, compared with the rows that TRL's own trainers make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.training import gemma
from tests.training.conftest import datasets_cache
from tests.training.small import docstrings
from tests.unit.checks.observed import seen

import graftkit as gk
from graftkit.checks.rows.cut import Cut
from graftkit.checks.rows.sequences import TokenSequence
from graftkit.demo.digits import load_digit_split
from graftkit.demo.processor import config_overrides
from graftkit.findings import Finding
from graftkit.recipes.row_options import RowOptions
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
__all__ = ["datasets_cache"]

ERROR, WARNING, OK, UNKNOWN = gk.Severity.ERROR, gk.Severity.WARNING, gk.Severity.OK, gk.Severity.UNKNOWN
ROWS = docstrings(120)
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "shuffle_dataset": False}
# TRL's own template with marks around what Gemma's assistant says.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def messages(signature: str, summary: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": signature}, {"role": "assistant", "content": summary}]


DATA: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "text": [{"text": f"{signature} {summary}"} for signature, summary in ROWS],
    "pairs": [{"prompt": signature, "completion": f" {summary}"} for signature, summary in ROWS],
    "messages": [{"messages": messages(*row)} for row in ROWS],
    "pairs of messages": [{"prompt": messages(*row)[:1], "completion": messages(*row)[1:]} for row in ROWS],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = gemma.letters()
    made.chat_template = _marked()
    return made


def _marked() -> str:
    """Return a template with marks around what the assistant says."""
    return (
        "{% for m in messages %}<|turn>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<turn|>\n{% endgeneration %}{% else %}{{ m.content }}<turn|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|turn>assistant\n{% endif %}"
    )


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return gk.twin("qwen3", overrides={"vocab_size": 320, "pad_token_id": tokenizer.pad_token_id})


def rule_on(rows: Any, processor: Any, trainer: str = "sft", settings: Any = None, **args: Any) -> Finding:
    training = Training(trainer=trainer, rows=RowOptions.of(args))
    return seen("GK214", settings, training=training, rows=lambda: rows, processor=processor)


def prepared(model: Any, tokenizer: Any, rows: Any, folder: Path, **args: Any) -> Any:
    """Return the rows as TRL's trainer makes them."""
    arguments = trl.SFTConfig(output_dir=str(folder), **CPU, **args)
    return trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer).train_dataset


@pytest.mark.rule_fails("GK214")
@pytest.mark.parametrize(
    ("kind", "args"),
    [
        *((kind, {}) for kind in DATA),
        *((kind, {"truncation_mode": "keep_end"}) for kind in DATA),
        ("messages", {"assistant_only_loss": True}),
        ("pairs of messages", {"assistant_only_loss": True}),
    ],
    ids=str,
)
def test_the_figures_are_those_of_the_trainer(
    tmp_path: Path, model: Any, tokenizer: Any, kind: str, args: dict[str, Any]
) -> None:
    rows = datasets.Dataset.from_list(list(DATA[kind]))
    limit = 80
    found = rule_on(rows, tokenizer, max_length=limit, **args).evidence
    whole = prepared(model, tokenizer, rows, tmp_path, max_length=None, **args)
    kept = prepared(model, tokenizer, rows, tmp_path, max_length=limit, **args)
    lengths = [len(row["input_ids"]) for row in whole]
    assert found["cut"] == sum(length > limit for length in lengths) > 0
    assert found["longest"] == max(lengths)
    assert found["rows"] == found["rows_in_data"] == len(rows)
    assert found["nothing_left"] == len(whole) - len(kept)
    assert found["keeps"]["100 %"] == max(lengths)
    ninety_five = found["keeps"]["95 %"]
    assert sum(length <= ninety_five for length in lengths) >= 0.95 * len(lengths)
    assert sum(length < ninety_five for length in lengths) < 0.95 * len(lengths)
    assert sum(found["lengths"]["counts"]) == len(lengths)


@pytest.mark.rule_passes("GK214")
@pytest.mark.parametrize("kind", DATA)
def test_a_length_that_keeps_all_rows_passes(kind: str, tokenizer: Any) -> None:
    rows = DATA[kind]
    longest = rule_on(rows, tokenizer, max_length=None).evidence["longest"]
    assert rule_on(rows, tokenizer, max_length=longest).severity is OK
    assert rule_on(rows, tokenizer, max_length=longest - 1).evidence["cut"] >= 1
    assert rule_on(rows, tokenizer).evidence["max_length"] == 1024


def test_the_default_is_that_of_trl() -> None:
    assert RowOptions().max_length == trl.SFTConfig(**CPU).max_length == trl.DPOConfig(use_cpu=True).max_length


@pytest.mark.rule_fails("GK214")
def test_it_is_an_error_when_more_rows_than_allowed_keep_nothing(tokenizer: Any) -> None:
    rows = [{"prompt": "x" * 200, "completion": " y"}] * 8 + list(DATA["pairs"])
    few = rule_on(rows, tokenizer, max_length=200)
    assert few.evidence["nothing_left"] == 8
    assert few.severity is ERROR
    allowed = CheckSettings(rules={"GK214": {"nothing_left": 0.1}})
    assert rule_on(rows, tokenizer, settings=allowed, max_length=200).severity is WARNING


@pytest.mark.parametrize(("strategy", "cut"), [("bfd", True), ("bfd_split", False), ("wrapped", False)])
def test_packing_loses_what_trl_loses(
    tmp_path: Path, model: Any, tokenizer: Any, strategy: str, cut: bool
) -> None:
    rows = datasets.Dataset.from_list(list(DATA["messages"]))
    args = {"packing": True, "packing_strategy": strategy, "max_length": 80}
    found = rule_on(rows, tokenizer, **args)
    whole = sum(len(row["input_ids"]) for row in prepared(model, tokenizer, rows, tmp_path, max_length=None))
    packed = sum(len(row["input_ids"]) for row in prepared(model, tokenizer, rows, tmp_path, **args))
    assert (packed < whole) is cut
    assert (found.severity is WARNING) is cut
    assert (found.evidence["cut"] > 0) is cut


@pytest.mark.parametrize("limit", [60, 90, None])
def test_preferences_are_those_of_the_trainer(
    tmp_path: Path, model: Any, tokenizer: Any, limit: int | None
) -> None:
    others = [ROWS[at - 1][1] for at in range(len(ROWS))]
    rows = datasets.Dataset.from_list(
        [
            {"prompt": signature, "chosen": f" {right}", "rejected": f" {wrong}"}
            for (signature, right), wrong in zip(ROWS, others, strict=True)
        ]
    )
    found = rule_on(rows, tokenizer, "dpo", max_length=limit).evidence
    args = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=limit)
    peft_config = gk.plan(model, r=2).peft_config
    trainer = trl.DPOTrainer(
        gk.twin(model), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )
    assert found["nothing_left"] == len(rows) - len(trainer.train_dataset)
    lengths = [
        len(row["prompt_ids"]) + max(map(len, (row["chosen_ids"], row["rejected_ids"])))
        for row in trainer.train_dataset
    ]
    if limit is None:
        assert found["longest"] == max(lengths)
    else:
        assert found["cut"] == found["nothing_left"] + sum(length > limit for length in lengths)


# ---- images ----


@pytest.mark.rule_fails("GK214")
@pytest.mark.rule_passes("GK214")
@pytest.mark.parametrize("kind", ["pairs", "messages"])
def test_a_cut_image_stops_the_trainer_and_is_an_error(kind: str) -> None:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = gemma.processor(gemma.template())
    model = gk.twin(gemma.MODEL, overrides=config_overrides(processor.tokenizer))

    def loss(limit: int | None) -> Any:
        return model(**DataCollatorForVisionLanguageModeling(processor, limit)([dict(row) for row in rows])).loss

    digits = load_digit_split().held_out.select(range(12))
    rows = [
        row if kind == "pairs" else {"images": row["images"], "messages": messages("digit?", row["completion"])}
        for row in digits
    ]
    found = rule_on(rows, processor)
    assert found.severity is OK
    collated = DataCollatorForVisionLanguageModeling(processor)([dict(row) for row in rows])
    assert found.evidence["longest"] == collated["attention_mask"].sum(1).max()
    media = (collated["input_ids"] == processor.image_token_id).any(0).nonzero().max().item()
    cut = rule_on(rows, processor, max_length=media)
    assert cut.severity is ERROR
    assert cut.evidence["lost_media"] == len(rows)
    with pytest.raises(ValueError, match="image"):
        loss(media)
    assert rule_on(rows, processor, max_length=media + 1).evidence["lost_media"] == 0
    assert loss(media + 1).isfinite()


@pytest.mark.rule_fails("GK214")
def test_a_cut_image_of_a_preference_is_an_error_too() -> None:
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    processor = gemma.processor(gemma.template())
    digits = load_digit_split().held_out.select(range(4))
    rows = [
        {**{key: row[key] for key in ("images", "prompt")}, "chosen": row["completion"], "rejected": "not this"}
        for row in digits
    ]
    collated = DataCollatorForVisionPreference(processor)([dict(row) for row in rows])
    found = rule_on(rows, processor, "dpo")
    assert found.evidence["longest"] == collated["attention_mask"].sum(1).max()
    media = (collated["input_ids"] == processor.image_token_id).any(0).nonzero().max().item()
    assert rule_on(rows, processor, "dpo", max_length=media).evidence["lost_media"] == len(rows)
    assert rule_on(rows, processor, "dpo", max_length=media + 1).evidence["lost_media"] == 0


# ---- what cannot be known ----


def test_what_is_not_there_makes_it_unknown(tokenizer: Any) -> None:
    def refuse() -> Any:
        raise gk.GraftError("no data", code="data-missing")

    training = Training()
    assert seen("GK214", training=training, rows=lambda: DATA["text"]).severity is UNKNOWN
    assert seen("GK214", training=training, processor=tokenizer).severity is UNKNOWN
    assert seen("GK214", training=training, processor=tokenizer, rows=refuse).severity is UNKNOWN
    assert rule_on([], tokenizer).severity is UNKNOWN
    assert rule_on([{"text": 5}], tokenizer).severity is UNKNOWN


def test_grpo_cuts_no_prompt(tokenizer: Any) -> None:
    assert rule_on([{"prompt": "x" * 5000}], tokenizer, "grpo").severity is OK


# ---- rows that a trainer has cut already ----


@pytest.mark.rule_fails("GK214")
def test_rows_that_were_cut_before_are_counted(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows = datasets.Dataset.from_list([*DATA["pairs"], {"prompt": "x" * 200, "completion": " y"}])
    whole = prepared(model, tokenizer, rows, tmp_path, max_length=None)
    limit = 100
    kept = prepared(model, tokenizer, rows, tmp_path, max_length=limit)
    found = rule_on(kept, None, max_length=limit)
    assert found.severity is WARNING
    assert found.evidence["dropped"] == len(whole) - len(kept) > 0
    # A row of exactly that length cannot be told from one that was cut.
    exact = sum(len(row["input_ids"]) >= limit for row in whole) - (len(whole) - len(kept))
    assert found.evidence["cut"] == exact
    assert rule_on(prepared(model, tokenizer, rows, tmp_path, max_length=500), None, max_length=500).severity is OK


def test_blocks_of_one_length_are_unknown() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * 8] * 4})
    assert rule_on(rows, None, max_length=8).severity is UNKNOWN


def test_a_cut_of_sequences_by_hand() -> None:
    rows = [(TokenSequence([False] * 4 + [True] * 2, [True] * 3 + [False] * 3),), (TokenSequence([True]),)]
    assert Cut.of(rows, RowOptions(max_length=4)) == Cut(lengths=(6, 1), cut=1, nothing_left=1, lost_media=0)
    assert Cut.of(rows, RowOptions(max_length=2)).lost_media == 1
    end = Cut.of(rows, RowOptions(max_length=2, keep_end=True))
    assert (end.nothing_left, end.lost_media) == (0, 1)
