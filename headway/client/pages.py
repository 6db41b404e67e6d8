"""What commands print about a job, a kind and artifacts: lines for people."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from headway.client.text import as_json, duration, facts, inert, moment, percent, readable, size, table, took
from headway.states import TERMINAL

Json = Mapping[str, Any]


def job(job: Json) -> list[str]:
    """Everything about one job."""
    ran = took(job)
    lines = [
        f"id: {inert(job['id'])}",
        f"kind: {inert(job['kind'])}",
        f"state: {inert(job['state'])}" + (f" after {ran}" if ran else ""),
        *(f"{name}: {moment(job[name + '_at'])}" for name in ("created", "started", "finished") if job[name + "_at"]),
    ]
    if job["cancel_requested_at"]:
        lines.append(f"cancel requested: {moment(job['cancel_requested_at'])}")
    if job["attempt"] > 1:
        lines.append(f"attempt: {job['attempt']}")
    for name, other in (("retry of", job["retry_of"]), ("child of", job["parent_id"])):
        if other:
            lines.append(f"{name}: {inert(other)}")
    if job["tags"]:
        lines.append(f"tags: {inert(', '.join(job['tags']))}")
    if job["progress"]:
        lines.append(f"progress: {', '.join(facts(job['progress'], ended=job['state'] in TERMINAL)).strip()}")
    lines.append(f"input: {as_json(job['input'])}")
    if job["error"]:
        lines.append(f"error: {error(job)}")
    return lines + readable(job["result"])


def error(job: Json) -> str:
    """Why a job failed. Further lines are indented, so that none can pass for one of ours."""
    message = str((job["error"] or {}).get("message") or "The job failed without a message.")
    return "\n  ".join(inert(line) for line in message.splitlines() or [message])


def jobs(jobs: Sequence[Json]) -> list[str]:
    """A table; the state comes last."""
    return table(("ID", "CREATED", "KIND", "PROGRESS", "STATE"), [_row(job) for job in jobs])


def kinds(kinds: Sequence[Json]) -> list[str]:
    return table(("KIND", "DESCRIPTION"), [(inert(kind["name"]), inert(kind["description"])) for kind in kinds])


def kind(kind: Json) -> list[str]:
    """What one kind takes and gives."""
    return [
        f"{inert(kind['name'])}: {inert(kind['description'])}",
        f"timeout: {duration(kind['timeout'])}",
        "",
        *_fields("INPUT", kind["input_schema"]),
        "",
        *_fields("RESULT", kind["result_schema"]),
    ]


def artifacts(artifacts: Sequence[Json]) -> list[str]:
    """A table of what `download` takes."""
    return table(
        ("NAME", "TYPE", "SIZE", "SHA-256"),
        [
            (inert(item["name"]), inert(item["content_type"]), size(item["size"]), inert(item["sha256"]))
            for item in artifacts
        ],
    )


def artifact(job: Json, artifact: Json) -> str:
    """That there is one, and how to get it."""
    name = artifact["name"]
    command = f"headway download {inert(job['id'])} {inert(shlex.quote(name))}"
    return f"artifact: {inert(name)}, {size(artifact['size'])} ({command})"


def _row(job: Json) -> tuple[str, ...]:
    progress = job["progress"]
    share = f"{percent(progress['done'], progress['total'])} %" if progress and progress["total"] else ""
    return inert(job["id"]), moment(job["created_at"]), inert(job["kind"]), share, inert(job["state"])


def _fields(title: str, schema: Json) -> list[str]:
    required = schema.get("required", ()) if title == "INPUT" else ()
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else as_json(field["default"]) if "default" in field else ""
        rows.append((inert(name), inert(_type(field)), default, inert(field.get("description", ""))))
    return table((title, "TYPE", "", ""), rows) if rows else [f"{title}: {inert(_type(schema))}"]


def _type(schema: Json) -> str:
    """A JSON Schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return " | ".join(_type(choice) for choice in schema[name])
    if "enum" in schema:
        return " | ".join(as_json(choice) for choice in schema["enum"])
    if "const" in schema:
        return as_json(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("format") or schema.get("type") or "any")
