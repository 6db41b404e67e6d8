"""A server as a child process: the account it runs as, the folder it holds, how it starts and ends."""

import contextlib
import ctypes
import fcntl
import logging
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import psycopg
import redis

from headway.errors import StartFailed

log = logging.getLogger(__name__)

# What both servers log; they speak English here.
PORT_TAKEN = "Address already in use"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Account(NamedTuple):
    """The system user that the servers run as when root starts them."""

    uid: int
    gid: int


class Server(ABC):
    """A child process and the folder that it alone may write.

    It inherits a lock on `<folder>.lock`. So the folder counts as taken until the last process of the server is
    gone, also when the process that started it was killed.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.last_port = 0
        self.password = ""
        self.account: Account | None = None
        self._log = folder.parent / "log" / f"{folder.name}.log"
        self._lock: IO[str] | None = None
        self._movable = False
        self._process: subprocess.Popen[str] | None = None

    @abstractmethod
    def start(self, account: Account | None) -> None:
        """Starts the process; `wait` tells when it answers."""

    @abstractmethod
    def ping(self) -> None:
        """Raises unless the server answers."""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def take(self, account: Account | None) -> None:
        """Takes the folder, after ending a server that an earlier run left in it."""
        self.account = account
        self._lock = self.folder.with_suffix(".lock").open("a+")
        deadline = time.monotonic() + 15
        asked = False
        while not try_lock(self._lock):
            self._lock.seek(0)
            holder = self._lock.read()
            if not asked:
                log.warning("%s of an earlier run (process %s) still runs; stopping it.", self.name, holder)
                with contextlib.suppress(ProcessLookupError, ValueError):
                    os.kill(int(holder), signal.SIGINT)
                asked = True
            if time.monotonic() > deadline:
                raise StartFailed(
                    f"{self.name} of an earlier run (process {holder}) holds {self.folder} and does not stop. "
                    "End that process and start again."
                )
            time.sleep(0.02)
        self._lock.truncate(0)
        # Who was told the address of a server that is brought back finds it there.
        self._movable = not self.port
        self.port = self.port or _free_port(self.last_port)
        self.make_folder(self.folder)

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        if self.account and folder.stat().st_uid != self.account.uid:
            os.chown(folder, *self.account)
        self.open_path_to(folder)

    def open_path_to(self, path: Path) -> None:
        """Lets the account search the folders above `path`; those of root are often closed to all others."""
        if not self.account:
            return
        closed = [folder for folder in path.parents if not _may_search(self.account, folder)]
        for folder in closed:
            folder.chmod(folder.stat().st_mode | 0o001)
        if closed:
            user, names = pwd.getpwuid(self.account.uid).pw_name, " ".join(map(str, closed))
            log.warning("%s runs as user %s; did chmod o+x (search, not read) %s", self.name, user, names)

    def run(self, command: list[str]) -> str:
        """What a program of the server writes; StartFailed with that if it fails."""
        done = subprocess.run(  # noqa: S603
            command, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False, **self._options()
        )
        if done.returncode:
            raise StartFailed(f"{self.name} cannot be started. {command[0]} ended with:\n{done.stdout.strip()}")
        return str(done.stdout)

    def spawn(self, command: list[str], stdin: str = "") -> None:
        """Starts the server itself, which keeps the folder."""
        if self._lock is None:
            raise RuntimeError("take() comes before spawn()")
        self._log.parent.mkdir(mode=0o700, exist_ok=True)
        if self._log.exists():
            self._log.replace(self._log.with_suffix(".log.1"))
        with self._lock as lock, self._log.open("w") as output:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=output,
                **self._options(),
            )
            lock.write(str(self._process.pid))
        # A server that ends before it has read its configuration is noticed by `wait`.
        if pipe := self._process.stdin:
            with contextlib.suppress(BrokenPipeError), pipe:
                pipe.write(stdin)

    def wait(self) -> None:
        """Returns when the server answers. One that found its port taken when it came to use it is given another."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.ping()
            except (psycopg.OperationalError, redis.RedisError) as error:
                failure = error
            if not self.running and self._movable and PORT_TAKEN in self._log.read_text(errors="replace"):
                log.warning("%s starts on another port; %d was taken meanwhile.", self.name, self.port)
                self.port = self.last_port = 0
                self.start(self.account)
                continue
            if not self.running or time.monotonic() > deadline:
                what = f"does not answer: {failure}" if self.running else "ended while it started."
                tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
                raise StartFailed(f"{self.name} {what}\nThe last lines of {self._log}:\n{tail}")
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        if self._process and self.running:
            self._process.send_signal(number)

    def end(self) -> None:
        """Returns when the process, which was asked to stop, is gone; insists after a while."""
        if self._lock:
            self._lock.close()
        if not self._process:
            return
        for patience, stronger in ((10, signal.SIGQUIT), (5, signal.SIGKILL)):
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                log.warning("%s has not stopped within %d s; sending %s.", self.name, patience, stronger.name)
                self.signal(stronger)
        self._process.wait()
        self._process = None

    def _options(self) -> dict[str, Any]:
        """Of every process: the account, the lock, and a session of its own so that Ctrl-C does not reach it."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "HEADWAY_"))}
        options: dict[str, Any] = {
            "env": environment | {"LC_ALL": "C"},
            "stderr": subprocess.STDOUT,
            "text": True,
            "start_new_session": True,
            "pass_fds": [self._lock.fileno()] if self._lock else [],
            "preexec_fn": end_with_parent,
        }
        if self.account:
            options |= {"user": self.account.uid, "group": self.account.gid, "extra_groups": []}
        return options


def account_for(data: Path) -> Account | None:
    """Whom root lets the servers run as, for PostgreSQL refuses root: the owner of the data, if there is some."""
    if os.geteuid() != 0:
        return None
    if data.exists() and data.stat().st_uid != 0:
        return Account(data.stat().st_uid, data.stat().st_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return Account(user.pw_uid, user.pw_gid)
    raise StartFailed("PostgreSQL refuses to run as root, and there is no user `nobody` here. Run as another user.")


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read, all of it or nothing."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600, exist_ok=False)
    unfinished.write_text(text)
    unfinished.replace(path)


def try_lock(file: IO[str]) -> bool:
    """Whether this process now holds the lock on the file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def end_with_parent() -> None:
    """For `preexec_fn`: the child gets SIGINT when the thread that started it ends, where the platform can do that."""
    if _libc:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _free_port(wanted: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _may_search(account: Account, folder: Path) -> bool:
    status = folder.stat()
    bit = 0o100 if status.st_uid == account.uid else 0o010 if status.st_gid == account.gid else 0o001
    return bool(status.st_mode & bit)
