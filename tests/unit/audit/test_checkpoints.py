"""Checkpoints alone: one form, one signature, one sequence."""

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedota.audit.checkpoints import (
    NOTHING,
    Checkpoint,
    CheckpointError,
    Sequence,
    file_digest,
    key_id,
    private_key,
    public_key,
    sign,
    verified,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()


def checkpoint(number: int = 1, position: int = 0, previous: bytes = NOTHING) -> Checkpoint:
    """One that is as it should be."""
    hash_ = bytes([position % 256]) * 32
    time = "2026-01-31T12:00:00.000001Z"
    return Checkpoint(number=number, position=position, hash=hash_, time=time, previous=previous, key=key_id(PUBLIC))


def files(*positions: int) -> list[bytes]:
    """A whole sequence."""
    made: list[bytes] = []
    for number, position in enumerate(positions, start=1):
        previous = file_digest(made[-1]) if made else NOTHING
        made.append(sign(checkpoint(number, position, previous), KEY))
    return made


def test_the_form_is_what_the_documentation_says() -> None:
    """Ed25519 signs the same bytes with the same key always alike."""
    assert sign(checkpoint(7, 3), KEY).decode() == (
        "fedota checkpoint 1\n"
        "number 7\n"
        "position 3\n"
        f"hash {'03' * 32}\n"
        "time 2026-01-31T12:00:00.000001Z\n"
        f"previous {'00' * 32}\n"
        "key 56475aa75463474c0285df5dbf2bcab73da651358839e9b77481b2eab107708c\n"
        "signature kHEZUI/GL+iSJiZpFnKDzaCd3+UWGdS+Y++zvZV8jHGrYaXY6ZUyWIYqEMzO8FNWnQUcFJ/jNQswoYVfAWh1Bw==\n"
    )


@given(number=st.integers(1, 10**18), position=st.integers(0, 10**18), hash_=st.binary(min_size=32, max_size=32))
def test_what_is_signed_is_read_back(number: int, position: int, hash_: bytes) -> None:
    """Whatever it says."""
    one = msgspec.structs.replace(checkpoint(), number=number, position=position, hash=hash_)
    assert verified(sign(one, KEY), PUBLIC) == one


@given(place=st.integers(0), other=st.integers(1, 255))
def test_no_byte_can_be_changed(place: int, other: int) -> None:
    """Nor one be added at either end."""
    file = bytearray(files(5)[0])
    file[place % len(file)] ^= other
    for changed in (bytes(file), files(5)[0] + b"\n", b"\n" + files(5)[0]):
        with pytest.raises(CheckpointError):
            verified(changed, PUBLIC)


def test_a_signature_has_one_form() -> None:
    """Base64 has bits to spare at its end: changed, they would make another file under the same signature."""
    file = files(5)[0]
    last = file.index(b"==") - 1
    for character in b"ABQRghwx":
        if character != file[last]:
            with pytest.raises(CheckpointError):
                verified(file[:last] + bytes([character]) + file[last + 1 :], PUBLIC)


def test_another_key_is_named() -> None:
    """So that who took the wrong file sees that."""
    with pytest.raises(CheckpointError, match="names the key 56475aa75463474c…, but the public key here is"):
        verified(files(5)[0], Ed25519PrivateKey.generate().public_key())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).map(sorted), st.data())
def test_a_sequence_misses_whatever_is_taken_out(positions: list[int], data: st.DataObject) -> None:
    """But for the newest ones: who knows of them has them in mind (the notary does)."""
    made = list(enumerate(files(*positions), start=1))
    out = data.draw(st.sets(st.sampled_from(made)))
    sequence = Sequence(PUBLIC)
    for number, file in made:
        if (number, file) not in out:
            sequence.take(number, file)
    kept = [number for number, file in made if (number, file) not in out]
    missing = [number for number in range(1, max(kept, default=0)) if number not in kept]
    assert (sequence.wrong[:2] if sequence.wrong else None) == (("checkpoint_missing", missing[0]) if missing else None)
    assert sequence.count == len(kept)


def test_a_later_one_cannot_speak_of_an_earlier_position() -> None:
    """Even when the notary's key has signed it."""
    first = sign(checkpoint(1, 9), KEY)
    sequence = Sequence(PUBLIC)
    assert sequence.take(1, first)
    assert sequence.take(2, sign(checkpoint(2, 8, file_digest(first)), KEY)) is None
    assert sequence.wrong and sequence.wrong[:2] == ("checkpoint_order", 2)


def test_what_is_no_key_is_none() -> None:
    """Whatever it is instead."""
    for pem in (b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        assert public_key(pem) is None and private_key(pem) is None
