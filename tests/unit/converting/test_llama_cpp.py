"""GGUF adapters: what llama.cpp's loader and its converter ask for, and every update as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tests.unit.converting.served import Served, factors_of, largest_difference, served_twin

import graftkit as gk
from graftkit.converting.delta import Deltas
from graftkit.converting.dialects.llama_cpp import DIALECT
from graftkit.converting.dialects.peft import DIALECT as PEFT
from graftkit.converting.gguf_file import LoraFile, LoraPair, read_lora_file, write_lora_file
from graftkit.converting.join import joined
from graftkit.errors import AdapterError, MissingDependencyError

TWINS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {},
    "gemma3": {},
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "google/gemma-4-26B-A4B-it": {},
    "phi3": {},
    "granite": {},
    "qwen2_moe": {},
    "glm4": {},
}
MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "google/gemma-4-26B-A4B-it"]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory) -> Callable[[str], Served]:
    made: dict[str, Served] = {}

    def make(name: str) -> Served:
        if name not in made:
            made[name] = served_twin(name, tmp_path_factory.mktemp("base"), **TWINS.get(name, {}))
        return made[name]

    return make


def written(deltas: Deltas, served: Served, folder: Path) -> Path:
    """Write a GGUF adapter that nothing speaks against."""
    assert DIALECT.refusals(deltas, served.base) == {}
    folder.mkdir()
    DIALECT.write(deltas, served.base, folder)
    return folder / "adapter.gguf"


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a GGUF file's tensors with the package alone."""
    return {t.name: np.array(t.data).reshape(tuple(reversed(t.shape.tolist()))) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("options", [{}, {"method": "rslora", "r": 3}], ids=["lora", "rslora"])
def test_every_update_comes_back(base_of, name, options, tmp_path):
    served = base_of(name)
    deltas = served.deltas(tmp_path / "peft", targets="all-linear", scope="language", **options)
    written(deltas, served, tmp_path / "gguf")
    # With rsLoRA, alpha is no whole number, and is rounded.
    largest = DIALECT.rounding if options else 0.0
    assert largest_difference(deltas, DIALECT.read(tmp_path / "gguf", served.base), served.base) <= largest


@pytest.mark.parametrize("name", MOE)
def test_every_expert_comes_back(base_of, name, tmp_path):
    served = base_of(name)
    deltas = served.deltas(tmp_path / "peft", targets=["experts", "attention"], scope="language")
    assert any(f.at.expert is not None for f in deltas)
    written(deltas, served, tmp_path / "gguf")
    back = DIALECT.read(tmp_path / "gguf", served.base)
    assert largest_difference(deltas, back, served.base) <= DIALECT.rounding


def test_the_header_is_what_llama_cpp_checks(base_of, tmp_path):
    served = base_of("llama")
    path = written(served.deltas(tmp_path / "peft", targets=["q_proj"], r=4, alpha=7), served, tmp_path / "gguf")
    fields = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 7.0
    assert set(tensors(path)) == {f"blk.{n}.attn_q.weight.lora_{ab}" for n in range(2) for ab in "ab"}


def test_the_base_is_named_by_its_page(base_of, tmp_path):
    served = base_of("llama")
    deltas = replace(
        served.deltas(tmp_path / "peft", targets=["q_proj"]), config={"base_model_name_or_path": "owner/model"}
    )
    path = written(deltas, served, tmp_path / "gguf")
    fields = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/owner/model"
    assert DIALECT.read(tmp_path / "gguf", served.base).config == {"base_model_name_or_path": "owner/model"}


def test_rows_of_queries_and_keys_follow_llama_cpps_rotary_embedding(base_of, tmp_path):
    served = base_of("llama")
    deltas = served.deltas(tmp_path / "peft", targets="attention")
    found = tensors(written(deltas, served, tmp_path / "gguf"))
    config = served.model.config
    for leaf, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads), ("v", None)):
        a, b = factors_of(deltas, f"model.layers.0.self_attn.{leaf}_proj.weight").read()
        rows = b.numpy()
        if heads:
            # In transformers the two halves of a head rotate together, in llama.cpp each pair of neighbours.
            halves = rows.reshape(heads, 2, -1, rows.shape[1])
            rows = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)
        assert np.array_equal(found[f"blk.0.attn_{leaf}.weight.lora_a"], a.numpy())
        assert np.array_equal(found[f"blk.0.attn_{leaf}.weight.lora_b"], rows)


