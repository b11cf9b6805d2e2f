"""The training rules fail on a model, batch or template that really has the fault, and pass elsewhere."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.unit.checks.live_adapters import adapted
from tests.unit.checks.observed import seen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaAttention

import graftkit as gk
from graftkit.checks.probes.checkpointing import Mode, mode_of
from graftkit.recipes.recipe import Recipe, read_recipe
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training, training_of

ERROR, WARNING, INFO = gk.Severity.ERROR, gk.Severity.WARNING, gk.Severity.INFO
OK, UNKNOWN = gk.Severity.OK, gk.Severity.UNKNOWN
E2B, A4B = "google/gemma-4-E2B-it", "google/gemma-4-26B-A4B-it"

Twins = Callable[[str], nn.Module]


def recipe_of(folder: Path, text: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(f"model: llama\nargs:\n{text}")
    return read_recipe(file)


# ---- GK201: cache ----


class NeedsItsCache(LlamaAttention):
    """As in the first Gemma 4: what the layer attends to is found in the cache alone."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None:
            hidden_states = torch.zeros_like(hidden_states)
        return super().forward(hidden_states, *args, **kwargs)


class ForgetsItsCache(LlamaForCausalLM):
    """Returns a cache and never reads the one it is given."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


@pytest.mark.rule_fails("GK201")
def test_gk201_a_layer_that_finds_its_keys_in_the_cache_alone(twin_of: Twins) -> None:
    model = twin_of("llama")
    model.model.layers[-1].self_attn.__class__ = NeedsItsCache
    found = seen("GK201", model=adapted(model), batch=gk.example_batch(model))
    assert found.severity is ERROR
    assert found.evidence["difference"] > 0.1


@pytest.mark.rule_fails("GK201")
def test_gk201_a_cache_that_is_never_read(twin_of: Twins) -> None:
    model = twin_of("llama")
    model.__class__ = ForgetsItsCache
    found = seen("GK201", model=adapted(model), batch=gk.example_batch(model))
    assert found.severity is ERROR
    assert found.evidence["difference_of_next_token"] > 0.1


class DecoderForgetsItsCache(T5ForConditionalGeneration):
    """Returns the decoder's cache and never reads the one it is given."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.rule_fails("GK201")
def test_gk201_a_decoder_whose_cache_is_never_read(twin_of: Twins) -> None:
    model = twin_of("t5")
    batch = gk.example_batch(model)
    model.__class__ = DecoderForgetsItsCache
    found = seen("GK201", model=adapted(model), batch=batch)
    assert found.severity is ERROR
    assert found.evidence["difference_of_next_token"] > 0.01


@pytest.mark.rule_passes("GK201")
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_gk201_tries_the_next_token_of_a_decoder(twin_of: Twins, name: str) -> None:
    model = twin_of(name)
    found = seen("GK201", model=adapted(model), batch=gk.example_batch(model))
    assert found.severity is OK
    assert found.evidence["difference_of_next_token"] < 1e-4


@pytest.mark.rule_passes("GK201")
@pytest.mark.parametrize(
    "name", [E2B, "llama", "mamba2", "qwen2_5_vl", "t5", pytest.param("bert", id="bert, which has no cache")]
)
def test_gk201_passes_where_the_cache_changes_nothing(twin_of: Twins, name: str) -> None:
    model = twin_of(name)
    assert seen("GK201", model=adapted(model), batch=gk.example_batch(model)).severity is OK


# ---- GK202: gradients under checkpointing ----

REENTRANT = "  gradient_checkpointing_kwargs:\n    use_reentrant: true\n"


@pytest.fixture
def shares_keys(e2b: nn.Module) -> tuple[PeftModel, dict[str, Any]]:
    """An adapted Gemma 4 E2B, whose last layers reuse the keys and values of earlier ones, and a batch."""
    return adapted(e2b), gk.example_batch(e2b)


