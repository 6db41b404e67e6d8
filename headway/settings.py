"""One frozen Settings, read from the environment once, at start.

Every field is read from `HEADWAY_<NAME>`, or from the file that `HEADWAY_<NAME>_FILE` names (Docker and
Kubernetes secrets). A bad value ends the process with a sentence that names the variable.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    WrapValidator,
    model_validator,
)

from headway.errors import InvalidSettings
from headway.fetching.requests import unsendable


def _items(value: object) -> object:
    """`a, b` to `("a", "b")`; the empty string to nothing."""
    if isinstance(value, str):
        return tuple(part for part in (part.strip() for part in value.split(",")) if part)
    return value


def _mapping(value: object) -> object:
    """JSON; the empty string to nothing."""
    return json.loads(value or "{}") if isinstance(value, str) else value


def _source(value: object) -> object:
    """A URL alone to a source of it."""
    return {"url": value} if isinstance(value, str) else value


def _tenants(value: object, read: Callable[[object], frozenset[UUID] | None]) -> frozenset[UUID] | None:
    try:
        return read(value)
    except ValidationError:
        raise ValueError(
            "tenants must be a list of tenants' ids, as the admin shows them, and not of names; "
            "leave it out for all tenants, [] is none"
        ) from None


def _networks(value: object) -> object:
    return tuple(ip_network(str(item)) for item in _items(value))  # type: ignore[attr-defined]


def _origins(value: tuple[str, ...]) -> tuple[str, ...]:
    for origin in value:
        if not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin[:100]!r} is not an origin as browsers send it, such as https://app.example: scheme and host "
                "in small letters, a port only if it is not the usual one, no slash at the end"
            )
    return value


def _credentials(value: dict[str, dict[str, SecretStr]]) -> dict[str, dict[str, SecretStr]]:
    _origins(tuple(value))
    for origin, headers in value.items():
        for name, secret in headers.items():
            if why := unsendable(name, secret.get_secret_value()):
                raise ValueError(f"of {origin}, {why}")
    return value


def _url(*schemes: str, drivers: bool = False) -> AfterValidator:
    """A check of a URL that never shows it: it may hold a password. `drivers`: `scheme+driver://` passes too."""

    def check(value: SecretStr) -> SecretStr:
        try:
            parts = urlsplit(value.get_secret_value())
            readable = bool(parts.scheme) and (parts.port or True)
        except ValueError:
            readable = False
        if not readable:
            raise ValueError("this is not a URL; percent-encode special characters in its user and password")
        if schemes and (parts.scheme.partition("+")[0] if drivers else parts.scheme) not in schemes:
            raise ValueError(f"the URL must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        return value

    return AfterValidator(check)


# As browsers write it: no default port, no path, names in punycode.
ORIGIN = re.compile(r"(?:http://(?!\S*:80$)|https://(?!\S*:443$))(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")

Items = Annotated[tuple[str, ...], BeforeValidator(_items)]
PostgresUrl = Annotated[SecretStr, _url("postgresql", "postgres")]
RedisUrl = Annotated[SecretStr, _url("redis", "rediss", "unix")]
SourceUrl = Annotated[SecretStr, _url("postgresql", "postgres", "sqlite", "mysql", drivers=True)]


class Source(BaseModel):
    """A database that the operator has named. What only reads uses `read_url`, that of a role which can do no more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: SourceUrl
    read_url: SourceUrl | None = None
    # None: all, also those to come.
    tenants: Annotated[frozenset[UUID] | None, WrapValidator(_tenants)] = None

    @property
    def reading(self) -> SecretStr:
        """The URL for what only reads."""
        return self.read_url or self.url

    @model_validator(mode="after")
    def _alike(self) -> "Source":
        if dialect(self.url) != dialect(self.reading):
            raise ValueError("url and read_url must name the same kind of database")
        return self


def dialect(url: SecretStr) -> str:
    """`postgresql`, `sqlite` or `mysql`."""
    name = urlsplit(url.get_secret_value()).scheme.partition("+")[0]
    return "postgresql" if name == "postgres" else name


