"""The pages in a browser: they follow the log, upload files, and keep to their own policy.

These need `playwright` from PyPI and a Chromium or Chrome of the system, and are skipped, in words, where either is
not there. FEDOTA_TEST_BROWSER names a browser that is somewhere else.
"""

import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from fedota.contracts.commands import AnnouncedFile, UploadSlot
from fedota.events import orchestrator as infra
from fedota.kernel.service import Service
from fedota.kernel.settings import Secret
from services.storage.blobs import Blobs
from services.storage.settings import Settings as StorageSettings
from tests.support.servers import RunningServers

playwright = pytest.importorskip("playwright.async_api", reason="the browser tests need playwright: pip install it")
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PATH = os.environ.get("FEDOTA_TEST_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)
pytestmark = pytest.mark.skipif(
    _PATH is None, reason=f"the browser tests need one of {', '.join(_NAMES)}, or FEDOTA_TEST_BROWSER"
)
_QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Any]:
    """A headless browser."""
    arguments = ["--no-sandbox", "--disable-gpu", *_QUIET]
    async with playwright.async_playwright() as driver:
        launched = await driver.chromium.launch(executable_path=_PATH, args=arguments)
        yield launched
        await launched.close()


@asynccontextmanager
async def signed_in(browser: Any, platform: Any, name: str, place: str = "/", **look: Any) -> AsyncIterator[Any]:
    """A page of somebody who has signed in with a role's token. Fails for any error that the browser tells of."""
    complaints: list[str] = []
    context = await browser.new_context(**look)
    context.set_default_timeout(10_000)
    page = await context.new_page()
    page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    await page.goto(platform.url + place)
    await page.fill("[name=token]", f"fdt_{name}_made_up")
    await page.click("text=Sign in >> nth=-1")
    await page.wait_for_selector(".connection[data-state=live]")
    yield page
    await context.close()
    assert complaints == []


async def until_shown(page: Any, part: str, words: str) -> None:
    """Return when a part of the page says so."""
    await page.wait_for_selector(f"[data-part={part}] >> text={words}")


async def test_a_page_follows_the_log_without_being_loaded_again(platform: Any, browser: Any) -> None:
    """From publication to the first completed round, each step shows by itself, each event once."""
    problem_id = str(uuid4())
    story = platform.story(problem_id)
    await platform.record(story[0])
    async with signed_in(browser, platform, "setter", f"/problems/{problem_id}") as page:
        await page.evaluate("window.same = true")
        await until_shown(page, "heading", "draft")
        await platform.record(*story[1:3])
        await until_shown(page, "heading", "ready")
        await until_shown(page, "participations", "Approve")
        await platform.record(*story[3:-1])
        await until_shown(page, "round", "reporting, said in words")
        await platform.record(story[-1])
        await until_shown(page, "rounds", "completed")
        await page.wait_for_selector("[data-part=metrics] figure svg circle")
        assert await page.locator("[data-part=feed] li").count() == len(story)
        assert await page.evaluate("window.same")


async def test_a_page_goes_on_after_a_broken_stream(platform: Any, browser: Any) -> None:
    """It says that it is cut off, and then shows what it missed, once."""
    problem_id = str(uuid4())
    story = platform.story(problem_id)
    await platform.record(*story[:6])
    async with signed_in(browser, platform, "setter", f"/problems/{problem_id}") as page:
        await page.evaluate("window.same = true")
        platform.feed.close()
        await page.wait_for_selector(".connection[data-state=lost]")
        await platform.record(*story[6:])
        platform.feed.closed = False
        await page.wait_for_selector(".connection[data-state=live]")
        await until_shown(page, "rounds", "completed")
        assert await page.locator("[data-part=feed] li").count() == len(story)
        assert await page.evaluate("window.same")


async def test_what_somebody_types_is_kept(platform: Any, browser: Any) -> None:
    """News must not wipe out a reason that is half written; once it is sent, the news are shown."""
    problem_id = str(uuid4())
    await platform.record(*platform.story(problem_id)[:6])
    async with signed_in(browser, platform, "setter", f"/problems/{problem_id}") as page:
        await page.fill("[placeholder='Why stop?']", "enough of")
        await platform.record(platform.round(problem_id, 1, "selection"))
        await until_shown(page, "round", "selection, said in words")
        assert await page.input_value("[placeholder='Why stop?']") == "enough of"
        await page.click("text=Stop training")
        await until_shown(page, "heading", "Stopped: enough of")


async def test_a_file_goes_from_the_browser_to_the_object_store(
    platform: Any, browser: Any, servers: RunningServers, tmp_path: Path
) -> None:
    """The gateway signs nothing and sees nothing of it: the bytes are in the store, and the problem is ready."""
    problem_id = str(uuid4())
    await platform.record(platform.story(problem_id)[0])
    model = tmp_path / "model.safetensors"
    model.write_bytes(os.urandom(100_000))
    url, access, secret, bucket, _ = servers.s3
    settings = StorageSettings(
        database_url=Secret(""),
        nats_url="",
        s3_url=url,
        s3_access_key=Secret(access),
        s3_secret_key=Secret(secret),
        s3_bucket=bucket,
    )
    async with Blobs.open(settings, Service("storage")) as blobs:
        await blobs.create_bucket()
        key = f"problems/{problem_id}/files/model"

        def slot(file: AnnouncedFile) -> UploadSlot:
            signed = blobs.presign_put(key, size=file.size, sha256=file.sha256)
            return UploadSlot(name=file.name, url=signed.url, headers=signed.headers)

        platform.slot = slot
        async with signed_in(browser, platform, "setter", f"/problems/{problem_id}") as page:
            await page.set_input_files("[name=model]", model)
            await page.click(".upload button")
            await until_shown(page, "heading", "ready")
        stored = await blobs.read(key)
    assert stored is not None
    assert (stored.size, stored.sha256) == (100_000, hashlib.sha256(model.read_bytes()).hexdigest())


