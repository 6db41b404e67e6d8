"""examples/live.html, served and used as its README says."""

import runpy
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from aiohttp import web as http

from headway.client import Client
from headway.settings import Settings
from tests.browser.conftest import Browser, Page
from tests.conftest import Tenant, web, worker
from tests.ports import free_ports

EXAMPLE = Path(__file__).parents[2] / "examples" / "live.py"


@asynccontextmanager
async def example(settings: Settings, tenant: Tenant) -> AsyncIterator[tuple[Client, str]]:
    """A service, a worker, and the example's own server: a client, and the page's URL."""
    port = free_ports()
    origin = f"http://127.0.0.1:{port}"
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(web(settings.model_copy(update={"origins": (origin,)})))
        client = await stack.enter_async_context(Client(url, tenant.api_key))
        await stack.enter_async_context(worker(settings))
        runner = http.AppRunner(runpy.run_path(str(EXAMPLE))["application"](client, origin))
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await http.TCPSite(runner, "127.0.0.1", port).start()
        yield client, origin


async def follow(browser: Browser, origin: str, user: str, job_id: str) -> Page:
    """The page, following a job."""
    page = await browser.open(f"{origin}/")
    await page.run(
        """(user, job) => {
            const { elements } = document.getElementById("who");
            elements.user.value = user;
            elements.job.value = job;
            document.getElementById("who").requestSubmit();
        }""",
        user,
        job_id,
    )
    await page.until("document.getElementById('connection').textContent === 'live'")
    return page


async def say(page: Page, message: str) -> None:
    await page.run(
        """(message) => {
            document.getElementById("say").elements.message.value = message;
            document.getElementById("say").requestSubmit();
        }""",
        message,
    )


async def messages(page: Page) -> list[str]:
    """What the page shows, without the time."""
    return await page.run(  # type: ignore[no-any-return]
        "() => [...document.querySelectorAll('#messages li')].map((line) => line.lastChild.data.trim())"
    )


async def done(page: Page) -> float:
    """How far the bar is."""
    return float(await page.run("() => document.getElementById('bar').value"))


async def said(page: Page, expected: list[str]) -> bool:
    return await messages(page) == expected


async def further(page: Page, than: float) -> bool:
    return await done(page) > than
