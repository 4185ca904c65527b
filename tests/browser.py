"""A headless Chromium, spoken to through its DevTools pipe: the standard library is enough.

    with Browser() as page:
        page.open(file); page.run("document.title")
"""
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def executable() -> str | None:
    """The first browser of NAMES that is installed."""
    for name in NAMES:
        if shutil.which(name):
            return shutil.which(name)
    return None


class Browser:
    """One tab. `log` collects what the page wrote to its console, policy violations among it."""

    def __init__(self, width: int = 1280, height: int = 900):
        self.profile = tempfile.mkdtemp(prefix="page-")
        from_us, self.write_end = os.pipe()
        self.read_end, to_us = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--remote-debugging-pipe", f"--user-data-dir={self.profile}",
                 f"--window-size={width},{height}", "about:blank"]
        # The pipe's ends have to be descriptors 3 and 4 of the browser.
        command = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, executable(), *flags], pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(from_us)
        os.close(to_us)
        self.buffer = b""
        self.number = 0
        self.session = None
        self.log = []
        targets = self.send("Target.getTargets")["targetInfos"]
        [tab] = [target for target in targets if target["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=tab["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.write_end)
        os.close(self.read_end)
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(self, method: str, **parameters):
        """One command of the DevTools protocol -> its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self.number:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]

    def _read(self) -> dict:
        while b"\0" not in self.buffer:
            piece = os.read(self.read_end, 1 << 20)
            assert piece, "the browser has ended"
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(line)
        if message.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled",
                                     "Runtime.exceptionThrown", "Network.requestWillBeSent"):
            self.log.append(message)
        return message

    def open(self, file, fragment: str = "") -> None:
        """Opens a file anew, and waits until the page says that it is drawn."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"file://{file}{fragment}")
        self.wait("document.documentElement?.dataset.ready !== undefined")

    def run(self, script: str):
        """The value of a JavaScript expression, as JSON."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, with its Windows key code: 9 Tab, 13 Enter (text "\\r"), 40 ArrowDown."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text,
                      windowsVirtualKeyCode=code)

    def screenshot(self, file) -> None:
        taken = self.send("Page.captureScreenshot")
        file.write_bytes(base64.b64decode(taken["data"]))
