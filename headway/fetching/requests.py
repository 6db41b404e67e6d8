"""What is asked for: the request itself, and the headers that a client may choose."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

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

Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
Kept = Literal["none", "digest", "text", "base64"]
Url = Annotated[str, Field(max_length=2048, pattern=r"^[Hh][Tt][Tt][Pp][Ss]?://\S+$")]


def refusal(name: str, value: str) -> str | None:
    """Why a header is not sent; None if it is. Repeats nothing of the value."""
    if not HEADER.fullmatch(name):
        return "A header's name is letters, digits and hyphens."
    if not VALUE.fullmatch(value):
        return f"The value of the header {name} holds a control character, or is over 8,192 characters."
    if name.lower() in TRANSPORT:
        return f"The header {name} is set by the HTTP client; leave it out."
    if name.lower() in SECRET:
        return f"The header {name} is a credential; the operator sets it for its host in HEADWAY_FETCH_CREDENTIALS."
    return None


def _checked(headers: dict[str, str]) -> dict[str, str]:
    if len({name.lower() for name in headers}) != len(headers):
        raise ValueError("a header stands there twice; names are the same in small letters and capitals")
    for name, value in headers.items():
        if why := refusal(name, value):
            raise ValueError(why)
    return headers


Headers = Annotated[dict[str, str], Field(max_length=MOST_HEADERS), AfterValidator(_checked)]


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `index` is its place among those of a job."""

    index: int
    url: str
    method: Method = "GET"
    headers: Mapping[str, str] | None = None
    data: bytes | None = None
