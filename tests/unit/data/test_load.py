"""Data of every kind a recipe can name: what is read, what it becomes, and how it is refused."""

from __future__ import annotations

import json
import math
import shutil
import wave
from pathlib import Path
from typing import Any

import pytest

from graftkit.data.load import Data, load_data
from graftkit.errors import DataError
from graftkit.recipes.recipe import read_recipe
from graftkit.training.trainers.audio_collator import read_audio_at

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"what is {at}?", "completion": str(at), "note": "aside"} for at in range(10)]
CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "prompt": "hi"}]


def loaded(folder: Path, trainer: str = "sft", seed: int | None = None, **data: Any) -> Data:
    args = {} if seed is None else {"seed": seed}
    recipe = {"model": "x", "trainer": trainer, "data": data, "args": args}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return load_data(read_recipe(folder / "recipe.yaml"))


def refused(folder: Path, code: str, **data: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        loaded(folder, **data)
    assert caught.value.code == code
    return caught.value


def jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file.name


def written(folder: Path, kind: str) -> str:
    """Write the rows as a file or folder of this kind; return its path, relative to the recipe."""
    rows = datasets.Dataset.from_list(ROWS)
    if kind == "jsonl":
        return jsonl(folder / "rows.jsonl", ROWS)
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(ROWS))
    elif kind == "csv":
        rows.to_csv(folder / "rows.csv")
    elif kind == "parquet":
        rows.to_parquet(folder / "rows.parquet")
    elif kind == "saved":
        rows.save_to_disk(folder / "rows.saved")
    elif kind == "saved splits":
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "rows.saved splits")
    else:
        (folder / "rows.folder").mkdir()
        (folder / "rows.folder" / "README.md").write_text("# rows\n")
        jsonl(folder / "rows.folder" / "train.jsonl", ROWS[:8])
        jsonl(folder / "rows.folder" / "test.jsonl", ROWS[8:])
    return f"rows.{kind}"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "saved splits", "folder"])
def test_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    found = loaded(tmp_path, path=written(tmp_path, kind))
    assert found.train[3]["prompt"] == "what is 3?"
    assert found.train[3]["completion"] == "3"
    assert len(found.train) == (8 if kind == "folder" else 10)
    assert found.held_out is None
    assert found.modalities == ("text",)


def test_the_cells_of_csv_are_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,note\n007,NA,1\n8,,\n", encoding="utf-8-sig")
    found = loaded(tmp_path, "grpo", path="rows.csv").train
    assert found[:] == {"prompt": ["007", "8"], "completion": ["NA", ""], "note": ["1", ""]}


@pytest.mark.parametrize("header", [",prompt,completion", "note,prompt,completion,note", "\n,prompt,completion"])
def test_other_columns_of_csv_may_have_any_name(tmp_path: Path, header: str) -> None:
    """``DataFrame.to_csv`` writes the labels of the rows under an empty name."""
    (tmp_path / "rows.csv").write_text(f"{header}\n0,a,1\n1,b,2\n")
    assert loaded(tmp_path, path="rows.csv").train[:] == {"prompt": ["a", "b"], "completion": ["1", "2"]}


def test_cells_that_have_no_column_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\nHello, you,1\n")
    refused(tmp_path, "data-unreadable", path="rows.csv")


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([1, 2], id="numbers"),
        pytest.param(["a", None], id="a gap"),
        pytest.param([None, None], id="none"),
    ],
)
def test_a_column_that_is_not_text_is_refused(tmp_path: Path, values: list[Any]) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "x", "completion": value} for value in values])
    assert "completion" in str(refused(tmp_path, "data-columns", path=path))
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT[0]["messages"]}, {"messages": None}])
    assert "messages" in str(refused(tmp_path, "data-columns", path=path))


def test_a_file_without_rows(tmp_path: Path) -> None:
    refused(tmp_path, "data-empty", path=jsonl(tmp_path / "rows.jsonl", []))
    for text in ("", "prompt,completion\n"):
        (tmp_path / "rows.csv").write_text(text)
        refused(tmp_path, "data-empty", path="rows.csv")


