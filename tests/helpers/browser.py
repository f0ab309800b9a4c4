"""A headless Chromium, driven through chromedriver's own protocol, and a server for the pages it opens."""

import base64
import contextlib
import functools
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

__all__ = ["Browser", "browser", "is_available", "serve"]

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]


def is_available():
    """Whether Debian's ``chromium`` and ``chromium-driver`` are installed."""
    return shutil.which("chromium") is not None and shutil.which("chromedriver") is not None


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(folder):
    """Serve ``folder`` on this machine alone; yield its address."""
    handler = functools.partial(_Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class Browser:
    """One window."""

    def __init__(self, session):
        self._session = session

    def open(self, address):
        """Load a page and wait for its scripts."""
        _call(f"{self._session}/url", {"url": address})

    def run(self, script, *arguments):
        """Run JavaScript in the page; return what it returns."""
        return _call(f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def wait_for(self, script, *arguments, seconds=15):
        """Run JavaScript until it returns something true; return that."""
        end = time.monotonic() + seconds
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end, f"{script} stayed false for {seconds} s"
            time.sleep(0.1)
        return value

    def resize(self, width, height):
        """Give the page this many pixels, as a phone's or a desktop's screen does."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        _call(f"{self._session}/goog/cdp/execute", command)

    def console_errors(self):
        """Return the errors that the console showed since the last call."""
        return [entry["message"] for entry in _call(f"{self._session}/se/log", {"type": "browser"})]

    def screenshot(self, path):
        """Write a PNG of what the window shows."""
        Path(path).write_bytes(base64.b64decode(_call(f"{self._session}/screenshot")))


def _call(address, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]


@contextlib.contextmanager
def browser():
    """Start Chromium; yield its window."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["chromedriver", f"--port={port}"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 30
        while True:
            try:
                _call(f"{address}/status")
                break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < end, "chromedriver did not start"
                time.sleep(0.1)
        options = {"goog:chromeOptions": {"args": FLAGS}, "goog:loggingPrefs": {"browser": "SEVERE"}}
        started = _call(f"{address}/session", {"capabilities": {"alwaysMatch": options}})
        session = f"{address}/session/{started['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _call(session, method="DELETE")
    finally:
        driver.terminate()
        driver.wait()
