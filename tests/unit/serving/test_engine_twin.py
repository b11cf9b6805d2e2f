"""The folder of a twin that engines load: what transformers reads back is the model that was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer

from graftkit.errors import OutputError
from graftkit.serving.engine_twin import write_engine_twin

FAMILIES = """
llama qwen2 qwen3 mixtral gemma3_text qwen3_moe gpt_oss mistral phi3 granite olmo2
google/gemma-4-E2B-it google/gemma-4-31B-it google/gemma-4-26B-A4B-it
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp("twins") / name.replace("/", "-")
            done[name] = (write_engine_twin(name, folder), folder)
        return done[name]

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_loaded_computes_what_was_written(name: str, written: Any) -> None:
    model, folder = written(name)
    loaded = type(model).from_pretrained(folder)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_lie_in_single_precision(name: str, written: Any) -> None:
    _, folder = written(name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert [path.suffix for path in folder.glob("model*")] == [".safetensors"]


# As in the config.json of Qwen/Qwen3-30B-A3B, openai/gpt-oss-20b, google/gemma-3-1b-it and google/gemma-4-31B-it.
RELEASED = {
    "qwen3_moe": {"num_experts": 4, "head_dim": 32, "rope_theta": 1e4, "norm_topk_prob": True},
    "gpt_oss": {"rope_theta": 15e4, "rope_scaling": {"rope_type": "yarn", "factor": 32.0}},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "google/gemma-4-31B-it": {
        "vocab_size": 512,
        "text_config": {"global_head_dim": 64, "num_global_key_value_heads": 1},
        "vision_config": {"default_output_length": 70},
    },
}


def contains(fields: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return all(name in fields and contains(fields[name], value) for name, value in wanted.items())
    return bool(fields == wanted)


@pytest.mark.parametrize("name", RELEASED)
def test_the_configuration_has_the_fields_of_released_ones(name: str, written: Any) -> None:
    _, folder = written(name)
    assert contains(json.loads((folder / "config.json").read_text(encoding="utf-8")), RELEASED[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_have_a_size_that_vllm_computes_on_a_cpu(name: str, written: Any) -> None:
    model, _ = written(name)
    fields = model.config.get_text_config().to_dict()
    assert (fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]) >= 32


@pytest.mark.parametrize("name", FAMILIES)
def test_every_id_of_the_vocabulary_is_one_token(name: str, written: Any) -> None:
    model, folder = written(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sorted(tokenizer.get_vocab().values()) == list(range(model.config.get_text_config().vocab_size))


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_have_the_ids_of_the_configuration(name: str, written: Any) -> None:
    model, folder = written(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        index = getattr(model.config.get_text_config(), role)
        if index is not None:
            assert getattr(tokenizer, role) == index
            text = tokenizer.convert_ids_to_tokens(index)
            assert tokenizer(text, add_special_tokens=False).input_ids == [index]


@pytest.mark.parametrize(("name", "starts"), [("google/gemma-4-E2B-it", True), ("llama", False)])
def test_prompts_start_with_bos_where_a_family_says_so(name: str, starts: bool, written: Any) -> None:
    _, folder = written(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "a"}]
    chat = tokenizer.apply_chat_template(messages, return_dict=False)
    pair = tokenizer("a", "b").input_ids
    for ids, times in ((tokenizer("a").input_ids, 1), (chat, 1), (pair, 2)):
        assert ids.count(tokenizer.bos_token_id) == (times if starts else 0)
        assert (ids[0] == tokenizer.bos_token_id) is starts


def test_a_processor_finds_its_tokens(written: Any) -> None:
    model, folder = written("google/gemma-4-E2B-it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.image_token_id == model.config.image_token_id
    assert tokenizer.audio_token_id == model.config.audio_token_id


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text().filter(lambda text: "<" not in text and "▁" not in text))
def test_any_text_comes_back_from_its_tokens(text: str, written: Any) -> None:
    _, folder = written("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_experts_as_mlx_lm_writes_them(tmp_path: Path) -> None:
    model = write_engine_twin("gpt_oss", tmp_path / "base", engine="mlx")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    experts, path = model.model.layers[0].mlp.experts, "model.layers.0.mlp.experts"
    x, expert = torch.randn(experts.gate_up_proj.shape[1]), 2
    both = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    for half, name in ((both[::2], "gate_proj"), (both[1::2], "up_proj")):
        weight, bias = weights[f"{path}.{name}.weight"][expert], weights[f"{path}.{name}.bias"][expert]
        assert torch.allclose(half, weight @ x + bias, atol=1e-6)
    assert torch.equal(weights[f"{path}.down_proj.weight"], experts.down_proj.transpose(1, 2))
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError):
        write_engine_twin("llama", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