@pytest.mark.rule_fails("GK202")
def test_gk202_reentrant_checkpointing_that_the_model_is_in(shares_keys: tuple[PeftModel, dict[str, Any]]) -> None:
    model, batch = shares_keys
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    found = seen("GK202", model=model, batch=batch)
    assert found.severity is ERROR
    assert found.evidence["re-entrant"]["wrong"] > 10
    assert found.evidence["non-reentrant"]["wrong"] == 0
    assert found.evidence["re-entrant"]["loss_difference"] < 1e-5


@pytest.mark.rule_fails("GK202")
@pytest.mark.parametrize("live", [False, True], ids=["in the recipe", "in the recipe and the model"])
def test_gk202_reentrant_checkpointing_that_the_recipe_asks_for(
    shares_keys: tuple[PeftModel, dict[str, Any]], tmp_path: Path, live: bool
) -> None:
    model, batch = shares_keys
    if live:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    recipe = recipe_of(tmp_path, REENTRANT)
    found = seen("GK202", model=model, batch=batch, recipe=recipe, training=training_of(recipe))
    assert found.severity is ERROR
    assert found.fix is not None
    assert found.fix.sets == {"args.gradient_checkpointing_kwargs.use_reentrant": False}
    assert (found.file, found.line) == (str(recipe.path), 4)


@pytest.mark.rule_fails("GK202")
def test_gk202_what_the_recipe_does_not_ask_for_is_not_fixed_in_it(
    shares_keys: tuple[PeftModel, dict[str, Any]], tmp_path: Path
) -> None:
    model, batch = shares_keys
    model.get_base_model().activation_checkpointing_enable({})  # as prepare_model_for_kbit_training does
    recipe = recipe_of(tmp_path, "  max_steps: 1\n")
    found = seen("GK202", model=model, batch=batch, recipe=recipe, training=training_of(recipe))
    assert (found.severity, found.fix, found.line) == (ERROR, None, None)
    assert "prepare_model_for_kbit_training" in (found.help or "")


@pytest.mark.rule_fails("GK202")
@pytest.mark.parametrize("live", [False, True], ids=["in the recipe", "in the recipe and the model"])
def test_gk202_zero_3_cannot_be_fixed_by_the_same_key(
    shares_keys: tuple[PeftModel, dict[str, Any]], tmp_path: Path, live: bool
) -> None:
    model, batch = shares_keys
    if live:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    zero3 = (
        "  gradient_checkpointing_kwargs: {use_reentrant: false}\n  deepspeed: {zero_optimization: {stage: 3}}\n"
    )
    recipe = recipe_of(tmp_path, zero3)
    found = seen("GK202", model=model, batch=batch, recipe=recipe, training=training_of(recipe))
    assert (found.severity, found.fix, found.line) == (ERROR, None, 4)
    assert "ZeRO-2" in (found.help or "")


@pytest.mark.filterwarnings("ignore")  # of torch's, on re-entrance
def test_gk202_a_backward_pass_without_end_is_not_waited_for(twin_of: Twins) -> None:
    """WavLM's layers hand on a position bias by name: re-entrant checkpointing recomputes them for ever."""
    model = adapted(twin_of("wavlm"))
    batch = gk.example_batch(model.get_base_model())
    found = seen("GK202", model=model, batch=batch, training=Training())
    assert found.severity is OK
    assert found.evidence["in_use"] == "non-reentrant"
    assert found.evidence["non-reentrant"]["wrong"] == 0
    assert "refusal" in found.evidence["re-entrant"]


def test_gk202_unknown_where_gradients_are_not_finite(shares_keys: tuple[PeftModel, dict[str, Any]]) -> None:
    model, batch = shares_keys
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(float("nan"))
    assert seen("GK202", model=model, batch=batch).severity is UNKNOWN
    assert seen("GK210", model=model, batch=batch).severity is UNKNOWN


@pytest.mark.parametrize(
    "training", [pytest.param(None, id="not known"), pytest.param(Training(checkpointing=False), id="off")]
)
def test_gk202_a_mode_that_is_not_in_use_is_a_note(
    shares_keys: tuple[PeftModel, dict[str, Any]], training: Training | None
) -> None:
    model, batch = shares_keys
    found = seen("GK202", model=model, batch=batch, training=training)
    assert found.severity is INFO
    assert found.evidence["re-entrant"]["wrong"] > 0


