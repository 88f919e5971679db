"""What a trainer imports: a client that never blocks, and never raises because of the bus.

Needs redis and protobuf. The seed library (`client.seeds`) and the callbacks for training
frameworks import torch, Lightning or Transformers themselves.
"""

from tamiyo_svc.client.aio import AsyncTamiyoClient
from tamiyo_svc.client.client import TamiyoClient, from_environment
from tamiyo_svc.client.core import ClientSettings
from tamiyo_svc.client.counters import ClientCounters
from tamiyo_svc.client.packets import State
from tamiyo_svc.client.transport import TransportOptions
from tamiyo_svc.client.verification import VerifiedCommand
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.taxonomy import AckOutcome, ClientMode

__all__ = [
    "AckOutcome",
    "AsyncTamiyoClient",
    "ClientCounters",
    "ClientMode",
    "ClientSettings",
    "Keyring",
    "State",
    "TamiyoClient",
    "TransportOptions",
    "VerifiedCommand",
    "from_environment",
]
