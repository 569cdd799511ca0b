"""Updates that are wrong in every way that chance finds: each refused by name and counted, the sum untouched.

A round is played for each example. The updates of two clients count in it, the same ones in each round, and a third
client does harm in between: the round's checkpoint must be, bit for bit, that of the round in which nobody did.
"""

import asyncio
import gzip
import io
import json
import pickle
import random
import re
import select
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fedota.events.problems import Plan
from tests.contract.speaker import Answer, Client, Tensors, Work, pack, unpack, work
from tests.integration.runtime.conftest import Weights, World
from tests.support.hasty_selector import STALL

SLACK: Final = 65_536  # bytes that an update may have more than the model
MOST_EXAMPLES: Final = 10**9
PHASES: Final = (Phase.explicit, Phase.generate)  # a failure is told as it was found
PATIENCE: Final = 60.0  # seconds


class Bad(NamedTuple):
    """A request that is to be refused with one of `codes`. `ticket` names whose it carries."""

    what: str
    codes: tuple[str, ...]
    body: bytes = b""
    headers: dict[str, str] = {}
    ticket: str = "its own"
    chunked: bool = False

    def __repr__(self) -> str:
        return f"<{self.what}: {len(self.body)} bytes, {self.headers}, {self.ticket} ticket, chunked={self.chunked}>"


def small() -> Weights:
    """Less than what is read past the HTTP library, of all types that there are."""
    floats: Weights = {f"f{n}": np.linspace(-1, 1, 24).astype(f"<f{n}").reshape(2, 3, 4) for n in (2, 4, 8)}
    counts: Weights = {f"{kind}{n}": np.arange(4, dtype=f"<{kind}{n}") for kind in "iu" for n in (1, 2, 4, 8)}
    return {**floats, **counts, "scalar": np.array(0.5, np.float32), "empty": np.zeros((0, 3), np.float32)}


def large() -> Weights:
    """Enough to be read straight from the socket."""
    return {
        "f4": np.linspace(-1, 1, 150_000, dtype=np.float32).reshape(300, 500),
        "f8": np.linspace(-1, 1, 3000).reshape(10, 300),
        "i8": np.arange(7),
    }


# The round that is played again and again.


