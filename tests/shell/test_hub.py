"""Models, adapters and rows by their Hub ids: the real client, and a Hub of one process that keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.folders import adapter_folder, base_folder

OID = "0123456789abcdef0123456789abcdef01234567"  # the only revision that there is


class Hub(BaseHTTPRequestHandler):
    """What the client asks a Hub for to create, fill, list and read repositories of models."""

    repositories: dict[str, dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return self.answer({"url": f"/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main", self.path.partition("?")[0]).groups()
        if what == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitOid": OID, "commitUrl": f"/{name}/commit/{OID}", "success": True})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(/revision/\w+|/tree/\w+)?(/.*)?", path):
            files = self.repositories.get(found[1])
            if files is None:
                return self.missing("RepoNotFound")
            if (found[2] or "").startswith("/tree"):
                return self.answer([{"type": "file", "path": p, "size": len(d), "oid": OID} for p, d in files.items()])
            return self.answer({"id": found[1], "sha": OID, "siblings": [{"rfilename": p} for p in files]})
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            files = self.repositories.get(found[1])
            data = None if files is None else files.get(found[2])
            if data is None:
                return self.missing("RepoNotFound" if files is None else "EntryNotFound")
            return self.send(data, {"X-Repo-Commit": OID, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        return self.missing("EntryNotFound")

    do_HEAD = do_GET

    def answer(self, value: object) -> None:
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def missing(self, code: str) -> None:
        self.send(b"", {"X-Error-Code": code, "X-Repo-Commit": OID}, 404)

    def send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a program that uses the Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.repositories.clear()
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    yield {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    server.shutdown()
    server.server_close()


def python(code: str, env: dict[str, str], folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def trimtab(*words: str, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trimtab", *words]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)


LOCAL = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trimtab import PeftModel
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
print(model(torch.tensor([[5, 6, 7]])).logits.sum().item())
"""
PUSH = """
AutoModelForCausalLM.from_pretrained("base").push_to_hub("me/base")
AutoTokenizer.from_pretrained("base").push_to_hub("me/base")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/base"), "adapter")
model.peft_config["default"].base_model_name_or_path = "me/base"
model.push_to_hub("me/adapter")
model.peft_config["default"].push_to_hub("me/config")
"""
LOAD = """
import torch
from trimtab import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("me/adapter")
print(model(torch.tensor([[5, 6, 7]])).logits.sum().item())
"""
VERBS = """
from typer.testing import CliRunner
from trimtab.cli import app
for line in (
    "train --model me/base --data me/sums --output run --max-steps 2",
    "inspect me/adapter",
    "generate --adapter run/adapter --prompt 1+1= --max-new-tokens 2",
):
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 0, (line, done.output, done.exception)
"""


def test_ids_of_the_hub_wherever_a_folder_can_stand(hub: dict[str, str], tmp_path: Path) -> None:
    adapter_folder(tmp_path / "adapter", base_folder(tmp_path / "base"))
    expected = python(LOCAL + PUSH, hub, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= Hub.repositories["me/adapter"].keys()
    assert "model.safetensors" not in Hub.repositories["me/adapter"]
    told = Hub.repositories["me/config"]["adapter_config.json"]
    assert told == Hub.repositories["me/adapter"]["adapter_config.json"]

    rows = "prompt,completion\n" + "".join(f"{i}+{i}=,is {2 * i}\n" for i in range(40))
    Hub.repositories["me/sums"] = {"train.csv": rows.encode()}
    elsewhere = {**hub, "HF_HOME": str(tmp_path / "elsewhere")}
    assert python(LOAD + VERBS, elsewhere, tmp_path) == expected
    written = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "me/base"
    assert python(LOAD, {**elsewhere, "HF_HUB_OFFLINE": "1"}, tmp_path) == expected  # from the cache


def test_ids_that_are_not_there(hub: dict[str, str], tmp_path: Path) -> None:
    Hub.repositories["me/base"] = {"README.md": b"nothing"}
    for id_ in ("me/nothing", "me/base"):
        done = trimtab("inspect", id_, env=hub, folder=tmp_path)
        assert done.returncode == 1
        assert id_ in done.stderr
        assert "Traceback" not in done.stderr
