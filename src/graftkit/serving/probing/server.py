"""A live server: which models it has, and what they answer to a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftkit.adapters.record import ExpectedPrompt
from graftkit.errors import ServerError
from graftkit.serving.probing.answers import Answer, answer_of
from graftkit.serving.probing.http import EmptyAnswerError, Http, RefusalError
from graftkit.text import some, suggest

# How servers are asked for log-probabilities of a completion, and how many each gives: the first form that is
# answered with some is kept. vLLM has 20 by default, SGLang any number; OpenAI's own limit is 5; mlx_lm.server
# takes that of chats.
_OF_TEXTS: Sequence[Mapping[str, Any]] = (
    {"logprobs": 20, "return_tokens_as_token_ids": True},
    {"logprobs": 5},
    {"logprobs": True, "top_logprobs": 10},
    {"n_probs": 20, "n_predict": 1},
)
_OF_CHATS: Sequence[Mapping[str, Any]] = (
    {"logprobs": True, "top_logprobs": 20, "return_tokens_as_token_ids": True},
    {"logprobs": True, "top_logprobs": 10},
    {"logprobs": True, "top_logprobs": 5},
)
_TEXTS, _CHATS = "/v1/completions", "/v1/chat/completions"
# What a request with a wrong form is refused with; other errors are not those of the form.
_REFUSALS_OF_A_FORM = frozenset({400, 404, 405, 415, 422, 500, 501})


@dataclass(frozen=True)
class Target:
    """A model of a server, under which name and with which further fields it is asked for."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelCard:
    """One entry of a server's list of models.

    Attributes:
        parent: the base's name, where it is an adapter and the server says so.
        owner: of it, where the server says so.
    """

    name: str
    parent: str | None = None
    owner: str | None = None


