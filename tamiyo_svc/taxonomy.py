"""The closed sets everything else speaks in: outcomes, severities, events, actions, reasons."""

from __future__ import annotations

from enum import IntEnum, StrEnum

from tamiyo_svc.leyline import leyline_pb2 as leyline


class Outcome(StrEnum):
    """How a packet ended; every packet received ends in exactly one of these."""

    DECIDED = "decided"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"
    DUPLICATE = "duplicate"
    DEAD_LETTERED = "dead_lettered"


class Severity(IntEnum):
    """How bad an event is; the order is the precedence."""

    INFO = 0
    WARNING = 1
    HIGH = 2
    CRITICAL = 3

    @property
    def level(self) -> leyline.TelemetryLevel:
        """The Leyline telemetry level that stands for this severity."""
        return _LEVELS[self]

    @property
    def priority(self) -> leyline.MessagePriority:
        """The bus priority that stands for this severity."""
        return _PRIORITIES[self]

    @property
    def is_emergency(self) -> bool:
        """Whether telemetry of this severity belongs on the emergency stream."""
        return self >= Severity.HIGH


_LEVELS: dict[Severity, leyline.TelemetryLevel] = {
    Severity.INFO: leyline.TELEMETRY_LEVEL_INFO,
    Severity.WARNING: leyline.TELEMETRY_LEVEL_WARNING,
    Severity.HIGH: leyline.TELEMETRY_LEVEL_ERROR,
    Severity.CRITICAL: leyline.TELEMETRY_LEVEL_CRITICAL,
}
_PRIORITIES: dict[Severity, leyline.MessagePriority] = {
    Severity.INFO: leyline.MESSAGE_PRIORITY_NORMAL,
    Severity.WARNING: leyline.MESSAGE_PRIORITY_NORMAL,
    Severity.HIGH: leyline.MESSAGE_PRIORITY_HIGH,
    Severity.CRITICAL: leyline.MESSAGE_PRIORITY_CRITICAL,
}


class PolicyAction(IntEnum):
    """What the policy head can propose; logits above these are reserved and masked."""

    SEED = 0
    OPTIMIZER = 1
    PAUSE = 2
    BREAKER_OPEN = 3
    BREAKER_CLOSE = 4


class CommandAction(IntEnum):
    """The kinds of command, ordered from least to most conservative."""

    SEED = 0
    OPTIMIZER = 1
    BREAKER = 2
    PAUSE = 3


class BreakerName(StrEnum):
    """The circuit breakers of the service."""

    INFERENCE = "inference"
    METADATA = "metadata"
    BUS = "bus"


class BreakerState(IntEnum):
    """State of a circuit breaker; values are those of Leyline's `CircuitBreakerState`."""

    CLOSED = 1
    OPEN = 2
    HALF_OPEN = 3


class TimeoutAction(StrEnum):
    """What the safe command is when the budget was missed."""

    PAUSE = "pause"
    BASELINE = "baseline"


class InferenceStatus(StrEnum):
    """How the network's part of a step ended."""

    COMPLETED = "completed"
    TIMED_OUT = "timed_out"
    LANE_BUSY = "lane_busy"
    FAILED = "failed"
    NOT_RUN = "not_run"


NEXT_SEED_OPERATIONS: dict[int, leyline.SeedOperation] = {
    leyline.SEED_STAGE_UNKNOWN: leyline.SEED_OP_GERMINATE,
    leyline.SEED_STAGE_DORMANT: leyline.SEED_OP_GERMINATE,
    leyline.SEED_STAGE_GERMINATED: leyline.SEED_OP_START_TRAINING,
    leyline.SEED_STAGE_TRAINING: leyline.SEED_OP_START_GRAFTING,
    leyline.SEED_STAGE_BLENDING: leyline.SEED_OP_STABILIZE,
    leyline.SEED_STAGE_SHADOWING: leyline.SEED_OP_EVALUATE,
    leyline.SEED_STAGE_PROBATIONARY: leyline.SEED_OP_FOSSILIZE,
}
"""What comes next for a seed in each stage; a seed in any other stage is no candidate."""


