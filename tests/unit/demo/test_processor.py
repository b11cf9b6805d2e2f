from __future__ import annotations

from typing import Any

import pytest
import torch

from graftkit.demo import digits, processor
from graftkit.demo.evaluation import model_inputs
from graftkit.twins.twin import twin


@pytest.fixture(scope="module")
def made() -> Any:
    return processor.digit_processor()


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Any]]:
    return digits.load_digit_split().train[:3]


def test_every_soft_token_has_its_image_token(made: Any, rows: dict[str, list[Any]]) -> None:
    batch = model_inputs(made, rows)
    pictures = batch["input_ids"] == made.image_token_id
    assert pictures.sum(-1).tolist() == [processor.SOFT_TOKENS] * 3
    assert torch.equal(batch["mm_token_type_ids"], pictures.long())


def test_batch_has_the_documented_shapes(made: Any, rows: dict[str, list[Any]]) -> None:
    batch = model_inputs(made, rows)
    assert batch["pixel_values"].shape == (3, 16, 3 * processor.PATCH_SIZE**2)
    assert batch["pixel_values"].dtype == torch.float32
    assert 0 <= batch["pixel_values"].min() < batch["pixel_values"].max() <= 1
    assert batch["image_position_ids"].shape == (3, 16, 2)
    assert batch["image_position_ids"].unique(dim=1).shape[1] == 16


def test_prompt_reads_back(made: Any, rows: dict[str, list[Any]]) -> None:
    tokens = made.tokenizer.convert_ids_to_tokens(model_inputs(made, rows)["input_ids"][0].tolist())
    assert tokens == ["<bos>", "<|image>", *["<|image|>"] * processor.SOFT_TOKENS, "<image|>", "digit"]


@pytest.mark.parametrize("digit", list("0123456789"))
def test_each_digit_is_one_token(made: Any, digit: str) -> None:
    (token,) = made.tokenizer(digit, add_special_tokens=False)["input_ids"]
    assert made.tokenizer.convert_ids_to_tokens(token) == digit


def test_config_overrides_agree_with_the_tokenizer(made: Any) -> None:
    overrides = processor.config_overrides()
    text = overrides["text_config"]
    assert overrides["image_token_id"] == made.image_token_id
    assert overrides["audio_token_id"] == made.audio_token_id
    assert (text["pad_token_id"], text["eos_token_id"], text["bos_token_id"]) == (0, 1, 2)
    tokens = [value for name, value in overrides.items() if not name.endswith("_config")]
    assert len(set(tokens)) == len(tokens) == 7
    assert all(token < text["vocab_size"] for token in tokens)
    assert len(made.tokenizer) <= text["vocab_size"]


def test_digits_come_before_every_placeholder() -> None:
    tokenizer = processor.digit_tokenizer()
    highest = max(tokenizer.convert_tokens_to_ids(list("0123456789")))
    placeholders = [v for n, v in processor.config_overrides().items() if not n.endswith("_config")]
    assert highest < min(placeholders)


def test_the_padding_that_is_cut_changes_no_feature(made: Any, rows: dict[str, list[Any]]) -> None:
    model = twin("google/gemma-4-E2B-it", overrides=processor.config_overrides())
    short = model_inputs(made, rows)
    padded = made.image_processor([image for images in rows["images"] for image in images], return_tensors="pt")
    assert padded["pixel_values"].shape[1] > short["pixel_values"].shape[1]

    def features(batch: Any) -> torch.Tensor:
        with torch.no_grad():
            found = model.model.get_image_features(batch["pixel_values"], batch["image_position_ids"])
        return torch.cat(list(found.pooler_output))

    assert features(short).shape[0] == 3 * processor.SOFT_TOKENS
    torch.testing.assert_close(features(short), features(padded), rtol=1e-4, atol=1e-4)
