"""An OpenAI-compatible server on loopback over the small model, which fails on request."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lm import direct, echo_with_best

Fault = Callable[[str, dict[str, Any]], str]  # (path, body) -> name of a fault, or ""


class Loopback:
    """``with Loopback(model, tokenizer) as server: server.url``.

    Args:
        answer: text for a generation prompt.
        likelihood: "echo", "prompt_logprobs", "first" or "": what the server can do. "best" is an
            echo with the likeliest tokens, "shifted" one whose values are those after the token.
        fault: which fault a request meets. longest: tokens of a prompt.

    Attributes:
        seen: requests by path. faults: by name. bodies, keys: of all requests.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, answer: Callable[[str], str] = lambda prompt: "yes",
        likelihood: str = "echo", fault: Fault = lambda path, body: "", longest: int = 4096,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.answer = model, tokenizer, answer
        self.likelihood, self.fault, self.longest = likelihood, fault, longest
        self.seen: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    def __enter__(self) -> Loopback:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet for headers and body

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "tiny"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                path = self.path.removeprefix("/v1")
                with outer.lock:
                    outer.seen[path] += 1
                    outer.bodies.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    fault = outer.fault(path, body)
                    outer.faults[fault] += bool(fault)
                outer.handle(self, path, body, fault)

            def reply(self, status: int, payload: Any, **more: str) -> None:
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_response(status)
                for name, value in more.items():
                    self.send_header(name.replace("_", "-"), value)
                if "Content_Length" not in more:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass  # clients that went away

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def handle(self, to: Any, path: str, body: dict[str, Any], fault: str) -> None:
        if fault == "down":
            to.connection.close()
            to.close_connection = True
            return
        if fault == "slow":
            time.sleep(0.6)
        plain = {
            "rate": (429, {"error": "slow down"}, {"Retry_After": "0.3"}),
            "status": (503, {"error": "loading"}, {}),
            "key": (401, {"error": f"wrong key {self.keys[-1]}"}, {}),
            "html": (200, b"<html><body>Bad gateway</body></html>", {}),
            "refused": (400, {"error": {"message": "no such parameter"}}, {}),
        }  # fmt: skip
        if fault in plain:
            status, payload, more = plain[fault]
            to.reply(status, payload, **more)
            return
        payload = self.chat(body) if path == "/chat/completions" else self.complete(body)
        if payload is None:
            said = f"This model's maximum context length is {self.longest} tokens."
            to.reply(400, {"error": {"message": said}})
            return
        choice = payload["choices"][0]
        if fault == "empty":
            choice |= {"text": ""} if "text" in choice else {"message": {"content": ""}}
        if fault == "shape" and choice.get("logprobs"):
            choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:-2]
        data = json.dumps(payload).encode()
        if fault == "json":
            to.reply(200, data[: len(data) // 2])
        elif fault == "truncated":
            to.reply(200, data[: len(data) // 2], Content_Length=str(len(data)))
            to.close_connection = True
        else:
            to.reply(200, data)

    def chat(self, body: dict[str, Any]) -> dict[str, Any] | None:
        prompt = body["messages"][0]["content"]
        if len(self.tokenizer(prompt)["input_ids"]) > self.longest:
            return None
        text = self.answer(prompt)
        choice: dict[str, Any] = {"message": {"content": text}, "finish_reason": "stop"}
        if body.get("logprobs") and self.likelihood == "first":
            top = [{"token": t, "logprob": v} for t, v in (("High", -0.1), ("No", -2.5), ("x", -5))]
            choice["logprobs"] = {"content": [{"token": "x", "top_logprobs": top}]}
        return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}

    def complete(self, body: dict[str, Any]) -> dict[str, Any] | None:
        text = body["prompt"]
        if len(self.tokenizer(text)["input_ids"]) > self.longest:
            return None
        choice: dict[str, Any] = {"text": self.answer(text), "finish_reason": "length"}
        if body.get("echo") and self.likelihood in ("best", "shifted"):
            choice["logprobs"] = echo_with_best(
                self.model, self.tokenizer, text, int(self.likelihood == "best")
            )
        if body.get("echo") and self.likelihood == "echo":
            tokens, values, starts = direct(self.model, self.tokenizer, text)
            choice["text"] = text + "!"
            choice["logprobs"] = {
                "tokens": [*tokens, "!"], "token_logprobs": [*values, -1.0],
                "text_offset": [*starts, len(text)],
            }  # fmt: skip
        if "prompt_logprobs" in body and self.likelihood == "prompt_logprobs":
            tokens, values, _ = direct(self.model, self.tokenizer, text)
            choice["prompt_logprobs"] = [None] + [
                {str(i): {"logprob": v, "rank": 1, "decoded_token": t}}
                for i, (t, v) in enumerate(zip(tokens[1:], values[1:], strict=True))
            ]
        return {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 1}}
