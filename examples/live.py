"""Serves live.html as your own product would: the page gets tickets from here, and never sees the API key.

HEADWAY_ORIGINS=http://127.0.0.1:8100 make run
.venv/bin/python examples/live.py
"""

import argparse
from pathlib import Path

from aiohttp import web

from headway.client import Client

PAGE = Path(__file__).with_name("live.html")


def application(client: Client, origin: str) -> web.Application:
    """The page, headway.js, and tickets for whoever asks: a product would first ask who that is."""

    async def page(request: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE)

    async def module(request: web.Request) -> web.Response:
        raise web.HTTPFound(f"{client.url}/static/headway/headway.js")

    async def ticket(request: web.Request) -> web.Response:
        user = (await request.json())["user"]
        return web.json_response(await client.ticket(origin, user=user))

    served = web.Application()
    served.add_routes([web.get("/", page), web.get("/headway.js", module), web.post("/ticket", ticket)])
    return served


async def served() -> web.Application:
    return application(Client.from_environment(), origin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8100)
    port = parser.parse_args().port
    origin = f"http://127.0.0.1:{port}"
    print(f"Open {origin}/ in a browser, or in two.")
    web.run_app(served(), host="127.0.0.1", port=port, print=None)
