"""The main job from beginning to end, as `fedota demo` plays it, and what it leaves in every store."""

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import quote

import asyncpg
import msgspec
import pytest
from safetensors.numpy import load

from fedota.client.api import Api
from fedota.contracts.runtime import Ready
from fedota.events import Event
from fedota.events.rounds import RoundUpdated
from fedota.local.platform import process_directory, read_tokens
from fedota.local.seaweedfs import S3Access
from fedota.local.state import Remembered
from gateway.projection import PROJECTION
from tests.e2e.conftest import PATIENCE, Command
from tests.support.objects import content, opened
from tests.support.waiting import until

HOSPITALS = ["Aare Screening Centre", "Birch Clinic", "Cedar Tumour Centre"]
STAGES = ["selection", "configuration", "reporting", "completed"]


class Played:
    """A demo that was played to its end and kept running."""

    def __init__(self, fedota: Command, output: subprocess.CompletedProcess[str]) -> None:
        assert output.returncode == 0, output.stderr
        self.result = json.loads(output.stdout)
        self.said = output.stderr
        (found,) = fedota.directory.glob("fedota-demo-*")
        self.path = found / "platform"
        self.remembered = msgspec.json.decode((self.path / "state.json").read_bytes(), type=Remembered)

    @property
    def problem_id(self) -> str:
        """The problem that was trained."""
        problem_id: str = self.result["problem_id"]
        return problem_id

    def database_url(self, role: str, secret: str) -> str:
        """The database, as a role."""
        port = self.remembered.ports["postgres"]
        return f"postgresql://{role}:{quote(self.remembered.secrets[secret])}@127.0.0.1:{port}/fedota"

    def objects(self) -> dict[str, bytes]:
        """Every object in the bucket."""
        keys = json.loads((self.path / "s3" / "identities.json").read_text())["identities"][0]["credentials"][0]
        url = f"http://127.0.0.1:{self.remembered.ports['s3']}"
        with opened(S3Access(url, keys["accessKey"], keys["secretKey"])) as store:
            names = [str(item.object_name) for item in store.list_objects("fedota", recursive=True)]
            return {name: content(store, "fedota", name) for name in names}


@pytest.fixture
async def played(fedota: Command) -> AsyncIterator[Played]:
    """`fedota demo --json --keep`, and afterwards what it says to stop it."""
    played = Played(fedota, fedota.run("demo", "--json", "--keep"))
    yield played
    assert fedota.run("down", "--data-dir", str(played.path)).returncode == 0
    fedota.wait_until_nothing_is_left()


async def test_the_story_is_true_in_every_store(played: Played, fedota: Command) -> None:
    """What the demo printed, the log, the read models, the object store and the pages tell the same story."""
    result, problem_id = played.result, played.problem_id
    async with Api.open(result["gateway_url"], read_tokens(played.path)["operator"]) as api:
        events = await api.events(problem_id)
        problem, rounds = await api.problem(problem_id), await api.rounds(problem_id)
        contributions = await api.contributions(problem_id)
    _check_accuracy(result["accuracy"])
    _check_order(events)
    _check_rounds(result, [event.data for event in events if isinstance(event.data, RoundUpdated)])
    assert result["events"] == {kind: sum(event.type == kind for event in events) for kind in result["events"]}
    assert (problem["state"], problem["model"]["sha256"]) == ("completed", result["model"]["sha256"])
    assert problem["infrastructure"]["state"] == "stopped"
    assert [row["stage"] for row in rounds] == ["completed"] * 12
    _check_objects(played)
    _check_contributions(played, contributions)
    await _check_replay(played)
    _check_audit(fedota.run("audit", "verify", "--data-dir", str(played.path)))


def _check_audit(audit: subprocess.CompletedProcess[str]) -> None:
    assert audit.returncode == 0 and audit.stdout.startswith("All fits (events: "), audit