class BlendMode(StrEnum):
    """How a seed's output joins its host's."""

    CONVEX = "CONVEX"
    RESIDUAL = "RESIDUAL"
    CHANNEL = "CHANNEL"
    CONFIDENCE = "CONFIDENCE"


BLENDING_METHODS: tuple[str, ...] = ("linear", "cosine", "warmup_hold")
"""Blending schedules in the order of the network's blending head."""

OPTIMIZER_FAMILIES: tuple[str, ...] = ("sgd", "adam", "adamw", "rmsprop", "adagrad")
"""Optimizer families; a trainer's `optimizer_family_index` counts from 1, 0 is unknown."""


class Event(StrEnum):
    """Everything a decision or the service can report; the value is the telemetry description."""

    TIMEOUT_INFERENCE = "timeout_inference"
    LANE_BUSY = "lane_busy"
    INFERENCE_FAILED = "inference_failed"
    ROLLBACK_DEADLINE = "rollback_deadline"
    EMERGENCY_SIGNAL = "emergency_signal"
    BP_QUARANTINE = "bp_quarantine"
    BSDS_HANDLING_QUARANTINE = "bsds_handling_quarantine"
    BSDS_HAZARD_CRITICAL = "bsds_hazard_critical"
    POLICY_RISK_CRITICAL = "policy_risk_critical"
    DEGRADED_INPUTS = "degraded_inputs"
    LOSS_NONFINITE = "loss_nonfinite"
    LOSS_SPIKE = "loss_spike"
    HOOK_BUDGET = "hook_budget"
    STEP_LATENCY_HIGH = "step_latency_high"
    ISOLATION_VIOLATIONS = "isolation_violations"
    DEVICE_PRESSURE_HIGH = "device_pressure_high"
    CPU_PRESSURE_HIGH = "cpu_pressure_high"
    TIMEOUT_URZA = "timeout_urza"
    CONSERVATIVE_MODE = "conservative_mode"
    POLICY_RISK_ELEVATED = "policy_risk_elevated"
    BLUEPRINT_RISK = "blueprint_risk"
    BSDS_HAZARD_HIGH = "bsds_hazard_high"
    LOSS_WARNING = "loss_warning"
    LOSS_VOLATILITY_HIGH = "loss_volatility_high"
    GRAD_VARIANCE_HIGH = "grad_variance_high"
    GRAD_CONFLICT_HIGH = "grad_conflict_high"
    KASMINA_APPLY_SLOW = "kasmina_apply_slow"
    KASMINA_FINALIZE_SLOW = "kasmina_finalize_slow"
    OPTIMIZER_HINT = "optimizer_hint"
    NONFINITE_INPUTS = "nonfinite_inputs"
    BSDS_PRESENT = "bsds_present"
    POLICY_RISK_SIGNAL = "policy_risk_signal"
    NO_SEED_CANDIDATES = "no_seed_candidates"
    NO_BLUEPRINT_CANDIDATES = "no_blueprint_candidates"
    POLICY_UNTRAINED = "policy_untrained"

    CONSERVATIVE_ENTERED = "conservative_entered"
    CONSERVATIVE_EXITED = "conservative_exited"
    BREAKER_OPENED = "breaker_opened"
    BREAKER_HALF_OPENED = "breaker_half_opened"
    BREAKER_CLOSED = "breaker_closed"
    EXECUTOR_HUNG = "executor_hung"
    PACKETS_EXPIRED = "packets_expired"
    FIELD_REPORT_SYNTHESISED = "field_report_synthesised"
    FIELD_REPORT_DROP = "field_report_drop"
    OBSERVATION_WINDOW_DROPPED = "observation_window_dropped"
    POLICY_UPDATE_APPLIED = "policy_update_applied"
    POLICY_UPDATE_REJECTED = "policy_update_rejected"
    POLICY_ROLLED_BACK = "policy_rolled_back"
    POLICY_SHADOW_STARTED = "policy_shadow_started"
    POLICY_SHADOW_REPORT = "policy_shadow_report"
    COMMAND_FAILED = "command_failed"
    GRAPH_TRUNCATED = "graph_truncated"
    METADATA_SKIPPED = "metadata_skipped"
    BSDS_ISSUED = "bsds_issued"
    BSDS_FAILED = "bsds_failed"
    CATALOG_UPDATED = "catalog_updated"
    CATALOG_DEGRADED = "catalog_degraded"
    CATALOG_RECOVERED = "catalog_recovered"


