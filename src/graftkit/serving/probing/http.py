"""JSON over HTTP: bounded in time and size, and without the key in any error."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import IO, Any

from graftkit.errors import ServerError
from graftkit.text import printable

# The first that is set.
KEY_VARIABLES = ("GRAFT_API_KEY", "OPENAI_API_KEY")

_LARGEST_ANSWER = 20_000_000
_CHUNK = 65_536
_LONGEST_WORDS = 300
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# What users paste: the address of the API, or of one of its functions.
_ENDINGS = ("/chat/completions", "/completions", "/models", "/v1")


class RefusalError(ServerError):
    """The server answered with an error.

    Attributes:
        status: of HTTP.
        words: what the server says.
    """

    code = "server-refused"

    def __init__(self, status: int, words: str, where: str) -> None:
        super().__init__(
            "the server refuses the request",
            where=where,
            why=f"HTTP {status}{': ' if words else ''}{words}",
            help=_advice(status),
        )
        self.status = status
        self.words = words


class AnswerError(ServerError):
    """What the server sends is not JSON."""

    code = "server-answer"

    def __init__(self, why: str, where: str) -> None:
        super().__init__(
            "this is not an OpenAI-compatible server",
            where=where,
            why=why,
            help="name the address of the API, as http://localhost:8000, not that of a page in front of it",
        )


class EmptyAnswerError(AnswerError):
    """The server sends nothing."""


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"set the key in the environment variable {KEY_VARIABLES[0]}"
    return "check the address, and the server's log"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would send the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True)
class Http:
    """One server.

    Attributes:
        root: its address without a path of the API: "http://localhost:8000".
        timeout: seconds for one request.
        key: sent as a bearer token, or None.
    """

    root: str
    timeout: float = 60.0
    key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str, timeout: float) -> Http:
        """Take a server's address as users write it; the key comes from the environment.

        Raises:
            ServerError: ``server-url``: it is not the address of a server.
        """
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ServerError(
                "the key cannot be sent",
                where=f"the environment variable {next(n for n in KEY_VARIABLES if os.environ.get(n))}",
                why="it has characters that no header can have, such as a line break",
                help="set it to the key alone",
                code="server-key",
            )
        return cls(_root(url), timeout, key)

    def get(self, path: str) -> Any:
        """Return the JSON at a path.

        Raises:
            ServerError: as :meth:`post`.
        """
        return self._ask(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON to a path, and return the JSON of the answer.

        Raises:
            RefusalError: the server answers with an error: ``server-refused``.
            ServerError: ``server-unreachable``, ``server-timeout``, ``server-answer`` (what it sends is not JSON).
        """
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None) -> Any:
        where = self.root + path
        request = urllib.request.Request(where, data=body, headers=self._headers())
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener().open(request, timeout=self.timeout) as answer:
                content = _read(answer, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise RefusalError(error.code, self._words(error, deadline), where) from None
        except TimeoutError:
            raise self._timed_out(where) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._timed_out(where) from None
            raise self._unreachable(where, error.reason) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(where, error) from None
        return _parsed(content, where)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "graftkit"}
        return headers if self.key is None else {**headers, "Authorization": f"Bearer {self.key}"}

    def _opener(self) -> urllib.request.OpenerDirector:
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if urllib.parse.urlsplit(self.root).hostname in _LOOPBACK:
            # A proxy that the environment names cannot reach this machine's own servers.
            handlers.append(urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers)

    def _words(self, error: urllib.error.HTTPError, deadline: float) -> str:
        """Return what an error's answer says, without the key, which some servers repeat."""
        try:
            content = _read(error, deadline)
        except (OSError, http.client.HTTPException, ServerError):
            return ""
        try:
            words = _message(json.loads(content))
        except (ValueError, RecursionError):
            words = "" if content.lstrip()[:1] == b"<" else content.decode(errors="replace")
        return self._without_key(printable(words.strip().replace("\n", " "), _LONGEST_WORDS))

    def _without_key(self, text: str) -> str:
        return text if self.key is None else text.replace(self.key, "***")

    def _timed_out(self, where: str) -> ServerError:
        return ServerError(
            "the server does not answer",
            where=where,
            why=f"no complete answer came within {self.timeout:g} seconds",
            help="wait until it has loaded its model, or give it longer: --timeout 300",
            code="server-timeout",
        )

    def _unreachable(self, where: str, error: object) -> ServerError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ServerError(
            "the server cannot be reached",
            where=where,
            why=self._without_key(printable(str(reason), _LONGEST_WORDS)),
            help="start it, or check host and port: graft probe http://localhost:8000 --adapter DIR",
            code="server-unreachable",
        )


def _root(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise _bad_url(url, str(error)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _bad_url(url, "it does not begin with http:// or https:// and a host")
    if parts.username is not None or parts.password is not None:
        raise _bad_url(None, f"a key does not belong there: set the environment variable {KEY_VARIABLES[0]}")
    if not url.strip().isascii() or not url.strip().isprintable() or " " in url.strip():
        raise _bad_url(url, "it has characters that no address can have")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/")
    for ending in _ENDINGS:
        path = path.removesuffix(ending)
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}"


def _bad_url(url: str | None, why: str) -> ServerError:
    return ServerError(
        "this is not the address of a server",
        where=url and printable(url, _LONGEST_WORDS),
        why=why,
        help="write it as http://localhost:8000",
        code="server-url",
    )


def _read(answer: IO[bytes], deadline: float) -> bytes:
    """Read an answer to its end, however slowly it comes."""
    content = bytearray()
    read = getattr(answer, "read1", answer.read)
    while True:
        chunk = read(_CHUNK)
        if not chunk:
            return bytes(content)
        content += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(content) > _LARGEST_ANSWER:
            raise ServerError(
                "the server's answer is too long",
                why=f"more than {_LARGEST_ANSWER:,} bytes came",
                help="check that the address is that of an inference server",
                code="server-answer",
            )


def _parsed(content: bytes, where: str) -> Any:
    if not content.strip():
        raise EmptyAnswerError("its answer is empty", where)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        what = "a page of HTML" if content.lstrip()[:1] == b"<" else "what is not JSON"
        raise AnswerError(f"it answers with {what}", where) from None


def _message(answer: Any) -> str:
    """Return the sentence in an error's JSON, wherever servers put it."""
    for name in ("error", "detail", "message", "object"):
        if isinstance(answer, dict) and name in answer:
            return _message(answer[name])
    return answer if isinstance(answer, str) else json.dumps(answer)