def _check_accuracy(accuracy: dict[str, Any]) -> None:
    assert list(accuracy["alone"]) == HOSPITALS
    assert accuracy["federated"] > max(accuracy["alone"].values())
    assert accuracy["federated"] >= accuracy["pooled"] - 0.01
    assert accuracy["pooled"] > 0.9


def _check_order(events: list[Event]) -> None:
    """The choreography, in the order of the log."""
    kinds = [event.type for event in events]
    firsts = sorted(set(kinds), key=kinds.index)
    chain = ["ProblemCreated", "FilesStored", "ProblemStarted", "InfraSpawned", "ProblemCompleted", "InfraStopped"]
    assert [kind for kind in firsts if kind in chain] == chain
    assert kinds.index("RoundUpdated") > kinds.index("ProblemStarted")
    assert kinds.index("ProblemCompleted") > max(i for i, kind in enumerate(kinds) if kind == "RoundUpdated")
    assert [event.position for event in events] == sorted({event.position for event in events})
    by_id = {event.id: event for event in events}
    (completed,) = (event for event in events if event.type == "ProblemCompleted")
    assert completed.causation and by_id[completed.causation].type == "RoundUpdated"


def _check_rounds(result: dict[str, Any], updates: list[RoundUpdated]) -> None:
    assert [update.report for update in updates] == list(range(1, len(updates) + 1))
    for number in range(1, 13):
        stages = [update.stage for update in updates if update.round == number]
        assert sorted(set(stages), key=STAGES.index) == STAGES, f"round {number}: {stages}"
        assert stages == sorted(stages, key=STAGES.index)
    ends = [update for update in updates if update.stage == "completed"]
    assert [sorted(update.participants) for update in ends] == [HOSPITALS] * 12
    assert [row["metrics"] for row in result["rounds"]] == [update.metrics for update in ends]
    assert ends[-1].metrics["loss"] < ends[1].metrics["loss"] / 5
    assert ends[-1].final and not any(update.final for update in ends[:-1])


def _check_contributions(played: Played, contributions: list[dict[str, Any]]) -> None:
    """Each hospital gave each round one update; what is said of it beside the checkpoints is the same."""
    assert [(row["round"], row["organization"], row["updates"], row["refusals"]) for row in contributions] == [
        (number, name, 1, {}) for number in range(1, 13) for name in HOSPITALS
    ]
    assert all(row["size"] > 0 and row["seconds"] > 0 for row in contributions)
    for first in range(0, len(contributions), len(HOSPITALS)):
        assert sum(row["share"] for row in contributions[first : first + len(HOSPITALS)]) == pytest.approx(1)
    manifests = [json.loads(body) for key, body in played.objects().items() if "/checkpoints/" in key and "json" in key]
    told = [one for manifest in sorted(manifests, key=lambda one: one["round"]) for one in manifest["contributions"]]
    assert told == [{name: row[name] for name in told[0]} for row in contributions]


def _check_objects(played: Played) -> None:
    """Nothing but the setter's files, the checkpoints and their manifests: no update of a single client."""
    objects, prefix = played.objects(), f"problems/{played.problem_id}"
    model = played.result["model"]
    content = objects[model["key"]]
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (model["sha256"], model["bytes"])
    assert set(load(content)) == {"mean", "square", "weights", "bias"}
    checkpoints = [key for key in objects if key.startswith(f"{prefix}/checkpoints/") and key.endswith(".safetensors")]
    manifests = [key for key in objects if key.startswith(f"{prefix}/checkpoints/") and key.endswith(".json")]
    files = [key for key in objects if key.startswith(f"{prefix}/files/")]
    assert (len(checkpoints), len(manifests), len(files)) == (12, 12, 3)  # two files and their manifest
    assert len(objects) == 27


