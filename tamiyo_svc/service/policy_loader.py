"""A process of its own that reads policy updates, checks them and leaves files behind.

What an update can do wrong, it does here: a crash, a hang or memory without bound ends this
process and is reported as a refusal, and neither parsing 56 MB nor loading them ever holds the
interpreter that decides. Each request is one JSON line on standard input, whose end means that the
service is gone. The answers are JSON lines on standard output. Once the stream is read to its end,
a child waits for each update, reads and examines it, and takes the half gigabyte of torch and
weights along when it ends.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

from redis import Redis

from tamiyo_svc.adapters.oona.entries import Entry
from tamiyo_svc.adapters.oona.policy_stream import (
    await_next,
    measure_next,
    open_stream,
    read_next,
    start_cursor,
)
from tamiyo_svc.errors import BusError, InferenceError, PolicyRejectedError
from tamiyo_svc.leyline import leyline_pb2 as leyline
from tamiyo_svc.leyline.envelope import (
    PAYLOAD_FIELD,
    EnvelopeRejectedError,
    RejectReason,
    open_envelope,
    parse_payload,
)
from tamiyo_svc.leyline.signing import Keyring
from tamiyo_svc.policy.update import PackedFile, TakenUpdates, check_order, read_action
from tamiyo_svc.service.courtesy import ThreadTurns, take_idle_time_only
from tamiyo_svc.service.loader_memory import bound_memory, end_in_steps, keep_freed_memory
from tamiyo_svc.taxonomy import PolicyRejection, PolicyUpdateAction, WeightDtype

if TYPE_CHECKING:
    from tamiyo_svc.adapters.policy_store import PolicyStore
    from tamiyo_svc.graph.builder import GraphBuilder
    from tamiyo_svc.policy.evaluator import Policy

MAX_UPDATE_BYTES: Final = 256 << 20
"""Largest entry of the policy stream that is taken."""

BUS_EXIT: Final = 3
"""Exit code when Redis did not answer."""

_BLOCK_MS: Final = 5_000
# An update is held about so many times over while it is read and examined.
_COPIES: Final = 6
# An entry below this brings no weights. What it asks for, a rollback perhaps, is urgent.
_WITHOUT_WEIGHTS_BYTES: Final = 64 << 10
_COMMAND_PATIENCE_S: Final = 1.0
# From prctl.h.
_PR_SET_PDEATHSIG: Final = 1
# The signature and the names of the fields.
_FRAME_BYTES: Final = 1024
_REASONS: Final = {
    RejectReason.MISSING_SIGNATURE: PolicyRejection.MISSING_SIGNATURE,
    RejectReason.INVALID_SIGNATURE: PolicyRejection.INVALID_SIGNATURE,
    RejectReason.OVERSIZED: PolicyRejection.PAYLOAD_TOO_LARGE,
}


@dataclass(frozen=True, slots=True)
class LoaderRequest:
    """All that one look at the policy stream needs."""

    redis_url: str
    stream: str
    after: str
    folder: str
    vocabularies: dict[str, list[str]]
    secrets: tuple[str, ...] | None
    """Current and, while keys rotate, previous secret; None takes unsigned updates."""
    first: bool = False
    """Whether `after` is yet to be compared with what the stream holds."""
    verify_updates: bool = True
    freshness_s: float = 0.0
    issued_ns: dict[str, int] = field(default_factory=dict)
    digests: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)
    max_bytes: int = MAX_UPDATE_BYTES
    library: str = ""
    """The compiled form to pack weights for, if the service takes packed ones."""
    weight_dtype: str = WeightDtype.FP32
    idle_patience_s: float = 45.0
    """For how long an update is examined in idle time only; 0 for not at all."""

    @classmethod
    def from_json(cls, text: str) -> LoaderRequest:
        """Read a request as `to_json` wrote it."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """The request on one line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one entry; `reason` is empty unless it was refused.

    An update that brings weights left them in `file`, checked; one without renames or commands.
    """

    entry_id: str
    ignored: bool = False
    reason: str = ""
    detail: str = ""
    update: str = ""
    """SHA-256 of the envelope's bytes, as hex."""
    action: str = PolicyUpdateAction.APPLY
    issued_by: str = ""
    policy_id: str = ""
    version: str = ""
    issued_ns: int = 0
    file: str = ""
    digest: str = ""
    packed_file: str = ""
    packed_digest: str = ""
    untrained: bool = False
    golden: int = 0

    @property
    def packed(self) -> PackedFile | None:
        """The weights as the service runs them, if it asked for that."""
        if not self.packed_file:
            return None
        return PackedFile(self.packed_file, self.packed_digest, self.untrained)


