"""The live protocol's description: the AsyncAPI document, and the same as a page."""

import json
from collections.abc import Mapping
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from services.web.live import asyncapi
from services.web.live.commands import Speech

Json = Mapping[str, Any]


def document(request: HttpRequest) -> HttpResponse:
    """`GET /api/v1/asyncapi.json`."""
    return JsonResponse(asyncapi.document())


def page(request: HttpRequest) -> HttpResponse:
    """`GET /api/v1/live`: nothing on it is from elsewhere, and it runs no script."""
    made = asyncapi.document()
    messages, schemas = made["components"]["messages"], made["components"]["schemas"]
    sides = [
        ("From the server", [frame.__name__ for frame in (*asyncapi.SENT, *asyncapi.ROOM_SENT)]),
        ("From the client", [frame.__name__ for frame in (*asyncapi.TAKEN, Speech)]),
    ]
    return render(
        request,
        "headway/live.html",
        {
            "title": made["info"]["title"],
            "description": [_marked(part) for part in made["info"]["description"].split("\n\n")],
            "channels": [(one["address"], _marked(one["description"])) for one in made["channels"].values()],
            "security": [
                (name, _marked(scheme["description"])) for name, scheme in made["components"]["securitySchemes"].items()
            ],
            "sides": [(title, [_shown(name, messages[name], schemas) for name in names]) for title, names in sides],
            "parts": [
                (name, _marked(schema.get("description", "")), _fields(schema), _choices(schema))
                for name, schema in schemas.items()
                if name not in messages
            ],
            "close_codes": [(row["code"], _marked(row["meaning"]), row["client"]) for row in made["x-close-codes"]],
        },
    )


def _shown(name: str, message: Json, schemas: Json) -> dict[str, Any]:
    examples = [json.dumps(example["payload"], ensure_ascii=False) for example in message["examples"]]
    return {
        "name": name,
        "summary": _marked(message["summary"]),
        "fields": _fields(schemas[name]),
        "examples": examples,
    }


def _fields(schema: Json) -> list[tuple[str, list[tuple[str, bool]], bool, str]]:
    """Name, type, whether it is always there, description. A part of a type that is True is explained on the page."""
    required = schema.get("required", ())
    return [
        (name, _type(field), name in required, _marked(field.get("description", "")))
        for name, field in schema.get("properties", {}).items()
    ]


def _marked(text: str) -> SafeString:
    """What stands between backticks as code."""
    parts = text.split("`")
    return format_html_join(
        "", "{}", ((format_html("<code>{}</code>", part) if place % 2 else part,) for place, part in enumerate(parts))
    )


def _choices(schema: Json) -> str:
    return " or ".join(
        json.dumps(choice) for choice in schema.get("enum", [schema["const"]] if "const" in schema else [])
    )


def _type(schema: Json) -> list[tuple[str, bool]]:
    if "$ref" in schema:
        return [(schema["$ref"].rsplit("/", 1)[-1], True)]
    if "anyOf" in schema:
        return [part for choice in schema["anyOf"] for part in (("or", False), *_type(choice))][1:]
    if "const" in schema or "enum" in schema:
        return [(_choices(schema), False)]
    if schema.get("type") == "array":
        return [("list of", False), *_type(schema["items"])]
    if "additionalProperties" in schema:
        return [("map to", False), *_type(schema["additionalProperties"])]
    return [(schema.get("format") or schema.get("type") or "any JSON", False)]
