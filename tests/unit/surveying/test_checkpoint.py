"""What a checkpoint holds against what its class expects, from headers alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graftkit as gk
from graftkit.errors import SourceError
from graftkit.surveying.checkpoint.comparison import Absent, Checkpoint
from graftkit.surveying.checkpoint.complete import check_complete
from graftkit.surveying.sources.load_model import load_model

NAMES = ["google/gemma-4-E2B-it", "llama", "mixtral", "qwen3_moe", "t5", "llava", "deepseek_v3", "gpt_oss"]
# One of each way to name, join, tie or leave out weights that transformers has.
TYPES = [
    "albert",
    "bart",
    "bert",
    "bloom",
    "clip",
    "cohere2",
    "deepseek_v4",
    "dinov2",
    "distilbert",
    "ernie4_5_moe",
    "falcon_h1",
    "gemma4",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "granitemoehybrid",
    "idefics3",
    "internvl",
    "jamba",
    "llama4",
    "longt5",
    "mamba2",
    "marian",
    "mimi",
    "mistral3",
    "moshi",
    "nemotron_h",
    "opt",
    "paligemma",
    "phi3",
    "pixtral",
    "qwen2_5_vl",
    "qwen3_next",
    "qwen3_vl_moe",
    "roberta",
    "sam2",
    "siglip",
    "vit",
    "wav2vec2",
    "whisper",
    "xglm",
    "zamba2",
]


def found_in(folder: Path, **options: bool) -> Checkpoint:
    found = gk.survey(str(folder), **options).checkpoint
    assert found is not None
    return found


def rewrite(folder: Path, change: Callable[[str], str | None]) -> None:
    """Give the tensors of a folder other names, or leave out those whose new name is None."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({new: t for key, t in tensors.items() if (new := change(key))}, file, {"format": "pt"})


def without_wrapper(key: str) -> str:
    return key.replace(".linear.weight", ".weight")


