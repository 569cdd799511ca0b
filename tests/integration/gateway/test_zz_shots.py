import random, asyncio
from typing import Any
from uuid import uuid4
from playwright.async_api import async_playwright
from fedota.events import orchestrator as infra, problems as p, storage, rounds as r
import msgspec

ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PLAN = p.Plan(rounds=30, goal_count=5, over_selection=1.4, client_config={"epochs": 2, "learning_rate": 0.05})
M = p.ModelFile(key="k/m", sha256="ab" * 32, size=1234567)
DESC = "Classify tumours as benign or malignant from 30 measurements of cell nuclei. Every hospital trains on its own patients; nothing but weights leaves the house. The result is published to all who took part."


def about(name):
    return dict(
        name=name,
        description=DESC,
        data_format="CSV, UTF-8, comma separated.\n31 columns: 30 features as floats, then label 0 or 1.\nOne row a patient.",
        client_image="registry.example.org/oncology/tumour-client@sha256:" + "9f" * 32,
        plan=PLAN,
    )


ORGS = [
    "Charité Berlin".replace("é", "e"),
    "Karolinska",
    "Clinic A",
    "Mayo Rochester",
    "General Hospital of Vienna AKH",
]


def created(i, n):
    return p.ProblemCreated(problem_id=i, setter="setter", **about(n))


def stored(i):
    return storage.FilesStored(
        problem_id=i,
        files=[
            storage.StoredFile(name="model.safetensors", role="model", key="k/m", sha256="ab" * 32, size=1234567),
            storage.StoredFile(name="vocabulary.json", role="other", key="k/v", sha256="cd" * 32, size=4096),
        ],
    )


def started(i, run=1):
    return p.ProblemStarted(problem_id=i, run=run, plan=PLAN, model=M)


def spawned(i, run=1):
    return infra.InfraSpawned(
        problem_id=i,
        run=run,
        namespace=f"fedota-{i[:8]}",
        backend="processes",
        coordinator="http://127.0.0.1:40123",
        selectors=["http://127.0.0.1:40124", "http://127.0.0.1:40125"],
    )


def rnd(i, report, number, stage, attempt=1, run=1, **k):
    done = stage == "completed"
    base = dict(goal_count=5, minimum_count=4)
    if done:
        base |= dict(
            reported=5,
            selected=7,
            participants=ORGS,
            examples=5312,
            metrics={
                "loss": 0.7 * 0.93**number + random.random() * 0.01,
                "accuracy": 1 - 0.4 * 0.93**number,
                "roc_auc": 1 - 0.3 * 0.95**number,
            },
            seconds=12.3,
            checkpoint=r.Checkpoint(key=f"k/{number}", sha256=f"{number:02x}" * 32, size=1234567),
            reason="5 of 5 clients reported",
        )
    return r.RoundUpdated(
        problem_id=i, run=run, report=report, round=number, attempt=attempt, stage=stage, **{**base, **k}
    )