def examine(entry: Entry, request: LoaderRequest) -> Finding:
    """Check one entry from its signature to its weights; a refusal is a finding too."""
    payload = entry.fields.get(PAYLOAD_FIELD)
    if payload is None:
        return Finding(entry.entry_id, ignored=True)
    known = Finding(entry.entry_id, update=sha256(payload).hexdigest())
    try:
        envelope = _open(entry, request)
        if envelope is None:
            return Finding(entry.entry_id, ignored=True)
        update = parse_payload(envelope)
        assert isinstance(update, leyline.PolicyUpdate)
        known = Finding(
            entry.entry_id,
            update=known.update,
            issued_by=envelope.attributes.get("issued_by", "")[:200],
            policy_id=update.policy_id[:200],
            version=update.tamiyo_policy_version[:200],
            issued_ns=update.issued_at.ToNanoseconds(),
        )
        return _examine_update(entry, update, dict(envelope.attributes), known, request)
    except PolicyRejectedError as error:
        return _refused(known, error.reason, error.detail)
    except EnvelopeRejectedError as error:
        reason = _REASONS.get(error.reason, PolicyRejection.INVALID_PAYLOAD)
        return _refused(known, reason, str(error))
    except MemoryError:
        return _refused(known, PolicyRejection.PAYLOAD_TOO_LARGE, "it does not fit in memory")


