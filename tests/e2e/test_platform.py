"""`fedota up`, `down` and `status`: the platform without the demo."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from fedota.client.api import Api
from fedota.contracts.runtime import Ready
from fedota.errors import FedotaError
from fedota.events.problems import Plan
from fedota.kernel.files import write_private
from fedota.local.background import read_progress, supervisor_argv
from fedota.local.platform import MODULES, process_directory, read_tokens
from fedota.local.state import HOST, Remembered, own_directory
from tests.e2e.conftest import PATIENCE, Command, commanding
from tests.support.services import until

PROBLEM = {"name": "n", "description": "d", "data_format": "f", "client_image": "registry.test/image"}
API = Path(__file__).parents[2] / "docs" / "api.md"
needs_curl_and_jq = pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("jq")), reason="the flow in docs/api.md needs curl and jq"
)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The command with a platform that runs where no --data-dir is given, for tests that leave it running."""
    with commanding(tmp_path_factory.mktemp("standing")) as command:
        up = command.run("up")
        assert up.returncode == 0, up.stderr
        yield command
        assert command.run("down").returncode == 0
        command.wait_until_nothing_is_left()


def url_of(path: Path) -> str:
    """Where its gateway answers, while it is up."""
    progress = read_progress(path)
    assert progress
    return progress.gateway_url


async def test_everything_is_still_there_after_a_restart(fedota: Command) -> None:
    """Same tokens, same address, same problems; each command says what is so."""
    path = fedota.directory / "data"
    place = ["--data-dir", str(path)]
    nothing = fedota.run("status", *place)
    assert (nothing.returncode, nothing.stdout) == (
        1,
        f"There is no platform in {path}. Start one here with: fedota up --data-dir {path}\n",
    )
    assert (
        fedota.run("down", *place).stderr
        == f"Error: There is no platform in {path}. Say with --data-dir where it is.\n"
    )

    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        write_private(own_directory(path) / "state.json", msgspec.json.encode(Remembered(ports={"gateway": port})))
        first = fedota.run("up", *place)
    assert first.returncode == 0, first.stderr
    assert f"another program has port {port} now" in first.stdout
    tokens, url = read_tokens(path), url_of(path)
    lines = first.stdout.splitlines()  # what is copied is followed by nothing that sticks to it
    assert {line.split()[-1] for line in lines if line.startswith("  ")} == {url, *tokens.values()}
    async with Api.open(url, tokens["setter"]) as api:
        problem_id = await api.create_problem(**PROBLEM, plan=Plan(rounds=1, goal_count=1))
    assert fedota.run("up", *place).stdout == first.stdout  # a second one changes nothing and tells the same
    status = fedota.run("status", *place)
    assert status.returncode == 0 and status.stdout.count("ready") == len(MODULES)
    assert fedota.run("down", *place).returncode == 0
    fedota.wait_until_nothing_is_left()
    assert f"{path} was not running" in fedota.run("down", *place).stdout

    assert fedota.run("up", *place).returncode == 0
    assert (read_tokens(path), url_of(path)) == (tokens, url)
    async with Api.open(url, tokens["organization"]) as api:
        assert (await api.problem(problem_id))["name"] == "n"
    assert fedota.run("down", *place).returncode == 0
    fedota.wait_until_nothing_is_left()


def test_two_who_start_it_at_once_get_the_same_one(fedota: Command) -> None:
    """And a supervisor that comes too late has no word in it."""
    path = fedota.directory / "data"
    with fedota.started("up", "--data-dir", str(path)) as one, fedota.started("up", "--data-dir", str(path)) as other:
        said = [process.communicate(timeout=PATIENCE)[0] for process in (one, other)]
        codes = [one.returncode, other.returncode]
    assert 0 in codes, said
    assert all("Fedota is up" in text or "already" in text or "just starting" in text for text in said), said
    late = subprocess.run(supervisor_argv(path), capture_output=True, text=True, timeout=PATIENCE)
    assert late.returncode == 1 and "is running" in late.stderr
    assert fedota.run("status", "--data-dir", str(path)).returncode == 0
    assert fedota.run("down", "--data-dir", str(path)).returncode == 0
    fedota.wait_until_nothing_is_left()


