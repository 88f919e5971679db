"""Where settings come from, what is refused and how, and that secrets stay hidden."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tamiyo_svc.errors import ConfigurationError
from tamiyo_svc.risk.thresholds import Thresholds
from tamiyo_svc.service.settings import VARIABLES, Origin, Settings, load_settings
from tamiyo_svc.service.variables import redacted
from tamiyo_svc.taxonomy import BlendMode, SeedOperations, TimeoutAction

SECRET = "correct-horse-battery-staple"
PREVIOUS = "the-secret-before-that-one"

DEFAULTS = {
    "REDIS_URL": "redis://localhost:6379/0",
    "OONA_NORMAL_STREAM": "oona.normal",
    "OONA_EMERGENCY_STREAM": "oona.emergency",
    "OONA_TELEMETRY_STREAM": "oona.telemetry",
    "OONA_POLICY_STREAM": "oona.policy",
    "OONA_DEAD_LETTER_STREAM": "oona.dead",
    "OONA_COMMAND_STREAM": "oona.normal",
    "OONA_FIELD_REPORT_STREAM": "oona.normal",
    "OONA_CONSUMER_GROUP": "tamiyo",
    "OONA_READ_COUNT": 32,
    "OONA_BLOCK_MS": 1000,
    "OONA_CLAIM_IDLE_MS": 5000,
    "OONA_MAX_DELIVERIES": 5,
    "OONA_MAX_MESSAGE_BYTES": 1048576,
    "OONA_MESSAGE_TTL_MS": 900000,
    "OONA_EMERGENCY_MAX_PER_MIN": 120,
    "OONA_COMMIT_TIMEOUT_MS": 2000,
    "OONA_PARTITIONS": 1,
    "ESPER_LEYLINE_SECRET": None,
    "ESPER_LEYLINE_SECRET_FILE": None,
    "ESPER_LEYLINE_SECRET_PREVIOUS": None,
    "ESPER_LEYLINE_SECRET_PREVIOUS_FILE": None,
    "TAMIYO_REQUIRE_SIGNATURES": True,
    "TAMIYO_STEP_TIMEOUT_MS": 5.0,
    "TAMIYO_METADATA_TIMEOUT_MS": 10.0,
    "TAMIYO_TIMEOUT_ACTION": "pause",
    "TAMIYO_LANE_HANG_S": 5.0,
    "TAMIYO_STATE_MAX_AGE_MS": 1000,
    "TAMIYO_REPLAY_WINDOW_S": 60.0,
    "TAMIYO_DRAIN_TIMEOUT_S": 10.0,
    "TAMIYO_DEVICE": "auto",
    "TAMIYO_ENABLE_COMPILE": None,
    "TAMIYO_CPU_THREADS": 1,
    "TAMIYO_CPU_ENGINE": "auto",
    "TAMIYO_WEIGHT_DTYPE": "fp16",
    "TAMIYO_KEEP_WARM": False,
    "TAMIYO_MAX_BATCH": 64,
    "TAMIYO_STATE_DIR": "var/tamiyo",
    "TAMIYO_POLICY": None,
    "TAMIYO_VERIFY_UPDATES": True,
    "TAMIYO_UPDATE_FRESHNESS_SEC": 0.0,
    "TAMIYO_POLICY_PROBATION_DECISIONS": 200,
    "TAMIYO_POLICY_PROBATION_FAILURES": 10,
    "TAMIYO_MAX_LAYERS": 64,
    "TAMIYO_MAX_ACTIVATIONS": 32,
    "TAMIYO_MAX_PARAMETERS": 32,
    "TAMIYO_MAX_SEEDS": 256,
    "TAMIYO_MAX_BLUEPRINTS": 32,
    "TAMIYO_BLUEPRINT_CANDIDATES": 8,
    "URZA_DATABASE_URL": "sqlite:///./var/urza/catalog.db",
    "TAMIYO_METADATA_REFRESH_S": 5.0,
    "TAMIYO_CONSERVATIVE_MODE": False,
    "TAMIYO_CONSERVATIVE_COOLDOWN_STEPS": 20,
    "TAMIYO_BREAKER_FAILURES": 3,
    "TAMIYO_BREAKER_COOLDOWN_S": 5.0,
    "TAMIYO_BREAKER_MAX_COOLDOWN_S": 60.0,
    "TAMIYO_SEED_OPERATIONS": "by_stage",
    "TAMIYO_MAX_LR_DELTA": 0.1,
    "TAMIYO_COMMAND_DEADLINE_MS": 50,
    "TAMIYO_ENABLE_BLEND_MODE_ANN": False,
    "TAMIYO_BLEND_MODE_DEFAULT": None,
    "TAMIYO_BLEND_CONF_GATE_K": 1.0,
    "TAMIYO_BLEND_CONF_GATE_TAU": 1.0,
    "TAMIYO_BLEND_ALPHA_LO": 0.0,
    "TAMIYO_BLEND_ALPHA_HI": 1.0,
    "TAMIYO_BLEND_ALPHA_VEC_MAX": 64,
    "TAMIYO_FR_OBS_WINDOW_EPOCHS": 1,
    "TAMIYO_FR_OBS_WINDOW_STEPS": 0,
    "TAMIYO_FIELD_REPORT_RETENTION_HOURS": 24.0,
    "TAMIYO_FIELD_REPORT_MAX_RETRIES": 3,
    "TAMIYO_FR_RETRY_BACKOFF_MS": 1000,
    "TAMIYO_FR_RETRY_BACKOFF_MULT": 2.0,
    "TAMIYO_RUN_TTL_S": 86400,
    "TAMIYO_HTTP_HOST": "0.0.0.0",
    "TAMIYO_HTTP_PORT": 9464,
    "TAMIYO_LOG_LEVEL": "INFO",
    "TAMIYO_LOG_FORMAT": "auto",
    "TAMIYO_OTLP_ENDPOINT": None,
}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting from the machine the tests run on."""
    for name in {variable.name for variable in VARIABLES} & os.environ.keys():
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def refusal(**flags: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**flags)
    return str(caught.value)


