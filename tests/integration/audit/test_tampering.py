"""Whatever a superuser of the database, or who writes to the bucket, does to the log is found where it was done."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedota.audit.checkpoints import sign, verified
from fedota.audit.verification import Report
from fedota.events import uuid7
from tests.integration.audit.conftest import Tampered, World, public_pem

Script = Callable[[Path, Path | None], None]


async def renumbered(connection: Tampered, condition: str, number: str) -> None:
    """Give events other positions, past the primary key."""
    await connection.execute(f"update fedota.events set position = -({number}) where {condition}")
    await connection.execute("update fedota.events set position = -position where position < 0")


async def put_in(connection: Tampered, position: int) -> None:
    """A made-up event at a position, all later ones pushed back; its hash is made up too."""
    await renumbered(connection, f"position >= {position}", "position + 1")
    await connection.execute(
        "insert into fedota.events select $1::bigint, $2::text::uuid, type, schema, 'problems/' || $2::text, 1, time,"
        " actor, correlation, causation, traceparent, data, sha256(hash)"
        " from fedota.events where position = $1::bigint - 1",
        position,
        str(uuid7()),
    )
    await connection.execute("update fedota.head set position = position + 1")


async def put_in_fitting(connection: Tampered) -> None:
    """The same, with the hash that belongs there."""
    await put_in(connection, 7)
    kept = await connection.fetch("select position, hash from fedota.events where position > 7")
    head = await connection.fetchrow("select position, hash from fedota.head")
    await connection.chain_anew(7)
    for row in kept:
        await connection.execute("update fedota.events set hash = $2 where position = $1", *row)
    await connection.execute("update fedota.head set position = $1, hash = $2", *head)


async def swapped(connection: Tampered, one: int, other: int) -> None:
    """Two events change places."""
    await renumbered(connection, f"position in ({one}, {other})", f"{one + other} - position")


async def swapped_under_their_hashes(connection: Tampered) -> None:
    """Two events change places, and the hashes stay where they were."""
    await swapped(connection, 7, 12)
    await connection.execute(
        "update fedota.events e set hash = o.hash from fedota.events o where e.position + o.position = 19"
        " and e.position in (7, 12)"
    )


async def cut_off(connection: Tampered, last: int) -> None:
    """Nothing is left past a position, and the head row says so."""
    await connection.execute("delete from fedota.events where position > $1", last)
    await connection.execute(
        "update fedota.head set position = $1, hash = (select hash from fedota.events where position = $1)", last
    )


async def rewritten(connection: Tampered, change: str, first: int) -> None:
    """An event is changed, and the chain made anew from there to the head."""
    await connection.execute(f"update fedota.events set {change} where position = {first}")
    await connection.chain_anew(first)


async def closed_up(connection: Tampered) -> None:
    """An event is deleted, and the later ones take its place."""
    await connection.execute("delete from fedota.events where position = 7")
    await renumbered(connection, "position > 7", "position - 1")
    await connection.execute("update fedota.head set position = position - 1")


COLUMNS: Final = "id, type, schema, subject, version, time, actor, correlation, causation, traceparent, data, hash"
UNBOUND: Final = """
alter table fedota.events drop constraint events_pkey, drop constraint events_id_key,
    drop constraint events_subject_version_key
