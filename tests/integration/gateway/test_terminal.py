"""The operator's commands, as processes of their own, against a gateway that runs."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
import pytest

from fedota.contracts.operations import Retried
from gateway import operations
from tests.integration.gateway.conftest import TOKENS
from tests.integration.gateway.test_operations import Process

_PATIENCE = 60.0  # seconds that a command may take on a busy machine


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it said on standard output."""
        return self.out.splitlines()


def environment(platform: Any, role: str = "operator") -> dict[str, str]:
    """Where the gateway is, and a role's token."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "FEDOTA_URL": platform.url, "FEDOTA_TOKEN": TOKENS[role], "PYTHONWARNINGS": "error"}


async def begun(*words: str, env: dict[str, str], **streams: Any) -> asyncio.subprocess.Process:
    """A command that runs."""
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE, **streams}
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "fedota", *words, env=env, **pipes)


async def fedota(*words: str, env: dict[str, str], typed: str = "") -> Ended:
    """A command that ends."""
    process = await begun(*words, env=env, stdin=asyncio.subprocess.PIPE)
    async with asyncio.timeout(_PATIENCE):
        out, err = await process.communicate(typed.encode())
    assert process.returncode is not None and "Traceback" not in err.decode(), err.decode()
    return Ended(process.returncode, out.decode(), err.decode())


async def test_events_are_listed_for_people_and_for_programs(platform: Any) -> None:
    """One line an event without colours in a pipe; with --json each is the gateway's own."""
    problem_id, env = str(uuid4()), environment(platform, "organization")
    await platform.record(*platform.story(str(uuid4())), *platform.story(problem_id))
    newest = await fedota("events", "list", "--limit", "2", env=env)
    assert newest.status == 0 and "\x1b" not in newest.out
    assert [re.split(r"  +", line.strip())[0] for line in newest.lines] == ["19", "20"]
    assert "Round 1 — completed" in newest.lines[-1] and "--until 18" in newest.err
    first = await fedota("events", "list", "--after", "0", "--limit", "3", "--json", env=env)
    assert [msgspec.json.decode(line)["position"] for line in first.lines] == [1, 2, 3]
    assert "--after 3" in first.err
    some = await fedota(
        *("events", "list", "--problem", problem_id, "--type", "filesstored", "--since", "1h", "--limit", "0"), env=env
    )
    assert len(some.lines) == 1 and "12" in some.out and "FilesStored" in some.out
    none = await fedota("events", "list", "--actor", "nobody", env=env)
    assert (none.status, none.out) == (0, "") and "20 events" in none.err


async def test_mistakes_are_answered_in_words(platform: Any, tmp_path: Path) -> None:
    """Exit status 2 for what was typed wrong, 1 for what was refused; never a traceback, never the token."""
    env = environment(platform)
    nowhere = {**env, "FEDOTA_URL": "http://127.0.0.1:9"}
    no_token = {name: value for name, value in env.items() if name != "FEDOTA_TOKEN"}
    (tmp_path / "token").write_text("two words")
    turns = asyncio.Semaphore(os.cpu_count() or 1)

    async def is_told(words: Sequence[str], where: dict[str, str], status: int, said: str) -> None:
        async with turns:
            ended = await fedota(*words, env=where)
        assert ended.status == status and said in ended.err, (words, ended)
        assert "fdt_" not in ended.out + ended.err

    mistakes: list[tuple[Sequence[str], dict[str, str], int, str]] = [
        (("events", "list", "--until", "1", "--after", "2"), env, 2, "no event is between"),
        (("events", "list", "--since", "soon"), env, 2, "15m"),
        (("events", "list", "--type", "Nothing"), env, 2, "ProblemCreated"),
        (("events", "list"), no_token, 2, "FEDOTA_TOKEN"),
        (("events", "list", "--url", "fedota.example"), env, 2, "https://fedota.example"),
        (("events", "list", "--token-file", str(tmp_path / "token")), env, 1, "one word"),
        (("events", "list", "--token-file", str(tmp_path / "none")), env, 1, "No such file"),
        (("events", "list", "--data-dir", str(tmp_path)), env, 1, "No platform runs"),
        (("events", "list"), {**env, "FEDOTA_TOKEN": "fdt_wrong"}, 1, "does not know the token from FEDOTA_TOKEN"),
        (("events", "list"), nowhere, 1, "does not answer"),
        (("events", "tail"), nowhere, 1, "does not answer"),
        (("events", "list", "--problem", "nothing"), env, 1, "No problem is called"),
        (("events", "show", "3"), env, 1, "position 0"),
        (("events", "show", "0"), env, 2, "x>=1"),
        (("events", "replay", "--speed", "0"), env, 2, "x>0"),
        (("projections", "verify"), env, 2, "--all"),
        (("projections", "rebuild", "relay"), env, 1, "gateway, orchestrator"),
        (("projections", "rebuild", "a/b?c"), env, 1, "gateway, orchestrator"),
        (("projections", "list"), environment(platform, "setter"), 1, "operator"),
        (("deadletters", "show", "gateway", "1"), env, 1, "no dead letter"),
    ]
    async with asyncio.TaskGroup() as all_:
        for mistake in mistakes:
            all_.create_task(is_told(*mistake))


