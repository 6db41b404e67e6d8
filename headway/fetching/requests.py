"""What is asked for: the request itself, and the headers that a client may choose."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic_core import to_json

HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}")
# A tab, and what may be seen; never a line's end, which would begin another header.
VALUE = re.compile(r"[\t\x20-\x7e\x80-\uffff]{0,8192}")
MOST_HEADERS = 50
# They say how a message travels, which is the HTTP client's to know.
TRANSPORT = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
SECRET = frozenset({"authorization", "cookie", "proxy-authorization"})
# The same for JSON Schema, whose patterns know small letters and capitals apart.
NOT_SECRET: JsonDict = {
    "not": {
        "pattern": "^("
        + "|".join(
            "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in name)
            for name in sorted(SECRET)
        )
        + ")$"
    }
}

Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
# What is kept of the body of an answer; `archive` is its bytes.
Kept = Literal["none", "digest", "text", "base64", "archive"]
LONGEST_URL = 2048
Url = Annotated[str, Field(max_length=LONGEST_URL, pattern=r"^[Hh][Tt][Tt][Pp][Ss]?://\S+$")]


def unsendable(name: str, value: str) -> str | None:
    """Why no request can have this header; None if it can. Repeats nothing of the value."""
    if not HEADER.fullmatch(name):
        return "the name of a header is letters, digits and hyphens"
    if not VALUE.fullmatch(value):
        return f"the value of the header {name} holds a control character, or is over 8,192 characters"
    if name.lower() in TRANSPORT:
        return f"the header {name} is the HTTP client's to set; leave it out"
    return None


def _chosen(headers: dict[str, str]) -> dict[str, str]:
    if len({name.lower() for name in headers}) != len(headers):
        raise ValueError("a header stands there twice; small letters and capitals are the same")
    for name, value in headers.items():
        if why := unsendable(name, value):
            raise ValueError(why)
        if name.lower() in SECRET:
            raise ValueError(
                f"the header {name} is a credential, which is kept with no request; "
                "the operator names it for its host in HEADWAY_FETCH_CREDENTIALS"
            )
    return headers


class Asking(BaseModel):
    """How URLs are asked for: what clients say of it, the same in `POST /fetch` and `http.fetch`."""

    model_config = ConfigDict(extra="forbid")

    method: Method = Field("GET", description="Method of every request.")
    headers: Annotated[dict[str, str], AfterValidator(_chosen)] = Field(
        default_factory=dict,
        max_length=MOST_HEADERS,
        # So that the API refuses them before they are kept.
        json_schema_extra={"propertyNames": NOT_SECRET},
        description="Headers of every request. Authorization and Cookie are refused: operators name them for a host.",
    )
    data: str | None = Field(None, max_length=1 << 20, description="Text to send as the body of every request.")
    payload: Any = Field(
        None, alias="json", description="In place of `data`: a value to send as JSON, as `application/json`."
    )

    @model_validator(mode="after")
    def _sends_one_body(self) -> "Asking":
        if self.data is not None and self.payload is not None:
            raise ValueError("give data or json, not both")
        if self.method in ("GET", "HEAD") and (self.data is not None or self.payload is not None):
            raise ValueError(f"a {self.method} has no body; choose another method, or leave out data and json")
        return self

    @property
    def sent(self) -> bytes | None:
        """The body of each request."""
        if self.payload is not None:
            return to_json(self.payload)
        return None if self.data is None else self.data.encode()

    @property
    def sent_headers(self) -> dict[str, str]:
        """The headers of each request."""
        if self.payload is None or any(name.lower() == "content-type" for name in self.headers):
            return self.headers
        return {"Content-Type": "application/json", **self.headers}


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `index` is its place among those of a job."""

    index: int
    url: str
    method: Method = "GET"
    headers: Mapping[str, str] | None = None
    data: bytes | None = None
