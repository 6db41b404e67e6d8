"""A laptop sleeps, and wakes up."""

import asyncio
import signal
import time

import pytest
from redis.asyncio import Redis

from headway.client import Client
from headway.settings import Settings
from tests.browser.conftest import Browser, Page
from tests.browser.example import done, example, follow, said
from tests.conftest import Tenant, until

ASLEEP = 60
# How far the bar may be behind, in seconds of the job. Ten reports a second come.
BEHIND = 0.7


@pytest.mark.timeout(170)
async def test_after_a_sleep_the_bar_is_right_at_once(
    chromium: Browser, firefox: Browser, settings: Settings, redis: Redis, tenant: Tenant
) -> None:
    async with example(settings, tenant) as (client, origin):
        job = await client.submit("demo.countdown", {"seconds": 300})
        browsers = (chromium, firefox)
        pages = [await follow(browser, origin, browser.name, job["id"]) for browser in browsers]
        for browser in browsers:
            browser.signal(signal.SIGSTOP)
        try:
            await client.room(f"job:{job['id']}").send("Are you asleep?")
            await asyncio.sleep(ASLEEP)
        finally:
            for browser in browsers:
                browser.signal(signal.SIGCONT)
        woken = time.monotonic()
        for page in pages:
            await until(lambda page=page: right(client, job["id"], page), 10)
            await until(lambda page=page: said(page, ["test: Are you asleep?"]), 10)
        assert time.monotonic() - woken < 10
        await client.cancel(job["id"])
        for page in pages:
            await page.until("document.getElementById('state').dataset.state === 'cancelled'")
            assert await page.shut() == []


async def right(client: Client, job_id: str, page: Page) -> bool:
    """Whether the bar is where the job is."""
    shown = await done(page)
    return abs((await client.get(job_id))["progress"]["done"] - shown) < BEHIND
