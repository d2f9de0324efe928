"""What can go wrong, said to the person who has to mend it.

`PoiseError` is the root of everything that Poise raises on purpose. The command line prints it without a traceback and
exits with `exit_code`; any other exception is a defect of Poise and keeps its traceback.
"""

from __future__ import annotations

from poise.secrets import redact

__all__ = ["DamagedError", "PoiseError", "PreemptedError", "RunBusyError", "StoreError", "UserError"]


class PoiseError(Exception):
    """A failure that the message explains: what is wrong, where, and what to do about it.

    A message is printed, logged and kept in the record of a run; a secret in it is replaced by `***`.
    """

    exit_code = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in arguments))


class UserError(PoiseError, ValueError):
    """Something that was asked for cannot be: a malformed spec, an unknown name, a missing file."""

    exit_code = 2


class StoreError(PoiseError):
    """The store could not be read or written: no space, no access, no such bucket."""


class DamagedError(StoreError):
    """An artifact in the store is not what was committed: truncated, altered or missing."""


class RunBusyError(PoiseError):
    """Another driver holds this run."""

    exit_code = 3


class PreemptedError(KeyboardInterrupt):
    """This process was asked by a signal to end, and has committed what it had.

    It is an interrupt, as Ctrl-C is: no failure of a run, and nothing that a sweep passes over.
    """

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: "try again later", which schedulers take for a request to be queued again."""
