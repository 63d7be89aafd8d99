"""Pushing to a hub: huggingface_hub's own client against a server on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from embkit.errors import UsageError
from embkit.model import Encoder, export, push_to_hub


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as a push needs; keeps what was pushed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.summary = ""


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer good":
            return self.reply({"error": "Invalid username or password."}, 401)
        return self.reply({"id": "me/model", "siblings": []})

    def do_PUT(self) -> None:
        self.server.large[self.path.rsplit("/", 1)[-1]] = self.body()
        self.reply({})

    def do_POST(self) -> None:
        hub, raw = self.server, self.body()
        if self.headers.get("Authorization") != "Bearer good":
            return self.reply({"error": "Invalid username or password."}, 401)
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, raw.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.summary = value["summary"]
                elif line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
            return self.reply(
                {
                    "success": True,
                    "commitOid": "abc",
                    "commitUrl": f"{hub.address}/me/model/commit/abc",
                }
            )
        given = json.loads(raw or b"{}")
        if self.path == "/api/repos/create":
            hub.created.append(given)
            return self.reply({"url": f"{hub.address}/me/model", "name": "me/model"})
        if "/preupload/" in self.path:
            files = [
                {
                    "path": f["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                }
                for f in given["files"]
            ]  # fmt: skip
            return self.reply({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.address}/put/{o['oid']}"}}}
                for o in given["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if "validate-yaml" in self.path:
            return self.reply({"errors": [], "warnings": []})
        return self.reply({"error": f"no such address: {self.path}"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_what_is_pushed_is_the_export(
    make_encoder: Callable[..., Encoder], tmp_path: Path, hub: Hub
) -> None:
    encoder = make_encoder()
    out = export(encoder, tmp_path / "m", name="me/model")
    where = push_to_hub(
        out, "me/model", private=True, token="good", endpoint=hub.address, message="First"
    )
    assert where == f"{hub.address}/me/model/commit/abc" and hub.summary == "First"
    (created,) = hub.created
    assert created["name"] == "model" and created["organization"] == "me"
    assert created.get("private") is True or created.get("visibility") == "private"
    want = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert hub.files == want
    for oid, content in hub.large.items():
        assert hashlib.sha256(content).hexdigest() == oid
    back = tmp_path / "back"  # what the hub holds is a model
    for name, content in hub.files.items():
        (back / name).parent.mkdir(parents=True, exist_ok=True)
        (back / name).write_bytes(content)
    assert Encoder.from_pretrained(back).digest() == encoder.digest()
    assert "SentenceTransformer('me/model'" in hub.files["README.md"].decode()


def test_refusals(make_encoder: Callable[..., Encoder], tmp_path: Path, hub: Hub) -> None:
    out = export(make_encoder(), tmp_path / "m")
    with pytest.raises(UsageError, match=r"refused \(401\)") as caught:
        push_to_hub(out, "me/model", token="bad", endpoint=hub.address)
    assert caught.value.fix is not None and "hf auth login" in caught.value.fix
    for name in ("model", "me/mo del", "me/model/more"):
        with pytest.raises(UsageError, match="No name for the hub"):
            push_to_hub(out, name, token="good", endpoint=hub.address)
    (out / "modules.json").unlink()
    with pytest.raises(UsageError, match=r"modules\.json missing"):
        push_to_hub(out, "me/model", token="good", endpoint=hub.address)
    assert not hub.files
