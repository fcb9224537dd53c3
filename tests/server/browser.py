"""A headless Chromium over the DevTools protocol: pages that load, click, type and say what was."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "ArrowUp": (38, ""), "Tab": (9, "")}
SHIFT = 8


class Browser:
    """One process; every page has its own cookies and storage."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
             "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
             "--disable-background-networking", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = folder / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port.exists() and len(lines := port.read_text().split()) == 2):
            assert self.process.poll() is None, "Chromium does not start"
            assert time.monotonic() < deadline, "Chromium does not answer"
            time.sleep(0.05)
        self.open = ExitStack()
        address = f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        self.socket = self.open.enter_context(connect(address, max_size=None))
        self.count = 0
        self.pages: dict[str, Page] = {}

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        while True:
            reply = json.loads(self.socket.recv(timeout=600))
            if reply.get("id") == self.count:
                assert "error" not in reply, (method, reply["error"])
                return dict(reply["result"])
            if page := self.pages.get(reply.get("sessionId", "")):
                page.heard(reply["method"], reply["params"])

    def page(
        self, width: int = 1280, height: int = 800, *, phone: bool = False, dark: bool = False
    ) -> Page:
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)[
            "targetId"
        ]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=2 if phone else 1, mobile=phone)  # fmt: skip
        if phone:
            page.send("Emulation.setTouchEmulationEnabled", enabled=True)
            page.media(hover="none", pointer="coarse")
        page.media(**{"prefers-color-scheme": "dark" if dark else "light"})
        return page

    def close(self) -> None:
        try:
            self.send("Browser.close")
            self.process.wait(10)
        except Exception:
            self.process.kill()
            self.process.wait()
        self.open.close()


class Page:
    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self.browser, self.session, self.target = browser, session, target
        self.requests: list[str] = []  # every address asked for
        self.problems: list[str] = []  # exceptions, violations of the policy, dialogs
        self.features: dict[str, str] = {}

    def heard(self, method: str, event: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and event["entry"]["source"] != "network":
            self.problems.append(event["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {event['message']}")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.send(method, self.session, **parameters)

    def media(self, **features: str) -> None:
        self.features |= features
        pairs = [{"name": k, "value": v} for k, v in self.features.items()]
        self.send("Emulation.setEmulatedMedia", features=pairs)

    def open(self, url: str) -> Page:
        error = self.send("Page.navigate", url=url).get("errorText")
        assert error is None, f"{url}: {error}"
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return self

    def js(self, expression: str) -> Any:
        """The value of an expression (awaited) in the page."""
        reply = self.send("Runtime.evaluate", expression=expression, awaitPromise=True,
                          returnByValue=True, userGesture=True)  # fmt: skip
        assert "exceptionDetails" not in reply, (expression, reply["exceptionDetails"])
        return reply["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, (
                expression,
                self.js("document.body.innerText"),
                self.problems,
            )
            time.sleep(0.03)
        return value

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        """A press of the mouse in the middle of the element, which must be visible, on top there,
        enabled, and no longer moving."""
        place = f"""(() => {{
            const node = document.querySelector({selector!r});
            if (!node || node.disabled) return null;
            node.scrollIntoView({{block: "nearest"}});
            const box = node.getBoundingClientRect();
            const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
            const top = document.elementFromPoint(x, y);
            return box.width && (node.contains(top) || top?.contains(node)) ? [x, y] : null;
        }})()"""
        before = None
        while (now := self.wait(place)) != before:
            before = now
            self.js("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 20)))")
        x, y = now
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        code, text = KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        )

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)
        del self.browser.pages[self.session]
