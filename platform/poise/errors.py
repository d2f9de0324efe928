"""The errors that Poise raises, all derived from `PoiseError`.

The command line prints a `PoiseError` without a traceback and exits with its `exit_code`. Any other exception is a
defect of Poise and keeps its traceback.
"""

from __future__ import annotations

from poise.secrets import redact

__all__ = ["IntegrityError", "PoiseError", "PreemptedError", "RunBusyError", "StoreError", "UserError"]


class PoiseError(Exception):
    """A failure whose message says what is wrong, where, and what to do about it.

    Messages are printed, logged and stored in the run, so secrets in them are replaced by `***`.
    """

    exit_code = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in arguments))


class UserError(PoiseError, ValueError):
    """A mistake of the user: a malformed spec, an unknown name, a missing file."""

    exit_code = 2


class StoreError(PoiseError):
    """The store cannot be read or written: no space, no access, no such bucket."""


class IntegrityError(StoreError):
    """A file in the store differs from what was committed: truncated, altered or missing."""


class RunBusyError(PoiseError):
    """Another driver holds the lease of this run."""

    exit_code = 3


class PreemptedError(KeyboardInterrupt):
    """A signal asked this process to end, and it has committed its step.

    A KeyboardInterrupt, as Ctrl-C is: the run has not failed, and a sweep ends too instead of starting its next trial.
    """

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: "try again later", by which schedulers queue a job again."""
