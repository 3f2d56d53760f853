"""What the project adds to the URL of a Redis: options of its own, and a password from a file.

redis-py sees a URL without them. A password in a file (a mounted secret) is in no command line, in no
environment and in no message.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote

from store.errors import BadAddress


def take_option(url: str, name: str) -> tuple[str, str | None]:
    """The URL without an option of its query, and the option's value."""
    option = re.search(rf"[?&]{name}=([^&]*)", url)
    if option is None:
        return url, None
    rest = url[option.end() :]
    if option[0].startswith("?"):
        rest = re.sub("^&", "?", rest)
    return url[: option.start()] + rest, unquote(option[1])


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
