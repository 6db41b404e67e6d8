"""API keys: `hw_live_<id>_<secret>_<checksum>`, kept only as HMAC-SHA256 under a pepper.

The checksum (CRC-32 of what stands before it) tells a mistyped key from a wrong one without a look-up.
"""

import base64
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass
from uuid import UUID

PREFIX = "hw_live"
FORM = re.compile(r"hw_live_([a-z2-7]{16})_([a-z2-7]{40})_([0-9a-f]{8})", re.ASCII)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as its owner holds it; `text` is shown once and never kept."""

    id: str
    secret: str

    @property
    def text(self) -> str:
        body = f"{PREFIX}_{self.id}_{self.secret}"
        return f"{body}_{_checksum(body)}"

    def digest(self, pepper: str) -> bytes:
        """What the database keeps of the secret: 32 bytes."""
        return hmac.digest(pepper.encode(), f"{self.id}:{self.secret}".encode(), "sha256")


@dataclass(frozen=True, slots=True)
class LiveKey:
    """What the database has of a key that is neither revoked nor expired."""

    id: str
    tenant_id: UUID
    name: str
    digest: bytes


def new() -> ApiKey:
    """A fresh key: 80 bits of id, 200 bits of secret."""
    return ApiKey(id=_random(10), secret=_random(25))


def parse(text: str) -> ApiKey | None:
    """The key in `text`, or None if it is not one."""
    match = FORM.fullmatch(text)
    if match is None or _checksum(text.rpartition("_")[0]) != match[3]:
        return None
    return ApiKey(id=match[1], secret=match[2])


def _random(count: int) -> str:
    return base64.b32encode(secrets.token_bytes(count)).decode().lower()


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
