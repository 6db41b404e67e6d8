"""Browsers follow jobs with what they have of their own, and with headway.js."""

import json
from typing import Any

import pytest
from redis.asyncio import Redis

from headway.client import Client
from headway.settings import Settings
from tests.browser.conftest import Browser, Page, check
from tests.conftest import Service, Tenant, web, worker
from tests.line_kinds import write_lines  # noqa: F401

# What all scripts of these tests share. A product would get tickets from a server of its own.
SHARED = """
window.key = KEY;
window.ticket = async () => {
    const answer = await fetch("/api/v1/ws-tickets", {
        method: "POST",
        headers: { Authorization: `Bearer ${window.key}` },
        body: JSON.stringify({ origin: location.origin, user: window.user ?? "ada" }),
    });
    return (await answer.json()).ticket;
};
"""


async def open_page(browser: Browser, url: str, key: str) -> Page:
    """A page of the service's own origin."""
    page = await browser.open(f"{url}/api/v1/live")
    await page.run(f"() => {{ {SHARED.replace('KEY', json.dumps(key))} }}")
    return page


async def test_the_description_is_a_page_without_a_fault(browser: Browser, service: Service) -> None:
    page = await browser.open(f"{service.url}/api/v1/live")
    assert await page.run("() => document.querySelector('#Snapshot h3').textContent") == "Snapshot"
    assert await page.run("() => document.querySelector('h1').scrollWidth <= innerWidth")
    assert await page.shut() == []


async def test_a_websocket_of_the_browser(browser: Browser, url: str, tenant: Tenant, job: str) -> None:
    page = await open_page(browser, url, tenant.api_key)
    seen = await page.run(
        """async (job) => {
            const ticket = await window.ticket();
            const connect = () => new Promise((resolve) => {
                const frames = [];
                const address = location.origin.replace("http", "ws") + "/ws/v1";
                const socket = new WebSocket(address, ["jobs.v1", `ticket.${ticket}`]);
                socket.onopen = () => socket.send(JSON.stringify({ t: "subscribe", id: 1, jobs: [{ job }] }));
                socket.onmessage = ({ data }) => {
                    frames.push(...[JSON.parse(data)].flat());
                    if (frames.at(-1).t === "bye") socket.close(1000);
                };
                socket.onclose = ({ code }) => resolve({ code, frames, protocol: socket.protocol });
            });
            return [await connect(), await connect()];
        }""",
        job,
    )
    first, second = seen
    check(first["frames"])
    assert (first["protocol"], first["code"]) == ("jobs.v1", 1000)
    # A ticket is good for one connection.
    assert (second["frames"], second["code"]) == ([], 4001)
    await page.shut()


async def test_an_eventsource_of_the_browser_ends_with_the_job(
    browser: Browser, url: str, tenant: Tenant, job: str
) -> None:
    page = await open_page(browser, url, tenant.api_key)
    frames = await page.run(
        """async (job) => {
            const source = new EventSource(`/api/v1/jobs/${job}/events?ticket=${await window.ticket()}`);
            const frames = [];
            for (const type of ["snapshot", "state", "progress", "log"]) {
                source.addEventListener(type, ({ data }) => frames.push(JSON.parse(data)));
            }
            return new Promise((resolve) => source.addEventListener("bye", ({ data }) => {
                source.close();
                resolve([...frames, JSON.parse(data)]);
            }));
        }""",
        job,
    )
    check(frames)
    await page.shut()


FOLLOW = """async (job) => {
    const { Live } = await import("/static/headway/headway.js");
    window.connections = [];
    window.seen = [];
    // It is told of every try that fails.
    const connection = (there) => there !== window.connections.at(-1) && window.connections.push(there);
    const live = new Live({ ticket: window.ticket, connection });
    (async () => {
        for await (const envelope of live.follow(job)) window.seen.push(envelope);
        window.over = true;
    })().catch((error) => { window.over = String(error); });
}"""


async def test_headway_js_follows_a_job_over_a_restart_of_the_service(
    browser: Browser, settings: Settings, redis: Redis, tenant: Tenant
) -> None:
    async with worker(settings):
        async with web(settings) as url, Client(url, tenant.api_key) as client:
            page = await open_page(browser, url, tenant.api_key)
            job = await client.submit("test.lines", {"count": 80})
            await page.run(FOLLOW, job["id"])
            await page.until("window.seen.length > 3")
        await page.until("window.connections.at(-1) === false")
        async with web(settings, port=int(url.rsplit(":", 1)[1])):
            assert await page.until("window.over", 20) is True
    seen: list[dict[str, Any]] = await page.run("() => window.seen")
    numbers = [envelope["seq"] for envelope in seen]
    assert numbers == sorted(set(numbers))
    lines = [envelope["d"]["message"] for envelope in seen if envelope["t"] == "log"]
    assert lines == [str(number) for number in range(int(lines[0]), 80)]
    assert [envelope["t"] for envelope in seen].count("snapshot") == 1
    assert seen[-1]["d"]["state"] == "succeeded"
    assert (await page.run("() => window.connections"))[:3] == [True, False, True]
    await page.shut()


async def test_headway_js_says_why_there_is_nothing_to_follow(browser: Browser, service: Service) -> None:
    page = await open_page(browser, service.url, service.api_key)
    await page.run(FOLLOW, "01975e13-0000-7000-8000-000000000000")
    assert await page.until("window.over") == ("Refused: There is no job 01975e13-0000-7000-8000-000000000000.")
    await page.shut()


async def test_headway_js_watches_a_set_and_follows_jobs_on_one_socket(browser: Browser, service: Service) -> None:
    page = await open_page(browser, service.url, service.api_key)
    await page.run(
        """async () => {
            const { Live } = await import("/static/headway/headway.js");
            window.sockets = 0;
            window.WebSocket = class extends WebSocket {
                constructor(...given) { super(...given); window.sockets += 1; }
            };
            window.ended = [];
            const live = window.live = new Live({ ticket: window.ticket });
            (async () => {
                for await (const { t, job, d } of live.watch({ tag: "t" })) {
                    if (d.state === "succeeded") {
                        window.ended.push(job);
                    }
                    if (t === "snapshot") (async () => {
                        for await (const envelope of live.follow(job)) window.last = envelope;
                        window.ended.push(job);
                    })();
                }
            })();
        }"""
    )
    # The set has a cursor once it holds.
    await page.until("[...(window.live.lines[0]?.subscriptions.values() ?? [])][0]?.cursor")
    jobs = [await service.client.submit("demo.countdown", {"seconds": 0.3}, tags=["t"]) for _ in range(5)]
    await page.until("window.ended.length === 10")
    assert sorted(await page.run("() => window.ended")) == sorted([job["id"] for job in jobs] * 2)
    assert await page.run("() => window.sockets") == 1
    await page.shut()


@pytest.mark.parametrize("reason", ["signal", "break"])
async def test_headway_js_lets_go(browser: Browser, service: Service, reason: str) -> None:
    job = await service.client.submit("demo.countdown", {"seconds": 60})
    page = await open_page(browser, service.url, service.api_key)
    await page.run(
        """async (job, reason) => {
            const { Live } = await import("/static/headway/headway.js");
            const live = new Live({ ticket: window.ticket, connection: (there) => { window.there = there; } });
            const stop = new AbortController();
            let seen = 0;
            for await (const envelope of live.follow(job, { signal: stop.signal })) {
                seen += 1;
                if (seen === 2 && reason === "break") break;
                if (seen === 2) stop.abort();
            }
        }""",
        job["id"],
        reason,
    )
    await page.until("window.there === false")
    await page.shut()
