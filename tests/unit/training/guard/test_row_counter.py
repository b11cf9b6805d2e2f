"""The guard counts the rows that a run trains on, as its trainer's own batches have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.training import gemma
from tests.training.conftest import datasets_cache
from tests.training.small import docstrings
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import graftkit as gk
from graftkit.findings import Finding, Severity
from graftkit.recipes.row_options import RowOptions
from graftkit.training.guard.guard import Guard
from graftkit.training.guard.row_counter import RowCounter, clipped

__all__ = ["datasets_cache"]
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

ROWS = docstrings(24)
LIMIT = 70
ARGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "save_strategy": "no",
    "max_length": LIMIT,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return gemma.letters()


@pytest.fixture(scope="module")
def base(tokenizer: Any) -> Any:
    return gk.twin("qwen3", overrides={"vocab_size": 320, "pad_token_id": tokenizer.pad_token_id})


def pairs() -> Dataset:
    """Return rows of which one has a prompt that is too long."""
    return Dataset.from_list([{"prompt": signature, "completion": f" {summary}"} for signature, summary in ROWS])


def run(folder: Path, base: Any, tokenizer: Any, rows: Dataset, guard: Guard, **args: Any) -> Any:
    trainer = SFTTrainer(
        gk.twin(base),
        args=SFTConfig(output_dir=str(folder), **{**ARGS, **args}),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tokenizer,
        peft_config=gk.plan(base, targets="attention", r=2).peft_config,
        callbacks=[guard],
    )
    trainer.train()
    return trainer


def findings(guard: Guard) -> tuple[Finding, Finding]:
    """Return those of GK214: before the first step, and of the rows that were trained on."""
    before, during = (finding for finding in guard.report if finding.code == "GK214")
    return before, during


def test_what_was_trained_on_is_what_the_collator_gave(tmp_path: Path, base: Any, tokenizer: Any) -> None:
    guard = Guard()
    trainer = run(tmp_path, base, tokenizer, pairs(), guard, eval_strategy="epoch")
    batches = [trainer.data_collator([trainer.train_dataset[at]]) for at in range(len(trainer.train_dataset))]
    full = sum(batch["input_ids"].shape[1] == LIMIT for batch in batches)
    before, during = findings(guard)
    assert during.evidence == {"rows": len(ROWS) - 1, "full": full, "nothing_left": 0}
    assert full > 0
    assert during.severity is Severity.WARNING
    # TRL dropped the row whose prompt fills the sequence.
    assert before.severity is Severity.WARNING
    assert before.evidence["dropped"] == 1


def test_with_the_rows_the_figures_before_are_exact(tmp_path: Path, base: Any, tokenizer: Any) -> None:
    rows = pairs()
    guard = Guard(rows=rows)
    run(tmp_path, base, tokenizer, rows, guard)
    before, during = findings(guard)
    assert before.evidence["rows"] == before.evidence["rows_in_data"] == len(ROWS)
    assert before.evidence["cut"] >= during.evidence["full"] - 1
    assert 0 < during.evidence["full"] <= before.evidence["cut"] + 1
    longest = before.evidence["longest"]
    fits = Guard(rows=rows)
    run(tmp_path, base, tokenizer, rows, fits, max_length=longest)
    assert [finding.severity for finding in findings(fits)] == [Severity.OK, Severity.OK]
    assert findings(fits)[1].evidence["full"] >= 1


def test_rows_of_a_packed_batch_are_counted_each(tmp_path: Path, base: Any, tokenizer: Any) -> None:
    rows = pairs()
    guard = Guard(rows=rows)
    trainer = run(tmp_path, base, tokenizer, rows, guard, packing=True)
    packed = sum(len(row["seq_lengths"]) for row in trainer.train_dataset)
    assert findings(guard)[1].evidence["rows"] == packed == len(ROWS)


def test_preferences_count_both_answers(tmp_path: Path, base: Any, tokenizer: Any) -> None:
    rows = Dataset.from_list([{"prompt": s, "chosen": " " + t, "rejected": " no"} for s, t in ROWS])
    guard = Guard()
    trainer = DPOTrainer(
        gk.twin(base),
        args=DPOConfig(output_dir=str(tmp_path), **ARGS),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=gk.plan(base, targets="attention", r=2).peft_config,
        callbacks=[guard],
    )
    trainer.train()
    before, during = findings(guard)
    answers = ("chosen_ids", "rejected_ids")
    rows_of = [[len(row["prompt_ids"]) + len(row[name]) for name in answers] for row in trainer.train_dataset]
    lengths = [length for row in rows_of for length in row]
    assert during.evidence["rows"] == 2 * len(trainer.train_dataset)
    assert during.evidence["full"] == sum(length >= LIMIT for length in lengths)
    assert before.evidence["cut"] == sum(max(row) > LIMIT for row in rows_of)
    assert before.evidence["dropped"] == len(rows) - len(trainer.train_dataset) == 1


def test_a_row_without_a_label_is_counted_wherever_it_is() -> None:
    model = torch.nn.Linear(1, 1)
    model.forward = lambda **given: None  # type: ignore[method-assign]
    counter = RowCounter(model, RowOptions(max_length=3))
    ids = torch.ones(2, 4, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100] * 4, [-100, 1, 1, 1]])
    model(input_ids=ids, attention_mask=mask, labels=labels)
    packed = {"input_ids": ids[:1], "position_ids": torch.tensor([[0, 1, 0, 1]])}
    model(**packed, labels=torch.tensor([[1, 1, -100, -100]]))
    with torch.no_grad():
        model(input_ids=ids, labels=labels)
    model.eval()(input_ids=ids, labels=labels)
    observed = counter.observed()
    assert observed is not None
    assert observed.evidence == {"rows": 4, "full": 1, "nothing_left": 2}
    assert observed.verdict is None
    counter.stop()
    model.train()(input_ids=ids, labels=labels)
    assert counter.observed() == observed


@pytest.mark.parametrize(
    ("labels", "nothing_left"),
    [
        ([[-100, -100], [-100, 1]], 1),  # of the last tokens, as with logits_to_keep
        ([[1, 1, 1]], None),  # of whatever: whose they are is not known
    ],
)
def test_labels_that_a_trainer_cut(labels: list[list[int]], nothing_left: int | None) -> None:
    model = torch.nn.Linear(1, 1)
    model.forward = lambda **given: None  # type: ignore[method-assign]
    counter = RowCounter(model, RowOptions(max_length=4))
    model(input_ids=torch.ones(2, 4, dtype=torch.int64), labels=torch.tensor(labels))
    observed = counter.observed()
    assert observed is not None
    assert observed.evidence == {"rows": 2, "full": 2, "nothing_left": nothing_left}


def test_completions_that_are_clipped() -> None:
    assert clipped([], 0.1) is None
    few, many = clipped([0.0, 0.1], 0.1), clipped([0.5, 1.0], 0.1)
    assert few is not None
    assert few.verdict is Severity.OK
    assert many is not None
    assert (many.verdict, many.evidence["clipped"]) == (None, 0.75)
