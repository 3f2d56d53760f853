"""What the project adds to the URL of a Redis: options of its own, and a password from a file.

redis-py sees a URL without them. A password in a file (a mounted secret) is in no command line, in no
environment and in no message.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from store.errors import BadAddress

_OWN = ("durability", "password_file")
_ANY = (
    "client_name", "health_check_interval", "max_connections", "password",
    "retry_on_timeout", "socket_connect_timeout", "socket_keepalive", "socket_read_size",
    "socket_timeout", "username",
)  # fmt: skip
_TLS = (
    "ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile",
    "ssl_check_hostname", "ssl_ciphers", "ssl_exclude_verify_flags", "ssl_include_verify_flags",
    "ssl_keyfile", "ssl_min_version", "ssl_password",
)  # fmt: skip
_SENTINEL = ("sentinel_password", "sentinel_username")


def take_option(url: str, name: str) -> tuple[str, str | None]:
    """The URL without an option of its query, and the option's value."""
    option = re.search(rf"[?&]{name}=([^&]*)", url)
    if option is None:
        return url, None
    rest = url[option.end() :]
    if option[0].startswith("?"):
        rest = re.sub("^&", "?", rest)
    return url[: option.start()] + rest, unquote(option[1])


class BadPart(ValueError):
    """A part of an address that cannot be meant; the message has nothing of a password."""


def check_parts(url: str) -> None:
    """Looks at what redis-py would let pass, or fall over later: database, socket, options.

    Args:
        url: without the project's own options.

    Raises:
        BadPart: the message says what is wrong and what to write.
    """
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    rest = rest.rpartition("@")[2]
    host, _, path = rest.partition("/")
    if scheme == "unix" and (host or not path):
        raise BadPart("the path of a socket is absolute: write unix:///PATH, with three slashes")
    if scheme in {"redis", "rediss"} and path.strip("/") and not re.fullmatch(r"\d+/?", path):
        raise BadPart(
            "what follows the host is the number of a database: write …/0, or leave it out"
        )
    # Where the password has a question mark, what follows it is no query and must not be shown.
    if "@" not in query:
        for name, _ in parse_qsl(query, keep_blank_values=True):
            check_option(scheme, name)


def check_option(scheme: str, name: str) -> None:
    """Raises BadPart when addresses of this scheme have no such option."""
    known = [
        *_ANY,
        *(() if scheme.endswith("+cluster") else ("db",)),
        *(_TLS if scheme.startswith("rediss") else ()),
        *(_SENTINEL if scheme.endswith("+sentinel") else ()),
    ]
    if name not in known:
        there_are = ", ".join(sorted([*known, *_OWN]))
        raise BadPart(f"there is no option {name!r}: leave it out; there are {there_are}")


def with_password(url: str, file: str | None) -> str:
    """The URL with the password that a file holds.

    Args:
        url: `scheme://[user@]host…`.
        file: the path; None leaves the URL as it is.

    Raises:
        BadAddress: the file cannot be read or is empty, or the URL has a password already.
    """
    if file is None:
        return url
    scheme, _, rest = url.partition("://")
    login, at, _ = re.split(r"[/?]", rest, maxsplit=1)[0].rpartition("@")
    if ":" in login:
        raise BadAddress("the address has a password and a password_file: give one of them")
    try:
        password = Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BadAddress(f"password_file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadAddress(f"password_file {file} is not text") from None
    if not password:
        raise BadAddress(f"password_file {file} is empty: one line with the password is needed")
    return f"{scheme}://{login}:{quote(password, safe='')}@{rest.removeprefix(login + at)}"