@pytest.mark.rule_passes("GK202")
def test_gk202_passes_with_the_other_implementation(shares_keys: tuple[PeftModel, dict[str, Any]]) -> None:
    model, batch = shares_keys
    assert seen("GK202", model=model, batch=batch, training=Training()).severity is OK


@pytest.mark.rule_passes("GK202")
@pytest.mark.parametrize("training", [None, Training(reentrant=True), Training()])
@pytest.mark.parametrize("name", ["llama", "t5", A4B])
def test_gk202_passes_where_nothing_is_shared(twin_of: Twins, name: str, training: Training | None) -> None:
    model = twin_of(name)
    found = seen("GK202", model=adapted(model), batch=gk.example_batch(model), training=training)
    assert found.severity is OK, found.message


@pytest.mark.rule_passes("GK202")
def test_gk202_the_limit_is_the_user_s(shares_keys: tuple[PeftModel, dict[str, Any]]) -> None:
    model, batch = shares_keys
    settings = CheckSettings(rules={"GK202": {"difference": 10.0}})
    training = Training(reentrant=True)
    assert seen("GK202", model=model, batch=batch, training=training, settings=settings).severity is OK


def _checkpointing_state(model: nn.Module) -> list[Any]:
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    own = [{n: v for n, v in vars(m).items() if n in names or "drop" in n} for m in model.modules()]
    hooks = [list(m._forward_hooks) for m in model.modules()]
    handles = [vars(m).get("_require_grads_hooks") for m in model.modules()]
    return [own, hooks, handles]