"""


def beside(position: str) -> str:
    """A copy of event 10 at another place, in a stream that its owner reads."""
    columns = COLUMNS.replace("id,", "gen_random_uuid(),", 1).replace("version", "version + 100")
    return (
        f"insert into fedota.events (position, {COLUMNS})"
        f" select {position}, {columns} from fedota.events where position = 10"
    )


def sql(*statements: str) -> Callable[[Tampered], Awaitable[None]]:
    """What a few statements do."""

    async def tamper(connection: Tampered) -> None:
        for statement in statements:
            await connection.execute(statement)

    return tamper


class Case(NamedTuple):
    """What is done, and what is found: its kind and position, and what the script calls it where that differs."""

    tamper: Callable[[Tampered], Awaitable[None]]
    kind: str
    position: int
    script: tuple[str, int] | None = None


def edit(change: str, position: int = 7) -> Case:
    """One column of one event is changed."""
    return Case(sql(f"update fedota.events set {change} where position = {position}"), "edited", position)


CASES: Final = {
    "data": edit("data = replace(convert_from(data, 'UTF8'), 'Zürich', 'Zug')::bytea", 9),
    "data that is no text": edit("data = '\\xff00'"),
    "actor": edit("actor = 'nobody'"),
    "time": edit("time = time + interval '1 microsecond'"),
    "time of another era": edit(
        "time = (to_char(time at time zone 'utc', 'YYYY-MM-DD HH24:MI:SS.US') || '+00 BC')::timestamptz"
    ),
    "id": edit("id = gen_random_uuid()"),
    "cause": edit("causation = null"),
    "version": edit("version = version + 100"),
    "the first event": edit("actor = 'nobody'", 1),
    "an event that no checkpoint covers": edit("actor = 'nobody'", 28),
    "the last event": edit("actor = 'nobody'", 30),
    "a hash": edit("hash = sha256(hash)"),
    "the last hash": edit("hash = sha256(hash)", 30),
    "deletion": Case(sql("delete from fedota.events where position = 7"), "deleted", 7),
    "deletion of several": Case(sql("delete from fedota.events where position in (7, 8, 9, 14)"), "deleted", 7),
    "deletion of the first": Case(sql("delete from fedota.events where position = 1"), "deleted", 1),
    "deletion that is hidden": Case(closed_up, "deleted", 7, ("edited", 7)),
    "swap": Case(lambda connection: swapped(connection, 7, 12), "reordered", 7, ("edited", 7)),
    "swap of neighbours": Case(lambda connection: swapped(connection, 7, 8), "reordered", 7, ("edited", 7)),
    "swap with the last": Case(lambda connection: swapped(connection, 7, 30), "reordered", 7, ("edited", 7)),
    "swap under their hashes": Case(swapped_under_their_hashes, "reordered", 7, ("edited", 7)),
    "insertion": Case(lambda connection: put_in(connection, 7), "inserted", 7, ("edited", 7)),
    "insertion before the last": Case(lambda connection: put_in(connection, 30), "inserted", 30, ("edited", 30)),
    "insertion with a hash that fits": Case(put_in_fitting, "inserted", 7, ("edited", 8)),
    "insertion before the first": Case(sql(beside("0")), "inserted", 0),
    "insertion far before the first": Case(sql(beside("-9223372036854775808")), "inserted", -9223372036854775808),
    "insertion of the same": Case(
        sql(UNBOUND, "insert into fedota.events select * from fedota.events where position = 7"), "inserted", 7
    ),
    "cut off": Case(lambda connection: cut_off(connection, 18), "truncated", 19),
    "cut off, and the head row forgotten": Case(sql("delete from fedota.events where position > 28"), "truncated", 29),
    "emptied": Case(
        sql("delete from fedota.events", "update fedota.head set position = 0, hash = decode(repeat('00', 32), 'hex')"),
        "truncated",
        1,
    ),
    "rewritten": Case(lambda connection: rewritten(connection, "actor = 'nobody'", 12), "rewritten", 11),
    "rewritten from the first on": Case(lambda connection: rewritten(connection, "data = '{}'", 1), "rewritten", 1),
    "head row's hash": Case(sql("update fedota.head set hash = sha256(hash)"), "head", 30),
    "head row's position": Case(sql("update fedota.head set position = 28"), "head", 29, ("head", 28)),
    "versions": Case(lambda connection: rewritten(connection, "version = version + 5", 27), "versions", 27),
}


@pytest.mark.parametrize("name", CASES)
async def test_what_a_superuser_does_is_found(told: World, script: Script, name: str) -> None:
    """By the audit and by the script, and what is before it is still known to be good."""
    case = CASES[name]
    kind, position = case.script or (case.kind, case.position)
    async with told.tampered() as connection:
        await case.tamper(connection)
        report = await told.verify()
        (finding,) = report.findings
        assert (finding.kind, finding.position) == (case.kind, case.position), finding
        assert report.covered == max((n for n in (0, 10, 20, 25) if n < case.position), default=0), report
        with pytest.raises(SystemExit, match=rf"\({kind}\).*(?<!\d){position}\b"):
            script(await told.export(), told.public_key_file)


async def test_rows_at_the_border_of_a_page_or_at_none_are_found(told: World) -> None:
    """A page would end before the second one; no page has a row without a position, though services read it."""
    async with told.tampered() as connection:
        fill = "insert into fedota.events select position, gen_random_uuid()" + COLUMNS.removeprefix("id")
        await connection.execute(UNBOUND)
        await connection.execute(f"{fill} from fedota.events, generate_series(1, 1000) where position = 1")
        pages = [page async for page in told.log.pages(0, 30)]
        assert [len(page) for page in pages] == [1001, 29]
    async with told.tampered() as connection:
        await connection.execute(UNBOUND)
        await connection.execute("alter table fedota.events alter position drop not null")
        await connection.execute(beside("null"))
        report = await told.verify()
    assert [(finding.kind, finding.position) for finding in report.findings] == [("inserted", 31)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("alter table fedota.events disable trigger append_only", "events is not guarded"),
        ("alter table fedota.requests enable trigger append_only", "requests is not guarded"),
        ("alter table fedota.events enable row level security", "events shows some people some rows only"),
        ("create rule other as on insert to fedota.head do also nothing", "head has the rule other"),
        (
            "create trigger other before insert on fedota.events for each row execute function fedota.refuse_change()",
            "events has the trigger other",
        ),
        ("create table public.more () inherits (fedota.events)", "events has rows of another table"),
        (
            "alter table fedota.requests rename to hidden; create view fedota.requests as select * from fedota.hidden",
            "requests is not a table",
        ),
    ],
)
async def test_tables_that_are_not_as_they_were_made_are_found(told: World, change: str, words: str) -> None:
    """By any of these, others could be shown another log than the auditor, or it be changed unseen."""
    async with told.tampered() as connection:
        await connection._connection.execute(change)
        (finding, *_) = (await told.verify()).findings
    assert (finding.kind, finding.position, finding.checkpoint) == ("guards", None, None)
    assert words in finding.words, finding


async def test_what_nobody_touched_fits(told: World, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    """The log that all these tests begin with."""
    report = await told.verify()
    assert report == Report(findings=[], head=30, verified=30, covered=25, checkpoint=4, checkpoints=4)
    script(await told.export(), told.public_key_file)
    assert "30 events, 4 checkpoints" in capsys.readouterr().out


async def test_the_words_say_what_happened(told: World) -> None:
    """For who has never seen a hash chain."""
    async with told.tampered() as connection:
        await rewritten(connection, "actor = 'nobody'", 12)
        (finding,) = (await told.verify()).findings
    assert finding.checkpoint == 3
    assert "between position 11 and position 20" in finding.words and "checkpoint 3" in finding.words


def forged(world: World) -> None:
    """By who has another key."""
    checkpoint = verified(world.checkpoint(3), world.key.public_key())
    world.plant(3, sign(checkpoint, Ed25519PrivateKey.generate()))


def altered(world: World) -> None:
    """Under the signature that it had."""
    world.plant(3, world.checkpoint(3).replace(b"position 20\n", b"position 21\n"))


def garbage(world: World) -> None:
    """Of any size."""
    world.plant(3, b"\xff" * 100_000)


def emptied(world: World) -> None:
    """An object without a byte: it has no range to be read."""
    world.plant(3, b"")


def deleted(world: World) -> None:
    """One in the middle."""
    world.remove(3)


def first_deleted(world: World) -> None:
    """As if the log had begun later."""
    world.remove(1)


def all_deleted(world: World) -> None:
    """As if there had never been a notary."""
    for number in world.numbers():
        world.remove(number)


def copied(world: World) -> None:
    """An old one in the place of a newer one."""
    world.plant(3, world.checkpoint(2))


def signed_again(world: World) -> None:
    """With the notary's own key, as if another checkpoint had been before the one after it."""
    checkpoint = verified(world.checkpoint(2), world.key.public_key())
    later = msgspec.structs.replace(checkpoint, time="2026-01-01T00:00:00.000000Z")
    world.plant(2, sign(later, world.key))


