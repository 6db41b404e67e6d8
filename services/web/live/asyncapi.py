"""The AsyncAPI document of the live protocol, made from `schemas`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from services.web.live import commands
from services.web.live import schemas as frames

ENVELOPES = (frames.Snapshot, frames.State, frames.ProgressReport, frames.Log)
SENT = (
    frames.Welcome,
    *ENVELOPES,
    frames.Resync,
    frames.Message,
    frames.Presence,
    frames.Heartbeat,
    frames.Bye,
    frames.Ack,
    frames.Error,
)
TAKEN = (commands.Subscribe, commands.Unsubscribe, commands.Publish, commands.Refresh, commands.Pong)
ROOM_SENT = (
    frames.RoomMessage,
    frames.Here,
    frames.Joined,
    frames.Left,
    frames.RoomResync,
    frames.RoomAck,
    frames.RoomError,
)
ALL = (*SENT, *TAKEN, *ROOM_SENT, commands.Speech)
# Frames of a running service.
EXAMPLES = json.loads(Path(__file__).with_name("examples.json").read_text())

DESCRIPTION = """\
Follow jobs live, and talk in rooms. A subscriber sees every event of a job once and in order, whatever breaks.

Frames are JSON text: one object, or an array of objects, which the server may send to say several things at once. A
client sends single objects. A field or type that a client does not know is to be passed over: later releases may add
some. The server refuses what it does not know.
"""

# Code, meaning, what a client does.
CLOSE_CODES = (
    (1000, "the job has ended; only on `/ws/jobs/{job}`", "stop"),
    (1011, "something broke in the server", "connect again and resume"),
    (1012, "the server is restarted", "connect again within 5 s, at a random moment"),
    (1013, "the database is away", "connect again"),
    (4000, "the socket is as old as it may be", "connect again and resume"),
    (4001, "the ticket or the key has ended", "connect again with a new ticket"),
    (4008, "the client reads too slowly", "connect again and resume"),
    (4010, "the server has lost its place", "connect again and resume"),
    (4013, "too many commands a second", "connect again, more slowly"),
    (4500, "a frame that cannot be read, or no subscribe within 10 s", "stop"),
    (4501, "the key is not valid, or the ticket does not allow this", "stop"),
    (4503, "the page's origin is not allowed", "stop"),
    (4504, "too many sockets of one key or user", "stop"),
    (4505, "too many subscriptions", "stop"),
    (4506, "there is no such job; only on `/ws/jobs/{job}` and in its room", "stop"),
)


@cache
def document() -> dict[str, Any]:
    """The whole document. `components.schemas` is draft 7 of JSON Schema, which is AsyncAPI's own."""
    return {
        "asyncapi": "3.1.0",
        "info": {"title": "Headway live", "version": "1", "description": DESCRIPTION},
        "defaultContentType": "application/json",
        "servers": {
            "websocket": {
                "host": "{host}",
                "protocol": "wss",
                "description": "The web service; `ws` where it has no TLS.",
                "variables": {"host": {"default": "localhost:8000"}},
                "security": [
                    {"$ref": "#/components/securitySchemes/key"},
                    {"$ref": "#/components/securitySchemes/ticket"},
                ],
            },
            "sse": {
                "host": "{host}",
                "protocol": "https",
                "description": "The same, as server-sent events.",
                "variables": {"host": {"default": "localhost:8000"}},
                "security": [
                    {"$ref": "#/components/securitySchemes/key"},
                    {"$ref": "#/components/securitySchemes/query"},
                ],
            },
        },
        "channels": {
            "live": _channel(
                "/ws/v1",
                "Many jobs, sets of jobs and rooms on one socket. Its subprotocol is `jobs.v1`.",
                (*SENT, *TAKEN),
            ),
            "job": _channel(
                "/ws/jobs/{job}",
                "One job, from its snapshot to its end, without a subscribe. Nothing is expected from the client.",
                (*ENVELOPES, frames.Bye),
                job="The job's id.",
            ),
            "room": _channel(
                "/ws/rooms/{room}",
                "One room, without a subscribe; `?since=` begins with the messages after that one.",
                (*ROOM_SENT, commands.Speech),
                room="The room's name.",
            ),
            "jobEvents": _channel(
                "/api/v1/jobs/{job}/events",
                "One job as server-sent events: `event` is the type, `data` the envelope, and `id` what "
                "`Last-Event-ID` resumes from.",
                (*ENVELOPES, frames.Resync, frames.Bye),
                server="sse",
                job="The job's id.",
            ),
            "events": _channel(
                "/api/v1/events",
                "A set of jobs as server-sent events; `tag`, `kind` and `parent` choose. The `id` is the cursor.",
                (*ENVELOPES, frames.Resync),
                server="sse",
            ),
        },
        "operations": {
            "receiveLive": _operation("send", "live", "What the server sends.", SENT),
            **{
                frame.__name__.lower(): {
                    **_operation("receive", "live", _summary(frame), (frame,)),
                    "reply": {
                        "channel": {"$ref": "#/channels/live"},
                        "messages": [_message_of("live", frames.Ack), _message_of("live", frames.Error)],
                    },
                }
                for frame in TAKEN
            },
            "receiveJob": _operation("send", "job", "What happens to the job.", (*ENVELOPES, frames.Bye)),
            "receiveRoom": _operation("send", "room", "What is said, and who is here.", ROOM_SENT),
            "say": _operation("receive", "room", _summary(commands.Speech), (commands.Speech,)),
            "receiveJobEvents": _operation(
                "send", "jobEvents", "What happens to the job.", (*ENVELOPES, frames.Resync, frames.Bye)
            ),
            "receiveEvents": _operation("send", "events", "What happens to the jobs.", (*ENVELOPES, frames.Resync)),
        },
        "x-close-codes": [
            {"code": code, "meaning": meaning, "client": client} for code, meaning, client in CLOSE_CODES
        ],
        "components": {
            "messages": {frame.__name__: _message(frame) for frame in ALL},
            "schemas": _schemas(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key; for programs."},
                "ticket": {
                    "type": "httpApiKey",
                    "in": "header",
                    "name": "Sec-WebSocket-Protocol",
                    "description": "`jobs.v1, ticket.…` with a ticket of `POST /api/v1/ws-tickets`; for browsers. It "
                    "lives 30 s, is good for one connection, and for the origin it was made for.",
                },
                "query": {
                    "type": "httpApiKey",
                    "in": "query",
                    "name": "ticket",
                    "description": "The same ticket, for `EventSource`, which cannot send a header.",
                },
            },
        },
    }


