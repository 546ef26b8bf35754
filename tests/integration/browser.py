"""A headless Chromium, driven over its debugging port: opens pages, reads their text, takes pictures."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from debian import install


def find_chromium() -> str:
    """Debian's; installed when this may be done, else the test is skipped."""
    why_not = install("chromium") if shutil.which("chromium") is None else None
    found = shutil.which("chromium")
    if found is None:
        pytest.skip(f"there is no chromium: {why_not}")
    return found


class Browser:
    """One tab."""

    def __init__(self, program: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="browser-"))
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={self._folder}", "--window-size=1500,900"]
        self._process = subprocess.Popen(
            [program, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._loop = asyncio.new_event_loop()
        self._num_calls = 0
        self._loop.run_until_complete(self._connect())

    def set_cookie(self, url: str, name: str, value: str) -> None:
        self._call("Network.setCookie", url=url, name=name, value=value)

    def open(self, url: str, until: str, timeout_s: float = 60.0) -> str:
        """Opens a page and waits until it shows a text. Returns all that it shows."""
        self._call("Page.navigate", url="about:blank")  # a page that differs by its fragment alone is not loaded anew
        self._call("Page.navigate", url=url)
        end = time.monotonic() + timeout_s
        text = ""
        while time.monotonic() < end:
            answer = self._call("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")
            text = str(answer["result"].get("value", ""))
            if until in text:
                return text
            time.sleep(0.3)
        raise AssertionError(f"{url} does not show {until!r} after {timeout_s} s, but:\n{text}")

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _connect(self) -> None:
        port_file, end = self._folder / "DevToolsActivePort", time.monotonic() + 60
        while not port_file.exists() or not port_file.read_text():
            assert time.monotonic() < end and self._process.poll() is None, "chromium does not start"
            await asyncio.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(each for each in await answer.json() if each["type"] == "page")
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    def _call(self, method: str, **params: Any) -> Any:
        return self._loop.run_until_complete(self._asked(method, params))

    async def _asked(self, method: str, params: dict[str, Any]) -> Any:
        self._num_calls += 1
        await self._socket.send_json({"id": self._num_calls, "method": method, "params": params})
        while True:  # events come between
            answer = json.loads((await self._socket.receive(timeout=60)).data)
            if answer.get("id") == self._num_calls:
                return answer["result"]
