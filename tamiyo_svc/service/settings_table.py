"""Every setting as a table: field, variable, default, meaning, unit and limits."""

from __future__ import annotations

import re
import socket
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from tamiyo_svc.adapters.logs import LogFormat, LogLevel
from tamiyo_svc.leyline.partition import MAX_PARTITIONS
from tamiyo_svc.leyline.signing import MIN_SECRET_BYTES, secret_text
from tamiyo_svc.risk.latency import MAX_STEPS
from tamiyo_svc.service.variables import setting
from tamiyo_svc.taxonomy import BlendMode, CpuEngine, SeedOperations, TimeoutAction, WeightDtype


def _check_redis_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        valid = bool(parts.path)
    else:
        # Reading the port of a malformed URL raises ValueError.
        valid = parts.scheme in ("redis", "rediss") and bool(parts.hostname) and parts.port != 0
        valid = valid and re.fullmatch(r"/?\d*", parts.path) is not None
    if not valid:
        raise ValueError("not a Redis URL")
    return url


def _check_secret(secret: SecretStr) -> SecretStr:
    """The secret as `secret_text` gives it; the error says what else than short it is."""
    text = secret_text(secret.get_secret_value())
    if len(text.encode()) < MIN_SECRET_BYTES:
        raise ValueError("")
    return SecretStr(text)


def _known_blend_mode(value: object) -> object:
    """A mode that nobody knows means convex, as it does for the reader of the annotation."""
    if not isinstance(value, str):
        return value
    return BlendMode.__members__.get(value.strip().upper(), BlendMode.CONVEX)


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


RedisUrl = Annotated[str, AfterValidator(_check_redis_url)]
Secret = Annotated[SecretStr, AfterValidator(_check_secret)]

_bus = partial(setting, "Bus")
_secret = partial(setting, "Secrets", unset="not set")
_budget = partial(setting, "Budgets")
_device = partial(setting, "Device")
_policy = partial(setting, "Policy")
_graph = partial(setting, "Graph")
_risk = partial(setting, "Risk")
_command = partial(setting, "Commands")
_report = partial(setting, "Reports")
_run = partial(setting, "Runs")
_operation = partial(setting, "Operation")
_stream = partial(
    _bus, takes="a stream name without spaces and braces", pattern=r"^[^\s{}]{1,200}$"
)
_secret_text = partial(_secret, takes=f"at least {MIN_SECRET_BYTES} bytes")
_secret_file = partial(_secret, takes="the path of a readable file")
_count = partial(_graph, ge=1, le=4096)
_loss = partial(_risk, unit="loss", ge=0)
_share = partial(_risk, unit="fraction", ge=0, le=1)
_percent = partial(_risk, unit="percent", ge=0, le=100)
_latency = partial(_risk, unit="ms", ge=0)
_limit = partial(_latency, unset="off")
_ratio = partial(_risk, unit="times", ge=0)