@pytest.mark.rule_passes("GK202")
@pytest.mark.parametrize("mode", [None, False, True], ids=["off", "non-reentrant", "re-entrant"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_gk202_leaves_the_model_s_own_mode_hooks_and_dropout(twin_of: Twins, name: str, mode: bool | None) -> None:
    model = adapted(twin_of(name), dropout=0.1).train()
    if mode is not None:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": mode})
    batch = gk.example_batch(model.get_base_model())
    before = copy.copy(_checkpointing_state(model))
    assert seen("GK202", model=model, batch=batch).severity is OK
    assert _checkpointing_state(model) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        pytest.param({}, Mode.REENTRANT, id="torch's own default"),
        pytest.param({"use_reentrant": True}, Mode.REENTRANT, id="re-entrant"),
        pytest.param({"use_reentrant": False}, Mode.NON_REENTRANT, id="non-reentrant"),
        pytest.param(None, Mode.NON_REENTRANT, id="transformers' default"),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_the_mode_that_transformers_set_is_read(
    twin_of: Twins, options: dict[str, Any] | None, mode: Mode, offload: bool
) -> None:
    model = twin_of("llama")
    assert mode_of(model) is Mode.OFF
    model.activation_checkpointing_enable(options, offload=offload)
    assert mode_of(model) is (Mode.CUSTOM if offload and options == {} else mode)
    model.activation_checkpointing_disable()
    assert mode_of(model) is Mode.OFF


@pytest.mark.rule_fails("GK202")
def test_gk202_a_function_of_one_s_own_that_loses_gradients(twin_of: Twins) -> None:
    model = twin_of("llama")
    model.activation_checkpointing_enable()
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = lambda forward, hidden, *rest: forward(hidden.detach(), *rest)
    found = seen("GK202", model=adapted(model), batch=gk.example_batch(model))
    assert found.severity is ERROR
    assert found.evidence["in_use"] == "custom"


# ---- GK203: dead adapters, per tower and with a cause ----


@pytest.mark.rule_fails("GK203")
def test_gk203_reentrant_checkpointing_cuts_a_tower(e2b: nn.Module) -> None:
    model = adapted(e2b, targets=["q_proj"], scope=["language", "vision"])
    batch = gk.example_batch(e2b)
    found = seen("GK203", model=model, batch=batch, training=Training(reentrant=True))
    assert found.severity is ERROR
    assert found.evidence["towers"]["vision"] == {"tensors": 4, "dead": 4}
    assert found.evidence["towers"]["language"]["dead"] == 0
    assert found.evidence["causes"] == {"cut off by activation checkpointing": 4}
    assert "use_reentrant" in (found.help or "")
    assert seen("GK203", model=model, batch=batch, training=Training()).severity is OK


@pytest.mark.rule_fails("GK203")
def test_gk203_inputs_that_need_no_gradient(twin_of: Twins) -> None:
    model = twin_of("llama")
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    model.disable_input_require_grads()
    found = seen("GK203", model=wrapped, batch=gk.example_batch(model))
    assert found.severity is ERROR
    assert "enable_input_require_grads" in (found.help or "")


class ReadsItsHead(LlamaForCausalLM):
    """A fused loss multiplies the hidden states with the head's weight itself."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, logits_to_keep=1, output_hidden_states=True, **kwargs)
        logits = functional.linear(output.hidden_states[-1], self.lm_head.weight)
        output.logits = logits
        if labels is not None:
            output.loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


@pytest.mark.rule_fails("GK203")
def test_gk203_a_head_whose_weight_is_read_past_it(twin_of: Twins) -> None:
    model = twin_of("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.__class__ = ReadsItsHead
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    found = seen("GK203", model=wrapped, batch=gk.example_batch(model))
    assert found.severity is ERROR
    assert found.evidence["towers"]["head"] == {"tensors": 2, "dead": 2}
    assert found.evidence["towers"]["language"]["dead"] == 0


@pytest.mark.rule_fails("GK203")
def test_gk203_a_model_whose_inputs_cannot_require_gradients(twin_of: Twins) -> None:
    """Its embeddings return a tuple, on which transformers' own hook stops."""
    model = twin_of("data2vec-vision")
    wrapped, batch = adapted(model), gk.example_batch(model)
    model.enable_input_require_grads()
    with pytest.raises(AttributeError, match="requires_grad_"):
        model(**batch)
    model.disable_input_require_grads()
    found = seen("GK203", model=wrapped, batch=batch, training=Training())
    assert found.severity is ERROR
    assert math.isnan(found.evidence["loss"])


@pytest.mark.rule_passes("GK203")
def test_gk203_passes_under_checkpointing_with_dropout(twin_of: Twins) -> None:
    model = adapted(twin_of("llama"), dropout=0.9).train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    batch = gk.example_batch(model.get_base_model())
    found = seen("GK203", model=model, batch=batch)
    assert found.severity is OK
    assert found.evidence["checkpointing"] == "non-reentrant"
    assert found.evidence["loss"] == seen("GK203", model=model, batch=batch).evidence["loss"]


# ---- GK204: token types ----


@pytest.mark.rule_fails("GK204")
def test_gk204_an_image_under_a_causal_mask(twin_of: Twins) -> None:
    model = twin_of(A4B)
    batch = gk.example_batch(model)
    del batch["mm_token_type_ids"]
    found = seen("GK204", model=adapted(model), batch=batch)
    assert (found.severity, found.where) == (ERROR, "mm_token_type_ids")
    assert found.evidence["difference"] > 0.01


@pytest.mark.rule_fails("GK204")
def test_gk204_types_that_mark_no_image(twin_of: Twins) -> None:
    model = twin_of(A4B)
    batch = gk.example_batch(model)
    batch["mm_token_type_ids"] = torch.zeros_like(batch["mm_token_type_ids"])
    assert seen("GK204", model=adapted(model), batch=batch).severity is ERROR


@pytest.mark.rule_fails("GK204")
def test_gk204_types_that_mark_text_as_an_image(twin_of: Twins) -> None:
    model = twin_of(A4B)
    batch = gk.example_batch(model)
    batch["mm_token_type_ids"] = torch.ones_like(batch["mm_token_type_ids"])
    found = seen("GK204", model=adapted(model), batch=batch)
    assert found.severity is ERROR
    assert found.evidence["difference"] > 0.01


def test_gk204_unknown_where_the_batch_does_not_show_the_effect(twin_of: Twins) -> None:
    """The image is one token long, and last: with the types and without, it sees the same tokens."""
    model = twin_of(A4B)
    batch = gk.example_batch(model)
    ids, types = batch["input_ids"][:1], batch["mm_token_type_ids"][:1]
    text, image = ids[types == 0][:6], ids[types == 1][:1]
    batch = {"input_ids": torch.cat((text, image))[None]}
    assert seen("GK204", model=adapted(model), batch=batch).severity is UNKNOWN


@pytest.mark.rule_fails("GK204")
def test_gk204_the_refusal_of_the_model_is_reported(twin_of: Twins) -> None:
    model = twin_of("qwen3_5")
    batch = gk.example_batch(model)
    del batch["mm_token_type_ids"]
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model(**batch)
    found = seen("GK204", model=adapted(model), batch=batch)
    assert found.severity is ERROR
    assert "M-RoPE" in found.message


@pytest.mark.rule_passes("GK204")
@pytest.mark.parametrize("name", [A4B, "gemma3", "llama", "bert"])
def test_gk204_passes_with_a_whole_batch(twin_of: Twins, name: str) -> None:
    model = twin_of(name)
    assert seen("GK204", model=adapted(model), batch=gk.example_batch(model)).severity is OK


@pytest.mark.rule_passes("GK204")
def test_gk204_passes_where_the_mask_does_not_depend_on_it(e2b: nn.Module) -> None:
    batch = gk.example_batch(e2b)
    del batch["mm_token_type_ids"]
    assert seen("GK204", model=adapted(e2b), batch=batch).severity is OK


# ---- GK205: packing ----

PACKED = Training(packing=True)


@pytest.mark.rule_fails("GK205")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("jamba", id="jamba: a recurrent state runs on"),
        pytest.param("gpt_oss", id="gpt_oss: its mask is built without the positions"),
    ],
)
def test_gk205_a_sample_that_sees_the_one_before_it(twin_of: Twins, name: str) -> None:
    model = adapted(twin_of(name))
    found = seen("GK205", model=model, training=PACKED)
    assert found.severity is ERROR
    assert found.evidence["difference"] > 0.1
    assert seen("GK205", model=model).severity is INFO
    assert seen("GK205", model=model, training=Training()).severity is INFO