def without_bounds(key: str) -> str | None:
    return None if key.endswith(("_min", "_max")) else key


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_whole(twin_of: Callable[[str], nn.Module], tmp_path: Path, name: str) -> None:
    """Names on disk are predicted exactly, for fused experts, renamed towers, ties and buffers alike."""
    twin_of(name).save_pretrained(tmp_path)
    found = found_in(tmp_path, headers=True)
    assert (found.unknown, found.absent, found.mismatched, found.undecided) == ((), Absent(), (), None)
    assert found.tensors == len(load_file(tmp_path / "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_what_is_absent_is_what_transformers_reports(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, name: str
) -> None:
    """The oracle is the report of a real loading: of the saved twin, and of one that lost every tenth tensor."""
    model: Any = twin_of(name)
    model.save_pretrained(tmp_path)
    assert found_in(tmp_path).absent == Absent()
    assert reported(model, tmp_path) == set()
    keys = sorted(key for file in tmp_path.glob("*.safetensors") for key in load_file(file))
    lost = set(random.Random(0).sample(keys, max(1, len(keys) // 10)))
    rewrite(tmp_path, lambda key: None if key in lost else key)
    found = found_in(tmp_path)
    try:
        expected = reported(model, tmp_path)
    except RuntimeError:
        # Some of the tensors that are joined to one weight are there, which transformers refuses to load.
        assert found.undecided
        return
    assert {*found.absent.weights, *found.absent.heads, *found.absent.buffers, *found.mismatched} == expected
    assert expected
    assert found.undecided is None


def reported(model: Any, folder: Path) -> set[str]:
    """Return what transformers misses when it loads a folder for real."""
    _, info = type(model).from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    return {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_index_ties_and_a_dtype_change_nothing(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, dtype: torch.dtype
) -> None:
    model: Any = twin_of("google/gemma-4-E2B-it").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert model.config.get_text_config().tie_word_embeddings
    found = found_in(tmp_path)
    assert (found.unknown, found.absent, found.mismatched, found.undecided) == ((), Absent(), (), None)


def test_weights_under_another_name_are_absent_and_renamed(e2b: nn.Module, tmp_path: Path) -> None:
    """The keys of transformers#45388."""
    e2b.save_pretrained(tmp_path)
    rewrite(tmp_path, without_wrapper)
    found = found_in(tmp_path)
    wrapped = [name for name in e2b.state_dict() if name.endswith(".linear.weight")]
    assert found.absent == Absent(weights=tuple(sorted(wrapped)))
    assert set(found.absent.weights) == reported(e2b, tmp_path)
    assert dict(found.renamed) == {without_wrapper(name): name for name in wrapped}
    assert found.to_dict()["missing"] == sorted(wrapped)


def test_a_permanent_unwrap_loses_the_bounds_too(e2b: nn.Module, tmp_path: Path) -> None:
    e2b.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda key: without_bounds(without_wrapper(key)))
    found = found_in(tmp_path)
    assert {*found.absent.weights, *found.absent.buffers} == reported(e2b, tmp_path)
    assert len(found.absent.weights) == len(found.renamed)
    assert len(found.absent.buffers) == 4 * len(found.renamed)


@pytest.mark.parametrize(
    "renamed",
    [
        pytest.param(lambda key: f"module.{key}", id="a prefix"),
        pytest.param(lambda key: key.replace("_proj.weight", "_proj.inner.weight"), id="a wrapper"),
    ],
)
def test_other_ways_to_be_named_otherwise(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, renamed: Callable[[str], str]
) -> None:
    model = twin_of("qwen3_moe")
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    rewrite(tmp_path, renamed)
    found = found_in(tmp_path)
    assert found.absent.weights
    assert dict(found.renamed) == {renamed(key): key for key in keys if renamed(key) != key}


def _two_swapped(key: str) -> str:
    return key.replace("k_proj.weight", "v.k_proj.weight").replace("q_proj.weight", "q.q_proj.weight")


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(_two_swapped, id="two changes"),
        pytest.param(lambda key: key.replace("q_proj", "query"), id="another word"),
        pytest.param(lambda key: None if "k_proj" in key else f"module.{key}", id="some are lost"),
        pytest.param(lambda key: key.replace("mlp.gate_proj", "mlp.shared.gate_proj"), id="another module"),
    ],
)
def test_no_renaming_is_guessed(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, broken: Callable[[str], str | None]
) -> None:
    twin_of("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, broken)
    found = found_in(tmp_path)
    assert found.absent.weights
    assert not found.renamed


def test_lost_clip_bounds_and_foreign_keys_show(e2b: nn.Module, tmp_path: Path) -> None:
    e2b.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    bounds = [key for key in load_file(file) if without_bounds(key) is None]
    rewrite(tmp_path, without_bounds)
    save_file({**load_file(file), "mtp.head.weight": torch.zeros(2)}, file)
    model_map = gk.survey(str(tmp_path))
    assert bounds
    assert model_map.checkpoint is not None
    assert model_map.checkpoint.absent == Absent(buffers=tuple(sorted(bounds)))
    assert model_map.checkpoint.unknown == ("mtp.head.weight",)
    assert model_map.checkpoint.unknown[0] in str(model_map)
    assert model_map.to_dict()["checkpoint"]["unknown"] == ["mtp.head.weight"]


def test_a_new_head_is_no_missing_weight(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    """As one begins a classifier: the files of the language model, and the class of another task."""
    model: Any = twin_of("llama")
    model.model.save_pretrained(tmp_path)
    set_architecture(tmp_path, "LlamaForSequenceClassification")
    assert found_in(tmp_path).absent == Absent(heads=("score.weight",))
    check_complete(found_in(tmp_path), str(tmp_path))
    # The output embeddings of a language model are no new head.
    set_architecture(tmp_path, "LlamaForCausalLM")
    assert found_in(tmp_path).absent == Absent(weights=("lm_head.weight",))


def set_architecture(folder: Path, name: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [name]}))


def test_weights_of_another_shape_are_refused(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    twin_of("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.zeros(3)}, file, {"format": "pt"})
    found = found_in(tmp_path)
    assert found.mismatched == ("model.norm.weight",)
    with pytest.raises(SourceError) as caught:
        check_complete(found, str(tmp_path))
    assert caught.value.code == "weights-incomplete"


def test_what_cannot_be_compared_is_undecided(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    twin_of("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    assert found_in(tmp_path).undecided
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1])
    assert found_in(tmp_path).undecided
    with pytest.raises(SourceError):
        gk.survey(str(tmp_path), headers=True)


def test_a_folder_without_weights_is_surveyed(e2b: nn.Module, tmp_path: Path) -> None:
    e2b.config.save_pretrained(tmp_path)
    assert gk.survey(str(tmp_path)).checkpoint is None
    with pytest.raises(SourceError):
        gk.survey(str(tmp_path), headers=True)


@pytest.mark.parametrize("uses", [gk.plan, load_model], ids=["plan", "load_model"])
def test_a_base_whose_weights_do_not_load_is_refused(
    e2b: nn.Module, tmp_path: Path, uses: Callable[[str], object]
) -> None:
    e2b.save_pretrained(tmp_path)
    uses(str(tmp_path))
    rewrite(tmp_path, without_wrapper)
    with pytest.raises(SourceError) as caught:
        uses(str(tmp_path))
    assert caught.value.code == "weights-incomplete"
    assert "graft rekey" in str(caught.value.help)


def test_a_pickled_base_is_judged_by_what_was_loaded(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    """Files without headers can only be loaded."""
    model: Any = twin_of("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    load_model(str(tmp_path))
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError) as caught:
        load_model(str(tmp_path))
    assert caught.value.code == "weights-incomplete"


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantizing_a_base_as_it_loads_loses_nothing(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, bits: str
) -> None:
    from transformers import BitsAndBytesConfig

    model: Any = twin_of("llama")
    model.save_pretrained(tmp_path / "base")
    quantized = load_model(str(tmp_path / "base"), quantization_config=BitsAndBytesConfig(**{bits: True}))
    # A checkpoint that is quantized on disk loads as well.
    quantized.save_pretrained(tmp_path / "quantized")
    load_model(str(tmp_path / "quantized"))
    assert found_in(tmp_path / "quantized").undecided
