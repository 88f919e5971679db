"""Where the bus is: a Redis URL, read once and checked before anything is connected.

No error here repeats a part of the URL that could belong to a user name or password: with a
character in it that should have been percent-encoded, a password reaches into the host, the port,
the path and the options.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final
from urllib.parse import parse_qsl, unquote

import redis
from redis import connection as redis_connection
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

_ENCODE: Final = (
    "percent-encode what is special in the user name and password, such as %23 for #, %2F for /, "
    "%3F for ?, %40 for @, %25 for %"
)
_CREDENTIALS: Final = frozenset({"username", "password", "ssl_password"})
_PASSED_ON: Final = _CREDENTIALS | {
    "db", "client_name", "socket_timeout", "socket_connect_timeout", "socket_keepalive",
}  # fmt: skip
_DECIDED_HERE: Final = frozenset(
    {
        "protocol", "legacy_responses", "decode_responses", "encoding", "encoding_errors",
        "health_check_interval", "retry_on_timeout", "retry_on_error", "max_connections", "timeout",
        "cache_max_size", "lib_name", "lib_version", "socket_read_size",
    }
)  # fmt: skip
"""Options that other programs with the same URL may need, and that change nothing here: the client
reads bytes over RESP2, on connections of its own, and retries by itself."""
_TLS: Final = frozenset(
    name
    for name in inspect.signature(redis_connection.SSLConnection).parameters
    if name.startswith("ssl_") and name != "ssl_ocsp_context"
)


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """A server and how to log on to it; its `repr` says neither user name nor password.

    Raises:
        ValueError: the URL cannot be used; the message says which part of it and why.
    """

    kind: type[Any]
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, url: str) -> Address:
        """Read a redis://, rediss:// or unix:// URL."""
        problem, kwargs = _read(url)
        if problem:
            raise ValueError(f"the Redis URL: {problem}")
        kind = kwargs.pop("connection_class", redis_connection.Connection)
        options = {name: value for name, value in kwargs.items() if name not in _DECIDED_HERE}
        address = cls(kind, options)
        if address._refused():
            raise ValueError(f"the Redis URL: its options are refused by the installed {_RELEASE}")
        return address

    def __repr__(self) -> str:
        return f"Address({self.kind.__name__})"

    def connection(self, defaults: Mapping[str, Any], **fixed: Any) -> Any:
        """A new connection, not yet connected, that answers in bytes and retries nothing.

        `defaults` are redis-py's options unless the URL has others, `fixed` whatever the URL has.
        """
        ours = {"protocol": 2, "decode_responses": False, "health_check_interval": 0, **fixed}
        keepalive = {}
        if not issubclass(self.kind, redis_connection.UnixDomainSocketConnection):
            keepalive["socket_keepalive"] = True
        retry = Retry(NoBackoff(), 0)
        return self.kind(**{**keepalive, **defaults, **self.options, **ours}, retry=retry)

    def without_credentials(self, text: str) -> str:
        """A text with the user name and password in it masked, as a server may repeat them."""
        for name in _CREDENTIALS & self.options.keys():
            text = text.replace(str(self.options[name]), "********")
        return text

    def _refused(self) -> bool:
        try:
            self.connection({})
        # It depends on the release what it makes of an option, and the error may repeat its value.
        except Exception:
            return True
        return False


_RELEASE: Final = f"redis-py {redis.__version__}"