class Field:
    """Rounds without end. Its calls block: they belong into a thread, while the test's loop plays the platform."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.selector = world.selectors[0]
        self.one, self.other, self.bad = (self.client(number) for number in (1, 2, 3))
        self.tickets: dict[str, str] = {}
        self.model: Tensors = {}
        self.good: list[bytes] = []
        self.undisturbed = self.play()

    def client(self, number: int) -> Client:
        """A client of an organization of its own."""
        return Client(self.selector.url, self.world.token(f"org {number}"), f"client-{number}")

    def play(
        self, harm: Callable[[], None] = lambda: None, send: Callable[[Client, Work], Answer] = Client.send
    ) -> tuple[str, int, int]:
        """One round with `harm` between its two updates, the second sent by `send`; what it came to."""
        told = self.selected()
        number = told[0]["round"]
        if not self.good:
            self.model = unpack(self.one.fetch(told[0]["model"]))
            self.good = [pack(shifted(self.model, by)) for by in (1, 2, 3)]
        before = self.tickets.get("its own", "")
        names = ("the first client's", "the second client's", "its own")
        self.tickets = dict(zip(names, (one["ticket"] for one in told), strict=True))
        self.tickets["an earlier round's"] = before
        assert self.one.send(self.update(told[0], 1)).status == 200
        try:
            harm()
            answer = send(self.other, self.update(told[1], 2))
            assert answer.status == 200, (answer, self.selector.log()[-2000:])
        except AssertionError:
            self.other.send(self.update(told[1], 2))  # whatever it says: another example begins with another round
            raise
        completed = self.wait_for(lambda: self.world.platform.completed(number))
        self.reported = [one.code for one in completed.refusals]
        told_of = [refused for one in completed.contributions for refused in one.refusals.items()]
        assert Counter(self.reported) == sum((Counter({code: count}) for code, count in told_of), Counter())
        return completed.checkpoint.sha256, completed.reported, completed.examples

    def selected(self) -> list[dict[str, Any]]:
        """All three, selected for the same round."""
        waiting = {one: one.http.begin("POST", "/v1/check-in") for one in (self.one, self.other, self.bad)}
        answers = {one: one.http.end(connection).json for one, connection in waiting.items()}
        while again := [one for one, answer in answers.items() if answer["status"] != "selected"]:
            waiting = {one: one.http.begin("POST", "/v1/check-in") for one in again}
            answers |= {one: one.http.end(connection).json for one, connection in waiting.items()}
        return list(answers.values())

    def update(self, told: dict[str, Any], examples: int) -> Work:
        """A good update."""
        return work(told["ticket"], told["round"], self.good[examples - 1], examples, {"loss": 0.5})

    def attempt(self, bad: Bad) -> Answer:
        """Do what is to be refused."""
        headers = {**work(self.tickets.get(bad.ticket, bad.ticket), 0, b"", 3, {}).headers, **bad.headers}
        client = self.one if bad.ticket == "the first client's" else self.bad
        body = pieces(bad.body) if bad.chunked else bad.body
        return client.http.ask("POST", "/v1/updates", headers, body)

    def refusals(self) -> Counter[str]:
        """What the selector has counted, by code."""
        answer = self.bad.http.ask("GET", "/metrics")
        found = re.findall(r'^fedota_refusals_total\{code="(\w+)"\} (\S+)', answer.body.decode(), re.MULTILINE)
        return Counter({code: int(float(count)) for code, count in found})

    def wait_for(self, look: Callable[[], Any]) -> Any:
        """What `look` gives, once that is true."""
        deadline = time.monotonic() + PATIENCE
        while not (found := look()):
            assert time.monotonic() < deadline, "still not so"
            time.sleep(0.002)
        return found


def shifted(model: Tensors, by: int) -> Tensors:
    """The model with other weights."""
    random_ = np.random.default_rng(by)
    return {name: (type_, shape, _other(type_, data, random_)) for name, (type_, shape, data) in model.items()}


def _other(type_: str, data: bytes, random_: np.random.Generator) -> bytes:
    count = len(data) // WIDTH[type_]
    if type_[0] == "F":
        return random_.normal(size=count).astype(f"<f{WIDTH[type_]}").tobytes()
    return random_.integers(0, 100, size=count).astype(f"<{type_[0].lower()}{WIDTH[type_]}").tobytes()


WIDTH: Final = {f"{kind}{8 * n}": n for kind in "IUF" for n in (1, 2, 4, 8) if (kind, n) != ("F", 1)}


def pieces(body: bytes) -> Iterator[bytes]:
    """A body that does not say how long it is."""
    for start in range(0, len(body), 100_000):
        yield body[start : start + 100_000]


# What can be wrong. Each strategy is over the updates that are wrong in one way.


class Header:
    """A safetensors body in its parts, to be put together wrongly."""

    def __init__(self, body: bytes) -> None:
        length = int.from_bytes(body[:8], "little")
        self.entries: dict[str, Any] = json.loads(body[8 : 8 + length])
        self.data = body[8 + length :]

    def body(self, text: str | None = None) -> bytes:
        """The parts, together."""
        raw = (json.dumps(self.entries) if text is None else text).encode("utf-8", "surrogatepass")
        return len(raw).to_bytes(8, "little") + raw + self.data


MALFORMED: Final = ("update_malformed",)
MISMATCH: Final = ("update_mismatch",)
EITHER: Final = ("update_malformed", "update_mismatch")


@st.composite
def cut_or_longer(draw: st.DrawFn, good: bytes) -> Bad:
    """Some of it is missing, or there is more."""
    if draw(st.booleans()):
        return Bad("cut", MALFORMED, good[: draw(st.integers(0, len(good) - 1))])
    more = draw(st.integers(1, 2 * SLACK))
    return Bad("longer", ("update_too_large",) if more > SLACK else MALFORMED, good + bytes(more))


@st.composite
def other_length(draw: st.DrawFn, good: bytes) -> Bad:
    """The header's length is a lie."""
    length = draw(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, len(good)), st.just(2**63), st.just(2**64 - 8)))
    body = length.to_bytes(8, "little") + good[8:]
    return Bad(f"a header of {length}", MALFORMED, body if body != good else good[:-1])