def test_the_defaults_are_the_documented_ones() -> None:
    values = load_settings().public_values()
    found = {name: value for name, value in values.items() if "_RISK_" not in name}
    assert found.pop("OONA_CONSUMER_NAME")
    assert found == DEFAULTS


def test_every_threshold_is_a_setting_and_every_risk_setting_a_threshold() -> None:
    names = {f"TAMIYO_RISK_{field.name.upper()}" for field in fields(Thresholds)}
    assert {variable.name for variable in VARIABLES if "_RISK_" in variable.name} == names
    assert load_settings().thresholds() == Thresholds()


@pytest.mark.parametrize("name", [field.name for field in fields(Thresholds)])
def test_a_risk_setting_reaches_the_threshold_of_its_name(name: str) -> None:
    default = getattr(Thresholds(), name)
    # Some are bounded by a neighbour, so each is moved by little.
    moved = default + 1 if isinstance(default, int) else (default or 0.0) + 0.001
    thresholds = load_settings(**{f"risk_{name}": moved}).thresholds()
    assert getattr(thresholds, name) == moved
    others = [field.name for field in fields(Thresholds) if field.name != name]
    assert all(getattr(thresholds, each) == getattr(Thresholds(), each) for each in others)


def test_every_variable_is_named_in_the_house_style_and_described() -> None:
    for variable in VARIABLES:
        assert variable.name.startswith(("TAMIYO_", "OONA_", "ESPER_", "URZA_", "REDIS_"))
        assert variable.description.endswith(".")
        assert variable.takes
        assert variable.default
    assert len({variable.name for variable in VARIABLES}) == len(VARIABLES)


def test_flag_beats_environment_beats_env_file_beats_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.joinpath(".env").write_text(
        "TAMIYO_HTTP_PORT=1\nTAMIYO_CPU_THREADS=2\nTAMIYO_MAX_SEEDS=3\nUNRELATED=x\n"
    )
    monkeypatch.setenv("TAMIYO_HTTP_PORT", "11")
    monkeypatch.setenv("TAMIYO_CPU_THREADS", "12")
    settings = load_settings(http_port=21)
    assert (settings.http_port, settings.cpu_threads, settings.max_seeds) == (21, 12, 3)
    provenance = settings.provenance()
    assert provenance["TAMIYO_HTTP_PORT"] is Origin.FLAG
    assert provenance["TAMIYO_CPU_THREADS"] is Origin.ENVIRONMENT
    assert provenance["TAMIYO_MAX_SEEDS"] is Origin.ENV_FILE
    assert provenance["TAMIYO_MAX_LAYERS"] is Origin.DEFAULT
    assert provenance.keys() == {variable.name for variable in VARIABLES}


