"""Holds every frame that a service sends in the tests against its own AsyncAPI document."""

import json
from collections.abc import Mapping
from typing import Any

import jsonschema_rs

from headway.settings import Settings
from services.web.asgi import Application
from services.web.live import asyncapi

DOCUMENT = asyncapi.document()
SCHEMAS = DOCUMENT["components"]["schemas"]
ANY_ROOM = {"anyOf": [{"$ref": f"#/components/schemas/{frame.__name__}"} for frame in asyncapi.ROOM_SENT]}


def validator(schema: Mapping[str, Any]) -> jsonschema_rs.Validator:
    """Of a schema whose references lead into the document."""
    draft = {"$schema": "http://json-schema.org/draft-07/schema#"}
    return jsonschema_rs.validator_for({**draft, **schema, "components": {"schemas": SCHEMAS}}, validate_formats=True)


BY_TYPE = {
    SCHEMAS[frame.__name__]["properties"]["t"]["const"]: validator({"$ref": f"#/components/schemas/{frame.__name__}"})
    for frame in asyncapi.SENT
}
# Frames of `/ws/rooms/{room}` have no type.
UNTYPED = validator(ANY_ROOM)


def faults(text: str) -> list[str]:
    """What is wrong with a frame of the server."""
    read = json.loads(text)
    found = []
    for frame in read if isinstance(read, list) else [read]:
        held_against = BY_TYPE.get(frame["t"]) if "t" in frame else UNTYPED
        if held_against is None:
            found.append(f"no such type: {frame}")
        else:
            found += [
                f"{error.instance_path}: {error.message}, in {frame}" for error in held_against.iter_errors(frame)
            ]
    return found


class Described(Application):
    """The web service; `faults` has what its frames do that the document does not say."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.faults: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        streams, rest = False, b""

        async def sending(message: Any) -> None:
            nonlocal streams, rest
            if message["type"] == "websocket.send":
                self.faults += faults(message["text"])
            elif message["type"] == "http.response.start":
                streams = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            elif message["type"] == "http.response.body" and streams:
                *lines, rest = (rest + message.get("body", b"")).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        self.faults += faults(line[5:].decode())
            await send(message)

        await super().__call__(scope, receive, sending)
