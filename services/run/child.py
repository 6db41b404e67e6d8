"""The web service and the worker as child processes that are restarted when they die."""

import http.client
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from headway.embedded import end_with_parent

log = logging.getLogger(__name__)

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0


class Child:
    """A service that is to run until the supervisor stops."""

    def __init__(self, name: str, module: str, environment: Mapping[str, str], ops_url: str, log_file: Path) -> None:
        self.name = name
        self._module = module
        self.log_file = log_file
        self._environment = environment
        self._ops = urlsplit(ops_url).netloc
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._due: float | None = None
        self._pause = _SHORTEST_PAUSE

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self._started = time.monotonic()
        self._due = None
        with self.log_file.open("ab") as output:
            self._process = spawn(["-m", self._module], self._environment, output)

    def keep_running(self) -> None:
        """Starts the service again some time after it died, later each time it dies young."""
        now = time.monotonic()
        if self.running or self._process is None:
            return
        if self._due is None:
            lived_long = now - self._started > 6 * _LONGEST_PAUSE
            self._pause = _SHORTEST_PAUSE if lived_long else self._pause
            self._due = now + self._pause
            log.warning(
                "The %s ended (%s); it starts again in %.1f s. Its log: %s",
                self.name,
                ending(self._process.returncode),
                self._pause,
                self.log_file,
            )
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        elif now >= self._due:
            self.start()

    def ready(self) -> bool:
        """Whether /readyz says so."""
        connection = http.client.HTTPConnection(self._ops, timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def signal(self, number: signal.Signals) -> None:
        if self._process and self.running:
            self._process.send_signal(number)


def spawn(
    arguments: list[str], environment: Mapping[str, str], output: IO[bytes] | None = None
) -> "subprocess.Popen[bytes]":
    """Python with these arguments, in a session of its own so that Ctrl-C does not reach it."""
    return subprocess.Popen(  # noqa: S603
        [sys.executable, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509  one call into libc; the supervisor has one thread
    )


def ending(code: int) -> str:
    """An exit code in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