async def test_an_event_is_shown_with_what_led_to_it_and_what_followed(platform: Any) -> None:
    """The whole chain, with all of the event."""
    problem_id, env = str(uuid4()), environment(platform)
    await platform.record(*platform.story(problem_id)[:5])
    [started] = [event for event in await platform.ground.events(f"problems/{problem_id}") if event.position == 5]
    spawned, *_ = await platform.follow_up(started, platform.story(problem_id)[5])
    await platform.follow_up(spawned, *platform.story(problem_id)[6:8])
    shown = await fedota("events", "show", "6", env=env)
    chain = shown.out[shown.out.index("What led to it") :].splitlines()[1:]
    assert [line.strip()[:3] for line in chain] == ["a r", "└ 5", "▸ 6", "└ 7", "└ 8"]
    assert '"coordinator": "http://c"' in shown.out and str(spawned.id) in shown.out
    alone = await fedota("events", "show", "1", env=env)
    assert alone.out.rstrip().endswith("└ nothing")


async def test_a_replay_ends_with_what_follows_from_it(platform: Any) -> None:
    """The counts, and the problems as they were at the last position that was played."""
    env = environment(platform)
    await platform.record(*platform.story(str(uuid4())))
    whole = await fedota("events", "replay", "--quiet", env=env)
    assert "Played 10 events up to position 10" in whole.out and "4  RoundUpdated" in whole.out
    assert "Name: running, round 1 of 3 completed, 1 taking part" in whole.out
    part = await fedota("events", "replay", "--until", "3", "--json", "--speed", "1000", env=env)
    assert [msgspec.json.decode(line)["position"] for line in part.lines] == [1, 2, 3]
    assert "Name: ready, 0 taking part" in part.err
    assert "nothing was played" in (await fedota("events", "replay", "--after", "10", env=env)).err


