"""What ``graftkit.json`` says an adapter answers is what stock PEFT answers, and signing leaves no trace."""

from __future__ import annotations

import copy
import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tests.unit.serving.signed import Signed, write_signed
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import graftkit as gk
from graftkit.adapters.file import RECORD_NAME
from graftkit.adapters.fingerprints.tokenizer import vocabulary_hash
from graftkit.adapters.record import AdapterRecord, Dialect, ExpectedPrompt, read_record
from graftkit.errors import AdapterError
from graftkit.serving.sign import Signer
from graftkit.serving.signing.prompts import QUESTIONS, TEXTS

# Single precision, and the five digits that are written.
CLOSE = 3e-5


def stock(signed: Signed, factor: float = 1.0) -> PeftModel:
    """Load the adapter with PEFT alone, its scale changed in its configuration."""
    folder = signed.adapter.parent / f"times {factor}"
    shutil.copytree(signed.adapter, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * factor}))
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(signed.base), folder).eval()


@torch.no_grad()
def answers(model: nn.Module, prompt: ExpectedPrompt) -> torch.Tensor:
    logits = model(torch.tensor([prompt.ids])).logits[0, -1].double()
    return logits.log_softmax(-1)[list(prompt.tokens)]


def expected(record: AdapterRecord) -> tuple[ExpectedPrompt, ...]:
    assert record.expected is not None
    return record.expected.prompts


@pytest.mark.parametrize(("field", "factor"), [("adapter", 1.0), ("half", 0.5), ("double", 2.0), ("base", None)])
def test_the_answers_are_those_of_stock_peft(signed: Signed, field: str, factor: float | None) -> None:
    model = stock(signed, factor or 1.0)
    with model.disable_adapter() if factor is None else nullcontext():
        for prompt in expected(signed.record):
            assert answers(model, prompt).tolist() == pytest.approx(getattr(prompt, field), abs=CLOSE)


def test_each_model_s_best_tokens_are_listed(signed: Signed) -> None:
    model = stock(signed)
    for prompt in expected(signed.record):
        with torch.no_grad():
            best = model(torch.tensor([prompt.ids])).logits[0, -1].topk(10).indices.tolist()
        assert set(best) <= set(prompt.tokens)


def test_prompts_are_what_the_tokenizer_makes_of_their_texts(signed: Signed) -> None:
    tokenizer = AutoTokenizer.from_pretrained(signed.base)
    prompts = expected(signed.record)
    plain = [prompt for prompt in prompts if not prompt.messages]
    assert [prompt.text for prompt in plain] == list(TEXTS)
    assert [list(prompt.ids) for prompt in plain] == [tokenizer(text)["input_ids"] for text in TEXTS]
    chats = [prompt for prompt in prompts if prompt.messages]
    assert [prompt.messages[0].content for prompt in chats] == list(QUESTIONS)
    for prompt in chats:
        messages = [message.model_dump() for message in prompt.messages]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert list(prompt.ids) == rendered["input_ids"]


def test_what_else_is_written(signed: Signed) -> None:
    record = signed.record
    assert record.dialect is Dialect.PEFT
    assert record.base is not None
    assert (record.base.id, record.base.model_type) == (str(signed.base), "qwen3")
    assert record.base.fingerprint is not None
    assert record.tokenizer is not None
    assert "Vienna" in str(record.tokenizer.rendering)
    assert record.plan is not None
    assert (record.plan.method, record.plan.r, record.plan.alpha) == ("LORA", 4, 8)
    weights = list(read_stock(signed.adapter).values())
    assert record.plan.parameters == sum(t.numel() for t in weights)
    assert record.plan.modules == len(weights) // 2 == sum(record.plan.targets.values())
    assert {"torch", "peft", "graftkit"} <= set(record.versions)
    assert record.unknown == {}
    assert (signed.adapter / RECORD_NAME).stat().st_size < 20_000