async def test_a_problem_is_published_on_the_page(platform: Any, browser: Any) -> None:
    """The form leads to the problem's own page; what is wrong is said beside the button."""
    async with signed_in(browser, platform, "setter") as page:
        await page.fill("[name=name]", "Tumours")
        for field in ("description", "data_format", "client_image"):
            await page.fill(f"[name={field}]", "words")
        await page.fill("[name='plan.clients_per_organization']", "2")
        await page.fill("[name='plan.clip_norm']", "0.25")
        await page.click("text=Publish >> nth=-1")
        await until_shown(page, "heading", "Tumours")
        assert (await page.title()).startswith("Tumours")
        await until_shown(page, "about", "2 clients of an organization · norm 0.25 of an update")
    plan = platform.requests[-1][1].plan
    assert (plan.clients_per_organization, plan.examples_per_update, plan.clip_norm) == (2, None, 0.25)


async def test_contributions_appear_when_an_attempt_ends(platform: Any, browser: Any) -> None:
    """By themselves, and to an organization none but its own."""
    problem_id = str(uuid4())
    story = platform.story(problem_id)
    await platform.record(*story[:-1])
    for name, rows in (("setter", 3), ("clinic", 1)):
        async with signed_in(browser, platform, name, f"/problems/{problem_id}") as page:
            if name == "setter":
                assert await page.locator("[data-part=contributions]").is_hidden()
                await platform.record(story[-1])
            await until_shown(page, "contributions", "75.0 %")
            assert await page.locator("[data-part=contributions] tbody tr").count() == rows


async def test_an_ended_session_leads_to_signing_in(platform: Any, browser: Any) -> None:
    """Who was signed out elsewhere is not shown an old page as if it were live."""
    problem_id = str(uuid4())
    await platform.record(*platform.story(problem_id)[:6])
    context = await browser.new_context()
    page = await context.new_page()
    await page.goto(f"{platform.url}/problems/{problem_id}")
    await page.fill("[name=token]", "fdt_setter_made_up")
    await page.click("text=Sign in >> nth=-1")
    await page.wait_for_selector(".connection[data-state=live]")
    other = await context.new_page()
    await other.goto(platform.url)
    await other.click("text=Sign out")
    await platform.record(platform.round(problem_id, 1, "selection"))
    await page.wait_for_url("**/sign-in**", timeout=15_000)
    await context.close()


@pytest.mark.parametrize("width", [1280, 760, 390])
async def test_nothing_is_wider_than_the_screen(platform: Any, browser: Any, width: int) -> None:
    """Long names, addresses and logs wrap or scroll in their own box."""
    problem_id = str(uuid4())
    long = "x" * 300
    degraded = infra.InfraDegraded(
        problem_id=problem_id, run=1, namespace="ns", component="selector-0", reason=long, log=[long]
    )
    failed = infra.InfraFailed(problem_id=problem_id, run=1, namespace="ns", reason=long, log=[long])
    await platform.record(*platform.story(problem_id), degraded, failed)
    look = {"viewport": {"width": width, "height": 800}}
    async with signed_in(browser, platform, "setter", f"/problems/{problem_id}", **look) as page:
        for place in (f"/problems/{problem_id}", "/"):
            await page.goto(platform.url + place)
            await page.wait_for_selector(".connection[data-state=live]")
            assert await page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


async def test_a_page_of_the_past_is_looked_at_from_event_to_event(platform: Any, browser: Any) -> None:
    """From the feed to how it was then, on to the next event, and back to now; nobody acts on what was."""
    problem_id = str(uuid4())
    await platform.record(*platform.story(problem_id))
    async with signed_in(browser, platform, "setter", f"/problems/{problem_id}") as page:
        await page.click("[data-part=feed] a >> text=4")
        await page.wait_for_selector(".as-of >> text=As of position 4")
        assert await page.locator(".as-of").inner_text() != "" and page.url.endswith("?at=4")
        await until_shown(page, "participations", "approved")
        await until_shown(page, "heading", "ready")
        assert await page.locator("main button, main input").count() == 0
        assert await page.locator("[data-live], .connection[data-state]").count() == 0
        assert await page.locator("[data-part=feed] li").count() == 4
        await page.click("text=Later event")
        await until_shown(page, "heading", "running")
        await page.click("text=Earlier event")
        await until_shown(page, "heading", "ready")
        await page.click("text=Back to now")
        await page.wait_for_selector(".connection[data-state=live]")
        await until_shown(page, "rounds", "completed")