def test_gpt_oss_has_gate_and_up_in_turn(base_of, tmp_path):
    served = base_of("gpt_oss")
    deltas = served.deltas(tmp_path / "peft", targets=["experts"])
    found = tensors(written(deltas, served, tmp_path / "gguf"))
    for expert in range(4):
        a, b = factors_of(deltas, "model.layers.1.mlp.experts.gate_up_proj", expert).read()
        for leaf, outs in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
            assert np.array_equal(found[f"blk.1.ffn_{leaf}_exps.weight.lora_a"][expert], a.numpy())
            assert np.array_equal(found[f"blk.1.ffn_{leaf}_exps.weight.lora_b"][expert], b[outs].numpy())


def test_what_llama_cpp_scales_before_it_adds_is_scaled_in_the_file(base_of, tmp_path):
    served = base_of("google/gemma-4-26B-A4B-it")
    deltas = served.deltas(tmp_path / "peft", targets=["experts"], scope="language")
    found = tensors(written(deltas, served, tmp_path / "gguf"))["blk.0.ffn_down_exps.weight.lora_b"]
    scales = served.model.get_parameter("model.language_model.layers.0.router.per_expert_scale").detach()
    assert not torch.equal(scales, torch.ones_like(scales))
    for expert, scale in enumerate(scales.double()):
        _, b = factors_of(deltas, "model.language_model.layers.0.experts.down_proj", expert).read()
        assert np.array_equal(found[expert], (b.double() * scale).float().numpy())


def test_embeddings_are_stored_by_token(base_of, tmp_path):
    served = base_of("llama")
    deltas = served.deltas(tmp_path / "peft", LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]))
    found = tensors(written(deltas, served, tmp_path / "gguf"))
    a, b = factors_of(deltas, "model.embed_tokens.weight").read()
    assert np.array_equal(found["token_embd.weight.lora_a"], a.T.numpy())
    assert np.array_equal(found["token_embd.weight.lora_b"], b.numpy())
    assert (
        largest_difference(deltas, DIALECT.read(tmp_path / "gguf", served.base), served.base) <= DIALECT.rounding
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.dictionaries(st.sampled_from(["q_proj", "v_proj", "down_proj"]), st.integers(1, 6), max_size=3),
    alphas=st.dictionaries(
        st.sampled_from(["q_proj", "o_proj", "down_proj"]), st.sampled_from([0, 1, -3, 7, 0.1]), max_size=3
    ),
    rslora=st.booleans(),
    alpha=st.sampled_from([0, 1, 5, 16, 0.3]),
)
def test_ranks_and_scales_of_any_kind_are_kept(base_of, tmp_path_factory, ranks, alphas, rslora, alpha):
    served = base_of("llama")
    folder = tmp_path_factory.mktemp("patterns")
    config = LoraConfig(
        r=3,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    )
    deltas = served.deltas(folder / "peft", config)
    written(deltas, served, folder / "gguf")
    back = DIALECT.read(folder / "gguf", served.base)
    assert largest_difference(deltas, back, served.base) <= DIALECT.rounding
    (folder / "back").mkdir()
    PEFT.write(joined(back, served.base), served.base, folder / "back")
    assert largest_difference(deltas, served.read(folder / "back"), served.base) <= 2 * DIALECT.rounding


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "google/gemma-4-26B-A4B-it"])
def test_there_and_back_again(base_of, name, tmp_path):
    served = base_of(name)
    adapter = served.adapter(
        tmp_path / "peft", targets=["experts", "attention", "router"], scope="language", method="rslora", r=3
    )
    gk.convert(adapter, tmp_path / "gguf", to="llama.cpp", base=served.folder)
    gk.convert(tmp_path / "gguf", tmp_path / "back", to="peft", base=served.folder)
    first, second = served.read(adapter), served.read(tmp_path / "back")
    assert largest_difference(first, second, served.base) <= 2 * DIALECT.rounding


