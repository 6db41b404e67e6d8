"""JSON Schemas of kinds, made ready to hold inputs against. They stand alone: nothing is fetched that one refers to."""

from typing import Any

import jsonschema_rs


def validator(schema: Any) -> jsonschema_rs.Validator:
    """Raises ValueError, with what is wrong as its `message`, for what is not a JSON Schema or needs another one."""
    return jsonschema_rs.validator_for(schema, validate_formats=True, retriever=_refuse)


def _refuse(uri: str) -> Any:
    raise ValueError(f"{uri} is not part of the schema; define in $defs what it refers to")