def test_a_flag_may_be_named_like_its_variable_and_none_is_not_given() -> None:
    settings = load_settings(TAMIYO_HTTP_PORT="0", device=None)
    assert (settings.http_port, settings.device) == (0, "auto")
    assert settings.provenance()["TAMIYO_DEVICE"] is Origin.DEFAULT


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAMIYO_DEVICE", "")
    monkeypatch.setenv("ESPER_LEYLINE_SECRET", "")
    settings = load_settings()
    assert (settings.device, settings.secret) == ("auto", None)
    assert settings.provenance()["TAMIYO_DEVICE"] is Origin.DEFAULT


def test_constructing_directly_does_not_look_at_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TAMIYO_HTTP_PORT", "11")
    settings = Settings(cpu_threads=2)
    assert (settings.http_port, settings.cpu_threads) == (9464, 2)
    assert settings.provenance()["TAMIYO_CPU_THREADS"] is Origin.FLAG


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().http_port = 1


def test_commands_and_reports_go_to_the_normal_stream_unless_told_otherwise() -> None:
    settings = load_settings(normal_stream="n", field_report_stream="r")
    assert (settings.command_stream, settings.field_report_stream) == ("n", "r")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"http_port": "abc"},
            "TAMIYO_HTTP_PORT: got 'abc', takes a whole number from 0 to 65535",
        ),
        (
            {"http_port": 65536},
            "TAMIYO_HTTP_PORT: got '65536', takes a whole number from 0 to 65535",
        ),
        ({"step_timeout_ms": -1}, "TAMIYO_STEP_TIMEOUT_MS: got '-1', takes a number of at least 0"),
        (
            {"step_timeout_ms": "nan"},
            "TAMIYO_STEP_TIMEOUT_MS: got 'nan', takes a number of at least 0",
        ),
        (
            {"replay_window_s": 300},
            "TAMIYO_REPLAY_WINDOW_S: got '300', takes a number above 0 and below 300",
        ),
        ({"lane_hang_s": 0}, "TAMIYO_LANE_HANG_S: got '0', takes a number above 0"),
        ({"block_ms": 0}, "OONA_BLOCK_MS: got '0', takes a whole number from 1 to 60000"),
        (
            {"verify_updates": "maybe"},
            "TAMIYO_VERIFY_UPDATES: got 'maybe', takes true or false",
        ),
        (
            {"timeout_action": "stop"},
            "TAMIYO_TIMEOUT_ACTION: got 'stop', takes one of pause, baseline",
        ),
        ({"device": "tpu"}, "TAMIYO_DEVICE: got 'tpu', takes auto, cpu, cuda or cuda:<index>"),
        ({"device": "cuda:"}, "TAMIYO_DEVICE: got 'cuda:', takes auto, cpu, cuda or cuda:<index>"),
        (
            {"urza_database_url": "postgres://x"},
            "URZA_DATABASE_URL: got 'postgres://x', takes a sqlite:///<path> URL",
        ),
        (
            {"normal_stream": "a b"},
            "OONA_NORMAL_STREAM: got 'a b', takes a stream name without spaces and braces",
        ),
        (
            {"normal_stream": "oona.{1}"},
            "OONA_NORMAL_STREAM: got 'oona.{1}', takes a stream name without spaces and braces",
        ),
        (
            {"partitions": 65},
            "OONA_PARTITIONS: got '65', takes a whole number from 1 to 64",
        ),
        (
            {"emergency_stream": "oona.normal"},
            (
                "OONA_EMERGENCY_STREAM: got 'oona.normal', "
                "takes a name other than that of OONA_NORMAL_STREAM"
            ),
        ),
        (
            {"command_stream": "oona.dead"},
            (
                "OONA_COMMAND_STREAM: got 'oona.dead', "
                "takes a name other than that of OONA_DEAD_LETTER_STREAM"
            ),
        ),
        (
            {"risk_coverage_crit": 0.5},
            "TAMIYO_RISK_COVERAGE_CRIT: got '0.5', takes at most TAMIYO_RISK_COVERAGE_WARN ('0.3')",
        ),
        (
            {"breaker_cooldown_s": 90},
            (
                "TAMIYO_BREAKER_COOLDOWN_S: got '90.0', "
                "takes at most TAMIYO_BREAKER_MAX_COOLDOWN_S ('60.0')"
            ),
        ),
        ({"http_prot": 1}, "http_prot: no such setting"),
        (
            {"TAMIYO_HTTP_PROT": 1},
            "TAMIYO_HTTP_PROT: no such setting, did you mean TAMIYO_HTTP_PORT?",
        ),
    ],
)
def test_a_bad_value_is_one_line_with_the_variable_what_it_got_and_what_it_takes(
    flags: dict[str, Any], message: str
) -> None:
    assert refusal(**flags) == message


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "http://localhost",
        "redis://",
        "redis://:6379",
        "redis://host:port",
        "redis://host:99999",
        "redis://host:0",
        "redis://host/zero",
        "redis://[::1",
        "unix://",
    ],
)
def test_a_bad_redis_url_is_refused(url: str) -> None:
    assert refusal(redis_url=url) == (
        f"REDIS_URL: got {url!r}, takes a redis://, rediss:// or unix:// URL"
    )


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "rediss://user:pass@host:6380/3",
        "redis://[::1]:6379/0",
        "unix:///run/redis.sock?db=1",
    ],
)
def test_redis_urls_of_every_kind_are_taken(url: str) -> None:
    assert load_settings(redis_url=url).redis_url == url


