"""Every error that reaches a person or another process: a stable code, its HTTP status and public words.

The table `CATALOGUE` is the whole of it. An error that is not in it is a defect and leaves a process only
as `internal_error`, without its text.
"""

from typing import Any, Final, NamedTuple

import msgspec


class Kind(NamedTuple):
    """What is the same for every occurrence of an error."""

    status: int
    title: str


CATALOGUE: Final[dict[str, Kind]] = {
    # the request
    "invalid_request": Kind(400, "The request is not well formed"),
    "unauthenticated": Kind(401, "No valid token was sent"),
    "forbidden": Kind(403, "Your role may not do this"),
    "not_found": Kind(404, "There is no such thing"),
    "method_not_allowed": Kind(405, "This address does not answer that method"),
    "too_large": Kind(413, "The body is too large"),
    "unsupported_encoding": Kind(415, "The body's encoding is not accepted"),
    "invalid_field": Kind(422, "A field is not valid"),
    "key_reused": Kind(422, "The idempotency key was used for another request"),
    "position_not_reached": Kind(404, "The log has not reached that position"),
    # problems and participations
    "problem_not_found": Kind(404, "There is no such problem"),
    "problem_exists": Kind(409, "The problem exists already"),
    "problem_state": Kind(409, "The problem is not in a state that allows this"),
    "files_missing": Kind(409, "The problem's files are not complete"),
    "participation_state": Kind(409, "The participation is not in a state that allows this"),
    "participation_not_found": Kind(404, "The organization does not take part in this problem"),
    # people
    "person_named": Kind(409, "A token still names this person"),
    # storage
    "file_rejected": Kind(422, "A file is not what was announced"),
    "key_forbidden": Kind(403, "The key is outside the problem's own prefix"),
    # rounds
    "report_refused": Kind(409, "The report does not follow from the recorded rounds"),
    # updates, said by a selector to a client
    "token_refused": Kind(401, "The participation token is not valid here"),
    "ticket_refused": Kind(403, "The ticket is not valid for this round"),
    "round_over": Kind(409, "The round takes no more updates"),
    "already_reported": Kind(409, "This update was sent before"),
    "offset_mismatch": Kind(409, "The update goes on from another place"),
    "update_malformed": Kind(422, "The update is not a valid safetensors body"),
    "update_mismatch": Kind(422, "The update's tensors do not match the model"),
    "update_not_finite": Kind(422, "The update holds NaN or infinity"),
    "update_examples": Kind(422, "The update's number of examples is not valid"),
    "update_too_large": Kind(413, "The update is larger than the model allows"),
    # the platform
    "conflict": Kind(409, "Somebody else changed this at the same moment"),
    "internal_error": Kind(500, "Something went wrong on our side"),
    "unavailable": Kind(503, "A part of the platform does not answer"),
    "timeout": Kind(504, "It took too long"),
}


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error in words, as RFC 9457 (problem+json) puts it, with Fedota's stable `code`.

    `fields` names each field that is wrong (dotted path) and why.
    """

    code: str
    status: int
    title: str
    detail: str = ""
    fields: dict[str, str] = {}
    retry_after: int | None = None  # seconds

    @property
    def type(self) -> str:
        """The problem type's URI reference: relative, its meaning is in docs/errors.md."""
        return f"/errors/{self.code}"


class FedotaError(Exception):
    """An error with public words; raise it wherever a person or another process is to read it.

    `code` is a key of `CATALOGUE`; `detail` is one plain sentence: what happened, why, what to do next.
    """

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        fields: dict[str, str] | None = None,
        retry_after: int | None = None,
    ) -> None:
        kind = CATALOGUE[code]
        super().__init__(f"{code}: {detail or kind.title}")
        self.problem = Problem(
            code=code,
            status=kind.status,
            title=kind.title,
            detail=detail,
            fields=fields or {},
            retry_after=retry_after,
        )

    @classmethod
    def of(cls, problem: Problem) -> "FedotaError":
        """The error that another process put into words."""
        if problem.code not in CATALOGUE:
            return cls("internal_error", problem.detail or problem.title)
        return cls(problem.code, problem.detail, fields=problem.fields, retry_after=problem.retry_after)


def problem_json(problem: Problem) -> dict[str, Any]:
    """The RFC 9457 object for an `application/problem+json` body."""
    return {"type": problem.type, **msgspec.to_builtins(problem)}
