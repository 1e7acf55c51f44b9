"""Pictures by address, where a data source allows them: http and https alone, within the limits of picture files."""

import http.client
import urllib.error
import urllib.request
from functools import cache

__all__ = ["fetch", "opener"]

SECONDS = 20.0
"""How long a host may stay silent."""


def fetch(address: str) -> bytes:
    """The bytes at an address, never more than LIMITS.max_bytes: they are counted while they come, whatever the host announces. Raises OSError, DataError for too many."""
    from vlm.images import LIMITS, too_large

    try:
        with opener().open(address, timeout=SECONDS) as answer:
            data: bytes = answer.read(LIMITS.max_bytes + 1)
    except (http.client.HTTPException, ValueError) as problem:
        raise OSError(f"{type(problem).__name__}: {problem}") from problem
    if len(data) > LIMITS.max_bytes:
        raise too_large(f"the picture at {address}", f"more than {LIMITS.max_bytes:,} bytes")
    return data


@cache
def opener() -> urllib.request.OpenerDirector:
    """What every address is opened by. Only these handlers: a redirect to file, ftp or data finds none, and is an unknown kind of address."""
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        director.add_handler(handler)
    return director
