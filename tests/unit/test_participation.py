"""Participation tokens: what a selector makes of one, without asking anybody."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedota.contracts.participation import sign, verify
from fedota.errors import FedotaError

PROBLEM = "018f0000-0000-7000-8000-000000000000"
OTHER = "018f0000-0000-7000-8000-000000000001"


def pair() -> tuple[str, str]:
    """A private key and its public one, as PEM."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


PRIVATE, PUBLIC = pair()
STRANGER, _ = pair()


def claims(**changes: Any) -> dict[str, Any]:
    """What a token says; None leaves a claim out."""
    now = int(time.time())
    usual = {"iss": "fedota", "aud": PROBLEM, "sub": "Clinic A", "iat": now, "exp": now + 60, "jti": "x"}
    return {name: value for name, value in {**usual, **changes}.items() if value is not None}


def signed(**changes: Any) -> str:
    """A token with these claims, by the platform's own key."""
    return jwt.encode(claims(**changes), PRIVATE, algorithm="EdDSA")


def unsigned(header: dict[str, str], signature: bytes = b"") -> str:
    """A token that is not signed as it should be."""
    return ".".join(_base64(part) for part in (json.dumps(header).encode(), json.dumps(claims()).encode(), signature))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def with_public_key_as_secret() -> str:
    """The attack on those who let a token name its own algorithm: everybody knows the public key."""
    body = unsigned({"alg": "HS256", "typ": "JWT"}).rpartition(".")[0]
    return f"{body}.{_base64(hmac.digest(PUBLIC.encode(), body.encode(), hashlib.sha256))}"


def with_another_organization() -> str:
    """A good token whose subject was exchanged."""
    head, _, signature = signed().split(".")
    return f"{head}.{_base64(json.dumps(claims(sub='Clinic B')).encode())}.{signature}"


def test_a_token_speaks_for_its_organization_in_its_problem() -> None:
    """As long as it was said to be good."""
    issued = sign(PRIVATE, PROBLEM, "Clinic Ä", seconds=60)
    assert verify(PUBLIC, issued.token, PROBLEM) == "Clinic Ä"
    assert 58 <= issued.expires - time.time() <= 60


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (sign(PRIVATE, PROBLEM, "Clinic A", seconds=-1).token, "has expired"),
        (sign(PRIVATE, OTHER, "Clinic A", seconds=60).token, "for another problem"),
        (sign(STRANGER, PROBLEM, "Clinic A", seconds=60).token, "not signed by this platform"),
        (signed(exp=None), "not signed by this platform"),
        (signed(aud=None), "not signed by this platform"),
        (signed(sub=None), "not signed by this platform"),
        (signed(jti=None), "not signed by this platform"),
        (signed(iss="another"), "not signed by this platform"),
        (signed(iss=None), "not signed by this platform"),
        (signed(aud=[OTHER]), "for another problem"),
        (signed(sub=7), "not signed by this platform"),
        (signed(iat=int(time.time()) + 3600), "not signed by this platform"),
        (unsigned({"alg": "none", "typ": "JWT"}), "not signed by this platform"),
        (unsigned({"alg": "EdDSA", "typ": "JWT"}, b"x" * 64), "not signed by this platform"),
        (with_public_key_as_secret(), "not signed by this platform"),
        (with_another_organization(), "not signed by this platform"),
        ("", "No token was sent"),
        ("a.b.c", "not signed by this platform"),
        ("\u0661.é.c", "not signed by this platform"),
        ("x" * 100_000, "not signed by this platform"),
    ],
)
def test_every_other_token_is_refused_in_words(token: str, said: str) -> None:
    """Forged, changed, of another platform, of another problem, or too old."""
    with pytest.raises(FedotaError, match=said) as refused:
        verify(PUBLIC, token, PROBLEM)
    assert refused.value.problem.code == "token_refused"


def test_a_token_that_was_good_before_expires_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature that was checked is remembered; that the token's time is over is looked at each time."""
    issued = sign(PRIVATE, PROBLEM, "Clinic A", seconds=60)
    assert verify(PUBLIC, issued.token, PROBLEM) == "Clinic A"
    monkeypatch.setattr(time, "time", lambda: issued.expires - 0.5)
    assert verify(PUBLIC, issued.token, PROBLEM) == "Clinic A"
    monkeypatch.setattr(time, "time", lambda: float(issued.expires))
    with pytest.raises(FedotaError, match="has expired"):
        verify(PUBLIC, issued.token, PROBLEM)


def test_a_token_that_is_good_for_one_problem_is_not_for_another() -> None:
    """Whatever is remembered of it."""
    token = sign(PRIVATE, PROBLEM, "Clinic A", seconds=60).token
    assert verify(PUBLIC, token, PROBLEM) == "Clinic A"
    with pytest.raises(FedotaError, match="for another problem"):
        verify(PUBLIC, token, OTHER)
