"""What comes with a client's request, in its headers: read, and checked."""

import math
import re
from typing import Final, NamedTuple

import msgspec
from aiohttp import web

from fedota.errors import FedotaError
from fedota.runtime.protocol import (
    BYTES,
    CLIENT,
    EXAMPLES,
    METRICS,
    METRICS_LIMIT,
    MOST_EXAMPLES,
    MOST_METRICS,
    OFFSET,
    WHOLE,
    Metrics,
)
from fedota.runtime.receiving import ONLY_TENSORS, expects

AHEAD: Final = 1 << 18  # bytes that the event loop may read of a body before it is wanted
_CLIENT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,10}", re.ASCII)


class Sent(NamedTuple):
    """What comes with an update: where its bytes go on, and how many there are in all, where that is known."""

    offset: int
    length: int | None
    examples: int
    metrics: dict[str, float]


def client_of(request: web.Request) -> str:
    """The name that a client gives itself."""
    name = request.headers.get(CLIENT, "")
    if not _CLIENT.fullmatch(name):
        what = "1 to 64 letters, digits, dots, dashes or underscores"
        raise FedotaError("invalid_field", f"{CLIENT}: send {what}.", fields={CLIENT: what})
    return name


def sent_with(request: web.Request, most: int) -> Sent:
    """What an update's headers say, checked."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FedotaError("unsupported_encoding", "Send the update as it is, without Content-Encoding.")
    offset, whole = 0, None
    if request.method == "PATCH":
        offset = _bytes(request, OFFSET)
        whole = _bytes(request, WHOLE) if WHOLE in request.headers else None
    end = offset + (request.content_length or 0)
    if whole is None and request.content_length is not None:
        whole = end
    if whole is not None and end > whole:
        what = "the bytes of the whole update"
        said = f"{WHOLE}: send {what}; this request ends at byte {end}, and it says {whole}."
        raise FedotaError("invalid_field", said, fields={WHOLE: what})
    if whole is not None and whole > most:
        said = f"The update has {whole} bytes; for this model {most} are the most. {ONLY_TENSORS}"
        raise FedotaError("update_too_large", said)
    return Sent(offset, whole, _examples(request), _metrics(request))


def ahead_of(request: web.Request) -> int:
    """The bytes of a body, at most, that are read before it is wanted."""
    if expects(request):
        return 0
    length = request.content_length
    return AHEAD if length is None else min(length, AHEAD)


def in_full(request: web.Request, error: FedotaError) -> FedotaError:
    """What its client cannot see in it: that the body was taken for more than it was."""
    problem = error.problem
    if request.method != "PATCH" or WHOLE in request.headers or problem.code != "update_malformed":
        return error
    taken = f"Without {WHOLE} the body was taken for all that was left: send it with each part, and the update anew."
    return FedotaError(problem.code, f"{problem.detail} {taken}")


def _bytes(request: web.Request, name: str) -> int:
    text = request.headers.get(name, "")
    if not BYTES.fullmatch(text):
        what = "a whole number of bytes"
        raise FedotaError("invalid_field", f"{name}: send {what}, got {text[:40]!r}.", fields={name: what})
    return int(text)


def _examples(request: web.Request) -> int:
    text = request.headers.get(EXAMPLES, "")
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= MOST_EXAMPLES:
        raise FedotaError(
            "update_examples", f"{EXAMPLES} must be a whole number from 1 to {MOST_EXAMPLES}, got {text[:40]!r}."
        )
    return int(text)


def _metrics(request: web.Request) -> dict[str, float]:
    text = request.headers.get(METRICS, "{}")
    if len(text) > METRICS_LIMIT:
        raise _wrong_metrics(f"it may have at most {METRICS_LIMIT} bytes, and has {len(text)}")
    try:
        metrics = msgspec.json.decode(text, type=Metrics)
    except msgspec.ValidationError as error:
        raise _wrong_metrics(str(error)) from None
    except (msgspec.DecodeError, UnicodeEncodeError):
        raise _wrong_metrics("it is not JSON") from None
    if infinite := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise _wrong_metrics(f"{infinite[0]!r} is not finite")
    return metrics


def _wrong_metrics(why: str) -> FedotaError:
    what = f"send a JSON object of at most {MOST_METRICS} finite numbers, with names of 1 to 100 characters"
    return FedotaError("invalid_field", f"{METRICS}: {why}. Correct it: {what}.", fields={METRICS: why})
