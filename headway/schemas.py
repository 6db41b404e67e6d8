"""JSON Schemas of kinds, made ready to hold inputs against. They stand alone: nothing is fetched that one refers to."""

from typing import Any

import jsonschema_rs


def validator(schema: Any) -> jsonschema_rs.Validator:
    """Raises ValueError, which says what is wrong, for what is not a JSON Schema or needs another one."""
    try:
        return jsonschema_rs.validator_for(schema, validate_formats=True, retriever=_refuse)
    except jsonschema_rs.ValidationError as error:
        raise ValueError(error.message) from error


def _refuse(uri: str) -> Any:
    raise ValueError(f"{uri} is not part of the schema; define in $defs what it refers to")
