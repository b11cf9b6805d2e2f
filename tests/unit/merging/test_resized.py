"""Adapters trained on a larger vocabulary than the base was published with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.unit.merging.conftest import move

from graftkit.checks.probes.forward import difference
from graftkit.errors import MergeError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.merging.conftest import Bench

NEW = 3
BOTH = ["q_proj", "embed_tokens", "lm_head"]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj"]},
    "the new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [-3, -2, -1]},
    "embeddings saved whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "lora on both": {"target_modules": BOTH},
    "dora on both": {"target_modules": BOTH, "use_dora": True},
    "pissa on both": {"target_modules": BOTH, "init_lora_weights": "pissa"},
}
TIED = ("lora", "the new tokens", "embeddings saved whole")


def grown(model: Any, seed: int) -> Any:
    """Return a copy with more tokens; their first values depend on the seed, as on any day of a real run."""
    torch.manual_seed(seed)
    larger = copy.deepcopy(model)
    size = larger.get_input_embeddings().weight.shape[0]
    larger.resize_token_embeddings(size + NEW, mean_resizing=False)
    for embeddings in {larger.get_input_embeddings(), larger.get_output_embeddings()}:
        with torch.no_grad():
            embeddings.weight[-NEW:] = torch.randn(NEW, embeddings.weight.shape[1]) * embeddings.weight.std()
    return larger


def trained(made: Bench, name: str) -> tuple[Path, Any]:
    """Save an adapter that was trained on more tokens; returns its folder, and the model in memory."""
    options = copy.deepcopy(OPTIONS[name])
    larger = grown(made.model, seed=1)
    size = larger.config.vocab_size
    if rows := options.get("trainable_token_indices"):
        options["trainable_token_indices"] = [size + row for row in rows]
    larger.name_or_path = larger.config._name_or_path = str(made.base)
    with made.quiet():
        adapted = get_peft_model(larger, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
        move(adapted, 0.05)
        adapted.save_pretrained(str(made.folder / "adapter"))
    return made.folder / "adapter", adapted.eval()


def logits(made: Bench, model: Any) -> torch.Tensor:
    size = made.model.config.vocab_size
    ids = torch.tensor([[1, 5, size, 7, size + 1, 3, size + 2, 4]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def cases() -> list[Any]:
    tied = [pytest.param("gemma2", name, id=f"gemma2, {name}") for name in TIED]
    return tied + [pytest.param("llama", name, id=f"llama, {name}") for name in OPTIONS]


@pytest.mark.parametrize(("family", "name"), cases())
def test_merged_onto_a_base_that_was_resized_again(family: str, name: str, bench: Callable[..., Bench]) -> None:
    made = bench(family, dtype=torch.float32)
    adapter, adapted = trained(made, name)
    with made.quiet():
        grown(made.model, seed=2).save_pretrained(made.base)
        stock = PeftModel.from_pretrained(made.loaded(dtype=torch.float32), str(adapter)).eval()
    want = logits(made, adapted)
    assert difference(want, logits(made, stock)) < 1e-4, "PEFT finds everything in the file"
    assert difference(want, logits(made, made.loaded(dtype=torch.float32))) > 0.02
    made.merge(adapter)
    assert difference(want, logits(made, made.loaded(made.out, dtype=torch.float32))) < 1e-4


def rows_alone(adapter: Path) -> None:
    """Leave the embeddings out of the file, as ``save_embedding_layers=False`` does."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {n: t for n, t in tensors.items() if "lora_" in n or "trainable_tokens_delta" in n}
    save_file(kept, adapter / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["lora", "the new tokens"])
def test_the_base_without_the_new_tokens_is_refused(name: str, bench: Callable[..., Bench]) -> None:
    made = bench("llama", dtype=torch.float32)
    adapter, _ = trained(made, name)
    if name == "the new tokens":
        rows_alone(adapter)
    with pytest.raises(MergeError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-resized"
