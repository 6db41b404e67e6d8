"""Two browsers in one room, on one running job."""

import os
from pathlib import Path

from redis.asyncio import Redis

from headway.settings import Settings
from tests.browser.conftest import Browser
from tests.browser.example import done, example, follow, further, said, say
from tests.conftest import Tenant, until

INERT = "<img src=x onerror='window.hacked = true'><b>bold</b>"
# Where pictures of the pages go, for whoever wants to see them.
PICTURES = os.environ.get("PICTURES")


async def test_two_browsers_in_one_room_on_one_running_job(
    chromium: Browser, firefox: Browser, settings: Settings, redis: Redis, tenant: Tenant
) -> None:
    async with example(settings, tenant) as (client, origin):
        job = await client.submit("demo.countdown", {"seconds": 8})
        ada = await follow(chromium, origin, "ada", job["id"])
        grace = await follow(firefox, origin, "grace", job["id"])
        before = [await done(page) for page in (ada, grace)]
        for page in (ada, grace):
            await page.until("document.getElementById('here').textContent.split(', ').sort().join() === 'ada,grace'")
        await say(ada, "It runs.")
        await until(lambda: said(grace, ["ada: It runs."]))
        await say(grace, INERT)
        # The page sends on its own connection: only what it has been shown is before what a program sends.
        await until(lambda: said(grace, ["ada: It runs.", f"grace: {INERT}"]))
        await client.room(f"job:{job['id']}").send("from a program")
        expected = ["ada: It runs.", f"grace: {INERT}", "test: from a program"]
        for page in (ada, grace):
            await until(lambda page=page: said(page, expected))
            assert await page.run(
                "() => [window.hacked, document.querySelectorAll('#messages b, #messages img').length]"
            ) == [None, 0]
        if PICTURES:
            await ada.screenshot(Path(PICTURES) / "chromium.png")
            await grace.screenshot(Path(PICTURES) / "firefox.png")
        for page, earlier in zip((ada, grace), before, strict=True):
            await until(lambda page=page, earlier=earlier: further(page, earlier))
            await page.until("document.getElementById('state').dataset.state === 'succeeded'", 20)
            assert await done(page) == 8
        assert await grace.shut() == []
        await ada.until("document.getElementById('here').textContent === 'ada'")
        assert await ada.shut() == []
