"""A real Chromium, driven over its debugging pipe: no driver program, no package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--window-size=1200,900",
)


class Browser:
    """From ``__enter__`` to ``__exit__``, one tab at a time; skips the test where no Chromium is installed.

    Source: https://chromedevtools.github.io/devtools-protocol/; messages end with a NUL byte on descriptors 3 and 4.
    """

    def __init__(self, profile: Path) -> None:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        if found is None:
            pytest.skip("no Chromium here: apt-get install chromium")
        self._command = [found, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self._numbers = itertools.count(1)
        self._rest = b""

    def __enter__(self) -> Self:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The two ends must be 3 and 4 in Chromium; bash moves them there. Every descriptor but these is closed.
        move = ["bash", "-c", f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"', "bash"]
        self._process = subprocess.Popen(
            [*move, *self._command], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        (tab,) = [one for one in self._ask("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._tab = tab["targetId"]
        self.renew()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def renew(self) -> None:
        """Go on in a new tab, which has nothing of the one before: no headers, no session's storage, no phone."""
        old, self._tab = self._tab, self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=self._tab, flatten=True)["sessionId"]
        self.prefer("light")
        self.tell("Network.enable")
        self._ask("Target.closeTarget", targetId=old)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command of the protocol to the tab and return its result."""
        return self._ask(method, self._session, **parameters)

    def open(self, address: str, **headers: str) -> None:
        """Go to ``address``; ``headers`` go with this and every later request."""
        self.tell("Network.setExtraHTTPHeaders", headers=headers)
        self.tell("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.tell("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 30.0) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"still not: {script}"
            time.sleep(0.1)

    def prefer(self, scheme: str) -> None:
        """Show pages light or dark; a new tab is light."""
        self.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def be_a_phone(self, width: int) -> None:
        """Show pages as a phone of ``width`` CSS pixels does, with a finger for a mouse."""
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=2, mobile=True)
        self.tell("Emulation.setTouchEmulationEnabled", enabled=True)

    def tap(self, selector: str) -> None:
        """Touch the middle of the first element of ``selector``."""
        middle = "(box => ({x: box.x + box.width / 2, y: box.y + box.height / 2}))(one.getBoundingClientRect())"
        script = f"(one => {{ one.scrollIntoView({{block: 'center'}}); return {middle}; }})"
        point = self.run(f"{script}(document.querySelector({json.dumps(selector)}))")
        self.tell("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        self.tell("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def overlapping_texts(self) -> list[list[str]]:
        """Return the pairs of texts of an SVG document that lie on each other, or one alone that leaves the canvas.

        Texts inside the tile of a core are left out.
        """
        found: list[list[str]] = self.run("""(() => {
          const texts = [...document.querySelectorAll("text")].filter(text => !text.closest(".cell"))
            .map(text => [text.textContent, text.getBoundingClientRect()]);
          const page = document.documentElement.getBoundingClientRect(), found = [];
          texts.forEach(([words, box], n) => {
            if (box.left < page.left || box.right > page.right || box.bottom > page.bottom) found.push([words]);
            for (const [others, other] of texts.slice(0, n))
              if (Math.min(box.right, other.right) > Math.max(box.left, other.left) + 0.5 &&
                  Math.min(box.bottom, other.bottom) > Math.max(box.top, other.top) + 2.5) found.push([words, others]);
          });
          return found;
        })()""")
        return found

    def screenshot(self, file: Path) -> bytes:
        """Write what the tab shows as PNG, and return it."""
        image = base64.b64decode(self.tell("Page.captureScreenshot")["data"])
        file.write_bytes(image)
        return image

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in, 1 << 16)
            assert part, "Chromium has gone"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message
