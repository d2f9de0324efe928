"""Retries of failed requests to S3.

botocore's own retries draw from the global random state, which is part of a checkpoint, and give up within a minute. So
they are switched off, and a handler of botocore's public `needs-retry` event decides instead: with random pauses of up
to 20 s from the operating system's generator, and for minutes if the service has answered before.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import Any

from botocore import exceptions as aws

__all__ = ["RetryPolicy"]

_LOG = logging.getLogger(__name__)
_LONGEST_PAUSE_S = 20.0
_WARN_AT_ATTEMPT = 4  # after about 10 s

_TRANSIENT_STATUS = {429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "BandwidthLimitExceeded",
    "InternalError",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}


class RetryPolicy:
    """Retries for one client of the service `name`.

    A request to a service that was never reached is repeated `attempts` times: its address is probably wrong. If the
    service has answered before, requests are repeated until `patience_s` seconds have passed.
    """

    def __init__(self, name: str, attempts: int, patience_s: float) -> None:
        self.name = name
        self.attempts = attempts
        self.patience_s = patience_s
        self.reached = False
        self._random = random.SystemRandom()
        self._failed = threading.local()  # `since`: the time of the first failure of this thread's request

    def register(self, client: Any) -> None:
        """Make `client` retry by this policy."""
        client.meta.events.register_first("needs-retry.s3", self._needs_retry)
        client.meta.events.register("after-call.s3", self._after_call)

    def pause(self, attempt: int, started: float, why: object) -> float | None:
        """Seconds to wait after the failed `attempt`, counted from 1; None to give up.

        `started` is the monotonic time (s) of the first failure, `why` the reason that a warning shows.
        """
        waited = time.monotonic() - started
        if attempt > self.attempts and not (self.reached and waited < self.patience_s):
            return None
        if attempt == _WARN_AT_ATTEMPT and self.reached:
            _LOG.warning("%s fails (%s): waiting for it, up to %.0f s", self.name, why, self.patience_s)
        # Exponential backoff; the exponent is bounded, since the attempts are not.
        longest = min(_LONGEST_PAUSE_S, 2.0 ** (attempt - 1)) if attempt < 10 else _LONGEST_PAUSE_S
        return self._draw(longest)

    def _draw(self, longest: float) -> float:
        """A random pause of at most `longest` seconds, so that many processes do not retry together."""
        return longest * self._random.uniform(0.5, 1)

    def _needs_retry(self, response: Any, attempts: int, caught_exception: Any, **_: Any) -> float | None:
        """The handler of `needs-retry`: seconds to wait before the next attempt; None to give up, or after success."""
        if attempts == 1:  # a new request: a thread sends one at a time, with all its retries
            self._failed.since = None
        why = _transient_failure(response, caught_exception)
        if why is None:
            return None
        if self._failed.since is None:
            self._failed.since = time.monotonic()
        return self.pause(attempts, self._failed.since, why)

    def _after_call(self, http_response: Any, **_: Any) -> None:
        if http_response.status_code < 500:
            self.reached = True


def _transient_failure(response: Any, caught: Any) -> str | None:
    """The reason of a failure after which another attempt may succeed; None for success and for other failures."""
    if isinstance(caught, (aws.ConnectionError, aws.HTTPClientError)):
        return type(caught).__name__
    if caught is not None:
        return None
    http, parsed = response
    code = str(parsed.get("Error", {}).get("Code", ""))
    if http.status_code in _TRANSIENT_STATUS or code in _TRANSIENT_CODES:
        return code or str(http.status_code)
    return None
