"""A headless Chromium over its debugging protocol: open a page, run script in it, press keys, take pictures.

    python -m tests.chromium runs/demo/report/index.html notebooks/page_desktop.png notebooks/page_phone.png

takes the two pictures of the README: the browser of conversations on a desktop, and on a phone in the dark.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One tab; `complaints` collects what the console, the page or its security policy complained of, and every request."""

    def __init__(self, socket: Any):
        self._socket, self._number, self.complaints, self.requests = socket, 0, [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning")
        ):
            self.complaints.append(params)
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"])
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 60
        while self.js("document.readyState") != "complete" or self.js("location.href") == "about:blank":
            assert time.monotonic() < deadline, "the page never finished loading"
            time.sleep(0.05)

    def js(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """A real mouse click in the middle of the first element that fits."""
        box = "e => { e.scrollIntoView({block: 'center'}); return e.getBoundingClientRect() }"
        where = f"({box})(document.querySelector({selector!r}))"
        box = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({where})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def size(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A tab of a fresh Chromium whose profile lies in `folder`."""
    from websockets.sync.client import connect

    command = [BINARY, "--headless=new", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={folder}",
               "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
               "--hide-scrollbars", "about:blank"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        port_file, deadline = folder / "DevToolsActivePort", time.monotonic() + 120
        while not port_file.is_file() or len(port_file.read_text().split()) < 2:
            assert process.poll() is None and time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        import urllib.request

        while True:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [t for t in json.loads(answer.read()) if t["type"] == "page"]
            if pages:
                break
            time.sleep(0.1)
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Tab(socket)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(page: str, desktop: str, phone: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, browser(Path(folder) / "profile") as tab:
        tab.size(1100, 800)
        tab.open(Path(page).resolve().as_uri())
        for control, value in (("a", "1"), ("gold", "2")):  # the second model, the third category
            tab.js(f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
                   f"(document.querySelector('[data-control={control}]'))")  # fmt: skip
        tab.js("document.querySelector('.browser').scrollIntoView()")
        tab.picture(Path(desktop))
        tab.size(390, 844, phone=True, dark=True)
        tab.js("document.querySelector('.browser').scrollIntoView()")
        tab.picture(Path(phone))


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
