"""What a selector does with clients and orders, without its network."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fedota.contracts.runtime import SelectorSettings
from fedota.errors import FedotaError
from fedota.runtime.aggregation import Weights
from fedota.runtime.places import whole
from fedota.runtime.protocol import Claim, Claimed, ComeBack, Concluded, Meta, ModelRef, Orders, Selected, Work
from fedota.runtime.selector import pool as pool_module
from fedota.runtime.selector import selecting as module
from fedota.runtime.selector.pool import Waiting
from fedota.runtime.selector.selecting import Selecting
from fedota.runtime.tensors import Layout, layout_of
from fedota.runtime.tickets import Ticket

BASE = ModelRef(sha256="b" * 64, size=10)
BODY = safetensors.numpy.save({"w": np.array([1.0, 2.0], np.float32)})
A = Waiting("org", "a")


@pytest.fixture
def selecting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Selecting:
    """Its coordinator answers, and it has every model that it is asked for."""
    settings = SelectorSettings(
        problem_id="p", run=1, name="selector-0", coordinator="http://127.0.0.1:9", token_key="", key="secret"
    )
    made = Selecting(settings, tmp_path)
    made.connected = True

    async def have(_: ModelRef) -> Layout:
        return layout_of(memoryview(BODY))

    async def claim(_: Claim) -> Claimed:
        return Claimed(answer="left_out")

    monkeypatch.setattr(made, "_have", have)
    monkeypatch.setattr(made._link, "claim", claim)
    monkeypatch.setattr(module, "_GATHERING", 0.0)
    (tmp_path / "models").mkdir()
    return made


def orders(one: Selecting, **work: Any) -> Orders:
    """What the coordinator wants of it; nothing when there is no work."""
    usual: dict[str, Any] = {"cohort": "k", "round": 1, "attempt": 1, "base": BASE, "share": 1, "deadline": 2e9}
    return Orders(life=one.life, model=BASE, config={}, work=Work(**{**usual, **work}) if work else None)


async def obeys(one: Selecting, wanted: Orders) -> None:
    """It hears of this, and does it."""
    one._hear(wanted)
    one._ordered.clear()
    await one._obey(wanted)


async def reports(one: Selecting, ticket_id: str) -> Ticket:
    """A client's update is in the sum."""
    assert one.cohort is not None
    ticket = Ticket(
        id=ticket_id,
        organization="org",
        client="a",
        round=1,
        attempt=1,
        cohort=one.cohort.id,
        selector="selector-0",
        life=one.life,
        issued=0.0,
    )
    await one.cohort.count(ticket, Weights(layout_of(memoryview(BODY)), whole(memoryview(BODY))), 1, {})
    return ticket


def selected(one: Selecting) -> int | None:
    """How many clients of its cohort it selected, if it has one."""
    return one.cohort.selected if one.cohort else None


async def waiting(one: Selecting, who: Waiting) -> "asyncio.Task[Any]":
    """Somebody has checked in."""
    before = len(one.pool)
    task = asyncio.create_task(one.check_in(who, None))
    await _until(lambda: len(one.pool) > before)
    return task


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - one turn of the loop
            await asyncio.sleep(0)


