"""The command, ready to run: one server for each module of tests."""

from collections.abc import Iterator

import pytest

from tests.hostile.command import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()
