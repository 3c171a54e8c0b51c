"""A page of headless Chromium for tests, driven over its DevTools protocol by plain functions."""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

WIDTH, HEIGHT = 1400, 1000
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars",
    # A mouse that hovers, as people have: without one, charts cover themselves with buttons.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,"
    "availablePointerTypes=4",
    # Nothing but this machine is asked for anything.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Page:
    """One page. Every call returns once the browser has answered."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse):
        """Use `browser_page`."""
        self._loop = loop
        self._socket = socket
        self._number = 0
        self.errors: list[str] = []
        """What the scripts of the page threw and nobody caught."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        return self._loop.run_until_complete(self._call(method, parameters))

    def resize(self, width: int, height: int) -> None:
        """Makes the window so large, in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def open(self, url: str) -> None:
        """Goes there; the page may still be drawing itself."""
        self.call("Page.navigate", url="about:blank")  # else another #fragment loads nothing
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, by JSON."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, limit_s: float = 120.0) -> Any:
        """The first value of the expression that JavaScript takes for true."""
        deadline = time.monotonic() + limit_s
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:
                raise AssertionError(f"never true: {expression}; the page says: {self.text()}")
            time.sleep(0.2)
        return value

    def wait_for_text(self, *texts: str) -> str:
        """What the page says, once it says all of these."""
        for text in texts:
            self.wait_for(f"document.body?.innerText.includes({json.dumps(text)})")
        return self.text()

    def text(self) -> str:
        """What the page says."""
        return self.evaluate("document.body?.innerText ?? ''")

    def click(self, expression: str) -> None:
        """Clicks the element that the expression gives, once it is there."""
        self.wait_for(f"((e) => e && (e.click(), true))({expression})")

    def type_into(self, selector: str, text: str) -> None:
        """Types in place of what an input holds."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait_for(f"((e) => e && (e.focus(), e.select(), true))({found})")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Presses a key that has a name, as Escape."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path: Path) -> None:
        """What is seen of the page, as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=120)
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"])[:1000])
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]


@contextlib.contextmanager
def browser_page() -> Iterator[Page]:
    """A page of a browser of its own, which ends with it; skips where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium here (Debian's package `chromium`)")
    with contextlib.ExitStack() as stack:
        profile = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="tvq-chromium-", ignore_cleanup_errors=True)
        )
        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        session, socket = loop.run_until_complete(_connected(Path(profile), process))
        stack.callback(lambda: loop.run_until_complete(session.close()))
        page = Page(loop, socket)
        page.call("Page.enable")
        page.resize(WIDTH, HEIGHT)
        page.call("Runtime.enable")
        yield page


async def _connected(
    profile: Path, process: subprocess.Popen[bytes]
) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    told = profile / "DevToolsActivePort"  # the browser writes its port there
    while not (told.exists() and told.read_text().strip()):
        assert process.poll() is None, "Chromium ended"
        await asyncio.sleep(0.05)
    address = f"http://127.0.0.1:{told.read_text().split()[0]}"
    session = aiohttp.ClientSession()
    while True:
        async with session.get(f"{address}/json") as answer:
            pages = [each for each in await answer.json() if each["type"] == "page"]
        if pages:
            break
        await asyncio.sleep(0.05)
    socket = await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
    return session, socket
