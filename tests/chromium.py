"""Chromium without a window, over the DevTools protocol by pipe (`--remote-debugging-pipe`): messages are JSON, each
ended by a NUL; we write to its descriptor 3 and read from its descriptor 4."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

SECONDS = 60  # for an answer; a busy machine needs some for the start
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
)  # fmt: skip


def program():
    """Where Chromium is; fails where it is not."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, "Chromium is not installed: apt-get install chromium"
    return found


class Browser:
    """One tab. `said` has what the page logged and what failed in it, `fetched` the addresses that it asked for."""

    def __init__(self, writing, reading):
        self._writing, self._reading, self._rest, self._number = writing, reading, b"", 0
        self._session, self._events = None, []
        self.said, self.fetched = [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """The result of a command; events that come before it are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            self._note(answer)

    def _next(self):
        over = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], max(0, over - time.monotonic()))
            data = os.read(self._reading, 1 << 20) if ready else b""
            assert data, "Chromium does not answer" if not ready else "Chromium has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        method, told = event.get("method", ""), event.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(told)
        elif method == "Network.requestWillBeSent":
            self.fetched.append(told["request"]["url"])
        self._events.append(method)

    def open(self, path, *, width, dark=False):
        """Load the file in a window of this width, and wait until it is there."""
        self.visit(path.as_uri(), width=width, dark=dark)

    def visit(self, address, *, width, dark=False):
        """Load the page as `open` does."""
        self.said.clear()
        self.fetched.clear()
        self._events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=address)
        while "Page.loadEventFired" not in self._events:
            self._note(self._next())

    def value(self, expression):
        """What JavaScript says of the page."""
        told = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def picture(self):
        """What is seen, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      **({"text": "\r"} if key == "Enter" and kind == "keyDown" else {}))  # fmt: skip

    def accessible(self):
        """(role, name) of everything that a screen reader finds."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes
                if not node["ignored"]]  # fmt: skip


@contextlib.contextmanager
def browser():
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        # The shell puts the pipes' ends at the descriptors that Chromium has for them: bash, since others know ten alone.
        words = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_write}', "bash", program(), *FLAGS,
                 f"--user-data-dir={home}"]  # fmt: skip
        process = subprocess.Popen(
            [*words, "about:blank"], pass_fds=(to_read, from_write), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": home},
        )  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        try:
            yield Browser(to_write, from_read)
        finally:
            os.close(to_write)
            os.close(from_read)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