def main() -> int:
    """Answer one request after the other, each with the next entry of the stream."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(
        target=_follow_parent, args=(requests,), name="follow-parent", daemon=True
    ).start()
    bound_memory()
    is_caught_up = False
    while True:
        request = LoaderRequest.from_json(requests.get())
        try:
            if request.first:
                request = _from_start(request)
            finding = None if is_caught_up else _find(request)
            if finding is None:
                is_caught_up = True
                finding = _find_apart(request)
        except BusError as error:
            _say({"kind": "bus", "detail": str(error)})
            return BUS_EXIT
        _say({"kind": "finding", **asdict(finding)})


def _from_start(request: LoaderRequest) -> LoaderRequest:
    with open_stream(request.redis_url) as redis:
        after = start_cursor(redis, request.stream, request.after)
    return replace(request, after=after, first=False)


def _find(request: LoaderRequest, on_reading: Callable[[], None] | None = None) -> Finding | None:
    """What the next entry is; a child waits for one, others return None when there is none.

    A child says so when it begins to read.

    Raises:
        BusError: Redis did not answer.
    """
    with open_stream(request.redis_url) as redis:
        entry = _entry_there(redis, request, on_reading)
        while entry is None and on_reading is not None:
            entry = _entry_to_come(redis, request, on_reading)
    if entry is None or isinstance(entry, Finding):
        return entry
    return examine(entry, request)


def _find_apart(request: LoaderRequest) -> Finding:
    """Have a child find the next entry; if that ends badly, so does this process.

    The kernel does not stop a process while it takes memory back: 4 to 8 ms for 56 MB, 30 ms for
    all that the child leaves. So the child frees nothing before its end. It runs when nobody else
    wants to, for a core that has anybody else may not be given to the service for milliseconds; on
    a machine that is never idle another child takes its place. It has ended when this returns, for
    the service has its own share of the work to do afterwards.

    Raises:
        BusError: Redis did not answer.
    """
    answer = _ask_child(request, in_idle_time=True) or _ask_child(request, in_idle_time=False)
    assert answer is not None
    if "bus" in answer:
        raise BusError(answer["bus"])
    return Finding(**answer["finding"])


def _ask_child(request: LoaderRequest, *, in_idle_time: bool) -> dict[str, Any] | None:
    """What a child found; None when the time it had for an update in idle time was too short."""
    receiver, sender = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _end_with(parent)
            keep_freed_memory()
            if in_idle_time:
                take_idle_time_only()
            with open(sender, "w") as pipe:
                _answer(request, pipe)
            code = 0
        finally:
            take_idle_time_only()
            _end(request, code)
    os.close(sender)
    with open(receiver, "rb", buffering=0) as pipe:
        # The first line says that there is something to examine.
        pipe.readline()
        patience_s = idle_patience_s(request) if in_idle_time else None
        in_time = patience_s != 0 and bool(select.select([pipe], [], [], patience_s)[0])
        if not in_time:
            os.kill(child, signal.SIGKILL)
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not in_time:
        return None
    if code:
        os._exit(abs(code))
    answer: dict[str, Any] = json.loads(text)
    return answer


def _end(request: LoaderRequest, code: int) -> NoReturn:
    """End this process; in steps, where there is half a gigabyte and the compiled form for that."""
    try:
        # Without that module it never loaded weights.
        compiled = sys.modules.get("tamiyo_svc.policy.compiled")
        if request.library and compiled is not None:
            end_in_steps(compiled.Library(Path(request.library)), code)
    finally:
        # Whatever failed, there may be memory for nothing else.
        os._exit(code)


def idle_patience_s(request: LoaderRequest) -> float:
    """For how long the next entry is examined in idle time; a command is not kept waiting."""
    with suppress(BusError), open_stream(request.redis_url) as redis:
        measured = measure_next(redis, request.stream, request.after)
        if measured is not None and measured[1] < _WITHOUT_WEIGHTS_BYTES:
            return min(_COMMAND_PATIENCE_S, request.idle_patience_s)
    return request.idle_patience_s


def _answer(request: LoaderRequest, pipe: TextIO) -> None:
    def on_reading() -> None:
        pipe.write("reading\n")
        pipe.flush()

    try:
        finding = _find(request, on_reading)
        assert finding is not None
        json.dump({"finding": asdict(finding)}, pipe)
    except BusError as error:
        on_reading()
        json.dump({"bus": str(error)}, pipe)


def _entry_there(
    redis: Redis, request: LoaderRequest, on_reading: Callable[[], None] | None
) -> Entry | Finding | None:
    """The next entry if it is there already, or why it is not read.

    It is measured first, for a client that runs out of memory tells it like an outage.
    """
    measured = measure_next(redis, request.stream, request.after)
    if measured is None:
        return None
    entry_id, size = measured
    _say({"kind": "reading", "entry_id": entry_id, "is_apart": on_reading is not None})
    if on_reading is not None:
        on_reading()
    if size > request.max_bytes + _FRAME_BYTES:
        detail = f"the entry has {size} bytes, at most {request.max_bytes} are taken"
        return _refused(Finding(entry_id), PolicyRejection.PAYLOAD_TOO_LARGE, detail)
    try:
        # Allowed or not, none of it is touched.
        mmap.mmap(-1, _COPIES * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        detail = f"the entry has {size} bytes, which do not fit in memory"
        return _refused(Finding(entry_id), PolicyRejection.PAYLOAD_TOO_LARGE, detail)
    # It may have been trimmed meanwhile.
    return read_next(redis, request.stream, request.after) or Finding(entry_id, ignored=True)


def _entry_to_come(
    redis: Redis, request: LoaderRequest, on_reading: Callable[[], None]
) -> Entry | None:
    """The next entry if it comes soon.

    One that is too much ends this process, and is there when the next one looks.
    """
    _say({"kind": "waiting", "after": request.after})
    # Redis sends as long as somebody takes: up to 80 ms in which it answers nobody else.
    with ThreadTurns().standing_back():
        entry = await_next(
            redis, request.stream, request.after, _BLOCK_MS, lambda: _say({"kind": "coming"})
        )
    if entry is not None:
        _say({"kind": "reading", "entry_id": entry.entry_id, "is_apart": True})
        on_reading()
    return entry


def _open(entry: Entry, request: LoaderRequest) -> leyline.BusEnvelope | None:
    """The verified envelope; None when it carries something that is not for us."""
    keyring = None
    if request.secrets is not None:
        keyring = Keyring(*(secret.encode() for secret in request.secrets))
    envelope = open_envelope(entry.fields, keyring, request.max_bytes)
    return envelope if envelope.message_type == leyline.BUS_MESSAGE_TYPE_POLICY_UPDATE else None


def _examine_update(
    entry: Entry,
    update: leyline.PolicyUpdate,
    attributes: dict[str, str],
    known: Finding,
    request: LoaderRequest,
) -> Finding:
    action = read_action(attributes)
    if request.verify_updates:
        taken = TakenUpdates(request.issued_ns, request.digests)
        check_order(update, known.update, entry.added_ms, taken, request.freshness_s)
    with_weights = action in (PolicyUpdateAction.APPLY, PolicyUpdateAction.SHADOW)
    if not with_weights or not update.payload:
        if action is PolicyUpdateAction.SHADOW:
            raise PolicyRejectedError(PolicyRejection.INVALID_PAYLOAD, "no candidate to shadow")
        if action is PolicyUpdateAction.APPLY and not update.tamiyo_policy_version:
            raise PolicyRejectedError(PolicyRejection.INVALID_PAYLOAD, "neither payload nor name")
        return replace(known, action=action)
    return _load(update, replace(known, action=action), request)


def _load(update: leyline.PolicyUpdate, known: Finding, request: LoaderRequest) -> Finding:
    """Load, replay what the checkpoint brings as its test, and leave the weights in a file."""
    import torch

    from tamiyo_svc.adapters.policy_store import PolicyStore
    from tamiyo_svc.graph.builder import GraphBuilder, GraphLimits
    from tamiyo_svc.graph.vocabulary import Vocabularies
    from tamiyo_svc.policy.checkpoint import read_checkpoint, write_policy
    from tamiyo_svc.policy.evaluator import PolicyEvaluator
    from tamiyo_svc.policy.golden import read_golden, replay_golden, sample_requests

    torch.set_num_threads(1)
    vocabularies = Vocabularies(request.vocabularies)
    checkpoint = read_checkpoint(
        update.payload,
        vocabularies,
        max_bytes=request.max_bytes,
        check_architecture=request.verify_updates,
    )
    golden = read_golden(checkpoint.metadata.get("golden"))
    policy = checkpoint.build(update.policy_id, update.tamiyo_policy_version)
    builder = GraphBuilder(GraphLimits(**request.limits), vocabularies)
    evaluator = PolicyEvaluator(builder, policy)
    replay_golden(evaluator, [(sample, {}) for sample in sample_requests()])
    replay_golden(evaluator, golden)
    store = PolicyStore(Path(request.folder))
    try:
        # `created_at` is the maker's; the file is ours and needs none.
        name = store.write(
            policy.digest, write_policy(policy, Vocabularies(request.vocabularies), "")
        )
    except OSError as error:
        raise PolicyRejectedError(
            PolicyRejection.SWAP_FAILED, f"it cannot be kept: {error.strerror}"
        ) from error
    packed = _packed(store, builder, policy, request) if request.library else None
    return replace(
        known,
        file=name,
        digest=policy.digest,
        packed_file=packed.name if packed is not None else "",
        packed_digest=packed.digest if packed is not None else "",
        untrained=policy.untrained,
        golden=len(golden),
        policy_id=policy.policy_id,
        version=policy.version,
    )


def _packed(
    store: PolicyStore, builder: GraphBuilder, policy: Policy, request: LoaderRequest
) -> PackedFile | None:
    """Leave the weights as the service runs them, if they give what the folded ones do.

    Without it the service packs them itself and finds out.
    """
    from tamiyo_svc.policy.compiled import CompiledNetwork, Library, pack
    from tamiyo_svc.policy.engines import EAGER_CPU, Engines, Form
    from tamiyo_svc.policy.evaluator import PolicyEvaluator
    from tamiyo_svc.policy.folding import fold_weights

    try:
        library = Library(Path(request.library))
        dtype = WeightDtype(request.weight_dtype)
        packed = pack(fold_weights(policy.network), library.panel, dtype)
        compiled = Form(
            "cpu", is_compiled=True, build=lambda network: CompiledNetwork(library, packed)
        )
        engines = Engines([compiled, EAGER_CPU])
        PolicyEvaluator(builder, policy, engines=engines).warm_up()
        return None if engines.status.fallbacks else store.write_packed(policy.digest, packed)
    except (InferenceError, OSError, AttributeError):
        return None


def _refused(finding: Finding, reason: str, detail: str) -> Finding:
    return replace(finding, reason=str(reason), detail=detail[:400])


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _end_with(parent: int) -> None:
    """Have this process end with the one that started it; Linux alone can do that."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _follow_parent(requests: queue.SimpleQueue[str]) -> None:
    """Pass requests on; end with the service, whatever ended it: its end of the pipe closes."""
    for line in sys.stdin:
        requests.put(line)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with the child, if there is one
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