class Settings(BaseModel):
    """What web, worker and `make run` read. Times are seconds, sizes are bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path = Field(Path(".headway"), description="Folder of local state: embedded servers, files, credentials.")
    host: str = Field("127.0.0.1", description="Address that the web service listens on.")
    port: int = Field(8000, ge=1, le=65535, description="Port of the API, the WebSockets and the pages.")
    ops_host: str = Field("127.0.0.1", description="Address of `/livez`, `/readyz` and `/metrics`.")
    ops_port: int = Field(9000, ge=0, le=65535, description="Port of `/livez`, `/readyz` and `/metrics`; 0 takes any.")
    database_url: PostgresUrl = Field(
        description="Postgres of Headway itself: `postgresql://user:password@host:port/name`."
    )
    redis_url: RedisUrl = Field(description="Redis that carries wake-ups and live events: `redis://host:port/0`.")
    database_pool: int = Field(10, ge=2, le=200, description="Most Postgres connections a process holds.")
    sources: Annotated[dict[str, Annotated[Source, BeforeValidator(_source)]], BeforeValidator(_mapping)] = Field(
        default_factory=dict,
        description='Databases that queries and kinds may use, JSON: `{"default": "postgresql+asyncpg://…"}`, or '
        '`{"default": {"url": "…", "read_url": "…", "tenants": ["…"]}}` with a role for what only reads, and the ids '
        "of the only tenants that may use it. Headway's own database is refused.",
    )
    source_pool: int = Field(5, ge=1, le=200, description="Most connections a process holds to a source for queries.")
    query_timeout: float = Field(30, gt=0, le=3600, description="Longest time of `POST /query`.")
    query_rows: int = Field(10_000, ge=1, description="Most rows that `POST /query` answers with.")
    query_bytes: int = Field(4 << 20, ge=1024, description="Most bytes of rows that `POST /query` answers with.")
    files_url: str | None = Field(
        None,
        pattern=r"^(file:///|s3://[a-z0-9])",
        description="Where files and artifacts are kept: `file:///folder` (default: `files` in the home folder) or "
        "`s3://bucket/prefix`.",
    )
    s3_endpoint: str | None = Field(
        None, pattern=r"^https?://", description="URL of S3, if it is not Amazon's; else `AWS_ENDPOINT_URL` counts."
    )
    s3_access_key: SecretStr | None = Field(
        None, description="Access key of S3; else `AWS_ACCESS_KEY_ID`, or the role of the machine or pod."
    )
    s3_secret_key: SecretStr | None = Field(None, description="Secret of that key; else `AWS_SECRET_ACCESS_KEY`.")
    kinds: Items = Field((), description="Python modules with `@kind` functions, separated by commas.")
    secret_key: SecretStr = Field(min_length=32, description="Key of Django's sessions and signatures.")
    key_pepper: SecretStr = Field(min_length=32, description="Secret mixed into the hash of every API key.")
    allowed_hosts: Items = Field(
        ("localhost", "127.0.0.1", "[::1]"), description="Host headers that are answered, separated by commas."
    )
    origins: Annotated[Items, AfterValidator(_origins)] = Field(
        (),
        description="Origins whose pages may connect with a ticket besides the service's own, separated by commas: "
        "`https://app.example`.",
    )
    trusted_proxies: str = Field(
        "127.0.0.1",
        description="Addresses or networks, separated by commas, whose `X-Forwarded-*` headers are believed.",
    )
    slots: int = Field(20, ge=1, le=1000, description="Jobs that one worker process runs at a time.")
    connections: int = Field(
        20,
        ge=1,
        description="WebSockets and streams that a key or user may hold open in one web process.",
    )
    drain: float = Field(20, ge=0, description="Seconds that SIGTERM leaves running requests and jobs to finish.")
    max_body: int = Field(1 << 20, ge=1024, description="Largest JSON body of a request.")
    max_file: int = Field(8 << 30, ge=1024, description="Largest uploaded file or artifact.")
    quota: int | None = Field(None, ge=0, description="Bytes of files that a tenant may keep; any number if unset.")
    upload_hours: float = Field(
        24, gt=0, le=24 * 365, description="Hours that an upload in several requests waits for its next bytes."
    )
    max_result: int = Field(1 << 20, ge=1024, description="Largest JSON result of a job.")
    # The kinds in the box count on the least that it may be.
    max_checkpoint: int = Field(64 << 10, ge=64 << 10, description="Largest JSON checkpoint of a job; 64 KiB or more.")
    keep_days: float = Field(
        30, gt=0, le=36500, description="Days that an ended job is kept, with all that it made, and an uploaded file."
    )
    keep_jobs: int = Field(
        1_000_000, ge=1, description="Ended jobs that are kept of each tenant; of more the oldest are deleted."
    )
    fetch_allow: Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_networks)] = Field(
        (),
        description="Private networks that `http.fetch` and `POST /fetch` may reach, separated by commas: "
        "`10.1.0.0/16`.",
    )
    fetch_credentials: Annotated[
        dict[str, dict[str, SecretStr]], BeforeValidator(_mapping), AfterValidator(_credentials)
    ] = Field(
        default_factory=dict,
        description="Headers of requests to an origin, which no job and no log has, JSON: "
        '`{"https://api.example": {"Authorization": "Bearer …"}}`. All tenants\' requests to it carry them.',
    )
    fetch_timeout: float = Field(30, gt=0, le=600, description="Longest time of `POST /fetch`.")
    fetch_bytes: int = Field(4 << 20, ge=1024, description="Most bytes of bodies that `POST /fetch` answers with.")
    fetch_requests: int = Field(
        10, ge=1, description="Calls of `POST /fetch` that a tenant may have under way in one web process."
    )
    log_format: Literal["json", "text"] = Field("json", description="`json` for machines, `text` for people.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")

    def sources_of(self, tenant_id: UUID) -> dict[str, Source]:
        """The sources that a tenant may use. To it there are no others, not even by name."""
        return {
            name: source
            for name, source in self.sources.items()
            if source.tenants is None or tenant_id in source.tenants
        }

    @property
    def credentials(self) -> dict[str, dict[str, str]]:
        """`fetch_credentials` in the clear, to be handed to nothing but a Fetcher."""
        return {
            origin: {name: secret.get_secret_value() for name, secret in headers.items()}
            for origin, headers in self.fetch_credentials.items()
        }

    @property
    def files_location(self) -> str:
        """`files_url`, or the `files` folder of the home folder as a URL."""
        return self.files_url or (self.home.resolve() / "files").as_uri()

    @property
    def files_options(self) -> dict[str, str]:
        """What `headway.files` needs to reach S3, beside the variables AWS_*."""
        given = {
            "endpoint": self.s3_endpoint,
            "access_key_id": self.s3_access_key and self.s3_access_key.get_secret_value(),
            "secret_access_key": self.s3_secret_key and self.s3_secret_key.get_secret_value(),
        }
        return {name: value for name, value in given.items() if value}


def variable(name: str) -> str:
    """The environment variable of a field."""
    return f"HEADWAY_{name.upper()}"


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment.

    Raises InvalidSettings, whose message names every variable that is wrong or missing and what to do.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for name in Settings.model_fields:
        key = variable(name)
        if key in environ and f"{key}_FILE" in environ:
            raise InvalidSettings(f"{key} and {key}_FILE are both set; keep one of them.")
        if key in environ:
            values[name] = environ[key]
        elif path := environ.get(f"{key}_FILE"):
            try:
                values[name] = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidSettings(f"{key}_FILE cannot be read: {error}.") from None
    try:
        settings = Settings(**values)
    except ValidationError as error:
        lines = [f"{variable(str(item['loc'][0]))}: {item['msg']}" for item in error.errors(include_input=False)]
        raise InvalidSettings("Settings are missing or wrong. " + "; ".join(lines) + ".") from None
    except ValueError as error:
        raise InvalidSettings(f"A setting cannot be read: {error}.") from None
    _refuse_own_database(settings)
    return settings


def _refuse_own_database(settings: Settings) -> None:
    own = _place(settings.database_url)
    for name, source in settings.sources.items():
        if any(dialect(url) == "postgresql" and _place(url) == own for url in (source.url, source.reading)):
            raise InvalidSettings(
                f"HEADWAY_SOURCES names Headway's own database as {name!r}; give the source a database of its own."
            )


def _place(url: SecretStr) -> tuple[str, int, str]:
    """Host, port and database of a URL of Postgres."""
    parts = urlsplit(url.get_secret_value())
    host = parts.hostname or "localhost"
    return "localhost" if host in ("127.0.0.1", "::1") else host, parts.port or 5432, parts.path
