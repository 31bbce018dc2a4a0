"""Keep secrets out of settings, which are saved with every run, checkpoint, model and report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

_SECRET = re.compile(
    r"secret|token|passw|pwd|credential|access_?key|account_?key|encryption_?key|private_?key|api_?key|signature"
    r"|(^|[._-])(sas|sig|key)$",
    re.IGNORECASE,
)
"""Names of options that contain a secret. A false alarm is better than a leak."""

_HIDDEN = "***"


def refuse_secrets(setting: str, options: Mapping[str, Any], remedy: str) -> None:
    """Reject options that contain a secret.

    Args:
        setting: Name of the setting, for the message.
        options: Its options; only names are checked.
        remedy: Where the secret belongs.

    Raises:
        ValueError: The message names the option, but not its value.
    """
    found = next((name for name in options if _SECRET.search(name)), None)
    if found is not None:
        raise ValueError(
            f"{setting} has the option {found}; settings are saved with every run and model, so they must"
            f" not contain secrets: {remedy}"
        )


def refuse_secret_address(setting: str, address: str, remedy: str) -> None:
    """Reject an address with a password (`scheme://user:password@host`) or a secret in its query.

    Args:
        setting: Name of the setting, for the message.
        address: A path or an address.
        remedy: Where the secret belongs.

    Raises:
        ValueError: The message does not show the address.
    """
    if without_secret(address) != address:
        raise ValueError(
            f"{setting} is an address with a password or key in it; settings are saved with every run and"
            f" model, so they must not contain secrets: {remedy}"
        )


def without_secret(address: str) -> str:
    """The address with `***` in place of its password and any secrets in its query."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    shown = f"{name}:{_HIDDEN}" if colon else user
    query = parts.query
    if any(_SECRET.search(option) for option, _ in parse_qsl(query, keep_blank_values=True)):
        query = "&".join(
            f"{pair.partition('=')[0]}={_HIDDEN}" if _SECRET.search(pair.partition("=")[0]) else pair
            for pair in query.split("&")
        )
    if (shown, query) == (user, parts.query):
        return address
    return urlunsplit((parts.scheme, f"{shown}{at}{host}", parts.path, query, parts.fragment))