def _read(url: str) -> tuple[str, dict[str, Any]]:
    """What is wrong with the URL, empty if nothing is, and what redis-py makes of it."""
    # Variables and files end with a newline that is no part of it.
    url = url.removeprefix("\ufeff").strip()
    scheme, colon, rest = url.partition(":")
    scheme = scheme.lower()
    if not colon or scheme not in ("redis", "rediss", "unix"):
        return "takes redis://host:6379/0, rediss://host:6379/0 or unix:///path", {}
    if not rest.startswith("//"):
        if scheme != "unix" or not rest.startswith("/"):
            return f"takes {scheme}:// before the rest", {}
        rest = f"//{rest}"
    rest = rest[2:]
    if any(character.isspace() or ord(character) < 32 for character in rest):
        return f"has a blank or control character in it; {_ENCODE}", {}
    authority, path, query, fragment = _split(rest)
    credentials, at, place = authority.rpartition("@")
    problem = (
        _check_separators(path, query, fragment, logs_on=bool(at))
        or _check_encoding(credentials + query)
        or _check_place(scheme, place, path)
        or _check_options(scheme, query)
    )
    if problem:
        return problem, {}
    try:
        parse: Any = redis_connection.parse_url
        return "", parse(f"{scheme}://{rest}")
    except (ValueError, RedisError):
        # What these say may repeat what they were given.
        pass
    return f"a host, port or option has a value that it does not take, or {_ENCODE}", {}


def _split(rest: str) -> tuple[str, str, str, str]:
    rest, _, fragment = rest.partition("#")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    return authority, slash + path, query, fragment


def _check_separators(path: str, query: str, fragment: str, *, logs_on: bool) -> str:
    """Whether the user name and password end where a URL says they do."""
    stray = "@" in path or "@" in fragment
    for option in query.split("&"):
        name, _, value = option.partition("=")
        # Only there an @ needs no encoding.
        stray |= "@" in name or ("@" in value and (logs_on or name not in _CREDENTIALS))
    if stray:
        return f"there is an @ behind the host name; {_ENCODE}"
    if fragment:
        return f"has a # in it; {_ENCODE}"
    return ""


def _check_encoding(text: str) -> str:
    try:
        unquote(text, errors="strict")
    except UnicodeDecodeError:
        return "what is percent-encoded in it is not UTF-8"
    return ""


def _check_place(scheme: str, place: str, path: str) -> str:
    if scheme == "unix":
        if place or not path.strip("/"):
            return "takes unix:///path, with the whole path of the socket"
        return ""
    # A bracketed IPv6 address has colons of its own.
    matched = re.fullmatch(r"(\[[0-9A-Fa-f:.]+(?:%[^\]]+)?\]|[^\[\]:]*)(?::(\d*))?", place)
    if matched is None:
        return f"takes host:port, with a port from 1 to 65535; {_ENCODE}"
    host, port = matched.groups()
    if not host and place:
        return f"has no host name; it may be that the @ before it is missing; {_ENCODE}"
    try:
        host.encode("idna")
    except UnicodeError:
        return f"has a host name that is none; {_ENCODE}"
    if port and not 0 < int(port) < 65536:
        return "takes a port from 1 to 65535"
    if re.fullmatch(r"/?\d{0,9}/?", path, flags=re.ASCII) is None:
        return f"takes the number of a database behind the host, such as /0; {_ENCODE}"
    return ""


def _check_options(scheme: str, query: str) -> str:
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in _DECIDED_HERE:
            continue
        if name in _TLS:
            if scheme != "rediss":
                return f"the option {name} takes rediss://"
        elif name not in _PASSED_ON:
            return _unknown(name, query)
        if name == "db" and re.fullmatch(r"\d{1,9}", value, flags=re.ASCII) is None:
            return "the option db takes the number of a database, such as db=0"
        if name.endswith("_timeout") and not _is_duration(value):
            return f"the option {name} takes seconds above 0"
    return ""


def _unknown(name: str, query: str) -> str:
    close = get_close_matches(name, _PASSED_ON | _TLS, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    # Behind a ? that belongs to a password there may be anything.
    is_option = f"{name}=" in query and re.fullmatch(r"[a-z][a-z_]{2,40}", name)
    shown = f" {name}" if is_option else ""
    return f"there is no such option{shown}{hint}; if it is no option, {_ENCODE}"


def _is_duration(value: str) -> bool:
    try:
        return 0.0 < float(value) < 1e6
    except ValueError:
        return False