def read_stock(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_signing_leaves_no_trace(signed: Signed, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(signed.base), signed.adapter, is_trainable=True
    )
    shutil.copytree(signed.adapter, tmp_path / "adapter")
    model.train()
    model.base_model.model.model.layers[0].eval()
    model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss.backward()

    def state() -> list[Any]:
        return [
            *(module.training for module in model.modules()),
            *(len(module._forward_hooks) for module in model.modules()),
            *(p.requires_grad for p in model.parameters()),
            *(None if p.grad is None else p.grad.sum().item() for p in model.parameters()),
            *(dict(m.scaling) for m in model.modules() if isinstance(m, LoraLayer)),
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ]

    before = state()
    gk.sign(model, AutoTokenizer.from_pretrained(signed.base), tmp_path / "adapter")
    assert state() == before
    assert read_record(tmp_path / "adapter") == signed.record


def copied(signed: Signed, folder: Path) -> Path:
    shutil.copytree(signed.adapter, folder / "adapter")
    (folder / "adapter" / RECORD_NAME).unlink()
    return folder / "adapter"


def test_without_a_tokenizer(signed: Signed, tmp_path: Path) -> None:
    record = gk.sign(stock(signed), None, copied(signed, tmp_path))
    assert set(record.unknown) == {"tokenizer"}
    prompts = expected(record)
    assert prompts
    assert {prompt.text for prompt in prompts} == {None}
    assert answers(stock(signed), prompts[0]).tolist() == pytest.approx(prompts[0].adapter, abs=CLOSE)


def test_further_prompts(signed: Signed, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(signed.base)
    record = gk.sign(stock(signed), tokenizer, copied(signed, tmp_path), prompts=["Ahoy"])
    assert "Ahoy" in [prompt.text for prompt in expected(record)]


def test_a_template_that_writes_the_date_gives_no_prompt(signed: Signed, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(signed.base)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    record = gk.sign(stock(signed), tokenizer, copied(signed, tmp_path))
    assert expected(record)
    assert not any(prompt.messages for prompt in expected(record))


def test_weights_that_are_not_on_this_machine(signed: Signed, tmp_path: Path) -> None:
    record = gk.sign(stock(signed), None, copied(signed, tmp_path), base="owner/name")
    assert record.base is not None
    assert (record.base.id, record.base.fingerprint) == ("owner/name", None)
    assert "base.fingerprint" in record.unknown


def test_another_adapter_in_the_folder(signed: Signed, tmp_path: Path) -> None:
    folder = copied(signed, tmp_path)
    model = stock(signed, 1.0)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data += 1e-3
    with pytest.raises(AdapterError) as caught:
        gk.sign(model, None, folder)
    assert caught.value.code == "sign-other-adapter"
    assert not (folder / RECORD_NAME).exists()


def test_a_model_without_an_adapter(signed: Signed, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        gk.sign(AutoModelForCausalLM.from_pretrained(signed.base), None, copied(signed, tmp_path))
    assert caught.value.code == "sign-no-adapter"


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), id="the base was moved"),
        pytest.param(LoraConfig(target_modules=["q_proj"], bias="all"), id="biases"),
    ],
)
def test_what_cannot_be_switched_off(signed: Signed, tmp_path: Path, config: LoraConfig) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(signed.base), config)
    model.save_pretrained(tmp_path)
    record = gk.sign(model, AutoTokenizer.from_pretrained(signed.base), tmp_path)
    assert record.expected is None
    assert set(record.unknown) == {"expected"}
    assert record.tokenizer is not None