@st.composite
def other_offsets(draw: st.DrawFn, good: bytes) -> Bad:
    """Tensors overlap, leave holes, end before they begin, or lie outside."""
    header = Header(good)
    name = draw(st.sampled_from(sorted(header.entries)))
    offsets = header.entries[name]["data_offsets"]
    kind = draw(st.sampled_from(["moved", "turned", "same", "any"]))
    if kind == "moved":
        end, by = draw(st.integers(0, 1)), draw(st.integers(-2000, 2000).filter(bool))
        offsets[end] += by
    elif kind == "turned" and offsets[0] != offsets[1]:
        offsets.reverse()
    elif kind == "same":
        other = draw(st.sampled_from(sorted(header.entries.keys() - {name})))
        offsets[:] = header.entries[other]["data_offsets"]
    if kind == "any" or header.body() == good:
        offsets[:] = [draw(st.integers(-(2**65), 2**65)), draw(st.integers(-(2**65), 2**65))]
    if header.entries == Header(good).entries:
        return Bad("cut", MALFORMED, good[:-1])
    return Bad(f"{kind} offsets of {name}", MALFORMED, header.body())


@st.composite
def other_names(draw: st.DrawFn, good: bytes) -> Bad:
    """A tensor is missing, is too many, or is called otherwise."""
    header = Header(good)
    name = draw(st.sampled_from(sorted(header.entries)))
    new = draw(st.text(max_size=50).filter(lambda text: text not in header.entries and text != "__metadata__"))
    kind = draw(st.sampled_from(["renamed", "missing", "more", "twice"]))
    if kind == "renamed":
        header.entries = {new if key == name else key: value for key, value in header.entries.items()}
        return Bad(f"{name} is called {new!r}", EITHER, header.body())  # a lone surrogate is no JSON text
    if kind == "missing":
        tensors = {key: value for key, value in unpack(good).items() if key != name}
        return Bad(f"{name} is missing", MISMATCH, pack(tensors))
    if kind == "more":
        return Bad(f"{new!r} is too many", MISMATCH, pack({**unpack(good), new: ("F32", [1], bytes(4))}))
    offsets = [at + len(header.data) for at in header.entries[name]["data_offsets"]]
    entry = json.dumps({**header.entries[name], "data_offsets": offsets})
    header.data += bytes(max(1, offsets[1] - offsets[0]))
    text = json.dumps(header.entries)[:-1] + f", {json.dumps(name)}: {entry}" + "}"
    return Bad(f"{name} is there twice", EITHER, header.body(text))