@asynccontextmanager
async def tailing(platform: Any, *words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A tail, which is interrupted in the end and has to end well."""
    # a shell that starts these tests in the background has them ignore Ctrl-C, and so would what they start
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = await begun("events", "tail", "--json", *words, env=environment(platform))
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield process
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(_PATIENCE):
            _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 130 and "Traceback" not in err.decode(), err.decode()


async def positions(process: asyncio.subprocess.Process, count: int) -> list[int]:
    """The next so many positions that it prints."""
    assert process.stdout is not None
    async with asyncio.timeout(_PATIENCE):
        return [msgspec.json.decode(await process.stdout.readline())["position"] for _ in range(count)]


async def test_a_tail_goes_on_after_a_break_with_nothing_lost_or_twice(platform: Any) -> None:
    """It begins with some of the past; a broken stream is told of, and goes on behind the last event."""
    await platform.record(*platform.story(str(uuid4()))[:4])
    async with tailing(platform, "--lines", "2") as process:
        assert await positions(process, 2) == [3, 4]
        await platform.record(*platform.story(str(uuid4()))[:2])
        assert await positions(process, 2) == [5, 6]
        platform.feed.close()
        assert process.stderr is not None
        async with asyncio.timeout(_PATIENCE):
            assert b"Trying again" in await process.stderr.readline()
        await platform.record(*platform.story(str(uuid4()))[:2])
        platform.feed.closed = False
        assert await positions(process, 2) == [7, 8]


async def test_a_closed_pipe_ends_a_command_silently(platform: Any) -> None:
    """As `| head -1` does it."""
    await platform.record(*platform.story(str(uuid4())))
    read, write = os.pipe()
    os.close(read)
    process = await begun("events", "list", env=environment(platform), stdout=write)
    os.close(write)
    async with asyncio.timeout(_PATIENCE):
        _, err = await process.communicate()
    assert (process.returncode, err) == (141, b"")


async def test_what_cannot_be_written_is_said(platform: Any) -> None:
    """As on a disk that is full."""
    await platform.record(*platform.story(str(uuid4())))
    full = os.open("/dev/full", os.O_WRONLY)
    process = await begun("events", "list", env=environment(platform), stdout=full)
    os.close(full)
    async with asyncio.timeout(_PATIENCE):
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode() == "Error: What this says cannot be written: No space left on device.\n"


async def test_when_no_process_answers_that_is_said(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway is there, and what it asks is not."""
    monkeypatch.setattr(operations, "PROJECTING", ("rounds", "storage"))
    ended = await fedota("projections", "verify", "--all", env=environment(platform))
    assert ended.status == 1 and "No process with a projection answers" in ended.err


async def test_the_read_model_is_verified_and_rebuilt(platform: Any) -> None:
    """Exit status 1 when rows differ, with the table and the rows; 0 once a rebuild has put it right."""
    env = environment(platform)
    await platform.record(*platform.story(str(uuid4())))
    await platform.projector.catch_up()
    fine = await fedota("projections", "verify", "gateway", env=env)
    assert fine.status == 0 and "every row is the same" in fine.out
    await platform.pool.execute("update files set size = 11")
    wrong = await fedota("projections", "verify", "gateway", env=env)
    assert wrong.status == 1 and "files: 1 row only in the live one" in wrong.out and "model.safetensors" in wrong.out
    assert (await fedota("projections", "rebuild", "gateway", env=env)).status == 0
    assert (await fedota("projections", "verify", "gateway", env=env)).status == 0
    printed = await fedota("projections", "list", "--json", env=env)
    assert [msgspec.json.decode(line)["process"] for line in printed.lines] == ["gateway"]
    assert printed.status == 1 and "rounds does not answer" in printed.err
    listed = await fedota("projections", "list", env=env)
    assert listed.status == 1 and "does not answer" in listed.out and "verified" in listed.out


async def test_dead_letters_are_seen_and_given_up(platform: Any) -> None:
    """What would be lost is said before it is; without a yes nothing happens."""
    env = environment(platform)
    await platform.record(*platform.story(str(uuid4()))[:4])
    async with platform.ground.bus("rounds") as bus, Process().running(bus) as played:
        listed = await fedota("deadletters", "list", "rounds", env=env)
        assert listed.status == 0 and len(listed.lines) == 4 and "parked" in listed.out
        shown = await fedota("deadletters", "show", "rounds", "2", env=env)
        assert "Parked behind it" in shown.out and "fedota deadletters retry rounds 2" in shown.out
        retried = await fedota("deadletters", "retry", "rounds", "2", env=env)
        assert (retried.status, retried.out) == (1, "1 event handled, 1 event still parked.\n")
        assert len((await fedota("deadletters", "list", "rounds", "--json", env=env)).lines) == 3
        played.retried = Retried(handled=0, left=0)
        again = await fedota("deadletters", "retry", "rounds", "9", env=env)
        assert (again.status, again.out) == (0, "The event at position 9 is no dead letter of rounds (any more).\n")
        kept = await fedota("deadletters", "drop", "rounds", "2", env=env, typed="n\n")
        assert kept.status == 1 and "for good" in kept.err
        assert "drop" not in [name for name, _ in played.asked]
        dropped = await fedota("deadletters", "drop", "rounds", "2", "--yes", env=env)
        assert dropped.status == 0 and "retry rounds 4" in dropped.err
        silent = await fedota("deadletters", "list", env=env)
        assert silent.status == 1 and "storage does not answer" in silent.err
