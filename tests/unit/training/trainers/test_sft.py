"""What the trainer made for a recipe learns of its rows: text, images and audio, plain and as messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.training import gemma

from graftkit.data.load import load_data
from graftkit.errors import TrainingError
from graftkit.recipes.recipe import read_recipe
from graftkit.recipes.trainer_arguments import trainer_arguments
from graftkit.training.model import load_base
from graftkit.training.trainers.audio_collator import AudioCollator
from graftkit.training.trainers.inputs import TrainerInputs
from graftkit.training.trainers.sft import sft_trainer

CHAT = [
    {"role": "user", "content": "Which river?"},
    {"role": "assistant", "content": "The Danube."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "The sea."},
]
ANSWERS = "The Danube.<turn|>\nThe sea.<turn|>\n"
CPU = {"use_cpu": True, "bf16": False, "save_strategy": "no", "activation_checkpointing": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma.save_base(tmp_path_factory.mktemp("base"), gemma.processor(gemma.template()))


def trainer_for(folder: Path, model: Path, rows: list[dict[str, Any]], **args: Any) -> Any:
    from datasets import Dataset, Image, List

    data = Dataset.from_list(rows)
    if "images" in rows[0]:
        data = data.cast_column("images", List(Image()))
    data.save_to_disk(folder / "rows")
    own = {**CPU, "output_dir": str(folder / "out"), **args}
    (folder / "recipe.yaml").write_text(json.dumps({"model": str(model), "data": {"path": "rows"}, "args": own}))
    recipe = read_recipe(folder / "recipe.yaml")
    found = load_data(recipe)
    base = load_base(recipe, found.modalities)
    return sft_trainer(TrainerInputs(recipe, base, found, trainer_arguments(recipe)))


def learned(trainer: Any, at: int = 0) -> str:
    """Return the text that the loss is on, in a row of the trainer's batch."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(trainer.train_dataset))])
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    text: str = tokenizer.decode([int(token) for token in batch["labels"][at] if token != -100])
    return text


def picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (8, 8))


def test_conversations_learn_the_answers_and_their_ends(tmp_path: Path, saved: Path) -> None:
    trainer = trainer_for(tmp_path, saved, [{"messages": CHAT}], assistant_only_loss=True)
    assert learned(trainer) == ANSWERS


def test_without_assistant_only_loss_conversations_are_learned_whole(tmp_path: Path, saved: Path) -> None:
    trainer = trainer_for(tmp_path, saved, [{"messages": CHAT}])
    assert learned(trainer).startswith("<bos><|turn>user\nWhich river?")
    assert trainer.processing_class.chat_template == gemma.template()


def test_completions_learn_their_end(tmp_path: Path, saved: Path) -> None:
    trainer = trainer_for(tmp_path, saved, [{"prompt": "<bos>river:", "completion": " Danube"}])
    assert learned(trainer) == " Danube<eos>"


def test_completions_as_messages_learn_their_end(tmp_path: Path, saved: Path) -> None:
    trainer = trainer_for(tmp_path, saved, [{"prompt": CHAT[:3], "completion": CHAT[3:]}])
    assert learned(trainer) == "The sea.<turn|>\n"


@pytest.mark.usefixtures("known")
def test_conversations_about_pictures_learn_the_answers_and_their_ends(tmp_path: Path, saved: Path) -> None:
    rows = [{"images": [picture()], "messages": CHAT}, {"images": [picture()], "messages": CHAT[:2]}]
    trainer = trainer_for(tmp_path, saved, rows, assistant_only_loss=True, max_length=None)
    assert learned(trainer) == ANSWERS
    assert learned(trainer, 1) == "The Danube.<turn|>\n"


@pytest.mark.usefixtures("known")
def test_a_batch_of_pictures_has_their_token_types(tmp_path: Path, saved: Path) -> None:
    rows = [{"images": [picture()], "prompt": "<bos><|image|>?", "completion": "black"}]
    trainer = trainer_for(tmp_path, saved, rows, max_length=None)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    pictures = batch["input_ids"] == trainer.processing_class.image_token_id
    assert pictures.any()
    assert ((batch["mm_token_type_ids"] == 1) == pictures).all()
    assert learned(trainer) == "black"


@pytest.mark.usefixtures("known")
def test_conversations_about_sounds_learn_the_answers_and_their_ends(tmp_path: Path, saved: Path) -> None:
    trainer = trainer_for(tmp_path, saved, [{"audio": [0.0] * 3200, "messages": CHAT}])
    assert isinstance(trainer.data_collator, AudioCollator)
    assert learned(trainer) == ANSWERS


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("media", ["images", "audio"])
def test_the_processor_gets_its_own_template_back(tmp_path: Path, saved: Path, media: str) -> None:
    value: Any = [picture()] if media == "images" else [0.0] * 3200
    rows = [{media: value, "messages": CHAT}]
    trainer = trainer_for(tmp_path, saved, rows, assistant_only_loss=True, max_length=None)
    # Those who look when training begins see what it learns by.
    assert "{% generation %}" in trainer.processing_class.chat_template.replace("{%-", "{%")
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.processing_class.chat_template == gemma.template()
    assert learned(trainer) == ANSWERS


def test_a_template_of_the_users_own(tmp_path: Path, saved: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<turn|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    trainer = trainer_for(
        tmp_path, saved, [{"messages": CHAT}], assistant_only_loss=True, chat_template_path=str(own)
    )
    assert learned(trainer) == "The Danube.<turn|>The sea.<turn|>"


@pytest.mark.parametrize("assistant_only", [True, False])
@pytest.mark.parametrize("row", [{"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:2]}], ids=sorted)
def test_messages_without_a_template_are_refused(
    tmp_path: Path, row: dict[str, Any], assistant_only: bool
) -> None:
    base = gemma.save_base(tmp_path / "base", gemma.letters())
    with pytest.raises(TrainingError) as caught:
        trainer_for(tmp_path, base, [row], assistant_only_loss=assistant_only)
    assert caught.value.code == "no-chat-template"