@st.composite
def other_types(draw: st.DrawFn, good: bytes) -> Bad:
    """A tensor has another type, with as many bytes as that takes, or as it had."""
    tensors = unpack(good)
    name = draw(st.sampled_from(sorted(tensors)))
    type_, shape, data = tensors[name]
    known = [*WIDTH, "BOOL", "BF16", "F8_E4M3", "F8_E5M2"]
    new = draw(st.one_of(st.sampled_from(known), st.text(max_size=8)).filter(lambda text: text != type_))
    width = WIDTH.get(new, 1)
    if draw(st.booleans()) and new in known:
        data = bytes(len(data) // WIDTH[type_] * (2 if new == "BF16" else width))
        return Bad(f"{name} is {new}", MISMATCH, pack({**tensors, name: (new, shape, data)}))
    return Bad(f"{name} is said to be {new!r}", EITHER, pack({**tensors, name: (new, shape, data)}))


@st.composite
def other_shapes(draw: st.DrawFn, good: bytes) -> Bad:
    """A tensor has another shape."""
    tensors = unpack(good)
    name = draw(st.sampled_from(sorted(tensors)))
    type_, shape, data = tensors[name]
    kind = draw(st.sampled_from(["flat", "deeper", "any"]))
    if kind == "any":
        numbers = st.integers(-(2**65), 2**65) | st.integers(0, 3) | st.just(2**32)
        new = draw(st.lists(numbers, max_size=6).filter(lambda found: found != shape))
        return Bad(f"{name} is of {new}", EITHER, pack({**tensors, name: (type_, new, data)}))
    new = [*shape, 1] if kind == "deeper" or len(shape) < 2 else [len(data) // WIDTH[type_]]
    return Bad(f"{name} is of {new}", MISMATCH, pack({**tensors, name: (type_, new, data)}))


@st.composite
def not_numbers(draw: st.DrawFn, good: bytes) -> Bad:
    """NaN of any kind, infinities, and what is too large to be summed."""
    tensors = unpack(good)
    name = draw(st.sampled_from(sorted(name for name, one in tensors.items() if one[0][0] == "F" and one[2])))
    type_, shape, data = tensors[name]
    width = WIDTH[type_]
    values = np.frombuffer(data, f"<f{width}").copy()
    spoiled = st.sampled_from([np.nan, -np.nan, np.inf, -np.inf, *([1e291, -1.7e308] if width == 8 else [])])
    for _ in range(draw(st.integers(1, 3))):
        values[draw(st.integers(0, values.size - 1))] = draw(spoiled)
    if draw(st.booleans()):  # a signalling NaN, with a payload
        raw = values.view(f"<u{width}")
        mantissa = {2: 10, 4: 23, 8: 52}[width]
        ones = (1 << (8 * width - 1 - mantissa)) - 1
        raw[-1] = (ones << mantissa) | draw(st.integers(1, (1 << mantissa) - 1))
    return Bad(
        f"no numbers in {name}", ("update_not_finite",), pack({**tensors, name: (type_, shape, values.tobytes())})
    )


@st.composite
def other_forms(draw: st.DrawFn, good: bytes) -> Bad:
    """Not safetensors at all; what grows when it is unpacked does not get to."""
    archive = io.BytesIO()
    np.savez_compressed(archive, w=np.zeros(1_000_000, np.float32))
    body = draw(
        st.one_of(
            st.binary(max_size=2000),
            st.sampled_from(
                [
                    pickle.dumps({"w": [1.0] * 100}),
                    archive.getvalue(),
                    gzip.compress(good),
                    gzip.compress(bytes(10_000_000)),
                    b'{"f4": [1, 2, 3]}',
                    b"[" * 100_000,
                    (60_000).to_bytes(8, "little") + b"[" * 60_000,
                    (60_000).to_bytes(8, "little") + b'{"a":' * 12_000,
                ]
            ),
        )
    )
    return Bad("no safetensors", MALFORMED, body)


@st.composite
def other_headers(draw: st.DrawFn, good: bytes) -> Bad:
    """JSON that is something else, or more than it should be."""
    header = Header(good)
    odd = st.sampled_from(['{"a": 1}', "[]", "null", '{"__metadata__": {"a": 1}}', '{"__metadata__": 7}', "{}", '""'])
    extra: list[tuple[str, Any]] = [
        ("dtype", 32),
        ("shape", "2"),
        ("shape", [1.5]),
        ("data_offsets", [0]),
        ("shape", None),
    ]
    if draw(st.booleans()):
        text = draw(odd)
        return Bad(f"the header {text}", EITHER, header.body(text))
    field, value = draw(st.sampled_from(extra))
    name = draw(st.sampled_from(sorted(header.entries)))
    header.entries[name][field] = value
    return Bad(f"{name} has the {field} {value}", EITHER, header.body())


def encoded(good: bytes) -> st.SearchStrategy[Bad]:
    """Packed in a way that HTTP has: refused before a byte of it is unpacked."""
    bomb = gzip.compress(bytes(10_000_000))
    ways = [("gzip", bomb), ("deflate", zlib.compress(good)), ("GZIP", gzip.compress(good)), ("gzip, gzip", b"x")]
    codes = ("unsupported_encoding",)
    return st.sampled_from([Bad(f"as {way}", codes, body, {"Content-Encoding": way}) for way, body in ways])


def weights(good: bytes) -> st.SearchStrategy[Bad]:
    """Weights that nobody may give himself."""
    numbers = st.integers().filter(lambda number: not 1 <= number <= MOST_EXAMPLES).map(str)
    texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
    odd = st.sampled_from(["1.5", "1e3", "NaN", "inf", "-0", "+1", "0x10", "1_000", "\xb2", "\xbd", "1,2", "0" * 10])
    wrong = (numbers | texts | odd).filter(lambda text: not re.fullmatch(r"0*[1-9][0-9]{0,9}", text.strip()))
    return wrong.map(lambda text: Bad("a weight", ("update_examples",), good, {"Fedota-Examples": text}))


def metrics(good: bytes) -> st.SearchStrategy[Bad]:
    """Metrics that are none."""
    texts = [
        '{"loss": NaN}', '{"loss": Infinity}', '{"loss": 1e999}', '{"loss": "low"}', '{"loss": null}', '{"loss": [1]}',
        '{"": 1}', "[1]", "1", "null", '{"a": 1', "\xe9", json.dumps({"a" * 101: 1}), "{" * 4000,
        json.dumps({f"m{number}": 1 for number in range(65)}), json.dumps({f"{number:090}": 1 for number in range(50)}),
    ]  # fmt: skip
    return st.sampled_from([Bad(text[:30], ("invalid_field",), good, {"Fedota-Metrics": text}) for text in texts])


def tickets(good: bytes) -> st.SearchStrategy[Bad]:
    """Another's, a forged one, none; one that was used, and one whose round is over."""
    forged = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=80)
    unsigned = "eyJhbGciOiJub25lIn0.eyJvcmdhbml6YXRpb24iOiJvcmcgMyJ9."
    return st.one_of(
        st.just(Bad("another's ticket", ("ticket_refused",), good, ticket="the second client's")),
        st.just(Bad("a used ticket", ("already_reported",), good, ticket="the first client's")),
        st.just(Bad("an old ticket", ("round_over",), good, ticket="an earlier round's")),
        st.just(Bad("no ticket", ("ticket_refused",), good, ticket="")),
        st.just(Bad("an unsigned ticket", ("ticket_refused",), good, ticket=unsigned)),
        forged.map(lambda text: Bad("a forged ticket", ("ticket_refused",), good, ticket=text)),
    )


def anything_wrong(good: bytes) -> st.SearchStrategy[Bad]:
    """All of it, with a length or without."""
    bodies = (
        cut_or_longer, other_length, other_offsets, other_names, other_types, other_shapes, not_numbers, other_forms,
        other_headers,
    )  # fmt: skip
    requests = (encoded, weights, metrics, tickets)
    found = st.one_of(*(strategy(good) for strategy in bodies), *(strategy(good) for strategy in requests))
    most = len(good) + SLACK - 4096  # the model's own header may be a little shorter than ours

    def finished(bad: Bad, chunked: bool) -> Bad:
        codes = (*bad.codes, "update_too_large") if len(bad.body) > most else bad.codes
        return bad._replace(codes=codes, chunked=chunked)

    return st.builds(finished, found, st.booleans())


# The tests.


def plan(others: int = 1) -> Plan:
    """Two clients are enough, and so many others are selected with them."""
    over = 1 + others / 2
    return Plan(rounds=100_000, goal_count=2, minimum_fraction=1.0, over_selection=over, selectors=1)


@pytest.mark.parametrize("model", [small, large])
async def test_nothing_that_is_wrong_touches_the_sum(
    world: World, model: Callable[[], Weights], chance: random.Random, faults: int
) -> None:
    """Each is refused with its reason, counted, and told of in the round's report."""
    await world.launch(plan(), model())
    await asyncio.to_thread(_try_everything, world, chance.getrandbits(32), 10 * faults)


def _try_everything(world: World, number: int, count: int) -> None:
    field = Field(world)
    assert field.play() == field.undisturbed, "a round is not what it was before"

    @seed(number)
    @settings(max_examples=count, deadline=None, phases=PHASES, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(anything_wrong(field.good[2]), min_size=1, max_size=6))
    def in_a_round(all_: list[Bad]) -> None:
        counted = field.refusals()
        codes: list[str] = []

        def harm() -> None:
            for bad in all_:
                answer = field.attempt(bad)
                assert answer.status >= 400 and answer.code in bad.codes, (bad, answer)
                assert answer.json["detail"] and answer.json["status"] == answer.status, (bad, answer)
                codes.append(answer.code)

        assert field.play(harm) == field.undisturbed
        assert field.refusals() - counted == Counter(codes)
        assert field.reported == [code for code in codes if code != "already_reported"], "that one counts"

    in_a_round()


async def test_bodies_that_come_too_slowly_are_cut_off(world: World, faults: int) -> None:
    """Stalled or in drops, with a length or without: each is refused in time, whoever else is in no hurry."""
    world.prepare(plan(), large())
    world.selectors[0].module = "tests.support.hasty_selector"
    await world.coordinator.start()
    await world.selectors[0].start()
    await asyncio.to_thread(_dawdle, world, faults)


def _dawdle(world: World, faults: int) -> None:
    field = Field(world)
    part = field.good[2][:-1]
    ways = [(length, drops) for length in (len(part) + 1, 100_000, None) for drops in (False, True)]
    for _ in range(max(1, faults // 4)):
        for length, drops in ways:
            counted = field.refusals()

            def harm(length: int | None = length, drops: bool = drops) -> None:
                began = time.monotonic()
                answer = dawdled(field, part if length is None else part[: length - 1], length, drops)
                assert (answer.status, answer.code) == (504, "timeout"), answer
                assert time.monotonic() - began < 20 * STALL, "the limit is not kept"

            assert field.play(harm) == field.undisturbed
            assert field.refusals() - counted == Counter({"timeout": 1})
            assert field.reported == ["timeout"]


def dawdled(field: Field, part: bytes, length: int | None, drops: bool) -> Answer:
    """The answer to a body that comes in drops after its first 1000 bytes, or not at all after all but its last."""
    framing = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
    headers = {**work(field.tickets["its own"], 0, b"", 3, {}).headers, **framing}
    first, slow = (part[:1000], part[1000:]) if drops else (part, b"")
    connection = field.bad.http.open("POST", "/v1/updates", headers)
    connection.send(first if length else chunk(first))
    for drop in slow:
        if select.select([connection.sock], [], [], STALL / 5)[0]:
            break  # it was answered
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(bytes([drop]) if length else chunk(bytes([drop])))
    return field.bad.http.end(connection)


def chunk(data: bytes) -> bytes:
    """A piece of a body that does not say how long it is."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


# Pieces of a good one.

STEPS: Final = st.lists(
    st.tuples(st.sampled_from(["breaks", "more", "elsewhere", "anew", "spoiled"]), st.integers(0, 10**7)), max_size=6
)


@pytest.mark.parametrize("model", [small, large])
async def test_an_update_in_any_pieces_is_the_same_update(
    world: World, model: Callable[[], Weights], chance: random.Random, faults: int
) -> None:
    """Its line breaks anywhere, it goes on in the wrong place, it begins anew: in the end it counts once, and whole."""
    await world.launch(plan(), model())
    await asyncio.to_thread(_piece_together, world, chance.getrandbits(32), 3 * faults)


def _piece_together(world: World, number: int, count: int) -> None:
    field = Field(world)

    @seed(number)
    @settings(max_examples=count, deadline=None, phases=PHASES, database=None, suppress_health_check=list(HealthCheck))
    @given(STEPS)
    def in_pieces(steps: list[tuple[str, int]]) -> None:
        def send(client: Client, update: Work) -> Answer:
            have = 0
            for what, where in steps:
                have = step(client, update, have, what, where)
            return client.go_on(update)

        assert field.play(send=send) == field.undisturbed
        assert field.reported == ["update_malformed"] * sum(what == "spoiled" for what, _ in steps)

    in_pieces()


def step(client: Client, update: Work, have: int, what: str, where: int) -> int:
    """One thing that happens on the way of an update; how much of it is here afterwards."""
    whole = len(update.body)
    count = where % (whole - have)  # of the bytes that are missing, never all
    part = update.body[have : have + count]
    going_on = {**update.headers, "Upload-Offset": str(have), "Upload-Length": str(whole)}
    if what == "breaks":
        client.http.break_off("PATCH", "/v1/updates", going_on, whole - have, part)
        now = held(client, update)
        assert have <= now <= have + count
        return now
    if what == "more":
        answer = client.http.ask("PATCH", "/v1/updates", going_on, part)
        assert (answer.status, answer.headers["Upload-Offset"]) == (204, str(have + count))
        return have + count
    if what == "elsewhere":
        there = where % whole + (where % whole == have)
        wrong = {**going_on, "Upload-Offset": str(there)}
        answer = client.http.ask("PATCH", "/v1/updates", wrong, part[: whole - there])
        assert (answer.code, answer.headers["Upload-Offset"]) == ("offset_mismatch", str(have))
        return have
    if what == "anew":
        client.http.break_off("POST", "/v1/updates", update.headers, whole, update.body[:count])
        now = held(client, update)
        assert 0 <= now <= count
        return now
    assert client.http.ask("POST", "/v1/updates", update.headers, update.body[:-1]).code == "update_malformed"
    assert held(client, update) == 0
    return 0


def held(client: Client, update: Work) -> int:
    """How much of an update whose line broke is here, once that was noticed."""
    while (answer := client.http.ask("HEAD", "/v1/updates", {"Fedota-Ticket": update.ticket})).status == 409:
        pass
    assert answer.status == 204
    return int(answer.headers["Upload-Offset"])


async def test_one_update_sent_many_times_at_once_counts_once(world: World, faults: int) -> None:
    """One of them is taken, all others are refused; which one makes no difference."""
    await world.launch(plan(), large())
    await asyncio.to_thread(_crowd, world, faults)


def _crowd(world: World, faults: int) -> None:
    field = Field(world)

    def at_once(client: Client, update: Work) -> Answer:
        with ThreadPoolExecutor(12) as pool:
            answers = list(
                pool.map(lambda _: client.http.ask("POST", "/v1/updates", update.headers, update.body), range(12))
            )
        taken = [one for one in answers if one.status == 200]
        assert len(taken) == 1
        # one that came late may have found the round complete
        assert {one.code for one in answers if one.status != 200} <= {"already_reported", "round_over"}
        return taken[0]

    for _ in range(faults):
        assert field.play(send=at_once) == field.undisturbed


# What is hardly HTTP, and what is meant to fill the memory.


def wires(body: bytes) -> dict[str, tuple[str, bytes]]:
    """Requests that do not agree with themselves, each by its framing headers and the bytes after them."""
    length, last = len(body), b"0\r\n\r\n"
    whole = chunk(body) + last
    return {
        "two lengths": (f"Content-Length: {length}\r\nContent-Length: {length - 1}", body),
        "a negative length": ("Content-Length: -1", body),
        "a length in words": ("Content-Length: many", body),
        "a length with a sign": (f"Content-Length: +{length}", body),
        "a length that no number holds": (f"Content-Length: {'9' * 400}", body),
        "a length and chunks": (f"Content-Length: {length}\r\nTransfer-Encoding: chunked", whole),
        "an unknown coding": ("Transfer-Encoding: bzip2, chunked", whole),
        "a coding twice": ("Transfer-Encoding: chunked, chunked", whole),
        "a chunk's size in words": ("Transfer-Encoding: chunked", b"many\r\n" + body),
        "a chunk that is negative": ("Transfer-Encoding: chunked", b"-5\r\n" + body),
        "a chunk of everything": ("Transfer-Encoding: chunked", b"f" * 30 + b"\r\n" + body),
        "a chunk without its end": ("Transfer-Encoding: chunked", chunk(body)[:-2] + last),
        "chunks that never end": ("Transfer-Encoding: chunked", chunk(body)),
        "less than announced": (f"Content-Length: {length}", body[:-1]),
        "a header that is none": (f"Content-Length: {length}\r\nno colon", body),
        "a header with a null": (f"Content-Length: {length}\r\nX: a\0b", body),
        "a header without an end": (f"Content-Length: {length}\r\nX: {'x' * 100_000}", body),
        "headers without an end": (
            f"Content-Length: {length}\r\n" + "\r\n".join(f"X{n}: x" for n in range(50_000)),
            body,
        ),
    }


@pytest.mark.parametrize("model", [small, large])
async def test_what_is_hardly_http_is_no_update(
    world: World, model: Callable[[], Weights], chance: random.Random
) -> None:
    """Neither a request that contradicts itself nor noise is answered with yes, and others are served meanwhile."""
    await world.launch(plan(), model())
    await asyncio.to_thread(_babble, world, chance)


def _babble(world: World, chance: random.Random) -> None:
    field = Field(world)
    noise = [chance.randbytes(chance.randrange(1, 5000)) for _ in range(10)]
    noise += [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\r\n" * 1000]

    def harm() -> None:
        mine = {**field.bad.http.headers, **work(field.tickets["its own"], 0, b"", 3, {}).headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in mine.items())
        for what, (framing, rest) in wires(field.good[2]).items():
            start = f"POST /v1/updates HTTP/1.1\r\nHost: selector\r\n{head}{framing}\r\n\r\n".encode()
            assert b"HTTP/1.1 2" not in said_to(world, start + rest), what
        for bytes_ in noise:
            assert b"HTTP/1.1 2" not in said_to(world, bytes_), bytes_

    assert field.play(harm) == field.undisturbed


def said_to(world: World, data: bytes) -> bytes:
    """What is answered to these bytes, after which nothing more comes."""
    place = urlsplit(world.selectors[0].url)
    answer = b""
    with socket.create_connection((place.hostname, place.port), timeout=PATIENCE) as connection:
        with suppress(OSError):  # it was refused and cut off: before all was sent, or before we say that it was
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


async def test_nothing_makes_a_selector_large(world: World) -> None:
    """Neither what grows when it is unpacked nor what never ends is held in its memory."""
    await world.launch(plan(), large())
    await asyncio.to_thread(_swell, world)


def _swell(world: World) -> None:
    field = Field(world)
    process = world.selectors[0].process
    bomb = gzip.compress(bytes(200_000_000))
    tensors = pack({f"t{number}": ("F32", [0], b"") for number in range(900)})
    deep = (60_000).to_bytes(8, "little") + b'{"a":' * 12_000

    def harm() -> None:
        for _ in range(2):
            for bad in (
                Bad("a bomb", ("unsupported_encoding",), bomb, {"Content-Encoding": "gzip"}),
                Bad("a bomb", ("unsupported_encoding",), bomb, {"Content-Encoding": "deflate"}, chunked=True),
                Bad("without an end", ("update_too_large",), bytes(40_000_000), chunked=True),
                Bad("too long", ("update_too_large",), bytes(40_000_000)),
                Bad("many tensors", MISMATCH, tensors),
                Bad("a deep header", MALFORMED, deep),
            ):
                assert field.attempt(bad).code in bad.codes, bad

    before = peak(process.pid)
    assert field.play(harm) == field.undisturbed
    assert peak(process.pid) - before < 16_000_000


def peak(pid: int) -> int:
    """The most memory, in bytes, that a process ever had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return 1024 * int(found[1])
