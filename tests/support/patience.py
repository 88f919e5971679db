"""Clients for tests that need every command, however busy the machine is."""

from __future__ import annotations

from tamiyo_svc.client import ClientSettings
from tamiyo_svc.client.testing import LONG_S
from tamiyo_svc.client.transport import TransportOptions

PATIENT = ClientSettings(
    max_wait_s=LONG_S,
    transport=TransportOptions(connect_timeout_s=LONG_S, socket_timeout_s=LONG_S),
)
