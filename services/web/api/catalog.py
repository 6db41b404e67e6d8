"""The kinds that workers have announced, and inputs held against their schemas."""

import json
import time
from dataclasses import dataclass
from typing import Any

import jsonschema_rs

from headway import schemas
from headway.errors import InvalidInput, NotFound, UnknownKind
from headway.store import Store

REMEMBERED = 5.0
# Kinds that an error names.
MOST_NAMED = 15
MOST_ERRORS = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A kind as announced, with its compiled input schema."""

    kind: dict[str, Any]
    validator: jsonschema_rs.Validator
    encoded: bytes


class Catalog:
    """Reads the announced kinds and remembers them for a few seconds."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._entries: dict[str, Entry] = {}
        self._encoded = b""
        self._until = 0.0

    async def encoded(self) -> bytes:
        """All kinds as the JSON body of `GET /kinds`."""
        await self._refresh()
        return self._encoded

    async def get(self, name: str) -> Entry:
        """Raises NotFound, naming the kinds there are."""
        entry = await self._find(name)
        if entry is None:
            raise NotFound(self._missing(name))
        return entry

    async def check(self, name: str, value: Any) -> Entry:
        """The kind, if `value` fits its input schema. Raises UnknownKind or InvalidInput with an error a field."""
        entry = await self._find(name)
        if entry is None:
            raise UnknownKind(self._missing(name))
        errors: list[dict[str, str]] = []
        for error in entry.validator.iter_errors(value):
            if len(errors) == MOST_ERRORS:
                break
            path = ".".join(str(part) for part in ("input", *error.instance_path))
            errors.append({"field": path, "message": _short(_message(error, entry.kind["input_schema"]))})
        if errors:
            where = f"see the input_schema of GET /api/v1/kinds/{name}"
            raise InvalidInput(f"{errors[0]['field']}: {errors[0]['message']}; {where}.", errors=errors)
        return entry

    async def _find(self, name: str) -> Entry | None:
        await self._refresh()
        if name not in self._entries:
            await self._refresh(at_once=True)
        return self._entries.get(name)

    def _missing(self, name: str) -> str:
        names = list(self._entries)
        there = ", ".join(names[:MOST_NAMED]) or "none yet, no worker has started"
        if len(names) > MOST_NAMED:
            there += f", and {len(names) - MOST_NAMED} more at GET /api/v1/kinds"
        return f"There is no kind {name[:100]!r}; there are: {there}."

    async def _refresh(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        # An unknown name may be a kind announced a moment ago, but must not cost a query each time.
        if now < self._until and not (at_once and now > self._until - REMEMBERED + 0.5):
            return
        kinds = await self._store.kinds()
        encoded = json.dumps({"kinds": kinds}, separators=(",", ":")).encode()
        if encoded != self._encoded:
            self._entries = {
                kind["name"]: Entry(
                    kind,
                    schemas.validator(kind["input_schema"]),
                    json.dumps(kind, separators=(",", ":")).encode(),
                )
                for kind in kinds
            }
            self._encoded = encoded
        self._until = now + REMEMBERED


def _message(error: jsonschema_rs.ValidationError, schema: Any) -> str:
    """What is wrong. Of an input that needs one of some properties the validator does not say which."""
    choices = schema.get("oneOf") if list(error.schema_path) == ["oneOf"] else None
    if not choices or not all(isinstance(choice, dict) and choice.keys() == {"required"} for choice in choices):
        return error.message
    return f"give one of these, and only one: {', '.join(' and '.join(choice['required']) for choice in choices)}"


def _short(message: str) -> str:
    """At most 500 characters. The validator quotes the value first and says last what is wrong with it."""
    return message if len(message) <= 500 else f"{message[:200]} … {message[-297:]}"
