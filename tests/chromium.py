"""A headless Chromium over its DevTools pipe: what a page asks for, says, measures and looks like. No driver, no port."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
]

PATIENCE = 30.0
"""Seconds that an answer of the browser may take."""


def binary() -> str | None:
    """The first Chromium on the path."""
    return next((found for name in BINARIES if (found := shutil.which(name))), None)


class Chromium:
    """A browser process of its own, with a fresh profile.

    Args:
        program: the browser.
        profile: an empty directory.
    """

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser speaks on the descriptors 3 (to it) and 4 (from it).
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._sent = 0
        self._rest = b""
        self.pages: dict[str, Page] = {}

    def open(self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False, script: bool = True) -> Page:
        """A new tab in a window (or on a phone, below 600 pixels) of that size, its page loaded."""
        context = self.command("Target.createBrowserContext")["browserContextId"]
        target = self.command("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target, context)
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.command(f"{domain}.enable")
        page.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        schemes = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.command("Emulation.setEmulatedMedia", features=schemes)
        page.command("Emulation.setScriptExecutionDisabled", value=not script)
        page.go(url)
        return page

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(OSError, TimeoutError):
            self.command("Browser.close")
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def command(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come meanwhile go to their pages."""
        self._sent += 1
        number = self._sent
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            told = self.receive(deadline)
            if told.get("id") == number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']['message']}")
                return told["result"]

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message; an event is also given to its page.

        Raises:
            TimeoutError: none came in time.
            OSError: the browser has ended.
        """
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise OSError("Chromium has ended")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        told: dict[str, Any] = json.loads(line)
        page = self.pages.get(told.get("sessionId", ""))
        if page is not None and "method" in told:
            page.hear(told["method"], told["params"])
        return told


class Page:
    """A tab.

    Attributes:
        requests: addresses asked for since it was opened, data: addresses left out.
        errors: what the console and uncaught exceptions said is wrong.
    """

    def __init__(self, browser: Chromium, session: str, target: str, context: str) -> None:
        self._browser, self._session, self._target, self._context = browser, session, target, context
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._loads = 0

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command about this tab."""
        return self._browser.command(method, session=self._session, **params)

    def hear(self, event: str, params: dict[str, Any]) -> None:
        """Take note of an event."""
        if event == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str([argument.get("value") for argument in params["args"]]))
        elif event == "Page.loadEventFired":
            self._loads += 1

    def go(self, url: str) -> None:
        """Load another page and wait until it is there."""
        before = self._loads
        failed = self.command("Page.navigate", url=url).get("errorText")
        if failed:
            raise RuntimeError(f"{url}: {failed}")
        self.loaded(before + 1)

    @property
    def loads(self) -> int:
        """How many pages this tab has loaded."""
        return self._loads

    def loaded(self, count: int) -> None:
        """Wait until the tab has loaded so many pages."""
        deadline = time.monotonic() + PATIENCE
        while self._loads < count:
            self._browser.receive(deadline)

    def see(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", expression))
        return found["result"].get("value")

    def until(self, expression: str, *, seconds: float = 10.0) -> Any:
        """The value of an expression as soon as it is truthy."""
        deadline = time.monotonic() + seconds
        while not (value := self.see(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} stays {value!r}")
            time.sleep(0.03)
        return value

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of the first element that a selector names."""
        name = json.dumps(selector)
        self.see(f"document.querySelector({name}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.see(
            f"(() => {{ const b = document.querySelector({name}).getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Write into a field."""
        self.see(f"document.querySelector({json.dumps(selector)}).focus()")
        self.command("Input.insertText", text=text)

    def press_enter(self) -> None:
        """Press Enter in the focused field."""
        for kind in ("keyDown", "keyUp"):
            self.command(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def picture(self, *, whole: bool = True) -> bytes:
        """A PNG of the page, or of what the window shows of it."""
        shown = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        if not whole:
            return base64.b64decode(shown["data"])
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shown = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shown["data"])

    def printed(self) -> bytes:
        """The page as a PDF on A4."""
        made = self.command("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        return base64.b64decode(made["data"])

    def accessible(self) -> list[dict[str, Any]]:
        """The accessibility tree as the browser tells it to a screen reader."""
        return self.command("Accessibility.getFullAXTree")["nodes"]

    def close(self) -> None:
        """Close the tab and forget its cookies and cache."""
        self._browser.pages.pop(self._session)
        self._browser.command("Target.closeTarget", targetId=self._target)
        self._browser.command("Target.disposeBrowserContext", browserContextId=self._context)
