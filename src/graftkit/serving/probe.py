"""``probe()``: what does a live server do with an adapter? Asked over HTTP, without weights and without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from graftkit.adapters.file import RECORD_NAME
from graftkit.adapters.record import Expected, ExpectedPrompt, read_record
from graftkit.engines.outcome import Served
from graftkit.errors import AdapterError
from graftkit.files import why_no_folder
from graftkit.findings import Report
from graftkit.progress import Progress
from graftkit.serving.probing.http import Http
from graftkit.serving.probing.server import Server, Target
from graftkit.serving.probing.verdict import Row, judge

# Seconds for one request.
TIMEOUT = 60.0


def probe(
    url: str,
    adapter: str | Path,
    *,
    model: str | None = None,
    base: str | None = None,
    timeout: float = TIMEOUT,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> Served:
    """Ask a live OpenAI-compatible server for the answers that an adapter's record expects, and compare them.

    The prompts of ``graftkit.json`` are sent to the adapter and to its base, and the log-probabilities of the next
    token compared: the change from base to adapter is the one that was trained, none, one that is scaled, or
    another. How exactly the server computes is measured on the base. A key is read from the environment variable
    ``GRAFT_API_KEY`` or ``OPENAI_API_KEY``.

    Args:
        url: the server's address, as "http://localhost:8000".
        adapter: the adapter's folder, or that of a merged model.
        model: the server's name of the adapter; None where it lists only one.
        base: the server's name of the base; None where the adapter's entry names it. Without it only answers that
            are very near to the expected ones can be told apart.
        timeout: seconds for one request.
        on_progress: called before each prompt.

    Returns:
        What the server does with the adapter. ``UNKNOWN`` where it gives no log-probabilities.

    Raises:
        AdapterError: ``adapter-not-found``; ``adapter-record`` (it cannot be read); ``adapter-not-signed``: there
            is none, or it expects no answers.
        ServerError: ``server-url``, ``server-unreachable``, ``server-timeout``, ``server-answer`` (it is no such
            server), ``server-no-model``, ``server-refused``.
    """
    expected = _expected(Path(adapter).expanduser())
    server = Server.connect(Http.at(url, timeout))
    adapted, unadapted = server.choose(model, base)
    asked = _Asked(server, unadapted, adapted)
    for done, prompt in enumerate(expected.prompts):
        on_progress(Progress("asking the server", done, len(expected.prompts)))
        asked.ask(prompt)
    for target in filter(None, (adapted, unadapted)):
        server.check_answered(target)
    engine = f"{adapted.name} at {server.http.root}"
    return judge(asked.texts, asked.chats, engine, other_ids=asked.other_ids)


def report_of(found: Served) -> Report:
    """Return what a probe found as the finding of the rule on what engines compute (GK706)."""
    from graftkit.checks.engine.context import CheckContext, Inputs
    from graftkit.checks.engine.runner import run
    from graftkit.checks.rules.serving.applied_when_served import RULE

    return run([RULE], CheckContext(Inputs(served=found)))


@dataclass
class _Asked:
    """What a server answered so far.

    Attributes:
        texts, chats: of plain texts, and of conversations.
        other_ids: whether the server made another number of tokens of a prompt than training did.
    """

    server: Server
    base: Target | None
    adapted: Target
    texts: list[Row] = field(default_factory=list)
    chats: list[Row] = field(default_factory=list)
    other_ids: bool = False

    def ask(self, prompt: ExpectedPrompt) -> None:
        """Ask the base and the adapter for the token after a prompt."""
        base = {} if self.base is None else self._values(prompt, self.base)
        adapted = self._values(prompt, self.adapted)
        rows = self.chats if prompt.messages else self.texts
        for place, token in enumerate(prompt.tokens):
            if token in base or token in adapted:
                rows.append(Row(_curve(prompt, place), base.get(token), adapted.get(token)))

    def _values(self, prompt: ExpectedPrompt, target: Target) -> Mapping[int, float]:
        answer = self.server.ask(prompt, target)
        if answer is None:
            return {}
        if answer.prompt_tokens in (None, len(prompt.ids)):
            return answer.values
        # It answered another prompt. Asked by ids, it may still show what it does with the adapter.
        self.other_ids = True
        by_ids = None if prompt.messages else self.server.ask_ids(prompt, target)
        return {} if by_ids is None else by_ids.values


def _curve(prompt: ExpectedPrompt, place: int) -> tuple[tuple[float, float], ...]:
    """Return factor on the update -> expected log-probability of one of the prompt's tokens."""
    known = ((0.0, prompt.base), (0.5, prompt.half), (1.0, prompt.adapter), (2.0, prompt.double))
    return tuple((factor, values[place]) for factor, values in known if values)


def _expected(folder: Path) -> Expected:
    if not folder.is_dir():
        raise AdapterError(
            "no such adapter folder",
            where=str(folder),
            why=why_no_folder(folder),
            help=f"name the folder that contains {RECORD_NAME}",
            code="adapter-not-found",
        )
    record = read_record(folder)
    if record is not None and record.expected is not None:
        return record.expected
    why = f"there is no {RECORD_NAME} in it"
    if record is not None:
        why = record.unknown.get("expected", f"{RECORD_NAME} expects no answers")
    raise AdapterError(
        "it is not known what the adapter should answer",
        where=str(folder),
        why=why,
        help="load it once in Python, then gk.sign(model, tokenizer, folder)",
        code="adapter-not-signed",
    )