class DeadLetterReason(StrEnum):
    """Why an entry could not be processed; the first five are the codec's own rejections."""

    MISSING_SIGNATURE = "missing_signature"
    INVALID_SIGNATURE = "invalid_signature"
    MALFORMED_ENVELOPE = "malformed_envelope"
    MALFORMED_PAYLOAD = "malformed_payload"
    UNSUPPORTED_MESSAGE_TYPE = "unsupported_message_type"
    OVERSIZED = "oversized"
    INVALID_FIELD = "invalid_field"
    DELIVERIES_EXCEEDED = "deliveries_exceeded"


class CommandRejection(StrEnum):
    """Why a trainer refused a command; the first seven concern its form and signatures."""

    OVERSIZED = "oversized"
    MISSING_SIGNATURE = "missing_signature"
    INVALID_SIGNATURE = "invalid_signature"
    MALFORMED = "malformed"
    NOT_A_COMMAND = "not_a_command"
    MISSING_COMMAND_SIGNATURE = "missing_command_signature"
    INVALID_COMMAND_SIGNATURE = "invalid_command_signature"
    MISSING_IDENTITY = "missing_identity"
    STALE = "stale"
    FROM_THE_FUTURE = "from_the_future"
    REPLAYED = "replayed"
    WRONG_RUN = "wrong_run"
    UNKNOWN_PACKET = "unknown_packet"
    WRONG_STEP = "wrong_step"
    ALREADY_ANSWERED = "already_answered"


class ClientMode(StrEnum):
    """What a trainer's client does with packets and commands."""

    ONLINE = "online"
    """Sends packets, hands out commands."""
    OBSERVE = "observe"
    """Sends packets, verifies and logs commands, hands out none."""
    OFFLINE = "offline"
    """Writes packets to a capture file, receives nothing."""
    DISABLED = "disabled"
    """Does nothing at all."""


class Direction(StrEnum):
    """Which way entries go between a client and the bus."""

    OUT = "out"
    IN = "in"


class AckOutcome(StrEnum):
    """What a trainer made of a command."""

    APPLIED = "applied"
    REJECTED = "rejected"


class SeedOperations(StrEnum):
    """Which seed operations a consumer of commands knows."""

    BY_STAGE = "by_stage"
    GERMINATE_ONLY = "germinate_only"


class CpuEngine(StrEnum):
    """How the served network runs on a CPU."""

    AUTO = "auto"
    COMPILED = "compiled"
    EAGER = "eager"


class WeightDtype(StrEnum):
    """Number format of the served network's weights."""

    FP32 = "fp32"
    FP16 = "fp16"


class Stage(StrEnum):
    """The timed parts of one packet's path."""

    DECODE = "decode"
    BUILD = "build"
    INFER = "infer"
    RISK = "risk"
    COMMIT = "commit"


class TimeoutPath(StrEnum):
    """The paths that have a time budget."""

    STEP = "step"
    METADATA = "metadata"
    COMMIT = "commit"


class PolicyRejection(StrEnum):
    """Why a policy update was refused."""

    MISSING_SIGNATURE = "missing_signature"
    INVALID_SIGNATURE = "invalid_signature"
    VERSION_MISMATCH = "version_mismatch"
    STALE_UPDATE = "stale_update"
    REPLAYED_UPDATE = "replayed_update"
    INVALID_PAYLOAD = "invalid_payload"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    REGISTRY_MISMATCH = "registry_mismatch"
    SHAPE_MISMATCH = "shape_mismatch"
    NONFINITE_WEIGHTS = "nonfinite_weights"
    PROBE_FAILED = "probe_failed"
    SWAP_FAILED = "swap_failed"


class PolicyUpdateAction(StrEnum):
    """What a policy update asks for; an envelope without the attribute asks to apply it."""

    APPLY = "apply"
    SHADOW = "shadow"
    PROMOTE = "promote"
    ROLLBACK = "rollback"


class PolicyUpdateOutcome(StrEnum):
    """How a policy update ended, or what became of it on probation."""

    APPLIED = "applied"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled_back"