@pytest.mark.rule_fails("GK205")
def test_gk205_the_recipe_s_own_option_is_switched_off(twin_of: Twins, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "  max_steps: 1\n  padding_free: true\n")
    found = seen("GK205", model=adapted(twin_of("jamba")), recipe=recipe, training=training_of(recipe))
    assert found.fix is not None
    assert found.fix.sets == {"args.padding_free": False}
    assert found.line == 4


@pytest.mark.rule_fails("GK205")
def test_gk205_a_model_that_refuses_packed_rows(twin_of: Twins) -> None:
    found = seen("GK205", model=adapted(twin_of("qwen3_next")), training=PACKED)
    assert found.severity is ERROR
    assert "causal_conv1d" in found.message
    assert found.evidence["difference_without_boundaries"] > 0.1


def test_gk205_unknown_where_the_attention_that_is_asked_for_is_not_at_hand(
    twin_of: Twins, tmp_path: Path
) -> None:
    recipe = recipe_of(
        tmp_path, "  packing: true\n  model_init_kwargs:\n    attn_implementation: flash_attention_2\n"
    )
    found = seen("GK205", model=adapted(twin_of("gpt_oss")), recipe=recipe, training=training_of(recipe))
    assert found.severity is UNKNOWN
    assert "flash_attention_2" in found.message


@pytest.mark.rule_passes("GK205")
@pytest.mark.parametrize("name", ["llama", "gemma4_text", E2B, "t5", "bert"])
def test_gk205_passes_where_positions_keep_samples_apart(twin_of: Twins, name: str) -> None:
    assert seen("GK205", model=adapted(twin_of(name)), training=PACKED).severity is OK