async def test_those_for_whom_there_is_no_room_come_back_one_by_one(
    selecting: Selecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at a moment of its own."""
    monkeypatch.setattr(pool_module, "MOST_WAITING", 1)
    there = await waiting(selecting, A)
    answers = [await selecting.check_in(Waiting("org", str(number)), None) for number in range(50)]
    seconds = [answer.seconds for answer in answers if isinstance(answer, ComeBack)]
    assert len(seconds) == 50 and min(seconds) >= 1
    assert seconds == sorted(set(seconds))
    selecting.close()
    await there


async def test_a_selector_that_ends_sends_its_clients_away_one_by_one(selecting: Selecting) -> None:
    """All of them would come to the other selectors at the same moment."""
    tasks = [await waiting(selecting, Waiting("org", str(number))) for number in range(20)]
    selecting.close()
    seconds = [answer.seconds for answer in await asyncio.gather(*tasks)]
    assert len(set(seconds)) == 20 and min(seconds) >= 1


async def test_no_cohort_is_selected_for_twice(selecting: Selecting) -> None:
    """A coordinator that forgot it, and takes it up from another selector, asks for what was done already."""
    first = await waiting(selecting, A)
    await obeys(selecting, orders(selecting, share=1))
    assert isinstance(await first, Selected)
    assert selected(selecting) == 1
    await obeys(selecting, orders(selecting))
    assert selected(selecting) is None
    second = await waiting(selecting, A)
    await obeys(selecting, orders(selecting, share=1))
    assert selected(selecting) == 0
    assert not second.done()
    await obeys(selecting, orders(selecting, cohort="another"))
    assert isinstance(await second, Selected)


async def test_a_selector_tells_all_shares_back(selecting: Selecting) -> None:
    """For a coordinator that does not remember them."""
    shares = {selecting.life: 0, "another": 3}
    await obeys(selecting, orders(selecting, share=0, shares=shares))
    assert selecting.cohort is not None
    held = selecting.cohort.held()
    assert (held.shares, held.share, held.selected) == (shares, 0, 0)


async def fate(one: Selecting, ticket: Ticket) -> str:
    """What a client hears of the update that it keeps, when its poll ends; "unknown" where it is not known."""
    task = asyncio.create_task(one.check_in(Waiting(ticket.organization, ticket.client), ticket))
    await _until(lambda: len(one.pool) > 0)
    one.pool.dismiss()
    answer = await task
    assert isinstance(answer, ComeBack)
    assert answer.known is msgspec.UNSET or (answer.update, answer.known) == ("over", False)
    return answer.update if answer.known is msgspec.UNSET else "unknown"


async def test_whose_updates_count_is_known_some_rounds_later(selecting: Selecting) -> None:
    """A client that was not selected again holds a poll in which several short rounds may pass."""
    kept = []
    for number in range(4):
        await obeys(selecting, orders(selecting, cohort=f"k{number}"))
        kept.append(await reports(selecting, f"t{number}"))
        concluded = Concluded(cohort=f"k{number}", counted=number != 1)
        await obeys(selecting, Orders(life=selecting.life, model=BASE, config={}, last=concluded))
    assert [await fate(selecting, ticket) for ticket in kept] == ["counted", "over", "counted", "counted"]


async def test_only_so_many_updates_are_remembered(selecting: Selecting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones."""
    monkeypatch.setattr(module, "_MOST_FATES", 2)
    kept = []
    for number in range(3):
        await obeys(selecting, orders(selecting, cohort=f"k{number}"))
        kept.append(await reports(selecting, f"t{number}"))
        concluded = Concluded(cohort=f"k{number}", counted=True)
        await obeys(selecting, Orders(life=selecting.life, model=BASE, config={}, last=concluded))
    assert list(selecting._fates) == ["t1", "t2"]
    assert [await fate(selecting, ticket) for ticket in kept[1:]] == ["counted", "counted"]


def of_another(one: Selecting) -> Ticket:
    """The ticket of an update that another selector took, in a cohort that is over."""
    return Ticket(
        id="t", organization="org", client="a", round=1, attempt=1, cohort="before", selector="selector-1", life="other"
    )


@pytest.mark.parametrize(
    ("answer", "said", "asked"),
    [("counted", "counted", 1), ("left_out", "over", 1), ("over", "unknown", 2), ("wait", "pending", 2)],
)
async def test_the_coordinator_knows_what_became_of_other_selectors_updates(
    selecting: Selecting, monkeypatch: pytest.MonkeyPatch, answer: Any, said: str, asked: int
) -> None:
    """It is asked before a client is told that it was left out, and what it knows is remembered."""
    claims: list[Claim] = []

    async def claim(wanted: Claim) -> Claimed:
        claims.append(wanted)
        return Claimed(answer=answer)

    monkeypatch.setattr(selecting._link, "claim", claim)
    await obeys(selecting, orders(selecting))
    ticket = of_another(selecting)
    assert [await fate(selecting, ticket) for _ in range(2)] == [said, said]
    assert len(claims) == asked
    assert (claims[0].cohort, claims[0].ticket, claims[0].issuer) == ("before", "t", "other")
    assert selecting.counts(ticket) is (said == "counted")


async def test_who_is_selected_hears_it_too(selecting: Selecting, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was selected is not changed by it."""

    async def claim(_: Claim) -> Claimed:
        return Claimed(answer="counted")

    monkeypatch.setattr(selecting._link, "claim", claim)
    await obeys(selecting, orders(selecting, cohort="before", share=0))
    await obeys(selecting, orders(selecting, cohort="between", share=0))
    task = asyncio.create_task(selecting.check_in(A, of_another(selecting)))
    await _until(lambda: len(selecting.pool) > 0)
    await obeys(selecting, orders(selecting, cohort="next", round=2))
    answer = await asyncio.wait_for(task, 5)
    assert isinstance(answer, Selected) and (answer.round, answer.update) == (2, "counted")


@pytest.mark.parametrize("trouble", ["it is not there", "it refuses", "it never answers"])
async def test_nobody_waits_for_a_dead_coordinator_to_say(
    selecting: Selecting, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """What nobody knows is said to be so: not that the round went on without the client."""
    asked = 0

    async def claim(_: Claim) -> Claimed:
        nonlocal asked
        asked += 1
        if trouble == "it refuses":
            raise FedotaError("unavailable", "It was killed.")
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(module, "_ASKING", 0.01)
    monkeypatch.setattr(selecting._link, "claim", claim)
    await obeys(selecting, orders(selecting))
    selecting.connected = trouble != "it is not there"
    async with asyncio.timeout(5):
        assert await fate(selecting, of_another(selecting)) == "unknown"
    assert asked == selecting.connected


@pytest.mark.parametrize("cut_off", ["before", "meanwhile"])
async def test_a_sum_is_sent_only_as_long_as_it_is_asked_for(
    selecting: Selecting, monkeypatch: pytest.MonkeyPatch, cut_off: str
) -> None:
    """A coordinator whose answer never comes does not keep the selector from what is wanted of it now."""
    handing = asyncio.Event()

    async def never(meta: Meta, _: memoryview) -> None:
        if meta.collection == "c1":
            handing.set()
            await asyncio.Event().wait()
        taken.append(meta.collection)

    taken: list[str] = []
    monkeypatch.setattr(selecting._link, "hand_over", never)
    await obeys(selecting, orders(selecting, share=0))
    await reports(selecting, "t")
    first, second = orders(selecting, collect="c1"), orders(selecting, collect="c2")
    selecting._hear(first)
    if cut_off == "before":
        selecting._hear(second)
    obeying = asyncio.create_task(selecting._obey(first))
    if cut_off == "meanwhile":
        await asyncio.wait_for(handing.wait(), 5)
        selecting._hear(first)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not obeying.done(), "the same orders once more change nothing"
        selecting._hear(second)
    async with asyncio.timeout(5):
        await obeying
    assert selecting.cohort is not None and not selecting.cohort.lock.locked() and taken == []
    async with asyncio.timeout(5):
        await selecting._obey(second)
    assert taken == ["c2"]


async def test_what_a_dead_coordinator_wanted_is_not_begun(
    selecting: Selecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one may want something else, and clients would train for nothing. When it wants the same, it is done."""
    heard: asyncio.Queue[Orders | FedotaError | None] = asyncio.Queue()

    async def hears() -> Orders | None:
        answer = await heard.get()
        if isinstance(answer, FedotaError):
            raise answer
        return answer

    monkeypatch.setattr(selecting._link, "orders", hears)
    client = await waiting(selecting, A)
    work = orders(selecting, share=1)
    tasks = [asyncio.create_task(selecting.listen())]
    heard.put_nowait(FedotaError("unavailable", "It was killed."))
    await _until(lambda: not selecting.connected)
    await obeys(selecting, work)
    assert selecting.cohort is None and not client.done()
    tasks.append(asyncio.create_task(selecting.obey()))
    heard.put_nowait(None)  # nothing new
    assert isinstance(await asyncio.wait_for(client, 5), Selected)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_models_of_earlier_lives_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a selector that was killed has left; but not what was fetched of the one that is wanted."""
    settings = SelectorSettings(
        problem_id="p", run=1, name="selector-0", coordinator="http://127.0.0.1:9", token_key="", key="secret"
    )
    one, drafts = Selecting(settings, tmp_path), []
    models = tmp_path / "models"
    models.mkdir()
    for left in ("old.safetensors", "older.new", f"{BASE.sha256}.new"):
        (models / left).write_bytes(BODY[:4])

    async def fetch(_: ModelRef, path: Path) -> None:
        drafts.append(path.with_suffix(".new").exists())
        path.with_suffix(".new").unlink()
        path.write_bytes(BODY)

    monkeypatch.setattr(one._link, "fetch", fetch)
    await one._have(BASE)
    assert drafts == [True]
    assert [file.name for file in models.iterdir()] == [f"{BASE.sha256}.safetensors"] and one.has_model(BASE.sha256)


async def test_one_organization_does_not_keep_others_out_of_a_full_pool(
    selecting: Selecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many clients it poses as: who has fewer is let in, until all have the same share."""
    monkeypatch.setattr(pool_module, "MOST_WAITING", 10)
    crowd = [await waiting(selecting, Waiting("crowd", str(number))) for number in range(10)]
    others = [asyncio.create_task(selecting.check_in(Waiting("other", str(number)), None)) for number in range(7)]
    await _until(lambda: all(task.done() for task in others[5:]))
    assert selecting.pool.organizations == {"crowd": 5, "other": 5}
    answers = [task.result() for task in others[5:]]
    assert all(isinstance(answer, ComeBack) and answer.seconds >= 1 for answer in answers)
    await _until(lambda: sum(task.done() for task in crowd) == 5)
    again = asyncio.create_task(selecting.check_in(Waiting("other", "0"), None))
    assert isinstance(await others[0], ComeBack), "who waits already comes in a second time instead"
    assert selecting.pool.organizations == {"crowd": 5, "other": 5}
    selecting.close()
    await asyncio.gather(*crowd, *others, again)


async def test_an_update_that_is_being_added_is_owed(selecting: Selecting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client hears that it arrived; the coordinator must not go on as if there were none."""
    adding, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(work: Callable[..., Any], *arguments: Any) -> Any:
        adding.set()
        await go_on.wait()
        return work(*arguments)

    handed: list[str] = []

    async def hand_over(meta: Meta, _: memoryview) -> None:
        handed.append(meta.accepted[0].ticket)

    monkeypatch.setattr(selecting._link, "hand_over", hand_over)
    await obeys(selecting, orders(selecting, share=0))
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "to_thread", slowly)
        counting = asyncio.create_task(reports(selecting, "t"))
        await asyncio.wait_for(adding.wait(), 5)
        collecting = asyncio.create_task(obeys(selecting, orders(selecting, collect="c1")))
        cohort = selecting.cohort
        assert cohort is not None
        await _until(lambda: cohort.closed)
        assert not cohort.held().closed and cohort.held().reported == 0
        selecting._changed.clear()
        go_on.set()
        await asyncio.gather(counting, collecting)
    assert handed == ["t"] and cohort.held().closed and cohort.held().reported == 1
    assert selecting._changed.is_set(), "the coordinator is told"


def told(one: Selecting) -> int | None:
    """How many of its clients have begun, as it says; None when it has nothing new to say."""
    if not one._changed.is_set():
        return None
    one._changed.clear()
    assert one.cohort is not None
    return one.cohort.held().begun


async def test_who_has_the_model_is_told_once(selecting: Selecting) -> None:
    """Those who were selected here, of the weights that their round begins with."""
    clients = [await waiting(selecting, who) for who in (A, Waiting("org", "b"))]
    await obeys(selecting, orders(selecting, share=2))
    await asyncio.gather(*clients)
    assert told(selecting) == 0
    for sha256, who in ((BASE.sha256, Waiting("another", "a")), ("d" * 64, A)):
        selecting.has_sent(sha256, who)
        assert told(selecting) is None
    selecting.has_sent(BASE.sha256, A)
    assert told(selecting) == 1
    selecting.has_sent(BASE.sha256, A)
    assert told(selecting) is None
    await reports(selecting, "t")
    assert selecting.cohort is not None and selecting.cohort.held().begun == 1, "who reports had begun before"
    await obeys(selecting, orders(selecting, cohort="next", share=0))
    selecting.has_sent(BASE.sha256, A)
    assert told(selecting) == 0, "nobody has begun with the next one"


async def test_who_reports_has_the_model_wherever_it_is_from(selecting: Selecting) -> None:
    """But who was selected by another selector is of that one's number."""
    client = await waiting(selecting, A)
    await obeys(selecting, orders(selecting, share=1))
    await client
    await reports(selecting, "t")
    assert selecting.cohort is not None and selecting.cohort.held().begun == 1
    await reports(selecting, "of another")
    assert selecting.cohort.held().begun == 1


async def test_how_many_had_begun_elsewhere_is_told_back(selecting: Selecting) -> None:
    """A coordinator that does not remember whom it lost must not wait for them."""
    for left in (3, 1):
        await obeys(selecting, orders(selecting, share=0, shares={"lost": left}))
        assert selecting.cohort is not None and selecting.cohort.held().shares == {"lost": left}