def test_a_model_that_predicts_no_tokens(signed: Signed, tmp_path: Path) -> None:
    with_head = AutoModelForSequenceClassification.from_pretrained(signed.base)
    model = get_peft_model(with_head, LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    record = gk.sign(model, None, tmp_path)
    assert record.expected is None
    assert "expected" in record.unknown


def test_a_method_beside_the_layers(signed: Signed, tmp_path: Path) -> None:
    """Its scale cannot be changed, and it has no layers to count."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(signed.base), config)
    model.save_pretrained(tmp_path)
    record = gk.sign(model, AutoTokenizer.from_pretrained(signed.base), tmp_path)
    assert not expected(record)[0].half
    assert expected(record)[0].adapter != expected(record)[0].base


def test_a_model_of_images(tmp_path: Path) -> None:
    signed = write_signed(tmp_path, "google/gemma-4-E2B-it", scope="language")
    model = stock(signed)
    for prompt in expected(signed.record):
        assert answers(model, prompt).tolist() == pytest.approx(prompt.adapter, abs=CLOSE)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantized_base(signed: Signed, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(signed.base, quantization_config=quantization, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, signed.adapter).eval()
    record = gk.sign(model, AutoTokenizer.from_pretrained(signed.base), copied(signed, tmp_path))
    assert record.base is not None
    assert record.base.quantization == "bitsandbytes 4-bit"
    assert record.base.fingerprint == signed.record.base.fingerprint
    prompt = expected(record)[0]
    # In evaluation mode bitsandbytes takes another kernel on some CPUs, in half precision.
    assert answers(model, prompt).tolist() == pytest.approx(prompt.adapter, abs=0.05)
    assert prompt.base != expected(signed.record)[0].base


def test_the_adapter_has_an_effect(signed: Signed) -> None:
    """What the tests above compare is not twice the same."""
    effects = [abs(a - b) for p in expected(signed.record) for a, b in zip(p.adapter, p.base, strict=True)]
    assert max(effects) > 0.5


def test_stock_peft_does_not_look_at_it(signed: Signed, tmp_path: Path) -> None:
    """With the file or without, the adapter loads to the same bits; what is saved from there has none."""
    base = AutoModelForCausalLM.from_pretrained(signed.base)
    without = PeftModel.from_pretrained(copy.deepcopy(base), copied(signed, tmp_path)).eval()
    with_it = PeftModel.from_pretrained(base, signed.adapter).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(with_it(ids).logits, without(ids).logits)
    with_it.save_pretrained(tmp_path / "again")
    assert read_record(tmp_path / "again") is None


def test_an_adapter_whose_names_are_migrated_keeps_it(signed: Signed, tmp_path: Path) -> None:
    gk.migrate(signed.adapter, str(signed.base), tmp_path / "out")
    assert read_record(tmp_path / "out") == signed.record


class CountingTokenizer:
    """Passes everything on to a tokenizer, and counts how often its whole vocabulary is decoded."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def batch_decode(self, *given: Any, **named: Any) -> Any:
        self.decoded += 1
        return self._tokenizer.batch_decode(*given, **named)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._tokenizer(*given, **named)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_a_run_decodes_its_vocabulary_once_and_again_when_it_has_changed(signed: Signed, tmp_path: Path) -> None:
    signed = Signed(signed.base, shutil.copytree(signed.adapter, tmp_path / "adapter"))
    tokenizer = CountingTokenizer(AutoTokenizer.from_pretrained(signed.base))
    model, signer = stock(signed), Signer()
    records = []
    for words in ([], [], ["<new>"]):
        tokenizer.add_tokens(words)
        signer.sign(model, tokenizer, signed.adapter)
        records.append((tokenizer.decoded, signed.record.tokenizer, signed.record.expected))
        assert signed.record.tokenizer is not None
        assert signed.record.tokenizer.vocabulary == vocabulary_hash(tokenizer)
    first, second, changed = records
    assert (first[0], second[0], changed[0]) == (1, 1, 2)
    assert first[1:] == second[1:]


def test_a_vocabulary_that_cannot_be_read_is_unknown_at_every_save(signed: Signed, tmp_path: Path) -> None:
    signed = Signed(signed.base, shutil.copytree(signed.adapter, tmp_path / "adapter"))

    class Broken(CountingTokenizer):
        def get_vocab(self) -> dict[str, int]:
            raise ValueError("no vocabulary")

    signer, tokenizer = Signer(), Broken(AutoTokenizer.from_pretrained(signed.base))
    for _ in range(2):
        signer.sign(stock(signed), tokenizer, signed.adapter)
        assert signed.record.tokenizer is None
        assert signed.record.expected is not None
