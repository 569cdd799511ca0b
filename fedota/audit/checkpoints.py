"""Checkpoints: the notary's signed word on where the log stood. Pure; the only library is `cryptography`.

A checkpoint is a small text file that never changes. Each one names the file before it by its SHA-256, so that none can
be taken out or put in between, and who has seen one of them can tell whether all before it are still the same.
"""

import base64
import hashlib
import re
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

NOTHING: Final = bytes(32)  # what the first checkpoint names as the one before it
_FORM: Final = re.compile(
    rb"fedota checkpoint 1\n"
    rb"number (?P<number>[1-9][0-9]{0,18})\n"
    rb"position (?P<position>0|[1-9][0-9]{0,18})\n"
    rb"hash (?P<hash>[0-9a-f]{64})\n"
    rb"time (?P<time>[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z)\n"
    rb"previous (?P<previous>[0-9a-f]{64})\n"
    rb"key (?P<key>[0-9a-f]{64})\n"
    rb"signature (?P<signature>[A-Za-z0-9+/]{85}[AQgw]==)\n"
)


class CheckpointError(Exception):
    """A file is no checkpoint, or not one that this key signed; the message is the reason."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """At `time` (text) the log ended with the event at `position`, whose hash was `hash`.

    `number` counts from 1. `previous` is the SHA-256 of the file of the checkpoint before, `key` that of the public
    key.
    """

    number: int
    position: int
    hash: bytes
    time: str
    previous: bytes
    key: bytes

    def signed_part(self) -> bytes:
        """The bytes that are signed."""
        return (
            f"fedota checkpoint 1\nnumber {self.number}\nposition {self.position}\nhash {self.hash.hex()}\n"
            f"time {self.time}\nprevious {self.previous.hex()}\nkey {self.key.hex()}\n"
        ).encode()


def raw(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key (RFC 8032)."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def key_id(key: Ed25519PublicKey) -> bytes:
    """What a key is called by: the SHA-256 of its 32 bytes."""
    return hashlib.sha256(raw(key)).digest()


def sign(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> bytes:
    """The checkpoint's file."""
    signature = base64.b64encode(key.sign(checkpoint.signed_part())).decode()
    return checkpoint.signed_part() + f"signature {signature}\n".encode()


def file_digest(file: bytes) -> bytes:
    """What the next checkpoint names this one by."""
    return hashlib.sha256(file).digest()


def verified(file: bytes, key: Ed25519PublicKey) -> Checkpoint:
    """The checkpoint in a file. Raises `CheckpointError` unless it is one, signed with this key."""
    found = _FORM.fullmatch(file)
    if found is None:
        raise CheckpointError("is not in the form of a checkpoint")
    checkpoint = Checkpoint(
        number=int(found["number"]),
        position=int(found["position"]),
        hash=bytes.fromhex(found["hash"].decode()),
        time=found["time"].decode(),
        previous=bytes.fromhex(found["previous"].decode()),
        key=bytes.fromhex(found["key"].decode()),
    )
    if checkpoint.key != key_id(key):
        raise CheckpointError(
            f"names the key {checkpoint.key.hex()[:16]}…, but the public key here is {key_id(key).hex()[:16]}…"
        )
    try:
        key.verify(base64.b64decode(found["signature"]), checkpoint.signed_part())
    except InvalidSignature:
        raise CheckpointError("has a signature that its key did not make") from None
    return checkpoint


def public_key(pem: bytes) -> Ed25519PublicKey | None:
    """The public key in a PEM file; None when it holds none."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, Ed25519PublicKey) else None


def private_key(pem: bytes) -> Ed25519PrivateKey | None:
    """The private key in a PEM file; None when it holds none, or one behind a password."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, Ed25519PrivateKey) else None


class Sequence:
    """Takes checkpoints' files in order; what is signed is given back, the first thing that is wrong is kept."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self.count = 0
        self.newest: Checkpoint | None = None
        self.wrong: tuple[str, int, str] | None = None  # kind, number, words
        self._number = 0
        self._digest: bytes | None = NOTHING

    def take(self, number: int, file: bytes) -> Checkpoint | None:
        """The checkpoint in the file of that number, if its signature is good."""
        self.count += 1
        if number != self._number + 1:
            self._missing(number)
        signed = self._verified(number, file)
        if signed:
            self._compare(number, signed)
        self._number, self._digest = number, file_digest(file)
        if signed is None or (self.newest and signed.position < self.newest.position):
            return None
        self.newest = signed
        return signed

    def _verified(self, number: int, file: bytes) -> Checkpoint | None:
        try:
            return verified(file, self._key)
        except CheckpointError as error:
            self._complain("checkpoint_forged", number, f"checkpoint {number} {error}")
            return None

    def _missing(self, number: int) -> None:
        first, last = self._number + 1, number - 1
        which = f"checkpoint {first} is" if first == last else f"checkpoints {first} to {last} are"
        self._complain("checkpoint_missing", first, f"{which} missing, checkpoint {number} is there")
        self._digest = None  # what it follows is not known

    def _compare(self, number: int, checkpoint: Checkpoint) -> None:
        if checkpoint.number != number:
            self._complain(
                "checkpoint_order", number, f"the file of checkpoint {number} holds checkpoint {checkpoint.number}"
            )
        elif self._digest is not None and checkpoint.previous != self._digest:
            self._complain(
                "checkpoint_order", number, f"checkpoint {number} does not follow the checkpoint that is before it"
            )
        elif self.newest is not None and checkpoint.position < self.newest.position:
            self._complain(
                "checkpoint_order", number, f"checkpoint {number} is at an earlier position than the one before it"
            )

    def _complain(self, kind: str, number: int, words: str) -> None:
        self.wrong = self.wrong or (kind, number, words)