async def test_shots(platform: Any) -> None:
    ids = [str(uuid4()) for _ in range(12)]
    names = [
        "Draft: tumours",
        "Ready: tumours",
        "Running: waiting for clients",
        "Running: selection",
        "Running: reporting",
        "Completed: tumours",
        "Stopped: a problem with a very long name that goes on and on and on until it has to be wrapped somewhere-or-other_without_spaces",
        "Degraded",
        "Failed to start",
        "Thirty rounds",
        "Abandoned",
        "Starting",
    ]
    n = dict(
        zip(
            [
                "draft",
                "ready",
                "waiting",
                "selection",
                "reporting",
                "completed",
                "stopped",
                "degraded",
                "failed",
                "many",
                "abandoned",
                "starting",
            ],
            ids,
        )
    )
    async with async_playwright() as pw:
        b = await pw.chromium.launch(executable_path="/usr/bin/chromium", args=ARGS)
        problems = []

        async def ctx(token, **kw):
            c = await b.new_context(**({"viewport": {"width": 1280, "height": 800}} | kw))
            page = await c.new_page()
            page.on("console", lambda m: problems.append((m.type, m.text)) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: problems.append(("pageerror", str(e))))
            await page.goto(platform.url)
            if token:
                await page.fill("[name=token]", token)
                await page.click("button")
            return page

        async def shot(page, name):
            await page.wait_for_timeout(600)
            await page.screenshot(path=f"/tmp/shots/{name}.png", full_page=True)

        page = await ctx(None)
        await shot(page, "01-signin")
        await page.fill("[name=token]", "wrong")
        await page.click("button")
        await shot(page, "02-signin-wrong")
        setter = await ctx("fdt_setter_made_up")
        await shot(setter, "03-empty")
        org = await ctx("fdt_clinic_made_up")
        await shot(org, "03-empty-org")
        for k, name in zip(ids, names):
            await platform.record(created(k, name))
        for k in ids[1:]:
            await platform.record(stored(k))
        for k in ids[2:]:
            for o in ORGS[:4]:
                await platform.record(p.ParticipationRequested(problem_id=k, organization=o))
            for o in ORGS[:3]:
                await platform.record(p.ParticipationApproved(problem_id=k, organization=o))
            await platform.record(
                p.ParticipationRefused(
                    problem_id=k,
                    organization="Other Clinic",
                    reason="The data format is another one; please convert it first.",
                )
            )
            await platform.record(started(k))
        for k in set(ids[2:]) - {n["failed"], n["starting"]}:
            await platform.record(spawned(k))
        await platform.record(
            rnd(n["selection"], 1, 1, "selection", waiting=3, reason="3 of 7 clients wait to be selected")
        )
        await platform.record(
            rnd(n["reporting"], 1, 1, "selection", waiting=7),
            rnd(n["reporting"], 2, 1, "configuration", waiting=0, selected=7),
            rnd(
                n["reporting"],
                3,
                1,
                "reporting",
                selected=7,
                reported=3,
                examples=3000,
                seconds=4.2,
                participants=ORGS[:3],
                refusals=[
                    r.Refusal(
                        organization="Mayo Rochester",
                        code="update_not_finite",
                        detail="The tensor dense.weight holds NaN.",
                    )
                ],
                reason="3 of 5 reported; 4 are enough when the time is over",
            ),
        )
        rep = 0
        for k in (n["completed"], n["many"], n["stopped"], n["degraded"]):
            for i in range(1, 31 if k != n["stopped"] else 4):
                await platform.record(rnd(k, i, i, "completed"))
        await platform.record(
            rnd(n["abandoned"], 1, 1, "completed"),
            rnd(
                n["abandoned"],
                2,
                2,
                "abandoned",
                selected=7,
                reported=3,
                seconds=600,
                reason="3 of 5 reported within 600 seconds; at least 4 were needed",
            ),
            rnd(
                n["abandoned"],
                3,
                2,
                "abandoned",
                attempt=2,
                selected=7,
                reported=2,
                seconds=600,
                reason="2 of 5 reported within 600 seconds; at least 4 were needed",
            ),
        )
        await platform.record(
            p.ProblemCompleted(
                problem_id=n["completed"],
                run=1,
                rounds=30,
                model=p.ModelFile(key="k/30", sha256="1e" * 32, size=1234567),
            ),
            infra.InfraStopped(
                problem_id=n["completed"], run=1, namespace="fedota-x", reason="the training is completed"
            ),
        )
        await platform.record(
            p.ProblemStopped(problem_id=n["stopped"], run=1, reason="round 4 was abandoned 5 times: too few clients"),
            infra.InfraStopped(problem_id=n["stopped"], run=1, namespace="fedota-x", reason="the problem was stopped"),
        )
        await platform.record(
            infra.InfraDegraded(
                problem_id=n["degraded"],
                run=1,
                namespace="ns",
                component="selector-1",
                reason="it was killed by signal 9",
                log=[
                    "2026-11-24T17:00:01Z info ready url=http://127.0.0.1:40125",
                    "2026-11-24T17:02:11Z warning memory is short",
                    "Killed",
                ],
            )
        )
        log = [f"2026-11-24T17:00:{i:02d}Z info starting step {i}" for i in range(12)] + [
            "Traceback (most recent call last):",
            '  File "/app/fedota/runtime/coordinator/app.py", line 155, in main',
            "ModuleNotFoundError: No module named 'numpy' — a very long line that goes on " + "x" * 200,
        ]
        await platform.record(
            infra.InfraFailed(
                problem_id=n["failed"],
                run=1,
                namespace="fedota-f",
                reason="the coordinator ended with exit code 1 before it was ready",
                log=log,
            ),
            p.ProblemStopped(
                problem_id=n["failed"],
                run=1,
                reason="the infrastructure failed: the coordinator ended with exit code 1 before it was ready",
            ),
            infra.InfraStopped(
                problem_id=n["failed"],
                run=1,
                namespace="fedota-f",
                reason="what was left of the failed launch was removed",
            ),
        )
        await platform.projector.catch_up()
        await setter.goto(platform.url)
        await shot(setter, "04-list")
        for name, k in n.items():
            await setter.goto(f"{platform.url}/problems/{k}")
            await shot(setter, f"1-{name}")
        for name in ("draft", "ready", "reporting", "failed", "many", "waiting"):
            await org.goto(f"{platform.url}/problems/{n[name]}")
            await shot(org, f"2-org-{name}")
        await setter.goto(f"{platform.url}/problems/{uuid4()}")
        await shot(setter, "05-404")
        for w in (760, 390):
            small = await ctx("fdt_setter_made_up", viewport={"width": w, "height": 800})
            await shot(small, f"3-{w}-list")
            for name in ("reporting", "many", "failed", "draft"):
                await small.goto(f"{platform.url}/problems/{n[name]}")
                await shot(small, f"3-{w}-{name}")
                over = await small.evaluate("document.documentElement.scrollWidth-innerWidth")
                if over > 0:
                    problems.append(("overflow", w, name, over))
        dark = await ctx("fdt_setter_made_up", color_scheme="dark")
        await shot(dark, "4-dark-list")
        for name in ("reporting", "abandoned"):
            await dark.goto(f"{platform.url}/problems/{n[name]}")
            await shot(dark, f"4-dark-{name}")
        await b.close()
        print(problems)
        assert problems == []
