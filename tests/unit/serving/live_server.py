"""A small HTTP server in the forms of OpenAI's API: real models behind it, and the faults of real servers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from zlib import crc32

import torch
from torch import nn

# Status, body; or None for what the server does by itself.
Fault = Callable[[str, Any], tuple[int, bytes] | None]


def no_fault(_path: str, _body: Any) -> None:
    return None


@dataclass
class Live:
    """What is served.

    Attributes:
        models: name -> a model, and how its adapter is switched.
        cards: what ``/v1/models`` lists; None for a server without it.
        form: of completions: "openai" (an object of texts), "ids" (the same with ``token_id:5`` where asked), or
            "list" (as chats have it).
        most: log-probabilities at most; 0 for a server that gives none.
        takes_ids: whether a prompt may be token ids.
        noise: standard deviation of an error on every logit, another one for each model.
        loras: what ``/lora-adapters`` lists; a request may then switch them off, as llama.cpp's server has it.
        requests: path, headers and body of what came.
    """

    tokenizer: Any
    models: Mapping[str, nn.Module]
    cards: list[dict[str, Any]] | None = None
    form: str = "openai"
    most: int = 20
    takes_ids: bool = True
    noise: float = 0.0
    chat_template: str | None = None
    loras: list[dict[str, Any]] | None = None
    fault: Fault = no_fault
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    @torch.no_grad()
    def log_probabilities(self, name: str, ids: list[int]) -> torch.Tensor:
        logits = self.models[name](torch.tensor([ids])).logits[0, -1].double()
        generator = torch.Generator().manual_seed(crc32(repr((name, ids)).encode()))
        logits += self.noise * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        return logits.log_softmax(-1)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        chat = path.endswith("/chat/completions")
        try:
            ids, top = self.asked(body, chat)
        except (KeyError, TypeError, ValueError) as error:
            return 400, {"error": str(error)}
        off = bool(body.get("lora")) and not any(one["scale"] for one in body["lora"])
        best = self.log_probabilities("base" if off else body["model"], ids).topk(top) if top else None
        as_ids = self.form == "ids" and body.get("return_tokens_as_token_ids")
        content = (
            []
            if best is None
            else [
                {"token": f"token_id:{token}" if as_ids else self.tokenizer.decode([token]), "logprob": value}
                for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        )
        logprobs: dict[str, Any] | None = None
        if content and (chat or self.form == "list"):
            logprobs = {"content": [{**content[0], "top_logprobs": content}]}
        elif content:
            logprobs = {"top_logprobs": [{one["token"]: one["logprob"] for one in content}]}
        return 200, {"choices": [{"index": 0, "logprobs": logprobs}], "usage": {"prompt_tokens": len(ids)}}

    def asked(self, body: dict[str, Any], chat: bool) -> tuple[list[int], int]:
        """Return the ids, and how many log-probabilities are wanted."""
        if chat:
            options = {} if self.chat_template is None else {"chat_template": self.chat_template}
            messages = body["messages"]
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"]
            return list(ids), min(self.most, body["top_logprobs"] if body["logprobs"] is True else 0)
        prompt = body["prompt"]
        if isinstance(prompt, list) and not self.takes_ids:
            raise ValueError("the prompt has to be a text")
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if self.form == "list":
            if body["logprobs"] is not True:
                raise ValueError("logprobs must be of type bool")
            return ids, min(self.most, body["top_logprobs"])
        if body["logprobs"] is True:
            raise ValueError("logprobs must be a number")
        return ids, min(self.most, body["logprobs"])


@contextmanager
def serving(live: Live) -> Iterator[str]:
    """Serve for the block, and return the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found: Any = {"/v1/models": live.cards and {"data": live.cards}, "/lora-adapters": live.loras}
            listed = found.get(self.path)
            self.respond(None, (404, {"detail": "Not Found"}) if listed is None else (200, listed))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.respond(body, live.answer(self.path, body) if not live.fault(self.path, body) else (200, {}))

        def respond(self, body: Any, answer: tuple[int, Any]) -> None:
            live.requests.append((self.path, dict(self.headers), body))
            status, content = live.fault(self.path, body) or (answer[0], json.dumps(answer[1]).encode())
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", content.decode())
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sleeping(seconds: float) -> Fault:
    """Answer nothing for a while."""

    def fault(_path: str, _body: Any) -> tuple[int, bytes] | None:
        time.sleep(seconds)
        return None

    return fault
