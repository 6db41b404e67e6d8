"""Content-Digest (RFC 9530) and the older Digest (RFC 3230): whether a body arrived as it was sent."""

import base64
import binascii
import hashlib
import re
from collections.abc import AsyncIterator, Mapping

from headway.errors import BadRequest, DigestMismatch

# Members of a dictionary of structured fields; only those of SHA-256 matter, and a byte sequence has colons around it.
CONTENT_DIGEST = re.compile(r"(?:^|,)\s*sha-256\s*=\s*:([^:,]*):", re.ASCII)
DIGEST = re.compile(r"(?:^|,)\s*sha-256=([^,\s]*)", re.ASCII | re.IGNORECASE)
NAMED = re.compile(r"(?:^|,)\s*sha-256\s*(?:[=,;]|$)", re.ASCII | re.IGNORECASE)


def expected(headers: Mapping[str, str]) -> set[bytes]:
    """The SHA-256 that the headers announce; other algorithms are passed over. Raises BadRequest."""
    found = set()
    for name, form in (("Content-Digest", CONTENT_DIGEST), ("Digest", DIGEST)):
        text = headers.get(name, "")
        digests = [decoded(value, name, hashlib.sha256().digest_size) for value in form.findall(text)]
        if not digests and NAMED.search(text):
            raise BadRequest(f"{name} cannot be read; it looks like `sha-256=:BASE64:`, and Digest has no colons.")
        found.update(digests)
    return found


def decoded(value: str, header: str, size: int) -> bytes:
    """A digest of so many bytes from base64. Raises BadRequest."""
    try:
        digest = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != size:
        raise BadRequest(f"The digest in {header} is not the base64 of {size} bytes.")
    return digest


async def checked(chunks: AsyncIterator[bytes], digests: set[bytes]) -> AsyncIterator[bytes]:
    """The chunks; raises DigestMismatch at their end if they do not have all these SHA-256."""
    digest = hashlib.sha256()
    async for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digests - {digest.digest()}:
        raise DigestMismatch(
            "The body does not have the SHA-256 that Content-Digest or Digest announced; send it again."
        )
