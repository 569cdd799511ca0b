"""A coordinator or selector that does nothing but keep the launch contract, or break it as it is told.

`behaviour` in the plan's client config tells a coordinator, a file of that name in its directory tells any: `hang` (run
and never answer), `die` (end at once) or `wait` (answer that it is not ready).
"""

import json
import os
import resource
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers 200 to everything; while a file `ill` is there, 503 with what is in it."""

    def do_GET(self) -> None:
        """The only method that a launcher uses."""
        ill = Path("ill")
        status, body = (503, ill.read_bytes()) if ill.exists() else (200, b"")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: what is in the log is compared by tests."""


def main() -> None:
    """Run in the directory that is given by the launcher."""
    signal.signal(signal.SIGTERM, _end)
    settings = json.loads(Path("settings.json").read_bytes())
    _log(json.dumps({"environment": sorted(os.environ), "core": resource.getrlimit(resource.RLIMIT_CORE)}))
    match _behaviour(settings):
        case "hang":
            _log("made-up words of one that hangs")
            sys.stdin.read()
        case "die":
            _log("made-up words of one that dies")
            sys.exit(3)
        case "wait":
            _log("made-up words of one that waits")
            Path("ill").write_text(json.dumps({"failing": {"made-up": "it waits for what never comes"}}))
            serve(settings["host"], settings["port"])
        case _:
            serve(settings["host"], settings["port"])


def _end(*_: Any) -> None:
    """Take a moment to end, as whoever has something to finish does."""
    time.sleep(0.2)
    Path("ended").touch()
    sys.exit(0)


def _log(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _behaviour(settings: dict[str, Any]) -> str | None:
    told = Path("behaviour")
    if told.exists():
        return told.read_text()
    behaviour: str | None = settings.get("plan", {}).get("client_config", {}).get("behaviour")
    return behaviour


def serve(host: str, port: int) -> None:
    """Answer, say so, and end with the launcher."""
    server = ThreadingHTTPServer((host, port), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    ready = {"url": f"http://{host}:{server.server_address[1]}", "pid": os.getpid()}
    Path("ready.json.new").write_text(json.dumps(ready))
    Path("ready.json.new").replace("ready.json")
    sys.stdin.read()


if __name__ == "__main__":
    main()
