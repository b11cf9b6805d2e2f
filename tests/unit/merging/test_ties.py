"""Adapters on weights that two modules share: what the adapter computed is what the merged model computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig
from transformers import Gemma2ForCausalLM

import graftkit as gk
from graftkit.adapters.file import read_adapter
from graftkit.checks.probes.forward import difference, logits_of
from graftkit.errors import MergeError
from graftkit.merging.adapter.effects import read_effects
from graftkit.merging.checkpoint.base import Base
from graftkit.merging.checkpoint.shards import read_weights
from graftkit.merging.checkpoint.tied_weights import resolve_ties
from graftkit.merging.merge import verify_merge
from graftkit.surveying.sources.build import build_on_meta

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.merging.conftest import Bench

TIED = "gemma2"
EMBEDDING = "model.embed_tokens.weight"

ONE_SIDED: dict[str, dict[str, Any]] = {
    "lora on the embedding": {"target_modules": ["embed_tokens"]},
    "lora on the head": {"target_modules": ["lm_head"]},
    "the head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "the embedding saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}
BOTH: dict[str, dict[str, Any]] = {
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "lora on both": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "both saved whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@pytest.fixture
def made(bench: Callable[..., Bench]) -> Bench:
    made = bench(TIED, dtype=torch.float32, shard="150KB")
    assert made.model.config.tie_word_embeddings
    return made


def adapter_of(made: Bench, options: dict[str, Any]) -> Path:
    return made.adapter(LoraConfig(r=4, init_lora_weights=False, **options), spread=0.05)


def logits(made: Bench, folder: Path, adapter: Path | None = None) -> Any:
    with made.quiet():
        model = made.loaded(folder, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        return logits_of(model, gk.example_batch(made.model))


@pytest.mark.parametrize("name", ONE_SIDED)
def test_one_side_alone_needs_a_choice(name: str, made: Bench) -> None:
    adapter = adapter_of(made, ONE_SIDED[name])
    with pytest.raises(MergeError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-tied"
    assert "untie" in str(caught.value.help)
    assert not made.out.exists()


@pytest.mark.parametrize("name", ONE_SIDED)
def test_untied_it_computes_what_the_adapter_did(name: str, made: Bench) -> None:
    adapter = adapter_of(made, ONE_SIDED[name])
    made.merge(adapter, tied="untie")
    before, after = made.stored(made.base), made.stored(made.out)
    assert set(after) == {*before, "lm_head.weight"}
    assert difference(logits(made, made.base), logits(made, made.base, adapter)) > 0.02
    assert difference(logits(made, made.base, adapter), logits(made, made.out)) < 1e-4
    assert verify_merge(made.base, {adapter: 1.0}, made.out).ok, "the report says what was chosen"
    index = json.loads((made.out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in after.values())


def test_both_sides_differently_need_a_choice(made: Bench) -> None:
    with pytest.raises(MergeError) as caught:
        made.merge(adapter_of(made, {"target_modules": ["embed_tokens", "lm_head"]}))
    assert caught.value.code == "merge-tied"
    assert caught.value.where == f"{EMBEDDING}, lm_head.weight"


def test_shared_it_is_what_peft_merges(made: Bench) -> None:
    adapter = adapter_of(made, ONE_SIDED["lora on the embedding"])
    made.merge(adapter, tied="share")
    made.assert_same_files()
    made.assert_exact(made.exact(adapter), share=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LoHaConfig(r=4, target_modules=["lm_head"], init_weights=False), id="loha"),
        pytest.param(VeraConfig(r=4, target_modules=["lm_head"], d_initial=1.0), id="a tuner whose layers share"),
        pytest.param(IA3Config(target_modules=["lm_head"], feedforward_modules=[]), id="ia3"),
    ],
)
def test_other_tuners_on_a_head_that_is_on_disk_as_the_embedding(config: Any, made: Bench) -> None:
    adapter = made.adapter(config, spread=0.5)
    made.merge(adapter, tied="untie")
    assert difference(logits(made, made.base), logits(made, made.base, adapter)) > 0.02
    assert difference(logits(made, made.base, adapter), logits(made, made.out)) < 1e-4


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_an_initializer_moves_the_embedding_with_the_head(name: str, made: Bench) -> None:
    """PEFT writes into the weight that both share, in training and on loading."""
    adapter = made.adapter(LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=name), spread=0.5)
    with pytest.raises(MergeError) as caught:
        made.merge(adapter, tied="share")
    assert caught.value.code == "merge-tied-choice"
    made.merge(adapter, tied="untie")
    assert difference(logits(made, made.base), logits(made, made.base, adapter)) > 0.02
    assert difference(logits(made, made.base, adapter), logits(made, made.out)) < 1e-4


@pytest.mark.parametrize("name", BOTH)
def test_both_sides_alike_need_no_choice(name: str, made: Bench) -> None:
    adapter = adapter_of(made, BOTH[name])
    made.merge(adapter)
    made.assert_same_files()
    assert made.merge(adapter).plan.jobs.keys() >= {EMBEDDING}
    assert difference(logits(made, made.base), logits(made, made.base, adapter)) > 0.02
    assert difference(logits(made, made.base, adapter), logits(made, made.out)) < 1e-4


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param("t5", "encoder.embed_tokens", id="four names of one weight"),
        pytest.param("bert", "decoder", id="a bias that is shared as well"),
        pytest.param("google/gemma-4-E2B-it", "lm_head", id="a tie below the top"),
    ],
)
def test_untying_leaves_no_name_without_a_weight(name: str, target: str, bench: Callable[..., Bench]) -> None:
    made = bench(name, dtype=torch.float32)
    adapter = adapter_of(made, {"target_modules": [target]})
    made.merge(adapter, tied="untie")
    assert difference(logits(made, made.base), logits(made, made.base, adapter)) > 0.02
    assert difference(logits(made, made.base, adapter), logits(made, made.out)) < 1e-4
    with made.quiet():
        _, loaded = type(made.model).from_pretrained(made.out, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]


def flags_in(config: dict[str, Any]) -> list[bool]:
    inner = [flag for value in config.values() if isinstance(value, dict) for flag in flags_in(value)]
    return [*inner, *(value for name, value in config.items() if name == "tie_word_embeddings")]


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "google/gemma-4-E2B-it"])
def test_the_configuration_says_that_they_are_apart(name: str, bench: Callable[..., Bench]) -> None:
    """Engines that read only the configuration must not tie them again."""
    made = bench(name)
    made.merge(adapter_of(made, {"target_modules": ["lm_head"]}), tied="untie")
    flags = flags_in(json.loads((made.out / "config.json").read_text()))
    assert flags
    assert not any(flags)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("t5", id="a configuration that forces the tie, and takes the flag for a scale"),
        pytest.param("longt5", id="another"),
        pytest.param("mt5", id="a configuration that forces the tie"),
        pytest.param("switch_transformers", id="a forward that scales by the flag"),
    ],
)
def test_a_flag_that_means_more_than_the_tie_stays(name: str, bench: Callable[..., Bench]) -> None:
    made = bench(name, dtype=torch.float32)
    path = made.base / "config.json"
    fields = json.loads(path.read_text())
    fields.pop("scale_decoder_outputs", None)  # only the newest transformers writes it
    path.write_text(json.dumps(fields))
    adapter = adapter_of(made, {"target_modules": ["lm_head"]})
    made.merge(adapter, tied="untie")
    assert difference(logits(made, made.base), logits(made, made.base, adapter)) > 0.02
    assert difference(logits(made, made.base, adapter), logits(made, made.out)) < 1e-4
    assert json.loads((made.out / "config.json").read_text()) == fields


class Insists(Gemma2ForCausalLM):
    """Its head is built on the embedding's weight, whatever the configuration says."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.weight = self.model.embed_tokens.weight


