"""The fixtures of `tamiyo_svc.client.testing` for pytest, which nothing else needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tamiyo_svc.client.client import TamiyoClient
from tamiyo_svc.client.testing import FakeService


@pytest.fixture
def tamiyo_service() -> FakeService:
    """A service that answers every packet with a pause until its script is replaced."""
    return FakeService()


@pytest.fixture
def tamiyo_client(tamiyo_service: FakeService) -> Iterator[TamiyoClient]:
    """A client of `tamiyo_service`."""
    with tamiyo_service.client() as client:
        yield client
