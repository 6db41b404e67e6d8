"""What `make run` was asked for: home folder, ports, servers, and the environment of the processes it starts."""

import errno
import json
import secrets
import socket
from collections.abc import Mapping

from headway.embedded import write_private
from headway.errors import StartFailed
from headway.settings import Settings, load, variable

# A host to listen on, and the one to reach it by from here.
ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Setup:
    """The settings of `make run`, of which some are only known once the servers run.

    Raises InvalidSettings for what is wrong in the environment.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        later = {
            "database_url": "postgresql://",
            "redis_url": "redis://",
            "secret_key": "-" * 32,
            "key_pepper": "-" * 32,
        }
        self.settings: Settings = load(
            {variable(name): value for name, value in later.items() if not self.has(name)} | dict(environ)
        )
        self.home = self.settings.home.resolve()
        self.log_folder = self.home / "log"
        self.credentials = self.home / "credentials.json"
        first_ops_port = self.settings.ops_port if self.has("ops_port") else self.settings.port + 1
        self.ops_ports = {"web": first_ops_port, "worker": first_ops_port + 1}
        # Ctrl-C is to end within a few seconds; jobs that it interrupts go on at the next start.
        self.drain = self.settings.drain if self.has("drain") else 3.0

    def has(self, name: str) -> bool:
        """Whether the setting was given."""
        return variable(name) in self._environ or f"{variable(name)}_FILE" in self._environ

    @property
    def url(self) -> str:
        """Where clients on this machine reach the web service."""
        return f"http://{_authority(self.settings.host, self.settings.port)}"

    def ops_url(self, service: str) -> str:
        """Where the operations port of a service is."""
        return f"http://{_authority(self.settings.ops_host, self.ops_ports[service])}"

    def check_ports(self) -> None:
        """Raises StartFailed for a port that cannot be had, before anything is started."""
        ops = "HEADWAY_OPS_PORT" if self.has("ops_port") else "HEADWAY_PORT"
        for host, port, use, name in (
            (self.settings.host, self.settings.port, "the API and the pages", "HEADWAY_PORT"),
            (self.settings.ops_host, self.ops_ports["web"], "health and metrics of the web service", ops),
            (self.settings.ops_host, self.ops_ports["worker"], "health and metrics of the worker", ops),
        ):
            try:
                with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((host, port))
            except (OSError, OverflowError) as error:
                taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
                why = "is in use" if taken else f"of {host} cannot be used ({error})"
                raise StartFailed(
                    f"Port {port} {why}; it is for {use}. Set {name} to another port, for example {name}=18000."
                ) from None

    def make_folders(self) -> None:
        """Raises StartFailed if the home folder cannot be had."""
        try:
            self.log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StartFailed(
                f"{self.home} cannot be used: {error}. Set HEADWAY_HOME to a folder that you may write."
            ) from None

    def environment(self, found: Mapping[str, str]) -> dict[str, str]:
        """The environment of every process: `found` settings, and defaults for what was not given."""
        defaults = {"log_format": "text", "log_level": "WARNING", "drain": f"{self.drain}", **self._secrets(), **found}
        missing = {variable(name): value for name, value in defaults.items() if not self.has(name)}
        # The first job's command line is to find this server, not the one that its user works with.
        given = {key: value for key, value in self._environ.items() if key not in ("HEADWAY_URL", "HEADWAY_API_KEY")}
        return {**given, **missing, variable("home"): str(self.home)}

    def service_environment(self, service: str, environment: Mapping[str, str]) -> dict[str, str]:
        """The environment of the web service or the worker."""
        return {**environment, variable("ops_port"): str(self.ops_ports[service])}

    def point_credentials_here(self) -> None:
        """Corrects the URL in the credentials of an earlier start that had another port.

        Raises StartFailed if they cannot be read.
        """
        if not self.credentials.exists():
            return
        try:
            credentials = dict(json.loads(self.credentials.read_text()))
        except (ValueError, TypeError):
            raise StartFailed(
                f"{self.credentials} is damaged. Restore it; or move it away, and use the password and a key that you "
                "have kept elsewhere."
            ) from None
        if credentials.get("url") != self.url:
            write_private(self.credentials, json.dumps({**credentials, "url": self.url}, indent=2) + "\n")

    def _secrets(self) -> dict[str, str]:
        """Made once, since sessions and API keys depend on them."""
        path = self.home / "secrets.json"
        if not path.exists():
            made = {name: secrets.token_urlsafe(48) for name in ("secret_key", "key_pepper")}
            write_private(path, json.dumps(made))
        try:
            kept = json.loads(path.read_text())
            return {name: str(kept[name]) for name in ("secret_key", "key_pepper")}
        except (ValueError, KeyError):
            raise StartFailed(
                f"{path} is damaged; without it no API key of {self.home} is valid. Restore it, or set "
                "HEADWAY_SECRET_KEY and HEADWAY_KEY_PEPPER."
            ) from None


def _authority(host: str, port: int) -> str:
    host = ANY_HOST.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
