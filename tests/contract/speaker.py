"""A client written from docs/protocol.md alone: Python's standard library, and nothing of Fedota's.

`python -I -S speaker.py <kit.json> <number> [--breaking]` takes part until the training is finished, where no installed
package can be imported. It "trains" by adding number × round to each weight, and prints what it met with as JSON. With
`--breaking` its line breaks in the middle of every model and of every update.
"""

import array
import hashlib
import http.client
import json
import random
import ssl
import struct
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

TYPES = {"F32": "f", "F64": "d", "I64": "q", "I32": "i"}  # of safetensors, and how `array` calls them
POLL = 90.0  # seconds
Tensors = dict[str, tuple[str, list[int], bytes]]  # by name: type, shape, little-endian bytes
Body = bytes | Iterable[bytes] | None


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Which error it is; empty when it is none."""
        return str(self.json["code"]) if self.status >= 400 and self.body else ""


class RefusedError(Exception):
    """A selector said no."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"{answer.status} {answer.body[:300]!r}")
        self.answer = answer


class Speaker:
    """Speaks to one server; `headers` go with each request."""

    def __init__(self, url: str, headers: Mapping[str, str], authority: str = "") -> None:
        self.url = url
        self.headers = dict(headers)
        self.authority = authority

    def connect(self) -> http.client.HTTPConnection:
        """A connection."""
        place = urlsplit(self.url)
        if place.scheme == "https":
            trust = ssl.create_default_context(cadata=self.authority or None)
            return http.client.HTTPSConnection(place.netloc, timeout=POLL, context=trust)
        return http.client.HTTPConnection(place.netloc, timeout=POLL)

    def begin(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Body = None
    ) -> http.client.HTTPConnection:
        """Ask; the answer is read by `end`. A body in pieces goes out as it comes, an iterator's without its length."""
        connection = self.connect()
        with suppress(BrokenPipeError, ConnectionResetError):  # a refusal may come before the whole body is sent
            connection.request(method, path, body, {**self.headers, **(headers or {})})
        return connection

    @staticmethod
    def end(connection: http.client.HTTPConnection) -> Answer:
        """What was answered."""
        try:
            reply = connection.getresponse()
            return Answer(reply.status, reply.headers, reply.read())
        finally:
            connection.close()

    def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Body = None) -> Answer:
        """Ask and be answered."""
        return self.end(self.begin(method, path, headers, body))

    def break_off(self, method: str, path: str, headers: Mapping[str, str], length: int, part: bytes) -> None:
        """Announce `length` bytes, send `part` of them, and be gone."""
        connection = self.half(method, path, headers, length, part)
        connection.close()

    def half(
        self, method: str, path: str, headers: Mapping[str, str], length: int, part: bytes
    ) -> http.client.HTTPConnection:
        """A request whose body stops in the middle."""
        connection = self.open(method, path, {**headers, "Content-Length": str(length)})
        connection.send(part)
        return connection

    def open(self, method: str, path: str, headers: Mapping[str, str]) -> http.client.HTTPConnection:
        """A request whose body is still to be sent."""
        connection = self.connect()
        connection.putrequest(method, path)
        for name, value in {**self.headers, **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        return connection


class Work(NamedTuple):
    """An update that is kept until it is known what became of it."""

    ticket: str
    round: int
    body: bytes
    headers: dict[str, str]


class Client:
    """An organization's client at one selector."""

    def __init__(self, url: str, token: str, name: str, *, authority: str = "", breaking: bool = False) -> None:
        self.http = Speaker(url, {"Authorization": f"Bearer {token}", "Fedota-Client": name}, authority)
        self.breaking = breaking
        self.log: list[dict[str, Any]] = []

    def check_in(self, ticket: str = "") -> dict[str, Any]:
        """Be told what to do."""
        answer = self.http.ask("POST", "/v1/check-in", {"Fedota-Ticket": ticket} if ticket else {})
        if answer.status != 200:
            raise RefusedError(answer)
        told: dict[str, Any] = answer.json
        self.log.append({"check_in": told["status"], "update": told.get("update", "")})
        return told

    def fetch(self, model: Mapping[str, Any]) -> bytes:
        """The weights, in as many pieces as it takes."""
        path, body = f"/v1/models/{model['sha256']}", b""
        if self.breaking:
            body = self._beginning(path, model["size"] // 2)
        while len(body) < model["size"]:
            answer = self.http.ask("GET", path, {"Range": f"bytes={len(body)}-"} if body else {})
            if answer.status != (206 if body else 200):
                raise RefusedError(answer)
            body += answer.body
        if hashlib.sha256(body).hexdigest() != model["sha256"]:
            raise ValueError("the model is not what its name says")
        return body

    def _beginning(self, path: str, count: int) -> bytes:
        connection = self.http.begin("GET", path)
        try:
            return connection.getresponse().read(count)
        finally:
            connection.close()

    def send(self, work: Work) -> Answer:
        """Send an update; when the line breaks, go on where the selector says that it stopped."""
        if self.breaking:
            self.http.break_off("POST", "/v1/updates", work.headers, len(work.body), work.body[: len(work.body) // 2])
            return self.go_on(work)
        return self.http.ask("POST", "/v1/updates", work.headers, work.body)

    def go_on(self, work: Work) -> Answer:
        """What is missing of an update."""
        held = self.http.ask("HEAD", "/v1/updates", {"Fedota-Ticket": work.ticket})
        if held.status == 409:  # it still comes by the old connection, or is over: the next check-in tells
            return held
        if held.status != 204:
            raise RefusedError(held)
        have = int(held.headers["Upload-Offset"])
        self.log.append({"resumed": have})
        headers = {**work.headers, "Upload-Offset": str(have), "Upload-Length": str(len(work.body))}
        answer = self.http.ask("PATCH", "/v1/updates", headers, work.body[have:])
        if answer.code == "offset_mismatch":  # more of it came in meanwhile
            headers["Upload-Offset"] = answer.headers["Upload-Offset"]
            answer = self.http.ask("PATCH", "/v1/updates", headers, work.body[int(headers["Upload-Offset"]) :])
        return answer


def work(ticket: str, round_: int, body: bytes, examples: int, metrics: Mapping[str, float]) -> Work:
    """An update with its headers."""
    headers = {
        "Fedota-Ticket": ticket,
        "Fedota-Examples": str(examples),
        "Fedota-Metrics": json.dumps(metrics),
        "Content-Type": "application/octet-stream",
    }
    return Work(ticket, round_, body, headers)


def unpack(body: bytes) -> Tensors:
    """The tensors of a safetensors body."""
    length = int.from_bytes(body[:8], "little")
    header, data = json.loads(body[8 : 8 + length]), body[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, one in header.items():
        start, stop = one["data_offsets"]
        tensors[name] = (one["dtype"], one["shape"], data[start:stop])
    return tensors


def pack(tensors: Tensors) -> bytes:
    """A safetensors body."""
    header, start = {}, 0
    for name, (type_, shape, data) in tensors.items():
        header[name] = {"dtype": type_, "shape": shape, "data_offsets": [start, start + len(data)]}
        start += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def plus(tensors: Tensors, number: int) -> Tensors:
    """The tensors with a number added to each element."""
    return {name: (type_, shape, _plus(TYPES[type_], data, number)) for name, (type_, shape, data) in tensors.items()}


def _plus(type_: str, data: bytes, number: int) -> bytes:
    return array.array(type_, [value + number for value in array.array(type_, data)]).tobytes()


def take_part(kit: Mapping[str, Any], number: int, *, breaking: bool = False) -> list[dict[str, Any]]:
    """Until the training is finished; what was met with on the way."""
    selectors = [
        Client(url, kit["token"], f"speaker-{number}", authority=kit.get("authority", ""), breaking=breaking)
        for url in kit["selectors"]
    ]
    kept: Work | None = None
    log: list[dict[str, Any]] = []
    while True:
        client = selectors[0]
        client.log = log
        try:
            told = client.check_in(kept.ticket if kept else "")
            if kept and told["status"] != "send_again" and told["update"] in ("counted", "over"):
                log.append({"round": kept.round, "fate": told["update"]})
                kept = None
            if told["status"] == "finished":
                return [*log, {"finished": told["reason"]}]
            if told["status"] == "come_back":
                time.sleep(told["seconds"] * random.uniform(1.0, 1.2))
                continue
            if told["status"] == "selected" and (kept is None or kept.ticket != told["ticket"]):
                kept = _trained(client, told, number)
            assert kept is not None
            answer = client.send(kept)
            log.append({"round": kept.round, "answer": answer.status, "code": answer.code})
            if answer.code == "round_over":
                kept = None
            elif answer.status >= 500:
                time.sleep(float(answer.headers.get("Retry-After", "1")))
            elif answer.status not in (200, 409):
                raise RefusedError(answer)
        except (OSError, http.client.HTTPException):
            selectors.append(selectors.pop(0))
            time.sleep(0.2)


def _trained(client: Client, told: Mapping[str, Any], number: int) -> Work:
    model = unpack(client.fetch(told["model"]))
    body = pack(plus(model, number * told["round"]))
    return work(told["ticket"], told["round"], body, number, {"loss": 1 / number})


if __name__ == "__main__":
    _, path, who, *options = sys.argv
    met = take_part(json.loads(Path(path).read_bytes()), int(who), breaking="--breaking" in options)
    sys.stdout.write(json.dumps(met))
