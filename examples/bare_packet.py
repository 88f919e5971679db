"""One state packet in, one command out, with nothing but redis-py and the generated contract.

ESPER_LEYLINE_SECRET=... python examples/bare_packet.py redis://localhost:6379/0
"""

import base64
import hashlib
import hmac
import os
import sys
import time

from redis import Redis

from tamiyo_svc.leyline import leyline_pb2 as leyline

secret = os.environ["ESPER_LEYLINE_SECRET"].rstrip("\r\n").encode()
loss = float(sys.argv[2]) if len(sys.argv) > 2 else 0.5


def sign(data: bytes) -> str:
    return base64.b64encode(hmac.digest(secret, data, hashlib.sha256)).decode()


packet = leyline.SystemStatePacket(
    version=1,
    training_run_id="bare-run",
    packet_id=f"bare-{time.time_ns()}",
    global_step=1,
    timestamp_ns=time.time_ns(),
    validation_loss=loss,
    seed_states=[leyline.SeedState(seed_id="seed-0", stage=leyline.SEED_STAGE_DORMANT)],
)
envelope = leyline.BusEnvelope(
    message_type=leyline.BUS_MESSAGE_TYPE_SYSTEM_STATE, payload=packet.SerializeToString()
).SerializeToString()

redis = Redis.from_url(sys.argv[1])
last = redis.xadd("oona.normal", {"payload": envelope, "signature": sign(envelope)})
while True:
    replies = redis.xread({"oona.normal": last}, block=5000)
    if not replies:
        sys.exit("no command within 5 s")
    for entry_id, fields in replies[0][1]:
        last = entry_id
        answer = leyline.BusEnvelope.FromString(fields[b"payload"])
        if answer.message_type != leyline.BUS_MESSAGE_TYPE_ADAPTATION_COMMAND:
            continue
        assert fields[b"signature"].decode() == sign(fields[b"payload"]), "outer signature"
        command = leyline.AdaptationCommand.FromString(answer.payload)
        inner = command.annotations.pop("signature")
        assert inner == sign(command.SerializeToString(deterministic=True)), "inner signature"
        if command.annotations["packet_id"] == packet.packet_id:
            kind = leyline.CommandType.Name(command.command_type)
            print(kind, command.annotations["risk_reason"], command.command_id)
            sys.exit(0)
