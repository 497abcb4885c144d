"""A headless Chromium that a test drives as a person would, by keys and by the mouse, over its DevTools protocol on two pipes."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SECONDS = 120  # that an answer may take, on a busy machine
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Home": 36, "End": 35, "Enter": 13, "Tab": 9, " ": 32}


class Browser:
    """One page of a Chromium of its own.

    Attributes:
        said: what the page wrote to its console, and its errors.
        asked: the addresses that were asked for, without those of data in the page.
    """

    def __init__(self, profile: Path) -> None:
        """Starts it; `profile` is a folder of its own."""
        assert CHROMIUM is not None
        self.said: list[str] = []
        self.asked: list[str] = []
        self._numbers, self._unread, self._session = itertools.count(1), b"", ""
        self._loaded = 0
        theirs_in, ours_out = map(_above_ten, os.pipe())
        ours_in, theirs_out = map(_above_ten, os.pipe())
        silent = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        command = [CHROMIUM, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self._process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=silent + pipes, setsid=True)
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = ours_out, ours_in
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        """The browser itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it and its processes."""
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol; events that come before it are noted."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        deadline = time.monotonic() + _SECONDS
        while (answer := self._message(deadline)).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Opens a page from the disk, on a screen of so many pixels, and waits until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 800
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        before, deadline = self._loaded, time.monotonic() + _SECONDS
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._loaded == before:
            self._note(self._message(deadline))

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up."""
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        about = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        """Text, where the cursor is."""
        self.call("Input.insertText", text=text)

    def click(self, element: str) -> None:
        """The mouse, in the middle of what an expression gives."""
        place = f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
        x, y = self.evaluate(f"{place} return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path, element: str | None = None) -> None:
        """A PNG of the screen; or of what an expression gives, whole."""
        options: dict[str, Any] = {}
        if element is not None:
            script = f"(() => {{ const b = {element}.getBoundingClientRect(); return [b.x + scrollX, b.y + scrollY, b.width, b.height]; }})()"
            clip = dict(zip(("x", "y", "width", "height"), self.evaluate(script), strict=True))
            options = {"clip": clip | {"scale": 1}, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"Chromium did not answer in {_SECONDS} seconds"
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium ended"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        kind, about = event.get("method"), event.get("params", {})
        if kind == "Page.loadEventFired":
            self._loaded += 1
        elif kind in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.said.append(json.dumps(about))
        elif kind == "Network.requestWillBeSent" and not about["request"]["url"].startswith("data:"):
            self.asked.append(about["request"]["url"])


def _above_ten(descriptor: int) -> int:
    """The same under a number that is not one of those that the browser is given."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