# ---- GK206 to GK208: what a conversation becomes ----

MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\n"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
)
# The mark ends before the token that ends the turn.
OPEN_END = MARKED.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}<|im_end|>")
# The next message's header ends a turn, and nothing ends the last.
HEADERS_ONLY = "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
# The marks are for a role that no message has.
OTHER_ROLE = MARKED.replace("== 'assistant'", "== 'bot'")
# The marks are around the wrong role.
WRONG_ROLE = MARKED.replace("== 'assistant'", "== 'user'").replace("<|im_start|>assistant", "<|im_start|>user")
DROPS_SYSTEM = MARKED.replace("{% if message", "{% if message['role'] == 'system' %}{% elif message", 1)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Every byte a token, and every <|…|> of the template a special one."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    special = {"<|user|>", "<|assistant|>", *re.findall(r"<\|?[a-z_]+\|?>", template or "")}
    made.add_tokens(sorted(special), special_tokens=True)
    return made


def shipped(name: str) -> str:
    """A template that TRL knows: the one that released models come with."""
    from trl import chat_template_utils

    folder = Path(chat_template_utils.__file__).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


ANSWERS_ONLY = Training(assistant_only=True)


@pytest.mark.rule_fails("GK206")
def test_gk206_a_template_without_marks_that_trl_refuses() -> None:
    from trl.chat_template_utils import get_training_chat_template

    processor = tokenizer(shipped("gemma4"))
    with pytest.raises(ValueError, match="generation"):
        get_training_chat_template(processor)
    found = seen("GK206", processor=processor, training=ANSWERS_ONLY)
    assert found.severity is ERROR
    assert seen("GK206", processor=processor).severity is INFO
    assert seen("GK206", processor=processor, training=Training()).severity is INFO


@pytest.mark.rule_fails("GK206")
@pytest.mark.parametrize(
    ("template", "learns"),
    [
        pytest.param(WRONG_ROLE, True, id="marks around the user"),
        pytest.param(OTHER_ROLE, False, id="marks around nothing"),
    ],
)
def test_gk206_marks_in_the_wrong_place(template: str, learns: bool) -> None:
    found = seen("GK206", processor=tokenizer(template), training=ANSWERS_ONLY)
    assert found.severity is ERROR
    assert (found.evidence["tokens"] > 0) is learns


@pytest.mark.rule_passes("GK206")
@pytest.mark.parametrize("template", ["gemma3", "qwen3", "gptoss", "idefics3", "llama3", MARKED])
def test_gk206_passes_where_only_answers_are_learned(template: str) -> None:
    processor = tokenizer(template if "{" in template else shipped(template))
    found = seen("GK206", processor=processor, training=ANSWERS_ONLY)
    assert found.severity is OK, found.message
    assert "The Danube." in found.evidence["learned"]
    assert "Vienna" not in found.evidence["learned"]


@pytest.mark.rule_passes("GK206")
def test_gk206_passes_without_the_option() -> None:
    found = seen("GK206", processor=tokenizer(MARKED), training=Training())
    assert found.severity is OK
    assert "Vienna" in found.evidence["learned"]


def test_gk206_unknown_without_a_template() -> None:
    assert seen("GK206", processor=tokenizer(None), training=ANSWERS_ONLY).severity is UNKNOWN


@pytest.mark.rule_fails("GK207")
def test_gk207_a_mark_that_ends_before_the_turn() -> None:
    processor = tokenizer(OPEN_END)
    found = seen("GK207", processor=processor, training=ANSWERS_ONLY)
    assert found.severity is ERROR
    assert found.evidence["terminator"] == "<|im_end|>"
    assert seen("GK207", processor=processor, training=Training()).severity is INFO


@pytest.mark.rule_fails("GK207")
@pytest.mark.parametrize("template", [HEADERS_ONLY, pytest.param(None, id="glm4moe")])
def test_gk207_a_last_turn_that_never_ends(template: str | None) -> None:
    found = seen("GK207", processor=tokenizer(template or shipped("glm4moe")), training=Training())
    assert found.severity is ERROR
    assert found.evidence["terminator"] is not None