class SettingsTable(BaseSettings):
    """The fields of the settings, grouped as the operator's reference is."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        case_sensitive=True,
        env_ignore_empty=True,
        env_file_encoding="utf-8",
    )

    redis_url: RedisUrl = _bus(
        "REDIS_URL",
        "redis://localhost:6379/0",
        "The Redis or Valkey server; user and password may be part of it.",
        takes="a redis://, rediss:// or unix:// URL",
    )
    normal_stream: str = _stream(
        "OONA_NORMAL_STREAM",
        "oona.normal",
        "State packets, safety sheets and catalogue updates come in here.",
    )
    emergency_stream: str = _stream(
        "OONA_EMERGENCY_STREAM",
        "oona.emergency",
        "Read first; HIGH and CRITICAL telemetry goes out here.",
    )
    telemetry_stream: str = _stream(
        "OONA_TELEMETRY_STREAM", "oona.telemetry", "All other telemetry goes out here."
    )
    policy_stream: str = _stream("OONA_POLICY_STREAM", "oona.policy", "Policy updates.")
    dead_letter_stream: str = _stream(
        "OONA_DEAD_LETTER_STREAM", "oona.dead", "What could not be processed, with the reason."
    )
    command_stream: str = _stream(
        "OONA_COMMAND_STREAM",
        lambda given: given["normal_stream"],
        "Commands for packets that name no `reply_to`.",
        unset="the normal stream",
    )
    field_report_stream: str = _stream(
        "OONA_FIELD_REPORT_STREAM",
        lambda given: given["normal_stream"],
        "Field reports, the durable log.",
        unset="the normal stream",
    )
    consumer_group: str = _bus(
        "OONA_CONSUMER_GROUP",
        "tamiyo",
        "Consumer group that all replicas share.",
        takes="a name without spaces",
        pattern=r"^\S{1,200}$",
    )
    consumer_name: str = _bus(
        "OONA_CONSUMER_NAME",
        socket.gethostname,
        "Name of this replica; must stay the same over restarts.",
        unset="the host name",
        takes="a name without spaces",
        pattern=r"^\S{1,200}$",
    )
    read_count: int = _bus(
        "OONA_READ_COUNT", 32, "Most entries taken in one read.", unit="entries", ge=1, le=10_000
    )
    block_ms: int = _bus(
        "OONA_BLOCK_MS", 1000, "How long one read waits for entries.", unit="ms", ge=1, le=60_000
    )
    claim_idle_ms: int = _bus(
        "OONA_CLAIM_IDLE_MS",
        5000,
        "Entries that another replica left pending this long are taken over.",
        unit="ms",
        ge=1,
    )
    max_deliveries: int = _bus(
        "OONA_MAX_DELIVERIES",
        5,
        "An entry that failed this often becomes a dead letter.",
        unit="deliveries",
        ge=1,
    )
    max_message_bytes: int = _bus(
        "OONA_MAX_MESSAGE_BYTES", 1 << 20, "Larger entries are dead letters.", unit="bytes", ge=1024
    )
    message_ttl_ms: int = _bus(
        "OONA_MESSAGE_TTL_MS",
        900_000,
        "Entries older than this are trimmed once every group is done with them.",
        unit="ms",
        ge=1000,
    )
    emergency_max_per_min: int = _bus(
        "OONA_EMERGENCY_MAX_PER_MIN",
        120,
        "Beyond this rate emergency telemetry goes to the telemetry stream.",
        unit="packets per minute",
        ge=1,
    )
    commit_timeout_ms: int = _bus(
        "OONA_COMMIT_TIMEOUT_MS",
        2000,
        "How long a commit may take before the connection is given up.",
        unit="ms",
        ge=1,
    )
    partitions: int = _bus(
        "OONA_PARTITIONS",
        1,
        "Parts of the bus, each with streams of its own; trainers must be told the same.",
        unit="partitions",
        ge=1,
        le=MAX_PARTITIONS,
    )

    secret: Secret | None = _secret_text(
        "ESPER_LEYLINE_SECRET", None, "The shared secret that signs and verifies; needed to serve."
    )
    secret_file: Path | None = _secret_file(
        "ESPER_LEYLINE_SECRET_FILE", None, "A file that holds the secret instead."
    )
    secret_previous: Secret | None = _secret_text(
        "ESPER_LEYLINE_SECRET_PREVIOUS", None, "The secret before it, accepted for verifying only."
    )
    secret_previous_file: Path | None = _secret_file(
        "ESPER_LEYLINE_SECRET_PREVIOUS_FILE", None, "A file that holds the previous secret instead."
    )
    require_signatures: bool = setting(
        "Secrets",
        "TAMIYO_REQUIRE_SIGNATURES",
        default=True,
        description="Refuse unsigned and forged entries; off only for development.",
    )

    step_timeout_ms: float = _budget(
        "TAMIYO_STEP_TIMEOUT_MS",
        5.0,
        "Budget from packet read to command ready; 0 turns it off.",
        unit="ms",
        ge=0,
    )
    metadata_timeout_ms: float = _budget(
        "TAMIYO_METADATA_TIMEOUT_MS",
        10.0,
        "Budget for blueprint metadata that is not in memory; 0 turns it off.",
        unit="ms",
        ge=0,
    )
    timeout_action: TimeoutAction = _budget(
        "TAMIYO_TIMEOUT_ACTION",
        TimeoutAction.PAUSE,
        "The safe command: pause, or an optimizer command that changes nothing.",
    )
    lane_hang_s: float = _budget(
        "TAMIYO_LANE_HANG_S",
        5.0,
        "A job that runs this long has hung and its lane is replaced.",
        unit="s",
        gt=0,
    )
    state_max_age_ms: int = _budget(
        "TAMIYO_STATE_MAX_AGE_MS", 1000, "Older packets get no command.", unit="ms", ge=1
    )
    replay_window_s: float = _budget(
        "TAMIYO_REPLAY_WINDOW_S",
        60.0,
        "A packet this far behind its run's newest is a replay.",
        unit="s",
        gt=0,
        # Consumers remember command ids for 300 s; a longer window could answer twice.
        lt=300,
    )
    drain_timeout_s: float = _budget(
        "TAMIYO_DRAIN_TIMEOUT_S",
        10.0,
        "How long a stop waits for what is in flight.",
        unit="s",
        ge=0,
    )

    device: str = _device(
        "TAMIYO_DEVICE",
        "auto",
        "Where the network runs; auto is cuda if there is one, else cpu.",
        takes="auto, cpu, cuda or cuda:<index>",
        pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$",
    )
    enable_compile: bool | None = _device(
        "TAMIYO_ENABLE_COMPILE",
        None,
        "Compile the network once at start.",
        unset="on for cuda, off for cpu",
    )
    cpu_threads: int = _device(
        "TAMIYO_CPU_THREADS", 1, "Threads of one inference on a CPU.", unit="threads", ge=1, le=256
    )
    cpu_engine: CpuEngine = _device(
        "TAMIYO_CPU_ENGINE", CpuEngine.AUTO, "How the network runs on a CPU."
    )
    weight_dtype: WeightDtype = _device(
        "TAMIYO_WEIGHT_DTYPE",
        WeightDtype.FP16,
        "Number format of the wide weights in the CPU's compiled form.",
    )
    keep_warm: bool = _device(
        "TAMIYO_KEEP_WARM",
        default=False,
        description="Read the weights into the caches just before the next packet is expected.",
    )
    max_batch: int = _device(
        "TAMIYO_MAX_BATCH", 64, "Most packets in one inference.", unit="packets", ge=1, le=1024
    )

    state_dir: Path = _policy(
        "TAMIYO_STATE_DIR", Path("var/tamiyo"), "Holds the last known good policy and vocabularies."
    )
    policy: str | None = _policy(
        "TAMIYO_POLICY",
        None,
        "The policy to start with.",
        unset="last known good, else untrained",
        takes="untrained, bootstrap or the path of a checkpoint",
        min_length=1,
    )
    verify_updates: bool = _policy(
        "TAMIYO_VERIFY_UPDATES",
        default=True,
        description="Check age, order and architecture label of policy updates; "
        "signatures are checked and loading is safe either way.",
    )
    update_freshness_s: float = _policy(
        "TAMIYO_UPDATE_FRESHNESS_SEC",
        0.0,
        "Policy updates older than this are refused; 0 takes any age.",
        unit="s",
        ge=0,
    )
    policy_probation_decisions: int = _policy(
        "TAMIYO_POLICY_PROBATION_DECISIONS",
        200,
        "Decisions during which a new policy may be rolled back.",
        unit="decisions",
        ge=0,
    )
    policy_probation_failures: int = _policy(
        "TAMIYO_POLICY_PROBATION_FAILURES",
        10,
        "Failed or late inferences that roll it back; so do as many in a row as open the breaker.",
        unit="inferences",
        ge=1,
    )

    max_layers: int = _count("TAMIYO_MAX_LAYERS", 64, "Most layers in a graph.")
    max_activations: int = _count("TAMIYO_MAX_ACTIVATIONS", 32, "Most activations in a graph.")
    max_parameters: int = _count("TAMIYO_MAX_PARAMETERS", 32, "Most parameters in a graph.")
    max_seeds: int = _count("TAMIYO_MAX_SEEDS", 256, "Most seeds in a graph.")
    max_blueprints: int = _count("TAMIYO_MAX_BLUEPRINTS", 32, "Most blueprints in a graph.")
    blueprint_candidates: int = _count(
        "TAMIYO_BLUEPRINT_CANDIDATES", 8, "Most blueprints considered for a packet."
    )
    urza_database_url: str = _graph(
        "URZA_DATABASE_URL",
        "sqlite:///./var/urza/catalog.db",
        "The blueprint catalogue, only read. While this is not set and there is no such file, "
        "blueprints that trainers name are used as they are.",
        takes="a sqlite:///<path> URL",
        pattern=r"^sqlite:///[^?]+$",
    )
    metadata_refresh_s: float = _graph(
        "TAMIYO_METADATA_REFRESH_S",
        5.0,
        "How often the catalogue is looked at for changes.",
        unit="s",
        gt=0,
    )

    risk_max_loss_spike: float = _loss(
        "TAMIYO_RISK_MAX_LOSS_SPIKE", 0.15, "`loss_spike` above this loss delta."
    )
    risk_loss_warning: float = _loss(
        "TAMIYO_RISK_LOSS_WARNING", 0.075, "`loss_warning` above this loss delta."
    )
    risk_loss_volatility: float = _loss(
        "TAMIYO_RISK_LOSS_VOLATILITY", 0.1125, "`loss_volatility_high` above this volatility."
    )
    risk_grad_variance: float = _risk(
        "TAMIYO_RISK_GRAD_VARIANCE", 1.0, "`grad_variance_high` above this variance.", ge=0
    )
    risk_grad_conflict: float = _share(
        "TAMIYO_RISK_GRAD_CONFLICT", 0.5, "`grad_conflict_high` above this conflict rate."
    )
    risk_optimizer_lr_min: float = _risk(
        "TAMIYO_RISK_OPTIMIZER_LR_MIN",
        0.0,
        "`optimizer_hint` at or below this learning rate while the loss rises.",
        ge=0,
    )
    risk_hook_budget_ms: float | None = _limit(
        "TAMIYO_RISK_HOOK_BUDGET_MS",
        None,
        "`hook_budget` (HIGH) above this hook latency, whatever the run is used to.",
    )
    risk_step_latency_high_ms: float | None = _limit(
        "TAMIYO_RISK_STEP_LATENCY_HIGH_MS",
        None,
        "`step_latency_high` (HIGH) above this step latency, whatever the run is used to.",
    )
    risk_hook_latency_rise_ratio: float = _ratio(
        "TAMIYO_RISK_HOOK_LATENCY_RISE_RATIO",
        2.5,
        "`hook_budget` above this many times the run's own median hook latency; 0 turns it off.",
    )
    risk_step_latency_rise_ratio: float = _ratio(
        "TAMIYO_RISK_STEP_LATENCY_RISE_RATIO",
        2.5,
        "`step_latency_high` above this many times the run's own median step latency; "
        "0 turns it off.",
    )
    risk_latency_rise_ms: float = _latency(
        "TAMIYO_RISK_LATENCY_RISE_MS",
        10.0,
        "`hook_budget` and `step_latency_high` ask for at least this much above the median.",
    )
    risk_latency_rise_steps: int = _risk(
        "TAMIYO_RISK_LATENCY_RISE_STEPS",
        8,
        "`hook_budget` and `step_latency_high` pause (HIGH) from so many slow steps in a row on.",
        unit="steps",
        ge=1,
        le=MAX_STEPS,
    )
    risk_kasmina_apply_slow_ms: float = _latency(
        "TAMIYO_RISK_KASMINA_APPLY_SLOW_MS", 30.0, "`kasmina_apply_slow` above this."
    )
    risk_kasmina_finalize_slow_ms: float = _latency(
        "TAMIYO_RISK_KASMINA_FINALIZE_SLOW_MS", 30.0, "`kasmina_finalize_slow` above this."
    )
    risk_isolation_violations: float = _risk(
        "TAMIYO_RISK_ISOLATION_VIOLATIONS",
        0.0,
        "`isolation_violations` above this many in one step.",
        unit="violations",
        ge=0,
    )
    risk_gpu_util_percent: float = _percent(
        "TAMIYO_RISK_GPU_UTIL_PERCENT",
        95.0,
        "`device_pressure_high` from this load on, and memory as below.",
    )
    risk_gpu_mem_free_gb: float = _risk(
        "TAMIYO_RISK_GPU_MEM_FREE_GB",
        0.2,
        "`device_pressure_high` at or below this free memory, and load as above.",
        unit="GB",
        ge=0,
    )
    risk_cpu_util_percent: float = _percent(
        "TAMIYO_RISK_CPU_UTIL_PERCENT", 95.0, "`cpu_pressure_high` from this load on."
    )
    risk_coverage_warn: float = _share(
        "TAMIYO_RISK_COVERAGE_WARN", 0.30, "`degraded_inputs` (INFO) below this mean coverage."
    )
    risk_coverage_crit: float = _share(
        "TAMIYO_RISK_COVERAGE_CRIT", 0.10, "`degraded_inputs` (CRITICAL) down from this coverage."
    )
    risk_policy_risk_critical: float = _share(
        "TAMIYO_RISK_POLICY_RISK_CRITICAL", 0.98, "`policy_risk_critical` from this score on."
    )
    risk_policy_risk_elevated: float = _share(
        "TAMIYO_RISK_POLICY_RISK_ELEVATED", 0.85, "`policy_risk_elevated` from this score on."
    )
    risk_policy_risk_signal: float = _share(
        "TAMIYO_RISK_POLICY_RISK_SIGNAL", 0.5, "`policy_risk_signal` from this score on."
    )
    risk_blueprint_quarantine: float = _share(
        "TAMIYO_RISK_BLUEPRINT_QUARANTINE", 0.8, "`bp_quarantine` from this blueprint risk on."
    )
    risk_blueprint_risk: float = _share(
        "TAMIYO_RISK_BLUEPRINT_RISK", 0.5, "`blueprint_risk` from this blueprint risk on."
    )
    conservative_mode: bool = _risk(
        "TAMIYO_CONSERVATIVE_MODE",
        default=False,
        description="The operator's switch: answer every packet with pause.",
    )
    conservative_cooldown_steps: int = _risk(
        "TAMIYO_CONSERVATIVE_COOLDOWN_STEPS",
        20,
        "Quiet steps after which a run leaves conservative mode.",
        unit="steps",
        ge=1,
    )
    breaker_failures: int = _risk(
        "TAMIYO_BREAKER_FAILURES",
        3,
        "Consecutive failures that open a breaker.",
        unit="failures",
        ge=1,
    )
    breaker_cooldown_s: float = _risk(
        "TAMIYO_BREAKER_COOLDOWN_S", 5.0, "How long a breaker stays open at first.", unit="s", gt=0
    )
    breaker_max_cooldown_s: float = _risk(
        "TAMIYO_BREAKER_MAX_COOLDOWN_S",
        60.0,
        "How long it stays open at most, after doubling.",
        unit="s",
        gt=0,
    )

    seed_operations: SeedOperations = _command(
        "TAMIYO_SEED_OPERATIONS",
        SeedOperations.BY_STAGE,
        "Seed operations that the consumer of commands knows.",
    )
    max_lr_delta: float = _command(
        "TAMIYO_MAX_LR_DELTA", 0.1, "Largest learning-rate change.", unit="fraction", ge=0, le=1
    )
    command_deadline_ms: int = _command(
        "TAMIYO_COMMAND_DEADLINE_MS",
        50,
        "`execution_deadline_ms` of every command.",
        unit="ms",
        ge=1,
    )
    enable_blend_mode_ann: bool = _command(
        "TAMIYO_ENABLE_BLEND_MODE_ANN",
        default=False,
        description="Annotate seed commands with a blend mode.",
    )
    blend_mode_default: Annotated[BlendMode | None, BeforeValidator(_known_blend_mode)] = _command(
        "TAMIYO_BLEND_MODE_DEFAULT",
        None,
        "The blend mode of every seed command; an unknown name means CONVEX.",
        unset="chosen per command",
        takes="CONVEX, RESIDUAL, CHANNEL or CONFIDENCE",
    )
    blend_conf_gate_k: float = _command(
        "TAMIYO_BLEND_CONF_GATE_K", 1.0, "`gate_k` of the CONFIDENCE mode."
    )
    blend_conf_gate_tau: float = _command(
        "TAMIYO_BLEND_CONF_GATE_TAU", 1.0, "`gate_tau` of the CONFIDENCE mode."
    )
    blend_alpha_lo: float = _command(
        "TAMIYO_BLEND_ALPHA_LO", 0.0, "`alpha_lo`, clamped to [0, 1] and put in order."
    )
    blend_alpha_hi: float = _command(
        "TAMIYO_BLEND_ALPHA_HI", 1.0, "`alpha_hi`, clamped to [0, 1] and put in order."
    )
    blend_alpha_vec_max: int = _command(
        "TAMIYO_BLEND_ALPHA_VEC_MAX",
        64,
        "Most channels for which the CHANNEL mode sends `alpha_vec`.",
        unit="channels",
        ge=0,
        le=4096,
    )

    fr_obs_window_epochs: int = _report(
        "TAMIYO_FR_OBS_WINDOW_EPOCHS",
        1,
        "Above 1, each command that changes something is reported on again after this long.",
        unit="epochs",
        ge=1,
        le=2**31 - 1,
    )
    fr_obs_window_steps: int = _report(
        "TAMIYO_FR_OBS_WINDOW_STEPS",
        0,
        "The same after so many steps, where that is sooner; 0 leaves it to the epochs.",
        unit="steps",
        ge=0,
        le=2**31 - 1,
    )
    field_report_retention_hours: float = _report(
        "TAMIYO_FIELD_REPORT_RETENTION_HOURS", 24.0, "How long reports are kept.", unit="h", gt=0
    )
    field_report_max_retries: int = _report(
        "TAMIYO_FIELD_REPORT_MAX_RETRIES", 3, "Attempts before a report is dropped.", ge=0
    )
    fr_retry_backoff_ms: int = _report(
        "TAMIYO_FR_RETRY_BACKOFF_MS", 1000, "Wait before the first retry.", unit="ms", ge=0
    )
    fr_retry_backoff_mult: float = _report(
        "TAMIYO_FR_RETRY_BACKOFF_MULT", 2.0, "Factor from one wait to the next.", ge=1
    )

    run_ttl_s: int = _run(
        "TAMIYO_RUN_TTL_S", 86_400, "An idle run is forgotten after this.", unit="s", ge=1
    )

    http_host: str = _operation(
        "TAMIYO_HTTP_HOST",
        "0.0.0.0",  # noqa: S104  scraped from outside the container
        "Address of metrics and health.",
        takes="a host name or address",
        pattern=r"^\S+$",
    )
    http_port: int = _operation(
        "TAMIYO_HTTP_PORT",
        9464,
        "Port of metrics and health; 0 takes a free one.",
        ge=0,
        le=65_535,
    )
    log_level: Annotated[LogLevel, BeforeValidator(_upper)] = _operation(
        "TAMIYO_LOG_LEVEL", LogLevel.INFO, "The least severe level that is logged."
    )
    log_format: LogFormat = _operation(
        "TAMIYO_LOG_FORMAT", LogFormat.AUTO, "Auto is console on a terminal, JSON elsewhere."
    )
    otlp_endpoint: str | None = _operation(
        "TAMIYO_OTLP_ENDPOINT",
        None,
        "Spans are sent here as OTLP over HTTP; needs the extra `otel`.",
        unset="spans stay in the telemetry",
        takes="an http:// or https:// URL, path included",
        pattern=r"^https?://\S+$",
    )