def test_a_hub_dataset_in_the_cache(tmp_path: Path, datasets_cache: Path) -> None:
    """As `datasets` keeps what it once downloaded, read without a network."""
    jsonl(tmp_path / "rows.jsonl", ROWS)
    datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "made"))
    (kept,) = (tmp_path / "made" / "json").glob("*/*/*/")
    ours = datasets_cache / "somebody___numbers" / "default" / "0.0.0" / "1"
    shutil.copytree(kept, ours)
    (ours / "json-train.arrow").rename(ours / "numbers-train.arrow")
    assert loaded(tmp_path, path="somebody/numbers").train[3]["prompt"] == "what is 3?"
    assert "somebody/letters" in str(refused(tmp_path, "data-unreachable", path="somebody/letters"))


def test_columns_that_the_trainer_does_not_take_are_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert sorted(loaded(tmp_path, path=path).train.column_names) == ["completion", "prompt"]
    assert "note" in loaded(tmp_path, "grpo", path=path).train.column_names


def test_messages_come_before_a_prompt_beside_them(tmp_path: Path) -> None:
    # TRL would take the prompt, and miss its completion.
    assert loaded(tmp_path, path=jsonl(tmp_path / "rows.jsonl", CHAT)).train.column_names == ["messages"]


def test_the_text_field_of_trl_is_a_column(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"body": "words", "text": "others"}])
    recipe = {"model": "x", "data": {"path": path}, "args": {"dataset_text_field": "body"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert load_data(read_recipe(tmp_path / "recipe.yaml")).train.column_names == ["body"]


@pytest.mark.parametrize(
    ("rows", "columns", "first"),
    [
        pytest.param(
            [{"q": "a", "a": "b"}],
            {"prompt": "q", "completion": "a"},
            {"prompt": "a", "completion": "b"},
            id="plain",
        ),
        pytest.param(
            [{"q": "a", "prompt": "other", "completion": "b"}],
            {"prompt": "q"},
            {"prompt": "a", "completion": "b"},
            id="a name that was taken",
        ),
        pytest.param(
            [{"prompt": "a", "completion": "b"}],
            {"prompt": "completion", "completion": "prompt"},
            {"prompt": "b", "completion": "a"},
            id="swapped",
        ),
        pytest.param([{"body": "a"}], {"text": "body"}, {"text": "a"}, id="text"),
    ],
)
def test_columns_are_renamed(
    tmp_path: Path, rows: list[dict[str, Any]], columns: dict[str, str], first: dict[str, str]
) -> None:
    found = loaded(tmp_path, path=jsonl(tmp_path / "rows.jsonl", rows), columns=columns)
    assert found.train[0] == first


def test_limits_hold_for_both_parts(tmp_path: Path) -> None:
    path = written(tmp_path, "folder")
    found = loaded(tmp_path, path=path, eval_split="test", limit=1)
    assert found.held_out is not None
    assert (len(found.train), len(found.held_out)) == (1, 1)
    assert found.held_out[0]["prompt"] == "what is 8?"


def test_a_file_of_its_own_is_held_out(tmp_path: Path) -> None:
    path, other = jsonl(tmp_path / "rows.jsonl", ROWS), jsonl(tmp_path / "held.jsonl", ROWS[:2])
    found = loaded(tmp_path, path=path, eval_path=other)
    assert found.held_out is not None
    assert (len(found.train), len(found.held_out)) == (10, 2)


def test_a_share_is_held_out_by_the_seed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    one, same, other = (loaded(tmp_path, path=path, eval_share=0.3, seed=seed) for seed in (1, 1, 2))
    assert one.held_out is not None
    assert same.held_out is not None
    assert other.held_out is not None
    assert one.held_out["prompt"] == same.held_out["prompt"] != other.held_out["prompt"]
    assert sorted([*one.train["prompt"], *one.held_out["prompt"]]) == sorted(row["prompt"] for row in ROWS)
    assert len(one.held_out) == 3


def test_a_small_share_is_one_row_and_one_row_has_none(tmp_path: Path) -> None:
    held_out = loaded(tmp_path, path=jsonl(tmp_path / "rows.jsonl", ROWS), eval_share=0.01).held_out
    assert held_out is not None
    assert len(held_out) == 1
    refused(tmp_path, "data-empty", path=jsonl(tmp_path / "one.jsonl", ROWS[:1]), eval_share=0.5)


def picture(file: Path, grey: int) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4), (grey, grey, grey)).save(file)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for at in range(3):
        picture(folder / f"{at}.png", at)
    rows = [{"file_name": f"{at}.png", "prompt": "which?", "completion": str(at)} for at in range(3)]
    jsonl(folder / "metadata.jsonl", rows)
    found = loaded(tmp_path, path="pictures")
    assert found.modalities == ("text", "image")
    assert sorted(found.train.column_names) == ["completion", "image", "prompt"]
    assert {int(row["completion"]): row["image"].getpixel((0, 0))[0] for row in found.train} == {0: 0, 1: 1, 2: 2}


