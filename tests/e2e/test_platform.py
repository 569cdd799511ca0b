"""`fedota up`, `down` and `status`: the platform without the demo."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from fedota.client.api import Api
from fedota.contracts.runtime import Ready
from fedota.errors import FedotaError
from fedota.events.problems import Plan
from fedota.local.background import read_progress, supervisor_argv
from fedota.local.platform import MODULES, process_directory, read_tokens
from tests.e2e.conftest import PATIENCE, Command
from tests.support.services import until

PROBLEM = {"name": "n", "description": "d", "data_format": "f", "client_image": "registry.test/image"}


def _url(path: Path) -> str:
    progress = read_progress(path)
    assert progress
    return progress.gateway_url


async def test_everything_is_still_there_after_a_restart(fedota: Command) -> None:
    """Same tokens, same address, same problems; each command says what is so."""
    path = fedota.directory / "data"
    place = ["--data-dir", str(path)]
    nothing = fedota.run("status", *place)
    assert (nothing.returncode, "Nothing runs" in nothing.stdout) == (1, True)
    assert "was not running" in fedota.run("down", *place).stdout

    first = fedota.run("up", *place)
    assert first.returncode == 0, first.stderr
    tokens, url = read_tokens(path), _url(path)
    assert all(token in first.stdout for token in tokens.values()) and url in first.stdout
    async with Api.open(url, tokens["setter"]) as api:
        problem_id = await api.create_problem(**PROBLEM, plan=Plan(rounds=1, goal_count=1))
    assert fedota.run("up", *place).stdout == first.stdout  # a second one changes nothing and tells the same
    status = fedota.run("status", *place)
    assert status.returncode == 0 and status.stdout.count("ready") == len(MODULES)
    assert fedota.run("down", *place).returncode == 0
    fedota.wait_until_nothing_is_left()

    assert fedota.run("up", *place).returncode == 0
    assert (read_tokens(path), _url(path)) == (tokens, url)
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
    async with Api.open(_url(path), read_tokens(path)["setter"]) as api:
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


async def test_nobody_comes_in_without_a_token(fedota: Command) -> None:
    """Neither without one nor with another's; secrets are in files for their owner alone and in no command line."""
    path = fedota.directory / "data"
    assert fedota.run("up", "--data-dir", str(path)).returncode == 0
    for token in ("", "fdt_setter_wrong"):
        async with Api.open(_url(path), token) as api:
            with pytest.raises(FedotaError, match="unauthenticated"):
                await api.problem("018f0000-0000-7000-8000-000000000000")
    secrets = [*read_tokens(path).values(), *_remembered_secrets(path)]
    lines = [" ".join(process.cmdline()) for process in fedota.processes()]
    assert lines and not [secret for secret in secrets for line in lines if secret in line]
    open_files = [file for file in path.rglob("*") if file.is_file() and file.stat().st_mode & 0o077]
    inside = [file for file in open_files if path / "s3" / "data" not in file.parents]
    assert path.stat().st_mode & 0o077 == 0
    assert not [file for file in inside if any(secret.encode() in file.read_bytes() for secret in secrets)]
    assert fedota.run("down", "--data-dir", str(path)).returncode == 0


def _remembered_secrets(path: Path) -> list[str]:
    secrets: dict[str, str] = msgspec.json.decode((path / "state.json").read_bytes())["secrets"]
    return list(secrets.values())
