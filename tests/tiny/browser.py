"""A real browser without a window, told what to do through Chromium's DevTools protocol."""

import asyncio
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a headless Chromium, for which no name but 127.0.0.1 resolves. `asked`: the addresses it wanted."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 1300):
        """folder: for its profile."""
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", f"--window-size={width},{height}"]
        flags += [f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
        assert CHROMIUM
        self.process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], stderr=subprocess.PIPE, text=True)
        self.asked: list[str] = []
        self.count = 0
        self.loop = asyncio.new_event_loop()
        self.socket = self.loop.run_until_complete(self._connect(self._port()))
        for domain in ("Page", "Runtime", "DOM", "Network"):
            self.send(f"{domain}.enable")

    def _port(self) -> int:
        assert self.process.stderr
        for line in self.process.stderr:
            if found := re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line):
                # Else it blocks once the pipe is full.
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return int(found[1])
        raise AssertionError("chromium did not start")

    async def _connect(self, port: int) -> Any:
        from tornado.websocket import websocket_connect

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            [address] = [page["webSocketDebuggerUrl"] for page in json.load(answer) if page["type"] == "page"]
        return await websocket_connect(address, max_message_size=2**26)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""

        async def exchange() -> dict[str, Any]:
            self.count += 1
            await self.socket.write_message(json.dumps({"id": self.count, "method": method, "params": parameters}))
            while True:
                message = json.loads(await self.socket.read_message())
                if message.get("method") == "Network.requestWillBeSent":
                    self.asked.append(message["params"]["request"]["url"])
                if message.get("id") == self.count:
                    assert "error" not in message, message
                    return message["result"]

        return self.loop.run_until_complete(exchange())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression on the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.run(f"!!({script})"):
                return
            time.sleep(0.1)
        raise AssertionError(f"{script} is not true after {seconds} s: {self.run('document.body.innerText')}")

    def choose_file(self, selector: str, path: Path) -> None:
        """Put a file into an <input type="file">."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def type_into(self, selector: str, text: str) -> None:
        """Type the text into a field."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)

    def close(self) -> None:
        """End it."""
        self.socket.close()
        self.loop.close()
        self.process.terminate()
        self.process.wait(20)
