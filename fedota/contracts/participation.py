"""Participation tokens: what `services/problems` signs and a selector verifies without asking anyone.

A JWT (RFC 7519) signed with EdDSA (RFC 8037) by the platform's one signing key; `aud` is the problem, `sub` the
organization.
"""

import time
from typing import Final

import jwt

from fedota.contracts.commands import IssuedToken
from fedota.errors import FedotaError
from fedota.events import uuid7

_ISSUER: Final = "fedota"
_ALGORITHM: Final = "EdDSA"
_CLAIMS: Final = ["iss", "aud", "sub", "exp", "jti"]


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
    try:
        claims = jwt.decode(
            token,
            public_key,
            algorithms=[_ALGORITHM],
            audience=problem_id,
            issuer=_ISSUER,
            options={"require": _CLAIMS},
        )
    except jwt.ExpiredSignatureError:
        raise FedotaError("token_refused", "The participation token has expired. Fetch a new join kit.") from None
    except jwt.InvalidAudienceError:
        raise FedotaError("token_refused", "The token is for another problem. Use this problem's join kit.") from None
    except jwt.InvalidTokenError:
        raise FedotaError(
            "token_refused", "The participation token is not signed by this platform. Fetch a new join kit."
        ) from None
    organization: str = claims["sub"]
    return organization
