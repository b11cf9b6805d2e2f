"""Batches with audio: what is learned, how long the placeholders are, and rates that do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from tests.training.gemma import processor, template

from graftkit.data.audio_columns import resolve_audio_files
from graftkit.errors import DataError
from graftkit.training.trainers.assistant_mask import template_for
from graftkit.training.trainers.audio_collator import AudioCollator, read_audio_at

RATE = 16_000
QUESTION = {"role": "user", "content": "Which tone?"}
ANSWER = {"role": "assistant", "content": "A flat."}


def audio(seconds: float) -> Any:
    return np.sin(np.arange(int(seconds * RATE)) / 9).astype(np.float32)


def text_of(made: Any, batch: Mapping[str, Any], row: int, learned: bool) -> str:
    """Return the text of a row's labels, or of the row, without the audio's tokens."""
    labels = batch["labels"] if learned else batch["input_ids"]
    skip = {-100, made.tokenizer.pad_token_id, made.audio_token_id}
    text: str = made.tokenizer.decode([int(token) for token in labels[row] if int(token) not in skip])
    return text


def check_batch(made: Any, batch: Mapping[str, Any]) -> None:
    """Check that shapes agree, features and placeholders belong together, and padding is on the right."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == batch["labels"].shape == batch["mm_token_type_ids"].shape
    assert torch.equal(batch["mm_token_type_ids"] == 3, ids == made.audio_token_id)
    # Two convolutions of stride 2 (Gemma4Processor.replace_audio_token).
    soft = batch["input_features_mask"][:, ::2][:, ::2].sum()
    assert int((ids == made.audio_token_id).sum()) == int(soft) > 0
    assert (mask.diff(dim=1) <= 0).all()
    assert (batch["labels"][mask == 0] == -100).all()
    assert (batch["labels"][ids == made.audio_token_id] == -100).all()


def test_prompts_and_completions() -> None:
    made = processor()
    rows = [
        {"audio": audio(0.2), "prompt": "<bos><|audio|>which?", "completion": "a tone<eos>"},
        {"audio": audio(0.4).tolist(), "prompt": "<bos><|audio|>?", "completion": "b<eos>"},
    ]
    batch = AudioCollator(made)(rows)
    check_batch(made, batch)
    assert text_of(made, batch, 0, learned=True) == "a tone<eos>"
    assert text_of(made, batch, 1, learned=True) == "b<eos>"
    assert text_of(made, batch, 0, learned=False) == "<bos><|audio><audio|>which?a tone<eos>"
    assert batch["input_features"].shape[::2] == (2, 128)


def test_several_sounds_a_row() -> None:
    made = processor()
    rows = [
        {"audios": [audio(0.2), audio(0.3)], "prompt": "<|audio|><|audio|>", "completion": "two"},
        {"audios": [], "prompt": "nothing", "completion": "none"},
    ]
    batch = AudioCollator(made)(rows)
    check_batch(made, batch)
    assert batch["input_features"].shape[0] == 2
    assert text_of(made, batch, 1, learned=True) == "none"


def test_a_batch_without_any_sound() -> None:
    batch = AudioCollator(processor())([{"audios": [], "prompt": "nothing", "completion": "none"}])
    assert "input_features" not in batch
    assert batch["labels"].shape == batch["input_ids"].shape


def test_rows_without_a_sound_among_others() -> None:
    made = processor()
    rows = [
        {"audio": None, "prompt": "nothing", "completion": "none"},
        {"audio": audio(0.2), "prompt": "<|audio|>", "completion": "one"},
    ]
    batch = AudioCollator(made)(rows)
    check_batch(made, batch)
    assert batch["input_features"].shape[0] == 1


def test_prompts_are_learned_where_that_is_asked_for() -> None:
    made = processor()
    row = {"audio": audio(0.2), "prompt": "<bos><|audio|>which?", "completion": "a<eos>"}
    batch = AudioCollator(made, completion_only=False)([row])
    check_batch(made, batch)
    assert text_of(made, batch, 0, learned=True) == "<bos><|audio><audio|>which?a<eos>"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"prompt": "<|audio|><|audio|>", "completion": "a"}, id="more places in a prompt"),
        pytest.param({"prompt": "none", "completion": "a"}, id="no place in a prompt"),
        pytest.param({"text": "none"}, id="no place in a text"),
        pytest.param(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "audio"}] * 2},
                    {"role": "assistant", "content": "a"},
                ]
            },
            id="more places in messages",
        ),
        pytest.param({"messages": [{"role": "assistant", "content": "a"}]}, id="no user to ask"),
    ],
)
def test_arrays_and_placeholders_must_be_as_many(row: dict[str, Any]) -> None:
    made = processor(template())
    with pytest.raises(DataError) as caught:
        AudioCollator(made, chat_template=template_for(made, []))([{"audio": audio(0.2), **row}])
    assert caught.value.code == "data-audio"


