"""Which pages may connect: those of the service itself, and those of `HEADWAY_ORIGINS`. Exactly these."""

from collections.abc import Collection, Mapping

from django.http.request import split_domain_port, validate_host

from headway.settings import Settings

SCHEMES = {"ws": "http", "wss": "https"}


def own_origin(scheme: str, host: str, allowed_hosts: Collection[str]) -> str | None:
    """The origin of the service as this connection names it, by its Host header; None if that host is not answered."""
    domain, _ = split_domain_port(host)
    if not domain or not validate_host(domain, allowed_hosts):
        return None
    return f"{SCHEMES.get(scheme, scheme)}://{host.lower()}"


def is_permitted(origin: str, scheme: str, headers: Mapping[str, str], settings: Settings) -> bool:
    """Whether pages of this origin may connect. `headers` have small names."""
    return origin in settings.origins or origin == own_origin(scheme, headers.get("host", ""), settings.allowed_hosts)
