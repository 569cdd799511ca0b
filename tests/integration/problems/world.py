"""The problems service and what it meets; storage, orchestrator and rounds are played by what the tests record."""

from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedota.contracts.commands import CreateProblem, StartProblem
from fedota.events.orchestrator import InfraFailed
from fedota.events.problems import Plan
from fedota.events.rounds import Checkpoint, RoundUpdated
from fedota.events.storage import FilesStored, StoredFile
from fedota.kernel.files import write_private
from services.problems.app import create_app
from services.problems.settings import Settings
from tests.support.services import Platform, new_id, until
from tests.support.world import ServiceWorld

ABOUT: Final[dict[str, Any]] = {
    "name": "Tumours",
    "description": "About",
    "data_format": "csv",
    "client_image": "registry.test/team/client:1.0",
    "plan": Plan(rounds=3, goal_count=2),
}


class World(ServiceWorld[Settings]):
    """A platform with a problems service that tests start, stop and kill."""

    def __init__(self, platform: Platform, directory: Path) -> None:
        key = Ed25519PrivateKey.generate()
        self.public_key = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        self.key_file = directory / "tokens.pem"
        write_private(self.key_file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        settings = platform.settings(Settings, "problems", token_key_file=self.key_file)
        super().__init__(
            platform, directory, "problems", create_app, settings, FEDOTA_TOKEN_KEY_FILE=str(self.key_file)
        )

    async def create(self, problem_id: str | None = None) -> str:
        """A problem that somebody published."""
        problem_id = problem_id or new_id()
        await self.platform.send(CreateProblem(problem_id=problem_id, **ABOUT))
        return problem_id

    async def store_model(self, problem_id: str) -> StoredFile:
        """What storage records when the model was uploaded."""
        file = StoredFile(name="model.safetensors", role="model", key="k/model", sha256="a" * 64, size=10)
        await self.platform.record(FilesStored(problem_id=problem_id, files=[file]))
        return file

    async def start(self) -> str:
        """A problem that runs."""
        problem_id = await self.create()
        await self.store_model(problem_id)
        await self.platform.send(StartProblem(problem_id=problem_id))
        return problem_id

    async def types(self, problem_id: str) -> list[str]:
        """What happened to the problem."""
        return [event.type for event in await self.platform.events(f"problems/{problem_id}")]

    async def happens(self, problem_id: str, *types: str) -> None:
        """Wait until these are the last things that happened to the problem."""

        async def happened() -> bool:
            return (await self.types(problem_id))[-len(types) :] == list(types)

        await until(happened, f"{types}")


def final(problem_id: str, stage: Any, *, run: int = 1, last: bool = True) -> RoundUpdated:
    """A report of the third round, the run's last word unless it is not the `last`."""
    done = Checkpoint(key="k/3", sha256="b" * 64, size=9) if stage == "completed" else None
    return RoundUpdated(
        problem_id=problem_id,
        run=run,
        report=12,
        round=3,
        attempt=1,
        stage=stage,
        goal_count=2,
        minimum_count=2,
        final=last,
        checkpoint=done,
        reason="abandoned: nobody came",
    )


def failed(problem_id: str, *, run: int = 1) -> InfraFailed:
    """The infrastructure gave up."""
    return InfraFailed(problem_id=problem_id, run=run, namespace="ns", reason="no memory", log=["line"])
