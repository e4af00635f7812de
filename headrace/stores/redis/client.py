"""The client of Redis, its errors by how one recovers from them, and versions as text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.change import NOWHERE, Version
from headrace.errors import Misconfigured, Transient
from headrace.settings import Settings, bad_address

_TIMEOUT = 30
_LONGEST = "proto-max-bulk-len"
_BUSY = re.compile("(^|-)(BUSY|LOADING|MISCONF|MASTERDOWN|NOREPLICAS|OOM|READONLY|TRYAGAIN) ")
"""How the text of an error begins; before Redis 7 within that of the script's, after a minus sign."""


def client(settings: Settings) -> redis.Redis:
    """Return a client that does not repeat anything by itself. Raises Misconfigured: `bad-setting`."""
    try:
        return redis.Redis.from_url(
            settings.redis,
            decode_responses=True,
            encoding_errors="replace",
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        remedy = "Write it as redis://host:6379/0 or redis://:password@host:6379/0."
        raise bad_address("HEADRACE_REDIS", settings.redis, error, remedy) from error


@contextmanager
def errors() -> Iterator[None]:
    """Turn the client's errors into ours, by how one recovers from them."""
    try:
        yield
    except (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError) as error:
        raise Misconfigured("redis-refused", f"Redis: {error}.", "Change HEADRACE_REDIS.") from error
    except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
        raise Transient("redis-away", f"Redis does not answer: {error}.", "See HEADRACE_REDIS.") from error
    except exceptions.RedisError as error:
        full = isinstance(error, exceptions.OutOfMemoryError)
        if full or isinstance(error, exceptions.ReadOnlyError) or _BUSY.search(str(error)):
            remedy = "Raise its maxmemory." if full else "See its log."
            raise Transient("redis-busy", f"Redis does not take writes: {error}.", remedy) from error
        raise Misconfigured("redis-refused", f"Redis: {error}.", "Change HEADRACE_REDIS.") from error


def longest(server: redis.Redis) -> int:
    """Return how many bytes of a text Redis takes; where it may not be asked, what it takes by default."""
    said: dict[str | None, str | None] = {}
    with suppress(exceptions.ResponseError):
        said = server.config_get(_LONGEST)
    return int(said.get(_LONGEST) or 512 * 1024 * 1024)


@lru_cache
def version_text(version: Version) -> str:
    """Return a version as text that sorts like it."""
    return f"{version.epoch:05d}-{version.lsn:015d}"


def text_version(text: str | None) -> Version:
    """Undo `version_text`; NOWHERE for what is not one."""
    if text is None or not re.fullmatch(r"\d{5}-\d{15}", text):
        return NOWHERE
    epoch, lsn = text.split("-")
    return Version(int(epoch), int(lsn))