def test_a_picture_that_is_none_is_refused_before_training(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"no picture")
    jsonl(folder / "metadata.jsonl", [{"file_name": "0.png", "prompt": "which?", "completion": "0"}])
    assert "UnidentifiedImageError" in str(refused(tmp_path, "data-unreadable", path="pictures").why)


def audio_folder(folder: Path) -> str:
    (folder / "sounds").mkdir()
    for at in range(2):
        with wave.open(str(folder / "sounds" / f"{at}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            tone = (int(9000 * math.sin(2 * math.pi * 440 * t / 8000)) for t in range(800))
            file.writeframes(b"".join(value.to_bytes(2, "little", signed=True) for value in tone))
    rows = [{"file_name": f"{at}.wav", "prompt": "which?", "completion": str(at)} for at in range(2)]
    jsonl(folder / "sounds" / "metadata.jsonl", rows)
    return "sounds"


def test_a_folder_of_sounds(tmp_path: Path) -> None:
    found = loaded(tmp_path, path=audio_folder(tmp_path))
    assert found.modalities == ("text", "audio")
    assert len(read_audio_at(found.train, 8000)[0]["audio"]) == 800


def test_a_folder_of_sounds_with_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "rows" / split).mkdir(parents=True)
        home = tmp_path / "rows" / split / audio_folder(tmp_path / "rows" / split)
        for file in home.iterdir():
            file.rename(home.parent / file.name)
        home.rmdir()
    found = loaded(tmp_path, path="rows", split="train[:1]", eval_split="test")
    assert found.held_out is not None
    assert (len(found.train), len(found.held_out)) == (1, 2)
    assert [Path(row["audio"]).parent.name for row in (found.train[0], found.held_out[1])] == ["train", "test"]
    assert [row["completion"] for row in (found.train[0], found.held_out[1])] == ["0", "1"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved"])
def test_rows_name_sounds_relative_to_their_own_file(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "data"
    home.mkdir()
    audio_folder(home)
    rows = [{"audio": f"sounds/{at}.wav", "prompt": "which?", "completion": str(at)} for at in range(2)]
    made = datasets.Dataset.from_list(rows)
    if kind.startswith("json"):
        made.to_json(home / f"rows.{kind}", lines=kind == "jsonl")
    elif kind == "saved":
        made.save_to_disk(home)
    else:
        getattr(made, f"to_{kind}")(home / f"rows.{kind}")
    found = loaded(tmp_path, path="data" if kind == "saved" else f"data/rows.{kind}", eval_share=0.5)
    assert found.modalities == ("text", "audio")
    assert found.held_out is not None
    for part in (found.train, found.held_out):
        (row,) = read_audio_at(part, 16_000)
        assert len(row["audio"]) == 1600


def test_held_out_sounds_are_relative_to_the_held_out_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        audio_folder(tmp_path / name)
    row = {"audio": "sounds/0.wav", "prompt": "which?", "completion": "0"}
    one, two = (jsonl(tmp_path / name / "rows.jsonl", [row]) for name in ("one", "two"))
    found = loaded(tmp_path, path=f"one/{one}", eval_path=f"two/{two}")
    assert found.held_out is not None
    assert found.train[0]["audio"] == str((tmp_path / "one" / "sounds" / "0.wav").resolve())
    assert found.held_out[0]["audio"] == str((tmp_path / "two" / "sounds" / "0.wav").resolve())


def test_messages_name_sounds(tmp_path: Path) -> None:
    audio_folder(tmp_path)
    question = [{"type": "audio", "path": "sounds/1.wav"}, {"type": "text", "text": "which?"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "1"}]
    found = loaded(tmp_path, path=jsonl(tmp_path / "rows.jsonl", [{"messages": turns}]))
    assert found.modalities == ("text", "audio")
    assert [len(audio) for audio in read_audio_at(found.train, 8000)[0]["audios"]] == [800]
    # Beside contents in parts, datasets would read the answer as a number.
    assert found.train[0]["messages"][1]["content"] == [{"type": "text", "text": "1"}]


def test_a_sound_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    audio_folder(tmp_path)
    rows = [{"audio": f"sounds/{at}.wav", "prompt": "which?", "completion": str(at)} for at in range(3)]
    error = refused(tmp_path, "data-audio", path=jsonl(tmp_path / "rows.jsonl", rows))
    assert error.where == "rows.jsonl, row 3"
    assert "2.wav" in str(error.why)


def test_sounds_that_preferences_name_are_for_sft_too(tmp_path: Path) -> None:
    audio_folder(tmp_path)
    asked = [{"role": "user", "content": [{"type": "audio", "path": "sounds/0.wav"}]}]
    row = {"prompt": asked, "chosen": [CHAT[0]["messages"][1]], "rejected": [CHAT[0]["messages"][1]]}
    refused(tmp_path, "data-modalities", trainer="dpo", path=jsonl(tmp_path / "rows.jsonl", [row]))


def test_sounds_as_numbers_need_no_decoder(tmp_path: Path) -> None:
    rows = [{"audio": [0.0, 0.5], "prompt": "which?", "completion": "0"}]
    assert loaded(tmp_path, path=jsonl(tmp_path / "rows.jsonl", rows)).modalities == ("text", "audio")


def test_the_recipe_says_what_the_batches_hold(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert loaded(tmp_path, path=path, modalities=["text", "image"]).modalities == ("text", "image")


@pytest.mark.parametrize("trainer", ["dpo", "grpo"])
def test_sound_is_for_sft(tmp_path: Path, trainer: str) -> None:
    rows = [{"audio": [0.0], "prompt": "which?", "chosen": "0", "rejected": "1"}]
    refused(tmp_path, "data-modalities", trainer=trainer, path=jsonl(tmp_path / "rows.jsonl", rows))


def test_sound_beside_pictures_is_refused(tmp_path: Path) -> None:
    rows = [{"audio": [0.0], "image": "x", "text": "which?"}]
    refused(tmp_path, "data-modalities", path=jsonl(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(
    ("trainer", "rows"),
    [
        pytest.param("sft", [{"prompt": "a"}], id="sft without completions"),
        pytest.param("dpo", [{"prompt": "a", "chosen": "b"}], id="dpo without rejected"),
        pytest.param("grpo", [{"question": "a"}], id="grpo without prompts"),
    ],
)
def test_missing_columns_are_refused(tmp_path: Path, trainer: str, rows: list[dict[str, Any]]) -> None:
    error = refused(tmp_path, "data-columns", trainer=trainer, path=jsonl(tmp_path / "rows.jsonl", rows))
    assert all(name in str(error.why) for name in rows[0])


def test_preferences_without_a_prompt_are_taken(tmp_path: Path) -> None:
    rows = [{"chosen": "ab", "rejected": "ac"}]
    assert len(loaded(tmp_path, "dpo", path=jsonl(tmp_path / "rows.jsonl", rows)).train) == 1


@pytest.mark.parametrize(
    ("code", "data", "said"),
    [
        pytest.param("data-missing", {}, "recipe.yaml", id="nothing named"),
        pytest.param("data-missing", {"path": "absent.jsonl"}, "absent.jsonl", id="not there"),
        pytest.param("data-unreadable", {"path": "recipe.yaml"}, ".yaml", id="of another kind"),
        pytest.param("data-unreadable", {"path": "broken.jsonl"}, "broken.jsonl", id="broken"),
        pytest.param("data-unreadable", {"path": "rows.jsonl", "split": "test"}, "test", id="no such split"),
        pytest.param("data-unreadable", {"path": "nothing"}, "nothing", id="empty folder"),
        pytest.param(
            "data-columns", {"path": "rows.jsonl", "columns": {"text": "body"}}, "'body'", id="no column"
        ),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, code: str, data: dict[str, Any], said: str) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    (tmp_path / "nothing").mkdir()
    assert said in str(refused(tmp_path, code, **data))


def test_data_without_rows_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "data-unreadable", path=jsonl(tmp_path / "rows.jsonl", ROWS), split="train[:0]")