def test_names_are_taken_in_any_case_where_people_write_them_so() -> None:
    settings = load_settings(log_level="debug", blend_mode_default="channel")
    assert settings.log_level == "DEBUG"
    assert settings.blend_mode_default is BlendMode.CHANNEL


def test_an_unknown_blend_mode_means_convex() -> None:
    assert load_settings(blend_mode_default="sideways").blend_mode_default is BlendMode.CONVEX


def test_closed_sets_arrive_as_enums() -> None:
    settings = load_settings(timeout_action="baseline", seed_operations="germinate_only")
    assert settings.timeout_action is TimeoutAction.BASELINE
    assert settings.seed_operations is SeedOperations.GERMINATE_ONLY


def test_the_catalogue_path_is_what_follows_the_scheme() -> None:
    assert load_settings(urza_database_url="sqlite:///a/b.db").catalog_path == Path("a/b.db")
    assert load_settings(urza_database_url="sqlite:////a/b.db").catalog_path == Path("/a/b.db")


def test_serving_without_a_secret_names_the_variable() -> None:
    with pytest.raises(ConfigurationError, match=r"^ESPER_LEYLINE_SECRET: not set"):
        load_settings().keyring()
    assert load_settings(require_signatures=False).keyring() is None


def test_the_keyring_signs_with_the_secret_and_still_verifies_the_previous_one() -> None:
    old = load_settings(secret=PREVIOUS).keyring()
    new = load_settings(secret=SECRET, secret_previous=PREVIOUS).keyring()
    assert old is not None
    assert new is not None
    assert new.verify(b"data", old.sign(b"data"))
    assert not old.verify(b"data", new.sign(b"data"))


@pytest.mark.parametrize("secret", ["0123456789abcdef", "üüüüüüüü"])
def test_sixteen_bytes_are_enough_for_a_secret(secret: str) -> None:
    assert load_settings(secret=secret).keyring() is not None


def test_a_short_secret_is_refused_without_showing_it() -> None:
    assert refusal(secret="hunter2") == "ESPER_LEYLINE_SECRET: takes at least 16 bytes"


def test_a_secret_file_stands_for_the_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET + "\r\n")
    monkeypatch.setenv("ESPER_LEYLINE_SECRET_FILE", str(path))
    settings = load_settings()
    assert settings.secret is not None
    assert settings.secret.get_secret_value() == SECRET
    assert settings.provenance()["ESPER_LEYLINE_SECRET"] is Origin.FILE
    assert settings.provenance()["ESPER_LEYLINE_SECRET_FILE"] is Origin.ENVIRONMENT


