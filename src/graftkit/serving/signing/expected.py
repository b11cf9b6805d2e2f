"""What a trained model answers to a handful of prompts, with and without its adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from graftkit.adapters.record import Expected, ExpectedPrompt, Message
from graftkit.checks.probes.live_adapter import moved_base
from graftkit.modeling.autocast import without_autocast
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.outputs import main_output
from graftkit.modeling.random_state import fork_random_state
from graftkit.modeling.sharding import is_sharded
from graftkit.serving.signing.prompts import Prompt, prompts_for
from graftkit.serving.signing.vocabulary import Vocabulary
from graftkit.text import describe

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

# Tokens of each of the models: servers name between 5 and 20.
_TOP = 10
_DIGITS = 5


class NoAnswersError(Exception):
    """The model's answers cannot be computed here; the message says why."""


def expected_answers(
    model: PeftModel, processor: Any, texts: Sequence[str] = (), vocabulary: Vocabulary | None = None
) -> Expected:
    """Compute the log-probabilities of the next token: without the adapter, with it, and with it scaled.

    The model's modes, hooks and random states are as before.

    Args:
        processor: None for a model without a tokenizer.
        texts: prompts beside the fixed ones.
        vocabulary: the processor's; None to read it.

    Raises:
        NoAnswersError: says why they cannot be computed.
    """
    import torch

    reason = _obstacle(model)
    if reason is not None:
        raise NoAnswersError(reason)
    prompts = prompts_for(processor, texts, _vocabulary(model))
    if not prompts:
        raise NoAnswersError("the tokenizer makes no token of any prompt that the model knows")
    with fork_random_state(model), evaluating(model), without_autocast(model), torch.no_grad():
        try:
            pieces = {} if processor is None else (vocabulary or Vocabulary(processor)).texts
            found = tuple(_answer(model, prompt, pieces) for prompt in prompts)
        except Exception as error:  # the model's own code may raise anything
            raise NoAnswersError(f"the model cannot be run on text: {describe(error)}") from error
    return Expected(prompts=found, dtype=_dtype(model), device=next(model.parameters()).device.type)


def _obstacle(model: PeftModel) -> str | None:
    """Return why the model with the adapter switched off would not be the base, or cannot be asked, or None."""
    base: Any = model.get_base_model()
    if is_sharded(model):
        return "the model's parameters are sharded over processes"
    if len(model.active_adapters) != 1:
        return "several adapters are active"
    can_generate = getattr(base, "can_generate", None)
    if can_generate is None or not can_generate() or base.config.is_encoder_decoder:
        return "the model does not predict the next token of a text"
    if moved_base(model) is not None:
        return "the initializer moved the base weights into the adapter"
    bias = getattr(model.active_peft_config, "bias", "none")
    return None if bias == "none" else "biases of the base were trained, which cannot be switched off"


def _answer(model: PeftModel, prompt: Prompt, texts: Mapping[int, str]) -> ExpectedPrompt:
    import torch

    rows = {name: _log_probabilities(model, prompt.ids, context) for name, context in _models(model)}
    best = (torch.topk(row, min(_TOP, row.numel())).indices.tolist() for row in rows.values())
    tokens = sorted({token for tokens in best for token in tokens})
    chosen = [token for token in tokens if all(bool(row[token].isfinite()) for row in rows.values())]
    values = {name: tuple(round(float(row[token]), _DIGITS) for token in chosen) for name, row in rows.items()}
    messages = () if prompt.question is None else (Message(role="user", content=prompt.question),)
    pieces = tuple(texts.get(token, "") for token in chosen) if texts else ()
    return ExpectedPrompt(
        ids=prompt.ids, text=prompt.text, messages=messages, tokens=tuple(chosen), pieces=pieces, **values
    )


def _models(model: PeftModel) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    yield "base", model.disable_adapter()
    yield "adapter", nullcontext()
    if _scalable(model):
        yield "half", _scaled(model, 0.5)
        yield "double", _scaled(model, 2.0)


def _scalable(model: PeftModel) -> bool:
    from peft.tuners.lora import LoraLayer

    return any(isinstance(module, LoraLayer) for module in model.modules())


@contextmanager
def _scaled(model: PeftModel, factor: float) -> Iterator[None]:
    """Multiply the scale of every LoRA layer for the block."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, factor):
        yield


def _log_probabilities(model: PeftModel, ids: Iterable[int], context: AbstractContextManager[None]) -> Tensor:
    """Return the natural log-probabilities of the next token, float64 (vocabulary,) on the CPU."""
    import torch

    device = next(model.parameters()).device
    tokens = torch.tensor([list(ids)], device=device)
    with context:
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return main_output(output)[0, -1].double().cpu().log_softmax(-1)


def _vocabulary(model: PeftModel) -> int:
    base: Any = model.get_base_model()
    return int(base.get_input_embeddings().weight.shape[0])


def _dtype(model: PeftModel) -> str:
    base: Any = model.get_base_model()
    return str(getattr(base, "dtype", "unknown")).removeprefix("torch.")