def _schemas() -> dict[str, Any]:
    _, made = models_json_schema([(frame, "validation") for frame in ALL], ref_template="#/components/schemas/{model}")
    return dict(made["$defs"])


def _channel(
    address: str, description: str, messages: tuple[type[BaseModel], ...], server: str = "websocket", **parameters: str
) -> dict[str, Any]:
    return {
        "address": address,
        "description": description,
        "servers": [{"$ref": f"#/servers/{server}"}],
        "messages": {frame.__name__: {"$ref": f"#/components/messages/{frame.__name__}"} for frame in messages},
        **({"parameters": {name: {"description": text} for name, text in parameters.items()}} if parameters else {}),
    }


def _operation(action: str, channel: str, summary: str, messages: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        "messages": [_message_of(channel, frame) for frame in messages],
    }


def _message(frame: type[BaseModel]) -> dict[str, Any]:
    return {
        "name": frame.__name__,
        "summary": _summary(frame),
        "payload": {"$ref": f"#/components/schemas/{frame.__name__}"},
        "examples": [{"payload": payload} for payload in EXAMPLES.get(frame.__name__, [])],
    }


def _summary(frame: type[BaseModel]) -> str:
    return frame.__doc__ or ""


def _message_of(channel: str, frame: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/channels/{channel}/messages/{frame.__name__}"}