def test_the_previous_secret_has_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "previous"
    path.write_text(PREVIOUS)
    settings = load_settings(secret=SECRET, secret_previous_file=path)
    assert settings.secret_previous is not None
    assert settings.secret_previous.get_secret_value() == PREVIOUS


def test_of_secret_and_file_the_higher_source_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    path.write_text(PREVIOUS)
    tmp_path.joinpath(".env").write_text(f"ESPER_LEYLINE_SECRET={SECRET}\n")
    monkeypatch.setenv("ESPER_LEYLINE_SECRET_FILE", str(path))
    from_file = load_settings()
    assert from_file.secret is not None
    assert from_file.secret.get_secret_value() == PREVIOUS
    monkeypatch.setenv("ESPER_LEYLINE_SECRET_FILE", "/nowhere")
    from_flag = load_settings(secret=SECRET)
    assert from_flag.secret is not None
    assert from_flag.secret.get_secret_value() == SECRET


def test_secret_and_file_from_the_same_source_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ESPER_LEYLINE_SECRET", SECRET)
    monkeypatch.setenv("ESPER_LEYLINE_SECRET_FILE", str(tmp_path / "secret"))
    assert refusal() == (
        "ESPER_LEYLINE_SECRET_FILE: ESPER_LEYLINE_SECRET is set as well, set only one of them"
    )


def test_a_bad_secret_file_names_the_variable_and_the_file(tmp_path: Path) -> None:
    missing, short, binary = (tmp_path / name for name in ("missing", "short", "binary"))
    short.write_text("hunter2\n")
    binary.write_bytes(b"\xff" * 32)
    start = "ESPER_LEYLINE_SECRET_FILE: "
    assert refusal(secret_file=missing) == (
        f"{start}got {str(missing)!r} (No such file or directory), "
        "takes the path of a readable file"
    )
    assert refusal(secret_file=short) == (
        f"{start}the secret in {str(short)!r} is too short, takes at least 16 bytes"
    )
    assert "not UTF-8 text" in refusal(secret_file=binary)


def test_an_unreadable_env_file_is_one_line(tmp_path: Path) -> None:
    tmp_path.joinpath(".env").write_bytes(b"\xff\xfe=1\n")
    assert refusal() == ".env: cannot be read (not UTF-8 text)"


@pytest.mark.parametrize(
    ("url", "password"),
    [
        ("redis://user:pa+ss@host:1/0", "pa+ss"),
        ("rediss://:p%40ss@host/0", "p%40ss"),
        ("redis://u:a b@c@host:1", "a b@c"),
        ("unix:///run/redis.sock?password=hunter2&db=0", "hunter2"),
    ],
)
def test_a_redis_password_is_in_no_output(url: str, password: str) -> None:
    assert password not in redacted(url)
    settings = load_settings(redis_url=url)
    assert password not in repr(settings)
    assert password not in str(settings.public_values())
    assert password in settings.secret_texts()


@pytest.mark.parametrize("password", ["hunter2", "pa/ss", "a b", "a@b", "a\nb"])
def test_the_password_of_a_refused_url_is_not_shown(password: str) -> None:
    message = refusal(redis_url=f"redis://user:{password}@host:99999")
    assert password not in message
    assert message.startswith("REDIS_URL: got 'redis://********@host:99999'")


@given(secret=st.text(st.characters(codec="ascii", exclude_characters="\x00"), min_size=16))
def test_secrets_are_in_no_representation(secret: str) -> None:
    marked = f"§{secret}§"
    settings = Settings(secret=SecretStr(marked), secret_previous=SecretStr(marked))
    for text in (repr(settings), str(settings), str(settings.public_values())):
        assert marked not in text
    assert settings.secret_texts() == (marked, marked)


def test_the_decoded_password_is_among_the_texts_to_hide() -> None:
    texts = load_settings(redis_url="redis://:p%40ss@host").secret_texts()
    assert set(texts) == {"p%40ss", "p@ss"}