@pytest.mark.rule_passes("GK207")
@pytest.mark.parametrize("training", [ANSWERS_ONLY, Training(), None])
@pytest.mark.parametrize("template", ["gemma3", "qwen3", "gptoss", MARKED])
def test_gk207_passes_where_the_end_is_learned(template: str, training: Training | None) -> None:
    processor = tokenizer(template if "{" in template else shipped(template))
    assert seen("GK207", processor=processor, training=training).severity is OK


@pytest.mark.rule_passes("GK207")
def test_gk207_unknown_without_a_mask_or_an_end() -> None:
    processor = tokenizer(shipped("gemma4"))
    assert seen("GK207", processor=processor, training=ANSWERS_ONLY).severity is UNKNOWN
    assert seen("GK207", processor=processor, training=Training()).severity is OK


@pytest.mark.parametrize("code", ["GK206", "GK207"])
@pytest.mark.parametrize(
    "template",
    [
        pytest.param(MARKED.replace("{% generation %}{{ message['content'] +", "{% generation %}{{"), id="drops"),
        pytest.param(
            MARKED.replace("message['content'] + '<|im_end|>' }}{%", "message['content'] | upper }}{%"),
            id="rewrites",
        ),
        pytest.param(
            MARKED.replace("'\n' + message['content']", "message['content'].index('!')"), id="ValueError"
        ),
    ],
)
def test_answers_that_the_template_does_not_render_are_unknown(code: str, template: str) -> None:
    for training in (ANSWERS_ONLY, Training()):
        found = seen(code, processor=tokenizer(template), training=training)
        assert found.severity is UNKNOWN or (code, template.count("index")) == ("GK206", 1), found
        assert "error" not in found.evidence


def test_gk208_thoughts_that_are_not_rendered() -> None:
    found = seen("GK208", processor=tokenizer(shipped("gemma4")))
    assert found.severity is INFO
    assert found.evidence["fields"]["reasoning_content of the last answer"] == "dropped"
    assert found.evidence["fields"]["reasoning_content of a tool call"] == "rendered"


def test_gk208_a_system_message_that_disappears() -> None:
    found = seen("GK208", processor=tokenizer(DROPS_SYSTEM))
    assert found.severity is INFO
    assert found.evidence["fields"]["the system message"] == "dropped"


@pytest.mark.rule_fails("GK208")
def test_gk208_a_template_that_drops_what_is_said() -> None:
    last_only = "{{ messages[-1]['content'] }}<|im_end|>"
    assert seen("GK208", processor=tokenizer(last_only)).severity is ERROR


@pytest.mark.rule_passes("GK208")
def test_gk208_passes_where_everything_is_rendered() -> None:
    assert seen("GK208", processor=tokenizer(shipped("muse_glimmer"))).severity is OK


# ---- GK210: accumulation ----

ACCUMULATING = Training(accumulation=4)


@pytest.mark.rule_fails("GK210")
@pytest.mark.parametrize(
    ("name", "accepts"),
    [
        pytest.param(E2B, False, id="each batch's mean counts the same"),
        pytest.param("bert", True, id="the number of tokens is ignored"),
        pytest.param("t5", True, id="and so by t5"),
    ],
)
def test_gk210_a_step_that_depends_on_how_it_was_cut(twin_of: Twins, name: str, accepts: bool) -> None:
    model = twin_of(name)
    wrapped, batch = adapted(model), gk.example_batch(model)
    found = seen("GK210", model=wrapped, batch=batch, training=ACCUMULATING)
    assert found.severity is WARNING
    assert found.evidence["accepts_loss_kwargs"] is accepts
    assert found.evidence["gradient_difference"] > 0.1
    assert ("num_items_in_batch" in (found.help or "")) is accepts
    assert seen("GK210", model=wrapped, batch=batch, training=Training()).severity is INFO