def test_plain_text_is_learned_but_for_the_sound() -> None:
    made = processor()
    batch = AudioCollator(made, text_field="body")([{"audio": audio(0.2), "body": "<bos><|audio|>a tone<eos>"}])
    check_batch(made, batch)
    assert text_of(made, batch, 0, learned=True) == "<bos><|audio><audio|>a tone<eos>"


def test_messages_learn_the_answers_and_their_ends() -> None:
    made = processor(template())
    marked = template_for(made, [])
    rows = [
        {"audio": audio(0.3), "messages": [QUESTION, ANSWER, QUESTION, ANSWER]},
        {"audio": audio(0.2), "messages": [QUESTION, {"role": "assistant", "content": "B."}]},
    ]
    batch = AudioCollator(made, chat_template=marked)(rows)
    check_batch(made, batch)
    assert text_of(made, batch, 0, learned=True) == "A flat.<turn|>\nA flat.<turn|>\n"
    assert text_of(made, batch, 1, learned=True) == "B.<turn|>\n"
    said = text_of(made, batch, 1, learned=False)
    assert said == "<bos><|turn>user\n<|audio><audio|>Which tone?<turn|>\n<|turn>model\nB.<turn|>\n"


def test_messages_keep_the_places_of_their_sounds() -> None:
    made = processor(template())
    content = [{"type": "text", "text": "Hear"}, {"type": "audio", "audio": None}, {"type": "text", "text": "?"}]
    rows = [{"audio": audio(0.2), "messages": [{"role": "user", "content": content}, ANSWER]}]
    batch = AudioCollator(made, chat_template=template_for(made, []))(rows)
    check_batch(made, batch)
    assert "Hear<|audio><audio|>?" in text_of(made, batch, 0, learned=False)


def test_prompts_and_completions_as_messages() -> None:
    made = processor(template())
    batch = AudioCollator(made)([{"audio": audio(0.2), "prompt": [QUESTION], "completion": [ANSWER]}])
    check_batch(made, batch)
    assert text_of(made, batch, 0, learned=True) == "A flat.<turn|>\n"


def test_a_prompt_that_renders_otherwise_alone() -> None:
    # As Gemma 4 12B: the generation prompt ends with an empty thought that the conversation drops.
    own = template().replace("{{- '<|turn>model\\n' -}}", "{{- '<|turn>model\\n(thinking)' -}}")
    assert own != template()
    made = processor(own)
    batch = AudioCollator(made)([{"audio": audio(0.2), "prompt": [QUESTION], "completion": [ANSWER]}])
    assert text_of(made, batch, 0, learned=True) == "A flat.<turn|>\n"
    assert "thinking" not in text_of(made, batch, 0, learned=False)


def test_rates_must_agree() -> None:
    row = {"audio": {"array": audio(0.2), "sampling_rate": 8000}, "prompt": "<|audio|>", "completion": "a"}
    with pytest.raises(DataError) as caught:
        AudioCollator(processor())([row])
    assert caught.value.code == "data-audio"
    assert "8000" in caught.value.what
    row["audio"] = {"array": audio(0.2), "sampling_rate": RATE}
    check_batch(processor(), AudioCollator(processor())([row]))


@pytest.mark.parametrize("as_prompt", [False, True], ids=["messages", "prompt and completion"])
def test_files_that_messages_name_are_learned_from(tmp_path: Path, as_prompt: bool) -> None:
    """From files at another rate to a batch: each sound in its place, and the answers alone learned."""
    soundfile = pytest.importorskip("soundfile")
    for name, seconds in (("a", 0.3), ("b", 0.2)):
        soundfile.write(tmp_path / f"{name}.wav", audio(seconds)[::2], RATE // 2)
    hear, what = {"type": "text", "text": "Hear"}, {"type": "text", "text": "?"}
    asked = [
        {"role": "user", "content": [hear, {"type": "audio", "path": "a.wav"}, what]},
        {"role": "user", "content": [{"type": "audio", "audio": "b.wav"}, what]},
    ]
    rows = [{"prompt": [q], "completion": [ANSWER]} if as_prompt else {"messages": [q, ANSWER]} for q in asked]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    read = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    read_rows = read_audio_at(resolve_audio_files(read, tmp_path, "rows.jsonl"), RATE)
    made = processor(template())
    batch = AudioCollator(made, chat_template=template_for(made, read))([read_rows[0], read_rows[1]])
    check_batch(made, batch)
    assert [text_of(made, batch, row, learned=True) for row in (0, 1)] == ["A flat.<turn|>\n"] * 2
    assert "Hear<|audio><audio|>?" in text_of(made, batch, 0, learned=False)
    assert "\n<|audio><audio|>?" in text_of(made, batch, 1, learned=False)
