"""Ports for the processes that are told theirs."""

import contextlib
import random
import socket


def free_ports(count: int = 1) -> int:
    """The first of so many free ports in a row.

    They are below those that systems give to outgoing connections (32768 and up on Linux, 49152 on others): a
    connection of another test cannot take one before the process that it is for listens on it.
    """
    while True:
        first = random.randrange(10_000, 32_768 - count)
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