@dataclass
class Server:
    """A live server, and how it was found to take requests."""

    http: Http
    cards: Sequence[ModelCard] = ()
    _forms: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _answered: set[str] = field(default_factory=set)
    _refusals: dict[str, RefusalError] = field(default_factory=dict)

    @classmethod
    def connect(cls, http: Http) -> Server:
        """Ask a server for its models; one without such a list has none.

        Raises:
            ServerError: it is not there, or is not such a server.
        """
        try:
            listed = http.get("/v1/models")
        except EmptyAnswerError:
            # mlx_lm.server ends its answer where it has no cache of models to list.
            return cls(http)
        except RefusalError as error:
            if error.status in (401, 403) or error.status >= 500:
                raise
            return cls(http)
        entries = listed.get("data") if isinstance(listed, dict) else None
        cards = [_card(entry) for entry in entries] if isinstance(entries, list) else []
        return cls(http, [card for card in cards if card is not None])

    def choose(self, model: str | None, base: str | None) -> tuple[Target, Target | None]:
        """Return the model with the adapter, and the base where it is known.

        Raises:
            ServerError: ``server-no-model``: the server has no such model, or several and none was named.
        """
        for name in filter(None, (model, base)):
            self._check_listed(name)
        adapted = model or self._only_adapter(base)
        card = next((card for card in self.cards if card.name == adapted), None)
        parent = base or (None if card is None else card.parent)
        if parent is not None and parent != adapted:
            return Target(adapted), Target(parent)
        without = self._without_adapters()
        return Target(adapted), None if without is None else Target(adapted, without)

    def ask(self, prompt: ExpectedPrompt, model: Target) -> Answer | None:
        """Ask for the token after a prompt: a conversation as messages, any other one as text, or else as ids.

        Returns:
            None where the server gives no log-probabilities of such a prompt.

        Raises:
            ServerError: it does not answer, refuses the key, or has no such model.
        """
        if prompt.messages:
            messages = [message.model_dump() for message in prompt.messages]
            return self._first_answer(_CHATS, _OF_CHATS, {"messages": messages}, prompt, model)
        if prompt.text is not None:
            found = self._first_answer(_TEXTS, _OF_TEXTS, {"prompt": prompt.text}, prompt, model)
            if found is not None:
                return found
        return self._first_answer(_TEXTS, _OF_TEXTS, {"prompt": list(prompt.ids)}, prompt, model)

    def ask_ids(self, prompt: ExpectedPrompt, model: Target) -> Answer | None:
        """Ask for the token after a prompt's ids; None where the server takes no ids."""
        return self._first_answer(_TEXTS, _OF_TEXTS, {"prompt": list(prompt.ids)}, prompt, model)

    def _first_answer(
        self,
        path: str,
        forms: Sequence[Mapping[str, Any]],
        asked: Mapping[str, Any],
        prompt: ExpectedPrompt,
        model: Target,
    ) -> Answer | None:
        known = self._forms.get(path)
        for form in forms if known is None else [known]:
            body = {"model": model.name, "max_tokens": 1, "temperature": 0, **asked, **form, **model.fields}
            try:
                answer = answer_of(self.http.post(path, body), prompt)
            except RefusalError as error:
                self._check_refusal(error, model)
                continue
            self._answered.add(model.name)
            if answer.values:
                self._forms[path] = form
                return answer
        return None

    def check_answered(self, model: Target) -> None:
        """Check that a model answered anything at all, be it without log-probabilities.

        Raises:
            ServerError: ``server-no-model``, ``server-refused``: every request was refused.
        """
        refusal = self._refusals.get(model.name)
        if model.name in self._answered or refusal is None:
            return
        raise self._no_model(model.name, refusal.words) if refusal.status == 404 else refusal

    def _check_refusal(self, error: RefusalError, model: Target) -> None:
        """Raise a refusal that another form of the request would not change."""
        if error.status == 404 and self.cards and _names(error.words, model.name):
            raise self._no_model(model.name, error.words)
        if error.status not in _REFUSALS_OF_A_FORM:
            raise error
        # What is said of the first form says more than that a later one is not known either.
        self._refusals.setdefault(model.name, error)

    def _check_listed(self, name: str) -> None:
        """Refuse a name that a server's list lacks: some answer with another model instead."""
        names = [card.name for card in self.cards]
        # mlx_lm.server lists what was downloaded, without an owner. SGLang writes an adapter as base:adapter.
        whole = any(card.owner is not None for card in self.cards)
        if whole and name not in names and name.rpartition(":")[0] not in names:
            raise self._no_model(name, None)

    def _only_adapter(self, base: str | None) -> str:
        adapters = [card.name for card in self.cards if card.parent is not None]
        # mlx_lm.server, which names no owners, lists the base that its adapter was put on.
        others = [card.name for card in self.cards if card.name != base and card.owner is not None]
        for names in (adapters, others):
            if len(names) == 1:
                return names[0]
        raise ServerError(
            "it is not known which of the server's models has the adapter",
            where=self.http.root,
            why=f"it has {some(card.name for card in self.cards)}" if self.cards else "it lists no models",
            help="--model NAME; mlx_lm.server has what it was started with as default_model",
            code="server-no-model",
        )

    def _without_adapters(self) -> Mapping[str, Any] | None:
        """Return the fields with which llama.cpp's own server leaves its adapters out; None for other servers.

        Source: llama.cpp, tools/server/README.md (``GET /lora-adapters``, and ``lora`` in a request).
        """
        try:
            listed = self.http.get("/lora-adapters")
        except ServerError:
            return None
        entries = listed if isinstance(listed, list) else []
        numbers = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        off = [{"id": number, "scale": 0.0} for number in numbers if type(number) is int]
        return {"lora": off} if off else None

    def _no_model(self, name: str, words: str | None) -> ServerError:
        names = [card.name for card in self.cards]
        listed = f"the server has {some(names, 5)}" if names else "the server lists no models"
        return ServerError(
            f"the server has no model {name!r:.200}",
            where=self.http.root,
            why=words or listed,
            help=suggest(name, names) or "--model NAME and --base NAME are the names that the server lists",
            code="server-no-model",
        )


def _card(entry: Any) -> ModelCard | None:
    name = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        return None
    parent, owner = entry.get("parent"), entry.get("owned_by")
    return ModelCard(name, parent if isinstance(parent, str) else None, owner if isinstance(owner, str) else None)


def _names(words: str, model: str) -> bool:
    return model in words or "model" in words.lower()
