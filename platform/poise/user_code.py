"""Errors of the user's own code, in one line that names its file and line."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import poise
from poise.errors import PoiseError, UserError

__all__ = ["describe_error", "explain_errors"]

_PACKAGES = ("site-packages", "dist-packages")
_LIBRARIES = (Path(poise.__file__).parent, Path(sysconfig.get_paths()["stdlib"]))


@contextmanager
def explain_errors(what: str, *, defect: str | None = None) -> Iterator[None]:
    """Turn any exception of the user's code into a UserError: `what`, the exception, and where it was raised.

    Errors of Poise pass through. torch raises RuntimeError and ValueError for tensors that do not fit; every other
    exception is a defect in the code, and `defect`, if given, replaces `what` for it.
    """
    try:
        yield
    except PoiseError:
        raise
    except Exception as error:
        fits = isinstance(error, RuntimeError | ValueError) and not isinstance(error, NotImplementedError)
        raise UserError(f"{what if fits or defect is None else defect}: {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """`AttributeError: message (mymodel.py:12)`; without the place where no frame is in a file of the user."""
    place = _place(error)
    return f"{type(error).__name__}: {error}" + (f" ({place})" if place else "")


def _place(error: BaseException) -> str | None:
    """File and line of the innermost frame outside Poise, Python and installed packages."""
    if isinstance(error, SyntaxError):
        return None  # its message has both
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if _is_of_user(file):
            here = Path.cwd()
            return f"{file.relative_to(here) if file.is_relative_to(here) else file}:{frame.lineno}"
    return None


def _is_of_user(file: Path) -> bool:
    if not file.is_file():  # "<frozen importlib._bootstrap>", "<eval_with_key>.0"
        return False
    installed = any(part in _PACKAGES for part in file.parts)
    return not installed and not any(file.is_relative_to(folder) for folder in _LIBRARIES)