@pytest.mark.parametrize(
    ("tamper", "kind", "number"),
    [
        (forged, "checkpoint_forged", 3),
        (altered, "checkpoint_forged", 3),
        (garbage, "checkpoint_forged", 3),
        (emptied, "checkpoint_forged", 3),
        (deleted, "checkpoint_missing", 3),
        (first_deleted, "checkpoint_missing", 1),
        (all_deleted, "checkpoint_missing", 1),
        (copied, "checkpoint_order", 3),
        (signed_again, "checkpoint_order", 3),
    ],
)
async def test_what_is_done_to_checkpoints_is_found(
    told: World, script: Script, tamper: Callable[[World], None], kind: str, number: int
) -> None:
    """By the audit and by the script; the log itself still fits."""
    with told.restored():
        tamper(told)
        report = await told.verify()
        (finding,) = report.findings
        assert (finding.kind, finding.checkpoint, finding.position, report.verified) == (kind, number, None, 30)
        with pytest.raises(SystemExit, match=rf"\({kind}\).*\bcheckpoint {number}\b"):
            script(await told.export(), told.public_key_file)


async def test_another_public_key_fits_nothing(told: World, script: Script) -> None:
    """Who puts their own key in the place of the notary's is found by who got it by another way."""
    other = Ed25519PrivateKey.generate()
    (finding,) = (await told.verify(key=other)).findings
    assert (finding.kind, finding.checkpoint) == ("checkpoint_forged", 1)
    (told.directory / "other.pem").write_bytes(public_pem(other))
    with pytest.raises(SystemExit, match=r"\(public_key\)"):
        script(await told.export(), told.directory / "other.pem")


async def test_both_at_once_are_both_said(told: World) -> None:
    """Who reaches database and bucket may do both."""
    with told.restored():
        async with told.tampered() as connection:
            await rewritten(connection, "actor = 'nobody'", 12)
            told.remove(3)
            first, second = (await told.verify()).findings
    assert (first.kind, first.position, first.checkpoint) == ("rewritten", 11, 4)
    assert (second.kind, second.checkpoint) == ("checkpoint_missing", 3)
