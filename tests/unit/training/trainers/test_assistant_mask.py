"""The loss on the assistant's turns: which template makes it, and what it covers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.training.gemma import TEMPLATES, letters, processor, template

from graftkit.errors import TrainingError
from graftkit.training.trainers.assistant_mask import RestoreChatTemplate, template_for

trl = pytest.importorskip("trl")

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which river?"},
    {"role": "assistant", "content": "The Danube."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "The sea."},
]


def learned(made: Any, chosen: str, messages: list[dict[str, Any]]) -> str:
    output = made.apply_chat_template(
        messages, chat_template=chosen, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(output["input_ids"], output["assistant_masks"], strict=True)
    text: str = made.decode([token for token, mask in pairs if mask])
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_gemma_4_learns_answers_and_their_ends(name: str) -> None:
    made = letters(chat_template=template(name))
    found = template_for(made, [{"messages": CHAT}])
    assert made.apply_chat_template(CHAT, chat_template=found, tokenize=False) == made.apply_chat_template(
        CHAT, tokenize=False
    )
    assert learned(made, found, CHAT) == "The Danube.<turn|>\nThe sea.<turn|>\n"


def test_a_processor_is_asked_as_its_tokenizer_is() -> None:
    made = processor(template())
    assert template_for(made, [{"messages": CHAT}]) == template_for(letters(chat_template=template()), [])


def test_a_template_with_marks_is_taken_as_it_is() -> None:
    own = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert template_for(letters(chat_template=own), []) == own


def test_the_template_that_trl_has_for_this_one_comes_first() -> None:
    from trl.chat_template_utils import qwen3_chat_template, qwen3_training_chat_template

    assert template_for(letters(chat_template=qwen3_chat_template), []) == qwen3_training_chat_template


UNKNOWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("own", [pytest.param(None, id="none"), pytest.param(UNKNOWN, id="one that nobody knows")])
def test_without_a_template_that_marks_the_run_is_refused(own: str | None) -> None:
    with pytest.raises(TrainingError) as caught:
        template_for(letters(chat_template=own), [])
    assert caught.value.code == "no-chat-template"


def test_a_template_that_renders_the_data_otherwise_is_not_taken() -> None:
    # As Gemma 4's, but for one word of the user's.
    own = template().replace("{{- message['content'] | trim -}}", "{{- message['content'] | trim | upper -}}")
    assert own != template()
    with pytest.raises(TrainingError):
        template_for(letters(chat_template=own), [])
    own = template().replace(
        "{{- '<turn|>\\n' -}}", "{{- '<turn|>\\n' if 'zebra' not in captured_content else '' -}}"
    )
    assert own != template()
    made = letters(chat_template=own)
    assert template_for(made, [{"messages": CHAT}])
    with pytest.raises(TrainingError):
        template_for(made, [{"prompt": [{"role": "user", "content": "a zebra"}], "completion": CHAT[-1:]}])


def test_a_template_that_refuses_everything_is_like_no_other() -> None:
    with pytest.raises(TrainingError):
        template_for(letters(chat_template="{{ raise_exception('no') }}"), [])


def test_the_processor_gets_its_own_template_back() -> None:
    made = SimpleNamespace(chat_template="own")
    callback = RestoreChatTemplate(made)
    made.chat_template = "marked"
    callback.on_train_begin(None, None, None)
    assert made.chat_template == "own"