# ---- what cannot be written ----


def test_tied_embeddings_are_refused(base_of, tmp_path):
    served = base_of("gemma3")
    deltas = served.deltas(tmp_path / "peft", LoraConfig(r=4, target_modules=["embed_tokens"]))
    assert set(DIALECT.refusals(deltas, served.base)) == {"model.language_model.embed_tokens.weight"}


def test_towers_are_refused(base_of, tmp_path):
    served = base_of("gemma3")
    deltas = served.deltas(tmp_path / "peft", targets="attention", scope=["language", "vision"])
    refused = DIALECT.refusals(deltas, served.base)
    assert refused
    assert all(".vision_tower." in name for name in refused)


@pytest.mark.parametrize("leaf", ["embed_tokens_per_layer", "per_layer_model_projection"])
def test_what_gemma_4_multiplies_without_adapters_is_refused(e2b, tmp_path, leaf):
    e2b.save_pretrained(tmp_path / "base")
    served = Served(tmp_path / "base", e2b)
    deltas = served.deltas(tmp_path / "peft", targets=[leaf, "per_layer_input_gate"], scope="language")
    assert set(DIALECT.refusals(deltas, served.base)) == {f"model.language_model.{leaf}.weight"}


def test_a_class_that_nobody_compared_is_refused(twin_of, tmp_path):
    model = twin_of("mamba2")
    model.save_pretrained(tmp_path / "base")
    served = Served(tmp_path / "base", model)
    deltas = served.deltas(tmp_path / "peft", targets="all-linear")
    assert set(DIALECT.refusals(deltas, served.base)) == {"Mamba2ForCausalLM"}


# ---- what cannot be read ----


def lora_file(path: Path, architecture: str = "llama") -> Path:
    """Write a file with one pair that fits nothing."""
    pair = LoraPair("blk.0.attn_q.weight", (2, 3), (5, 2), lambda _: torch.ones(2, 3), lambda _: torch.ones(5, 2))
    write_lora_file(path, LoraFile(architecture, 2.0, (pair,)))
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen3"], ids=["another base", "another architecture"])
def test_an_adapter_of_another_base_is_an_error(base_of, tmp_path, architecture):
    lora_file(tmp_path / "adapter.gguf", architecture)
    with pytest.raises(AdapterError) as error:
        DIALECT.read(tmp_path, base_of("llama").base)
    assert error.value.code == "adapter-does-not-fit"


def test_a_tensor_that_the_base_lacks_is_an_error(base_of, tmp_path):
    pair = LoraPair("blk.9.attn_q.weight", (1, 1), (1, 1), lambda _: torch.ones(1, 1), lambda _: torch.ones(1, 1))
    write_lora_file(tmp_path / "adapter.gguf", LoraFile("llama", 1.0, (pair,)))
    with pytest.raises(AdapterError) as error:
        DIALECT.read(tmp_path, base_of("llama").base)
    assert error.value.code == "adapter-does-not-fit"


def test_a_model_is_no_adapter(tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterError) as error:
        read_lora_file(tmp_path / "model.gguf")
    assert error.value.code == "adapter-gguf"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_reads(tmp_path_factory, data):
    path = lora_file(tmp_path_factory.mktemp("damaged") / "adapter.gguf")
    raw = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with suppress(AdapterError):
        for pair in read_lora_file(path).pairs:
            pair.a(None), pair.b(None)


def test_the_package_is_named_where_it_is_missing(base_of, monkeypatch, tmp_path):
    path = lora_file(tmp_path / "adapter.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError) as error:
        read_lora_file(path)
    assert error.value.code == "missing-dependency"
    assert "graftkit[gguf]" in str(error.value.help)
