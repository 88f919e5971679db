"""Which Redis URLs a client takes, and that its errors repeat no user name or password."""

from __future__ import annotations

import ssl
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tamiyo_svc.client import Keyring, TamiyoClient, from_environment
from tamiyo_svc.client.address import Address
from tamiyo_svc.errors import ConfigurationError

PARTS = ("hunter", "42", "secret", "trainer")
"""What the user names and passwords below are made of."""


def options(url: str) -> dict[str, Any]:
    return Address.of(url).options


def refusal(url: str) -> str:
    """The one error of both ways to make a client, which repeats nothing of the credentials."""
    with pytest.raises(ValueError) as direct:
        TamiyoClient(url, Keyring(b"a secret for the tests"), "run-1")
    variables = {"ESPER_LEYLINE_SECRET": "a secret for the tests", "REDIS_URL": url}
    with pytest.raises(ConfigurationError) as configured:
        from_environment("run-1", variables)
    text = str(configured.value)
    assert text == f"REDIS_URL or the run id: {direct.value}"
    assert "\n" not in text
    for error in (direct.value, configured.value):
        assert error.__context__ is None
        shown = "".join(traceback.format_exception_only(error)) + repr(error)
        assert not any(part in shown for part in PARTS)
    return text


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host", {"host": "host"}),
        ("redis://host:6380/3", {"host": "host", "port": 6380, "db": 3}),
        ("REDIS://host:1/0", {"host": "host", "port": 1, "db": 0}),
        ("redis://host:1/0\n", {"host": "host", "port": 1, "db": 0}),
        ("\ufeffredis://host:1/0\r\n", {"host": "host", "port": 1, "db": 0}),
        ("redis://[::1]:1?db=2", {"host": "::1", "port": 1, "db": 2}),
        ("redis://u:p%40%2F%23%25@h", {"username": "u", "password": "p@/#%", "host": "h"}),
        ("redis://:p@ss@h", {"password": "p@ss", "host": "h"}),
        ("redis://u:100%@h", {"username": "u", "password": "100%", "host": "h"}),
        ("redis://h?password=p@ss", {"password": "p@ss", "host": "h"}),
        ("unix:///run/redis.sock?db=1", {"path": "/run/redis.sock", "db": 1}),
        ("unix:/run/redis.sock", {"path": "/run/redis.sock"}),
        ("unix://u:p@/run/a.sock", {"username": "u", "password": "p", "path": "/run/a.sock"}),
        ("redis://h?client_name=t&socket_timeout=2", {
            "host": "h", "client_name": "t", "socket_timeout": 2.0,
        }),
        # What other programs with the same URL need is no reason to refuse it.
        ("redis://h?protocol=3&decode_responses=true&max_connections=9", {"host": "h"}),
        ("redis://h?retry_on_timeout=1&health_check_interval=30", {"host": "h"}),
        ("rediss://h?ssl_cert_reqs=none&ssl_check_hostname=false", {
            "host": "h", "ssl_cert_reqs": "none", "ssl_check_hostname": False,
        }),
    ],
)  # fmt: skip
def test_a_url_is_read_as_its_user_means_it(url: str, expected: dict[str, Any]) -> None:
    assert options(url) == expected


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://trainer:hunter#42@host:6379/0", "percent-encode"),
        ("redis://:hunter/42@host:6379/0", "percent-encode"),
        ("redis://:hunter?42@host:6379/0", "percent-encode"),
        ("redis://:42#secret@host", "percent-encode"),
        ("redis://:42?secret=hunter@host/0", "percent-encode"),
        ("redis://:42/secret", "no host name"),
        ("redis://trainer:hunter@secret#host", "percent-encode"),
        ("redis://:hunter[42@host", "percent-encode"),
        ("redis://:hunter\u2100@", "percent-encode"),
        ("redis://trainer:hunter 42@host", "blank"),
        ("redis://:hunter%ff@host", "UTF-8"),
        ("redis://host?password=%ffsecret", "UTF-8"),
        ("redis://trainer:hunter", "port"),
        ("redis://host:hunter/0", "port"),
        ("redis://host:0/0", "port"),
        ("redis://host:65536/0", "port"),
        ("redis://host/secret", "number of a database"),
        ("redis://host/-1", "number of a database"),
        ("redis://host?db=secret", "option db"),
        ("redis://host?db=", "option db"),
        ("redis://host?socket_timeout=0", "socket_timeout"),
        ("redis://host?socket_connect_timeout=soon", "socket_connect_timeout"),
        ("redis://host?sokcet_timeout=1", "did you mean socket_timeout"),
        ("redis://host?foo_option=hunter", "foo_option"),
        ("redis://trainer:42@host?hunter", "percent-encode"),
        ("redis://host?parser_class=1", "no such option"),
        ("redis://host?connection_class=1", "no such option"),
        ("redis://host?ssl_cert_reqs=none", "rediss://"),
        ("rediss://host?ssl_cert_reqs=hunter", "refused by the installed redis-py"),
        ("redis://host..secret", "host name"),
        ("unix://run/redis.sock", "unix:///path"),
        ("unix://", "unix:///path"),
        ("unix:///", "unix:///path"),
        ("localhost:6379", "redis://host:6379/0"),
        ("http://hunter:42@host", "redis://host:6379/0"),
        ("redis:host", "redis://"),
        ("\n", "redis://"),
    ],
)
def test_a_url_that_cannot_work_is_refused_in_one_line(url: str, says: str) -> None:
    assert says in refusal(url)


@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_no_text_in_the_place_of_a_password_raises_more_than_a_value_error(
    user: str, password: str
) -> None:
    for url in (f"redis://{user}:{password}@host:1/0", f"redis://host?{user}={password}"):
        try:
            address = Address.of(url)
        except ValueError:
            continue
        address.connection({})


def test_a_connection_answers_in_bytes_and_retries_nothing_whatever_the_url_says() -> None:
    url = "redis://h?protocol=3&decode_responses=true&socket_timeout=7&retry_on_timeout=true"
    connection = Address.of(url).connection({"socket_timeout": 0.25})
    assert connection.protocol == 2
    assert connection.encoder.decode_responses is False
    assert connection.socket_timeout == 7.0
    assert connection.retry._retries == 0
    assert Address.of(url).connection({}, socket_timeout=2.0).socket_timeout == 2.0


def test_tls_options_reach_the_connection() -> None:
    connection = Address.of("rediss://h?ssl_cert_reqs=optional&ssl_ca_certs=/ca").connection({})
    assert connection.cert_reqs == ssl.CERT_OPTIONAL
    assert connection.ca_certs == "/ca"


def test_neither_an_address_nor_a_client_shows_who_logs_on() -> None:
    url = "redis://trainer:hunter@host"
    client = TamiyoClient(url, Keyring(b"a secret for the tests"), "run-1")
    for value in (Address.of(url), client, client._keyring, client._link):
        assert not any(part in repr(value) for part in PARTS)
