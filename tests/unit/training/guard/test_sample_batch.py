"""One real batch: made by the trainer's collator, of rows that show what the data holds, and without a trace."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, default_data_collator
from trl.trainer.dpo_trainer import DataCollatorForPreference

import graftkit as gk
from graftkit.training.guard.sample_batch import preserve_random_state, real_batch

ROWS = [{"input_ids": [n, n + 1], "labels": [n, n + 1]} for n in range(10)]


@pytest.fixture
def adapted(twin_of: Callable[[str], nn.Module]) -> PeftModel:
    model = twin_of("qwen3")
    return gk.attach(model, gk.plan(model, targets="attention", r=2))


def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def streamed() -> Iterator[dict[str, Any]]:
    yield from ROWS


@pytest.mark.parametrize(
    "data",
    [ROWS, Dataset.from_list(ROWS), IterableDataset.from_generator(streamed)],
    ids=["list", "table", "stream"],
)
def test_rows_come_from_the_data_without_iterating_the_loader(data: Any, adapted: PeftModel) -> None:
    loader = DataLoader(data, batch_size=2, collate_fn=default_data_collator)
    batch = real_batch(loader, adapted, None, rows=2)
    assert batch is not None
    assert batch["input_ids"].tolist() == [[0, 1], [1, 2]]
    assert [row["input_ids"] for row in loader.dataset][:1] == [[0, 1]], "a stream begins anew"


def test_data_that_would_be_consumed_gives_no_batch(adapted: PeftModel) -> None:
    class Once(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("iterated")

    assert real_batch(DataLoader(Once()), adapted, None, rows=2) is None


def test_rows_are_chosen_so_that_every_kind_of_content_is_there(adapted: PeftModel) -> None:
    rows = [{"input_ids": [1, 2], "images": []} for _ in range(40)]
    rows[30] = {"input_ids": [7, 7], "images": ["a picture"]}
    talk = [{"messages": [{"role": "user", "content": "a"}]} for _ in range(40)]
    talk[20] = {"messages": [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "a"}]}]}
    seen: list[Any] = []

    def collate(given: list[Any]) -> dict[str, Any]:
        seen.append(given)
        return {"input_ids": torch.tensor([[1]])}

    for data in (rows, talk):
        real_batch(DataLoader(data, collate_fn=collate), adapted, None, rows=2)
    assert any(row["images"] for row in seen[0])
    assert any(isinstance(row["messages"][0]["content"], list) for row in seen[1])
    assert [len(given) for given in seen] == [2, 2]


def test_a_collator_that_changes_its_rows_does_not_change_the_data(adapted: PeftModel) -> None:
    data = [{"input_ids": [1], "image": "a"}]

    def collate(rows: list[Any]) -> dict[str, Any]:
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows if row.pop("image")])}

    assert real_batch(DataLoader(data, collate_fn=collate), adapted, None, rows=1) is not None
    assert data == [{"input_ids": [1], "image": "a"}]


def test_preferences_are_learned_on_their_completions(adapted: PeftModel) -> None:
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}]
    loader = DataLoader(rows, collate_fn=DataCollatorForPreference(pad_token_id=0))
    batch = real_batch(loader, adapted, None, rows=1)
    assert batch is not None
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, -100, 8, 9]]
    assert "completion_mask" not in batch


def test_of_packed_rows_it_is_one_whole_sample(adapted: PeftModel) -> None:
    packed = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 0]]),
        "labels": torch.tensor([[1, 2, 3, 4, 5, -100]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0]]),
        "seq_idx": torch.tensor([0, 2, 5]),
    }
    batch = real_batch(DataLoader([{"row": 0}], collate_fn=lambda _: packed), adapted, None, rows=1)
    assert batch is not None
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[3, 4, 5]],
        "labels": [[3, 4, 5]],
        "position_ids": [[0, 1, 2]],
    }


@pytest.mark.parametrize(
    "prompts",
    [("a b", "b"), ([{"role": "user", "content": "a b"}], [{"role": "user", "content": "b"}])],
    ids=["text", "conversations"],
)
def test_prompts_alone_are_tokenized(prompts: tuple[Any, Any], adapted: PeftModel) -> None:
    loader = DataLoader([{"prompt": prompt} for prompt in prompts], collate_fn=lambda rows: rows)
    batch = real_batch(loader, adapted, words(), rows=2)
    assert batch is not None
    assert batch["input_ids"].tolist() == [[1, 2], [2, 0]]
    assert batch["labels"].tolist() == [[1, 2], [2, -100]]


def test_the_random_states_come_out_as_they_went_in() -> None:
    torch.manual_seed(1)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    with preserve_random_state():
        random.random(), np.random.rand(), torch.rand(1)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().equal(states[2])
