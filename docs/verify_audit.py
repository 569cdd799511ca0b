"""Verify a file that `fedota audit export` wrote. Needs Python 3.11 and the package `cryptography`, nothing of Fedota.

    python verify_audit.py FILE [--public-key notary.public.pem]

Exit status 0 when everything fits, else 1, and one line names the first position or checkpoint that does not.
Without --public-key the file is only checked against the key in it: get the notary's public key by another way.
"""

import argparse
import base64
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

FIELDS = re.findall(r"\w+", "position id type schema subject version time actor correlation causation traceparent")
CHECKPOINT = re.compile(
    rb"fedota checkpoint 1\nnumber ([0-9]+)\nposition ([0-9]+)\nhash ([0-9a-f]{64})\ntime ([0-9TZ:.-]{27})\n"
    rb"previous ([0-9a-f]{64})\nkey ([0-9a-f]{64})\nsignature ([A-Za-z0-9+/]{85}[AQgw]==)\n"
)


def fail(kind: str, words: str) -> NoReturn:
    sys.exit(f"DOES NOT FIT ({kind}): {words}")


def content(value: dict[str, Any], name: str) -> bytes:  # as text, or in base64 where it is none
    return value[name].encode() if name in value else base64.b64decode(value[f"{name}_base64"])


class Log:  # the chain, event by event, and the hash at each position
    def __init__(self) -> None:
        self.position, self.hash, self.hashes = 0, bytes(32), bytearray(32)
        self.versions: dict[str, int] = {}

    def add(self, event: dict[str, Any]) -> None:
        position, subject = self.position + 1, event["subject"]
        if event["position"] > position:
            fail("deleted", f"position {position} is not there")
        if event["position"] < position:
            fail("inserted", f"position {event['position']} is there twice, or before the first one")
        head = "".join(f"{'' if event[name] is None else event[name]}\n" for name in FIELDS)
        self.hash = hashlib.sha256(self.hash + head.encode() + content(event, "data")).digest()
        if head.count("\n") != len(FIELDS) or self.hash.hex() != event["hash"]:
            fail("edited", f"position {position} is not what was hashed there: edited, moved or put in")
        if event["version"] != self.versions.get(subject, 0) + 1:
            fail("versions", f"position {position}: version {event['version']} does not follow in stream {subject}")
        self.position, self.versions[subject] = position, event["version"]
        self.hashes += self.hash


class Checkpoints:  # in order, each against the log
    def __init__(self, key: Ed25519PublicKey) -> None:
        self.key = key
        self.key_id = hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()
        self.number, self.position, self.previous = 0, 0, bytes(32)

    def add(self, number: int, file: bytes, log: Log) -> None:
        if number != self.number + 1:
            fail("checkpoint_missing", f"checkpoint {self.number + 1} is missing")
        found = CHECKPOINT.fullmatch(file) or fail("checkpoint_forged", f"checkpoint {number} has another form")
        own_number, position, hash_, _, previous, key_id, signature = (part.decode() for part in found.groups())
        if key_id != self.key_id:
            fail("checkpoint_forged", f"checkpoint {number} is signed with another key: {key_id}")
        try:
            self.key.verify(base64.b64decode(signature), file[: file.rindex(b"signature ")])
        except InvalidSignature:
            fail("checkpoint_forged", f"checkpoint {number} has a signature that its key did not make")
        if int(own_number) != number or previous != self.previous.hex() or int(position) < self.position:
            fail("checkpoint_order", f"checkpoint {number} does not follow the one before it")
        if int(position) > log.position:
            fail("truncated", f"position {log.position + 1} is missing: checkpoint {number} saw {position} events")
        if log.hashes[32 * int(position) : 32 * int(position) + 32].hex() != hash_:
            fail(
                "rewritten", f"from position {self.position + 1} on: checkpoint {number} saw another hash at {position}"
            )
        self.number, self.position, self.previous = number, int(position), hashlib.sha256(file).digest()


def verify(path: Path, public_key: Path | None) -> None:
    with path.open("rb") as lines:
        header = json.loads(next(lines))
        if (header["format"], header["version"]) != ("fedota audit export", 1):
            fail("format", "this is no export of version 1")
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(header["public_key"]))
        if public_key and load_pem_public_key(public_key.read_bytes()) != key:
            fail("public_key", "the file was made for another public key than yours")
        log, checkpoints = Log(), Checkpoints(key)
        for line in map(json.loads, lines):
            if "event" in line:
                log.add(line["event"])
            else:
                checkpoints.add(line["checkpoint"]["number"], content(line["checkpoint"], "file"), log)
    head = header["head"]["position"], header["head"]["hash"]
    if log.position < header["last"]:
        fail("truncated", f"position {log.position + 1} is missing: the file was to end at {header['last']}")
    if log.position >= head[0] and head != (log.position, log.hash.hex()):
        fail("head", f"the log's head row says {head}, the events end at {log.position} with {log.hash.hex()}")
    if not checkpoints.number:
        fail("checkpoint_missing", "checkpoint 1 is missing: there is none")
    print(f"All fits: {log.position} events, {checkpoints.number} checkpoints, key {checkpoints.key_id}.")
    print(f"The last {log.position - checkpoints.position} events are not covered by a checkpoint.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Verify a file that `fedota audit export` wrote.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--public-key", type=Path, help="the notary's public key (PEM), got by another way")
    options = parser.parse_args()
    try:
        verify(options.file, options.public_key)
    except OSError as error:
        sys.exit(f"Nothing was verified: {error.filename or options.file} cannot be read ({error.strerror}).")
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        fail("format", f"the file or the public key is damaged: {error!r}")
