"""`make e2e` starts the stack that these tests use, and takes it down."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from stack import Stack


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    if "CREDENTIALS" not in os.environ:
        pytest.exit("There is no stack to test: run make e2e, which starts one.", returncode=2)
    prometheus = f"http://127.0.0.1:{os.environ['PROMETHEUS_PORT']}"
    stack = Stack(os.environ["ENV_FILE"], Path(os.environ["CREDENTIALS"]), prometheus)
    with stack.http:
        yield stack