async def test_whatever_is_killed_comes_back(fedota: Command) -> None:
    """kill -9 of each process of the platform, and the API answers again."""
    path = fedota.directory / "data"
    assert fedota.run("up", "--data-dir", str(path)).returncode == 0
    async with Api.open(url_of(path), read_tokens(path)["setter"]) as api:
        for name in MODULES:
            file = process_directory(path, name) / "ready.json"
            killed = _pid(file)
            assert killed
            os.kill(killed, signal.SIGKILL)

            async def back(file: Path = file, killed: int = killed) -> bool:
                return _pid(file) not in (None, killed)

            await until(back, f"{name} runs again", PATIENCE)

        async def created() -> bool:
            try:
                problem_id = await api.create_problem(**PROBLEM, plan=Plan(rounds=1, goal_count=1))
                return bool((await api.problem(problem_id))["name"] == "n")
            except (FedotaError, OSError):
                return False

        await until(created, "the platform answers", PATIENCE)
    assert fedota.run("down", "--data-dir", str(path)).returncode == 0


def _pid(file: Path) -> int | None:
    """Who answers; None while a new one is being started."""
    with suppress(FileNotFoundError):
        return msgspec.json.decode(file.read_bytes(), type=Ready).pid
    return None


async def test_nobody_comes_in_without_a_token(standing: Command) -> None:
    """Neither without one nor with another's; secrets are in files for their owner alone and in no command line."""
    path = standing.data_directory
    for token in ("", "fdt_setter_wrong"):
        async with Api.open(url_of(path), token) as api:
            with pytest.raises(FedotaError, match="unauthenticated"):
                await api.problem("018f0000-0000-7000-8000-000000000000")
    secrets = [*read_tokens(path).values(), *_remembered_secrets(path)]
    lines = [" ".join(process.cmdline()) for process in standing.processes()]
    assert lines and not [secret for secret in secrets for line in lines if secret in line]
    open_files = [file for file in path.rglob("*") if file.is_file() and file.stat().st_mode & 0o077]
    inside = [file for file in open_files if path / "s3" / "data" not in file.parents]
    assert path.stat().st_mode & 0o077 == 0
    assert not [file for file in inside if any(secret.encode() in file.read_bytes() for secret in secrets)]


def _remembered_secrets(path: Path) -> list[str]:
    secrets: dict[str, str] = msgspec.json.decode((path / "state.json").read_bytes())["secrets"]
    return list(secrets.values())


@needs_curl_and_jq
def test_the_flow_in_the_documentation_runs_as_it_is_written(standing: Command, tmp_path: Path) -> None:
    """From an empty platform to a trained model, by who knows nothing but that page."""
    flow = _run_flow(standing, tmp_path, _flow())
    assert flow.returncode == 0, flow
    rounds = [json.loads(line) for line in flow.stdout.splitlines() if '"round"' in line]
    assert [(row["round"], row["stage"], row["participants"]) for row in rounds] == [
        (number, "completed", ["Aare", "Birch"]) for number in (1, 2, 3)
    ]
    assert flow.stderr.count("The training is finished.") == 2
    assert (tmp_path / "trained.safetensors").read_bytes() != (tmp_path / "model.safetensors").read_bytes()


@needs_curl_and_jq
def test_the_flow_in_the_documentation_does_not_wait_for_what_cannot_come(standing: Command, tmp_path: Path) -> None:
    """The training ends while it waits for selectors: it says why, and ends, too."""
    waits = 'await "running running"\n'
    assert waits in _flow()
    stop = """call "$SETTER" POST "/api/problems/$problem/stop" '{"reason": "Enough of it."}'\n"""
    flow = _run_flow(standing, tmp_path, _flow().replace(waits, stop + waits))
    assert (flow.returncode, "Enough of it." in flow.stderr) == (1, True), flow


@needs_curl_and_jq
def test_an_error_ends_the_flow_in_the_documentation(fedota: Command, standing: Command, tmp_path: Path) -> None:
    """Nothing runs; or the gateway refuses, in words that are seen."""
    flow = _run_flow(fedota, tmp_path, _flow())
    assert (flow.returncode, flow.stdout) == (1, "") and "There is no platform" in flow.stderr, flow
    assert "curl" not in flow.stderr
    flow = _run_flow(standing, tmp_path, _flow().replace('"rounds": 3', '"rounds": 0'))
    assert (flow.returncode, flow.stdout) == (1, "") and "plan.rounds: Expected `int` >= 1" in flow.stderr, flow


def _flow() -> str:
    """The script in docs/api.md."""
    (script,) = re.findall(
        r"^```bash\n(.*?)^```$", API.read_text().partition("## The whole flow")[2], re.MULTILINE | re.DOTALL
    )
    return str(script)


def _run_flow(command: Command, directory: Path, script: str) -> subprocess.CompletedProcess[str]:
    file = directory / "flow.sh"
    file.write_text(script)
    return command.run_beside("bash", str(file), directory=directory)
