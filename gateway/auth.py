"""Who may do what: role tokens, and the one table of roles × actions."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import structlog

from fedota.contracts.commands import Digest, Organization
from fedota.errors import FedotaError
from fedota.kernel.settings import SettingsError

Role = Literal["setter", "organization", "operator"]
_log = structlog.get_logger(__name__)
_EVERYBODY: Final[frozenset[Role]] = frozenset({"setter", "organization", "operator"})
_SETTERS: Final[frozenset[Role]] = frozenset({"setter", "operator"})
# visible at both ends and without control characters, which no two screens show alike
PersonName = Annotated[
    str,
    msgspec.Meta(
        min_length=1, max_length=200, pattern=r"^[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?$(?!\n)"
    ),
]
_PERSON_ID: Final = re.compile("[0-9a-f]{32}")
_ORGANIZATIONS: Final[frozenset[Role]] = frozenset({"organization"})
_OPERATORS: Final[frozenset[Role]] = frozenset({"operator"})

ACTIONS: Final[dict[str, frozenset[Role]]] = {
    "read_problems": _EVERYBODY,
    "create_problem": _SETTERS,
    "revise_problem": _SETTERS,
    "start_problem": _SETTERS,
    "stop_problem": _SETTERS,
    "read_files": _EVERYBODY,
    "upload_files": _SETTERS,
    "read_participations": _EVERYBODY,
    "request_participation": _ORGANIZATIONS,
    "decide_participation": _SETTERS,
    "fetch_kit": _ORGANIZATIONS,
    "read_infrastructure": _EVERYBODY,
    "read_infrastructure_log": _SETTERS,
    "read_rounds": _EVERYBODY,
    "read_contributions": _EVERYBODY,
    "read_model": _SETTERS,
    "read_events": _EVERYBODY,
    "read_metrics": _OPERATORS,
    "read_projections": _OPERATORS,
    "rebuild_projections": _OPERATORS,
    "verify_projections": _OPERATORS,
    "read_dead_letters": _OPERATORS,
    "retry_dead_letters": _OPERATORS,
    "drop_dead_letters": _OPERATORS,
    "read_people": _OPERATORS,
    "forget_people": _OPERATORS,
    "sign_out": _EVERYBODY,
}


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who sends a request. With an `organization` it acts for that one alone.

    `person` is somebody's name: it leaves the gateway sealed only, see `gateway.people`.
    """

    role: Role
    organization: str | None = None
    person: str | None = None

    @property
    def standing(self) -> str:
        """In which standing it acts: what events say of who caused them, when that is nobody by name."""
        return self.role if self.organization is None else f"{self.role}:{self.organization}"

    def may(self, action: str) -> bool:
        """Whether the table allows it."""
        return self.role in ACTIONS[action]

    def require(self, action: str) -> None:
        """Raise `forbidden`, naming the roles that may, unless the table allows it."""
        if not self.may(action):
            allowed = " or ".join(sorted(ACTIONS[action]))
            raise FedotaError(
                "forbidden",
                f"Your token has the role {self.role}, which may not {action.replace('_', ' ')}. "
                f"Use a token with the role {allowed}.",
            )

    def require_organization(self, organization: str) -> None:
        """Raise `forbidden` when this identity acts for another organization."""
        if self.organization not in (None, organization):
            raise FedotaError(
                "forbidden",
                f"Your token acts for {self.organization}, not for {organization}. Use the token of {organization}.",
            )


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the tokens file: the SHA-256 (hex) of a token, its role, and whom an organization's stands for.

    `person` names who holds it, as an account name or an address: people see it, and the log never does.
    """

    role: Role
    sha256: Digest
    organization: Organization | None = None
    person: PersonName | None = None

    def __post_init__(self) -> None:
        if self.person is not None and _PERSON_ID.fullmatch(self.person):
            raise ValueError("a person's name may not look like a person's id, 32 hexadecimal digits")
        if self.organization is not None and self.role != "organization":
            raise ValueError(f"a token of the role {self.role} stands for no organization, not for {self.organization}")


class Tokens:
    """The tokens that open the gateway, known by their digests only."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tuple(tokens)

    def identify(self, token: str) -> Identity | None:
        """Whose token this is."""
        return self.find(digest_of(token))

    def find(self, digest: str) -> Identity | None:
        """Whose token has this digest. All are compared, each in constant time: the time taken says nothing."""
        matches = [known for known in self._tokens if hmac.compare_digest(known.sha256, digest)]
        if not matches:
            return None
        return Identity(role=matches[0].role, organization=matches[0].organization, person=matches[0].person)

    @property
    def people(self) -> frozenset[str]:
        """The names of those who hold a token that says so."""
        return frozenset(token.person for token in self._tokens if token.person is not None)


def digest_of(token: str) -> str:
    """What a token is known by."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


class TokensFile:
    """The tokens in a file, read again when the file changes: who is taken out of it is out with the next request.

    A file that cannot be read, or is wrong, or names people without `may_name_people`, changes nothing: the log says
    why. Raises `SettingsError` when that is so at first.
    """

    def __init__(self, path: Path, *, may_name_people: bool) -> None:
        self._path = path
        self._may_name_people = may_name_people
        self._seen = self._look()  # before it is read: what is written meanwhile is seen to be another state
        self._tokens = read_tokens(path)

    @property
    def current(self) -> Tokens:
        """The tokens now."""
        if (seen := self._look()) != self._seen:
            self._seen = seen
            self._read_again()
        return self._tokens

    def find(self, digest: str) -> Identity | None:
        """Who has a token of this digest now."""
        return self.current.find(digest)

    def _read_again(self) -> None:
        try:
            tokens = read_tokens(self._path)
            if tokens.people and not self._may_name_people:
                raise SettingsError("A token names a person, but people_key_file is not set: docs/api.md says more.")
        except SettingsError as error:
            _log.error("the tokens file is wrong, and the tokens from before still count", error=str(error))
            return
        self._tokens = tokens
        _log.info("the tokens file was read again")

    def _look(self) -> tuple[int, ...]:
        """What is another when the file is: its time of change too, which `chmod` sets."""
        with suppress(OSError):
            state = self._path.stat()
            return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
        return ()


def read_tokens(path: Path) -> Tokens:
    """The tokens in a JSON list of `{"role", "sha256"}`, and where it has them `organization` and `person`."""
    try:
        if path.stat().st_mode & 0o077:
            raise SettingsError(f"Others may read the tokens file {path}. Run: chmod 600 {path}")
        return Tokens(msgspec.json.decode(path.read_bytes(), type=list[Token]))
    except OSError as error:
        raise SettingsError(f"The tokens file {path} cannot be read: {error.strerror}. Set tokens_file.") from None
    except msgspec.DecodeError as error:
        raise SettingsError(f"The tokens file {path} is not valid: {error}. Correct that entry.") from None
