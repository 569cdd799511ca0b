"""Participation tokens: what `services/problems` signs and a selector verifies without asking anyone.

A JWT (RFC 7519) signed with EdDSA (RFC 8037) by the platform's one signing key; `aud` is the problem, `sub` the
organization.
"""

import time
from functools import lru_cache
from typing import Final

import jwt

from fedota.contracts.commands import IssuedToken
from fedota.errors import FedotaError
from fedota.events import uuid7

_ISSUER: Final = "fedota"
_ALGORITHM: Final = "EdDSA"
_CLAIMS: Final = ["iss", "aud", "sub", "exp", "jti"]
_REMEMBERED: Final = 4096  # tokens


def sign(private_key: str, problem_id: str, organization: str, *, seconds: int) -> IssuedToken:
    """A token that lets `organization` take part in the problem for so many seconds; `private_key` is PEM, Ed25519."""
    now = int(time.time())
    claims = {
        "iss": _ISSUER,
        "aud": problem_id,
        "sub": organization,
        "iat": now,
        "exp": now + seconds,
        "jti": uuid7().hex,
    }
    return IssuedToken(token=jwt.encode(claims, private_key, algorithm=_ALGORITHM), expires=now + seconds)


def verify(public_key: str, token: str, problem_id: str) -> str:
    """The organization that the token speaks for. Raises `token_refused`, saying what to do next."""
    if not token:
        raise FedotaError("token_refused", "No token was sent. Send the join kit's as 'Authorization: Bearer <token>'.")
    organization, expires = _verified(public_key, token, problem_id)
    if expires <= time.time():
        raise FedotaError("token_refused", "The participation token has expired. Fetch a new join kit.")
    return organization


@lru_cache(maxsize=_REMEMBERED)
def _verified(public_key: str, token: str, problem_id: str) -> tuple[str, float]:
    """Whose token it is, and until when it is good; only tokens that were good are remembered.

    A signature takes longer to check than all the rest of a check-in, and what was signed once stays signed.
    """
    try:
        claims = jwt.decode(
            token,
            public_key,
            algorithms=[_ALGORITHM],
            audience=problem_id,
            issuer=_ISSUER,
            options={"require": _CLAIMS, "verify_exp": False},
        )
        return str(claims["sub"]), float(claims["exp"])
    except jwt.InvalidAudienceError:
        raise FedotaError("token_refused", "The token is for another problem. Use this problem's join kit.") from None
    except (jwt.InvalidTokenError, TypeError, ValueError):
        raise FedotaError(
            "token_refused", "The participation token is not signed by this platform. Fetch a new join kit."
        ) from None
