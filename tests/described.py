"""Holds what a service sends in the tests against its own documents: AsyncAPI for frames, OpenAPI for answers."""

import json
import re
from collections.abc import Mapping
from functools import cache
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


@cache
def answers() -> list[tuple[str, re.Pattern[str], dict[str, dict[str, jsonschema_rs.Validator]]]]:
    """Of each operation its method, its path, and by status and content type what holds of the body."""
    from services.web.urls import api

    document = json.loads(json.dumps(api.get_openapi_schema()))
    return [
        (
            method.upper(),
            re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))),
            {
                status: {
                    content_type: jsonschema_rs.validator_for(
                        {"$schema": "https://json-schema.org/draft/2020-12/schema", **content["schema"]}
                        | {"components": document["components"]},
                        validate_formats=True,
                    )
                    for content_type, content in response.get("content", {}).items()
                }
                for status, response in operation["responses"].items()
            },
        )
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]


def answer_faults(method: str, path: str, status: int, content_type: str, body: bytes) -> list[str]:
    """What is wrong with an answer of the API, if it has a body of JSON."""
    if not path.startswith("/api/v1/") or not content_type.endswith("json"):
        return []
    for described, pattern, by_status in answers():
        if described == method and pattern.fullmatch(path):
            by_type = by_status.get(str(status), by_status["default"])
            if "*/*" in by_type:
                return []
            if (held_against := by_type.get(content_type)) is None:
                return [f"{method} {path}: no {content_type} with {status}"]
            return [
                f"{method} {path}, {status}: {error.instance_path}: {error.message}"
                for error in held_against.iter_errors(json.loads(body))
            ]
    return []


class Described(Application):
    """The web service; `faults` has what it sends that its documents do not say."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.faults: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status, content_type, rest = 0, "", b""

        async def sending(message: Any) -> None:
            nonlocal status, content_type, rest
            if message["type"] == "websocket.send":
                self.faults += faults(message["text"])
            elif message["type"] == "http.response.start":
                status = message["status"]
                content_type = dict(message["headers"]).get(b"Content-Type", b"").decode()
            elif message["type"] == "http.response.body" and content_type.endswith("json"):
                rest += message.get("body", b"")
                if not message.get("more_body") and scope["method"] != "HEAD":
                    self.faults += answer_faults(scope["method"], scope["path"], status, content_type, rest)
            elif message["type"] == "http.response.body" and content_type.startswith("text/event-stream"):
                *lines, rest = (rest + message.get("body", b"")).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        self.faults += faults(line[5:].decode())
            await send(message)

        await super().__call__(scope, receive, sending)