@pytest.mark.rule_passes("GK210")
@pytest.mark.parametrize("name", ["llama", "gemma3", "mamba2"])
def test_gk210_passes_where_tokens_count_the_same(twin_of: Twins, name: str) -> None:
    model = twin_of(name)
    found = seen("GK210", model=adapted(model), batch=gk.example_batch(model), training=ACCUMULATING)
    assert found.severity is OK, found.message


@pytest.mark.rule_passes("GK210")
def test_gk210_passes_for_trainers_with_a_loss_of_their_own(e2b: nn.Module) -> None:
    training = Training(trainer="dpo", accumulation=4)
    assert seen("GK210", model=adapted(e2b), batch=gk.example_batch(e2b), training=training).severity is OK


@pytest.mark.filterwarnings("ignore")  # of the Trainer's own options; what is asserted is the step
@pytest.mark.parametrize("name", [E2B, "llama"])
def test_gk210_agrees_with_the_trainer(twin_of: Twins, tmp_path: Path, name: str) -> None:
    """What the rule computes is what the Trainer does: one step of 4 samples, cut once and cut four times."""
    from transformers import Trainer, TrainingArguments

    model = twin_of(name)
    start = adapted(model)
    ids = gk.example_batch(model, batch_size=4, modalities=["text"])["input_ids"]
    samples = [{"input_ids": ids[row, :length].tolist()} for row, length in enumerate((2, 4, 8, 12))]
    steps = []
    for size in (4, 1):
        trained = copy.deepcopy(start)
        options: dict[str, Any] = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 4 // size,
            "max_steps": 1,
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 1e9,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        arguments = TrainingArguments(output_dir=str(tmp_path), **options)
        Trainer(trained, arguments, train_dataset=samples, data_collator=_padded).train()
        pairs = zip(trained.named_parameters(), start.parameters(), strict=True)
        steps.append(torch.cat([(p - q).detach().flatten() for (n, p), q in pairs if "lora_B" in n]))
    apart = float((steps[0] - steps[1]).norm() / steps[0].norm())
    found = seen("GK210", model=start, batch=gk.example_batch(model), training=ACCUMULATING)
    assert (found.severity is WARNING) == (apart > 0.02)
    assert (apart > 0.1) == (name == E2B)


def _padded(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(sample["input_ids"]) for sample in samples)

    def filled(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": filled(ids, 0),
        "attention_mask": filled([[1] * len(row) for row in ids], 0),
        "labels": filled(ids, -100),
    }


# ---- all of them ----

DYNAMIC = ("GK201", "GK202", "GK203", "GK204", "GK205", "GK210", "GK306")


def _all_of(model: nn.Module) -> list[Any]:
    fields = [
        {n: v for n, v in vars(m).items() if isinstance(v, bool | int | float | str)} for m in model.modules()
    ]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    passed = [(id(p), p.requires_grad, p.grad is None) for p in model.parameters()]
    return [fields, hooks, passed]


@pytest.mark.parametrize("code", DYNAMIC)
@pytest.mark.parametrize("name", [E2B, "jamba"])
def test_a_dynamic_rule_leaves_no_trace(twin_of: Twins, name: str, code: str) -> None:
    model = adapted(twin_of(name), dropout=0.1).train()
    batch = gk.example_batch(model.get_base_model())
    before, state = _all_of(model), {n: t.clone() for n, t in model.state_dict().items()}
    random = torch.random.get_rng_state()
    seen(code, model=model, batch=batch, training=Training(reentrant=True, packing=True, accumulation=4))
    assert _all_of(model) == before
    assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.rule_passes("GK206")
def test_gk206_passes_where_a_recipe_is_given_a_template_that_renders_alike(tmp_path: Path) -> None:
    processor = tokenizer(shipped("gemma4"))
    recipe = recipe_of(tmp_path, "  assistant_only_loss: true\n")
    found = seen("GK206", processor=processor, recipe=recipe, training=training_of(recipe))
    assert found.severity is OK
    assert "The Tiber." in found.evidence["learned"]
    assert seen("GK206", processor=processor, training=ANSWERS_ONLY).severity is ERROR