async def _check_replay(played: Played) -> None:
    """The gateway's read model is dropped, the gateway killed: it comes back from the log with the same rows."""
    connection = await asyncpg.connect(played.database_url("postgres", "postgres"))
    try:
        before = await _rows(connection)
        assert {name: len(rows) for name, rows in before.items()} | {"feed": 0} == {
            "problems": 1,
            "files": 2,
            "participations": 3,
            "infrastructure": 1,
            "rounds": 12,
            "contributions": 36,
            "feed": 0,
        }
        head = await connection.fetchval("select position from fedota.head")
        pid = msgspec.json.decode((process_directory(played.path, "gateway") / "ready.json").read_bytes(), type=Ready)
        os.kill(pid.pid, signal.SIGKILL)
        await connection.execute("drop schema gateway cascade; create schema gateway authorization fedota_gateway")

        async def rebuilt() -> bool:
            try:
                return bool(await connection.fetchval("select position = $1 from gateway.checkpoint", head))
            except asyncpg.UndefinedTableError:
                return False

        await until(rebuilt, "the gateway's read model stands for the whole log again", PATIENCE)
        assert await _rows(connection) == before
    finally:
        await connection.close()


async def _rows(connection: "asyncpg.Connection[asyncpg.Record]") -> dict[str, list[tuple[Any, ...]]]:
    return {
        name: sorted(tuple(map(repr, row)) for row in await connection.fetch(f"select * from gateway.{name}"))
        for name in PROJECTION.names
    }


@pytest.mark.parametrize("moment", ["✓ PostgreSQL", "✓ hospital", "✓ client", " completed "])
def test_ctrl_c_leaves_nothing_behind(fedota: Command, moment: str) -> None:
    """At whatever moment it comes, no process and no file stays."""
    _interrupt(fedota, moment, lambda process: process.send_signal(signal.SIGINT))
    assert not list(fedota.directory.glob("fedota-demo-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_leaves_nothing_behind(fedota: Command, number: int) -> None:
    """Not even what was to be kept: only a story that came to its end leaves something running."""
    _interrupt(fedota, "✓ PostgreSQL", lambda process: process.send_signal(number), "--keep")
    assert not list(fedota.directory.glob("fedota-demo-*"))


def test_a_kill_leaves_no_process_behind(fedota: Command) -> None:
    """Nobody can tidy up after kill -9, and still everything ends."""
    _interrupt(fedota, "✓ client", lambda process: process.kill())


def _interrupt(fedota: Command, moment: str, how: Callable[[subprocess.Popen[str]], None], *options: str) -> None:
    with fedota.started("demo", *options) as process:
        assert process.stdout
        for line in process.stdout:
            if moment in line:
                break
        else:
            raise AssertionError(f"the demo ended before it said {moment!r}")
        assert len(fedota.processes()) > 3
        how(process)
        process.stdout.read()
        assert process.wait(60) != 0
    fedota.wait_until_nothing_is_left()


def test_a_story_that_fails_says_why_and_is_no_success(fedota: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the settings for a store elsewhere: one plain sentence, exit status 1, nothing on stdout."""
    monkeypatch.setenv("FEDOTA_S3_URL", "http://127.0.0.1:9")
    output = fedota.run("demo", "--json")
    assert (output.returncode, output.stdout) == (1, "")
    assert "FEDOTA_S3_URL needs FEDOTA_S3_ACCESS_KEY" in output.stderr and "Traceback" not in output.stderr
    fedota.wait_until_nothing_is_left()


def test_a_place_with_a_long_name_is_no_obstacle(fedota: Command) -> None:
    """Sockets have short names only: none of ours stands at a path of the user's choosing."""
    path = fedota.directory / ("long name " * 12) / "data"
    assert fedota.run("up", "--data-dir", str(path)).returncode == 0
    assert fedota.run("down", "--data-dir", str(path)).returncode == 0


def test_hospitals_reach_selectors_by_tls_when_that_is_asked_for(
    fedota: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they always do on other machines: by the authority that came with their kits."""
    monkeypatch.setenv("FEDOTA_SELECTORS_TLS", "true")
    output = fedota.run("demo", "--json")
    assert output.returncode == 0, output.stderr
    assert output.stderr.count("https://127.0.0.1:") == 2
    assert json.loads(output.stdout)["rounds"][-1]["participants"] == HOSPITALS
    fedota.wait_until_nothing_is_left()
