"""A model of the hub, from a server on loopback: fetched once a node, with a token that nobody prints."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tune_service.demo import write_tokenizer

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "a1b2c3d4" * 4
COMMIT = "0" * 40
MAKE = """
import sys
from trainables.config import ModelConfig
from trainables.model import build_model, load_tokenizer
model = ModelConfig(name=sys.argv[1], from_scratch=True, config={"model_type": "gpt2", "n_layer": 1, "n_embd": 32,
                                                                 "n_head": 2, "n_positions": 64})
tokenizer = load_tokenizer(model)
build_model(model, tokenizer, ("no", "yes")).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""
OPEN = """
from trainables.config import ModelConfig
from trainables.model import build_model, load_tokenizer
model = ModelConfig(name="bakery/bread")
print(sum(each.numel() for each in build_model(model, load_tokenizer(model), ("no", "yes")).parameters()))
"""


class Hub:
    """What huggingface_hub asks for, of one private repository. Slow with weights, so that two askers meet."""

    def __init__(self, folder: Path) -> None:
        self.fetched: Counter[str] = Counter()
        self.refused: list[str] = []
        hub = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, with_body: bool) -> None:
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    hub.refused += [self.path] if "bread" in self.path else []
                    return self._send(401, b"", {"X-Error-Code": "GatedRepo"}, with_body)
                if self.path.startswith("/api/"):
                    files = [{"rfilename": path.name} for path in folder.iterdir()]
                    info = {"id": "bakery/bread", "sha": COMMIT, "siblings": files, "tags": [], "private": True}
                    tree = "/tree/" in self.path
                    return self._send(200, json.dumps([] if tree else info).encode(), {}, with_body)
                path = folder / self.path.partition("?")[0].rpartition("/")[2]
                if not path.is_file():
                    return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body)
                if with_body:
                    hub.fetched[path.name] += 1
                    time.sleep(2.0 if path.suffix == ".safetensors" else 0.0)
                data = path.read_bytes()
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
                return self._send(200, data, headers, with_body)

            def _send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    write_tokenizer(folder / "tokenizer")
    command = [sys.executable, "-c", MAKE, str(folder / "tokenizer"), str(folder / "model")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})
    found = Hub(folder / "model")
    yield found
    found.close()


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    left_out = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE", "HF_TOKEN_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "TUNE_SERVICE_DEVICE": "cpu"}
    return kept | ours | {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"} | more


def test_ranks_that_start_together_fetch_a_nodes_model_once_with_the_token_of_its_file(
    hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)  # what `hf auth login` writes, and the cluster file can copy
    env = environment(hub, tmp_path)
    command = [sys.executable, "-c", OPEN]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        for _ in range(2)
    ]
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    assert hub.fetched["model.safetensors"] == 1
    assert hub.refused == []
    assert not any(TOKEN in text for text in said)


def test_a_wrong_token_is_refused_without_being_told(hub: Hub, tmp_path: Path) -> None:
    wrong = "hf_" + "9z8y7x6w" * 4
    env = environment(hub, tmp_path, HF_TOKEN=wrong)
    code = (
        "from trainables.config import ModelConfig; from trainables.model_files import check_model_files; "
        "print(*check_model_files(ModelConfig(name='bakery/bread')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert "model.name" in run.stdout
    assert wrong not in run.stdout + run.stderr
