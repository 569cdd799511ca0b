"""The NATS credentials of a namespace's coordinator."""

from pathlib import Path
from typing import Final, Protocol

import msgspec

from fedota.events import to_json
from fedota.kernel.bus import Bus
from fedota.kernel.files import write_private
from fedota.kernel.nats_accounts import Minted, Operator, delete_account, push_account

CREDENTIALS: Final = "nats.creds"
_ACCOUNT: Final = "account.json"


class Accounts(Protocol):
    """Gives a namespace its way into NATS, kept in the namespace's directory, and takes it away again."""

    async def grant(self, problem_id: str, directory: Path) -> Path:
        """The credentials file, good from now on; the same account again when the directory has one."""
        ...

    async def revoke(self, directory: Path) -> None:
        """Let what was granted there be good for nothing. Harmless when nothing was."""
        ...

    async def check(self) -> None:
        """Raise when nothing could be granted now."""
        ...


class ProblemAccounts:
    """An account for each launch: with it a coordinator reaches its own problem's subjects and no other."""

    def __init__(self, operator: Operator, system: Bus, platform: str) -> None:
        self._operator = operator
        self._system = system
        self._platform = platform

    async def grant(self, problem_id: str, directory: Path) -> Path:
        """Minted once and pushed each time: the server may have lost what it was told."""
        minted = _recall(directory)
        if minted is None:
            minted = self._operator.problem_account(problem_id, platform=self._platform)
            write_private(directory / _ACCOUNT, to_json(minted))  # before it is pushed: it must be found to be deleted
        write_private(directory / CREDENTIALS, minted.credentials.encode())
        await push_account(self._system.client, minted.jwt)
        return directory / CREDENTIALS

    async def revoke(self, directory: Path) -> None:
        """Deleted on the server, which cuts the connections of whoever uses it."""
        if minted := _recall(directory):
            await delete_account(self._system.client, self._operator, minted.account)

    async def check(self) -> None:
        """The system account's connection must answer."""
        await self._system.check()


class SharedCredentials:
    """One user for all coordinators, for a NATS server without operator mode.

    Problems are not isolated from each other then: a coordinator that was taken over can speak for any of them.
    """

    def __init__(self, credentials: Path) -> None:
        self._credentials = credentials

    async def grant(self, problem_id: str, directory: Path) -> Path:
        """A copy of the shared file."""
        write_private(directory / CREDENTIALS, self._credentials.read_bytes())
        return directory / CREDENTIALS

    async def revoke(self, directory: Path) -> None:
        """The user is everybody's: it stays."""

    async def check(self) -> None:
        """The shared file must be there."""
        self._credentials.stat()


def _recall(directory: Path) -> Minted | None:
    try:
        return msgspec.json.decode((directory / _ACCOUNT).read_bytes(), type=Minted)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