def test_a_class_that_insists_is_not_untied(made: Bench) -> None:
    adapter = adapter_of(made, ONE_SIDED["lora on the head"])
    base = Base(read_weights(made.base), lambda: build_on_meta(made.model.config, Insists))
    effects = read_effects(read_adapter(adapter), base.model)
    with pytest.raises(MergeError) as caught:
        resolve_ties(base, [effects], "untie")
    assert caught.value.code == "merge-tied-choice"
    assert resolve_ties(base, [effects], "share").targets("lm_head.weight") == (EMBEDDING,)


def test_a_choice_has_to_be_one_of_two(made: Bench) -> None:
    with pytest.raises(MergeError) as caught:
        made.merge(adapter_of(made, ONE_SIDED["lora on the head"]), tied="maybe")
    assert caught.value.code == "merge-tied-choice"


def test_without_an_adapter_on_them_ties_do_not_matter(made: Bench) -> None:
    adapter = adapter_of(made, {"target_modules": ["q_proj"]})
    made.merge(adapter, tied="untie")
    made.assert_same_files()


ROWS: dict[str, dict[str, list[int]]] = {
    "rows of the head": {"lm_head": [3, 5]},
    "other rows of each": {"embed_tokens": [3, 5], "lm_head": [3, 4]},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_peft_does_not_share_need_a_choice(name: str, made: Bench) -> None:
    adapter = adapter_of(made, {"target_modules": ["q_proj"], "trainable_token_indices": ROWS[name]})
    with pytest.raises(MergeError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-tied"
    made.merge(adapter, tied="untie")
    assert difference(logits(made, made.base), logits(made, made.base, adapter)) > 0.02
    assert difference(logits(made, made.base, adapter), logits(made, made.out)) < 1e-4


def test_the_same_rows_of_both_are_shared(made: Bench) -> None:
    rows = {"embed_tokens": [3, 5], "lm_head": [3, 5]}
    adapter = adapter_of(made, {"target_modules": ["q_proj"], "trainable_token_indices": rows})
    made.merge(adapter)
    made.assert_same_files()
    assert difference(logits(made, made.base, adapter), logits(made, made.out)) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"modules_to_save": ["embed_tokens", "lm_head"]}, id="saved whole"),
        pytest.param({"trainable_token_indices": ROWS["other rows of each"]}, id="rows"),
    ],
)
def test_one_weight_has_no_room_for_two_values(options: dict[str, Any], made: Bench) -> None:
    adapter = adapter_of(made, {"target_modules": ["q_proj"], **options})
    with pytest.raises(MergeError) as caught:
        made.merge(adapter, tied="share")
    assert caught.value.code == "merge-tied-choice"


def test_updates_of_both_add_up_in_one_weight(made: Bench) -> None:
    adapter = adapter_of(made, {"target_modules": ["embed_tokens", "lm_head"]})
    made.merge(adapter, tied="share")
    made.assert_exact(made.exact(adapter), share=1e-3)
