"""When a request to S3 that failed is sent again.

botocore's own retries draw from the global random state, which is part of a checkpoint, and give up within a minute. So
they are switched off, and its public `needs-retry` event is answered here: with pauses of up to 20 s, drawn from the
operating system, and for minutes where the service has answered before.
"""

from __future__ import annotations

import logging
import random
import time
from typing import Any

from botocore import exceptions as aws

__all__ = ["RetryPolicy"]

_LOG = logging.getLogger(__name__)
_LONGEST_PAUSE_S = 20.0
_TOLD_AFTER = 4  # attempts, some 10 s

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

    A service that was never reached is asked `attempts` times again: its address is probably wrong. One that has
    answered before is down, and is waited for until `patience_s` seconds have passed.
    """

    def __init__(self, name: str, attempts: int, patience_s: float) -> None:
        self.name = name
        self.attempts = attempts
        self.patience_s = patience_s
        self.reached = False
        self._random = random.SystemRandom()

    def register(self, client: Any) -> None:
        """Make `client` retry as this policy says."""
        client.meta.events.register_first("needs-retry.s3", self._needs_retry)
        client.meta.events.register("after-call.s3", self._after_call)

    def pause(self, attempt: int, started: float, why: object) -> float | None:
        """Seconds to wait after the failed `attempt`, from 1, or None to give up.

        `started` is the monotonic time (s) of the first failure and `why` its reason, for whoever waits.
        """
        waited = time.monotonic() - started
        if attempt > self.attempts and not (self.reached and waited < self.patience_s):
            return None
        if attempt == _TOLD_AFTER and self.reached:
            _LOG.warning("%s fails (%s): waiting for it, up to %.0f s", self.name, why, self.patience_s)
        longest = min(_LONGEST_PAUSE_S, 2.0 ** (attempt - 1)) if attempt < 10 else _LONGEST_PAUSE_S
        return self._draw(longest)

    def _draw(self, longest: float) -> float:
        return longest * self._random.uniform(0.5, 1)

    def _needs_retry(
        self, response: Any, attempts: int, caught_exception: Any, request_dict: dict[str, Any], **_: Any
    ) -> float | None:
        why = _transient(response, caught_exception)
        if why is None:
            return None
        started = request_dict["context"].setdefault("poise_failed_at", time.monotonic())
        return self.pause(attempts, started, why)

    def _after_call(self, http_response: Any, **_: Any) -> None:
        if http_response.status_code < 500:
            self.reached = True


def _transient(response: Any, caught: Any) -> str | None:
    """Why a request failed, if another try may succeed."""
    if caught is not None:
        return type(caught).__name__ if isinstance(caught, (aws.ConnectionError, aws.HTTPClientError)) else None
    http, parsed = response
    code = str(parsed.get("Error", {}).get("Code", ""))
    if http.status_code in _TRANSIENT_STATUS or code in _TRANSIENT_CODES:
        return code or str(http.status_code)
    return None
