"""Errors of the user's own code, in one line that names its file and line."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import poise
from poise.errors import PoiseError, UserError

__all__ = ["describe_error", "explain_errors"]

_SCRIPT_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')
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


def describe_error(error: BaseException, *, source: bool = False) -> str:
    """`AttributeError: message (mymodel.py:12)`; without the place where no frame is in a file of the user.

    With `source` in one line, whatever the message, and the place is `mymodel.py:12 in forward: y = self.haed(x)`.
    """
    message, place = str(error), _place(error, source)
    if source:
        message = _one_line(message)
    return f"{type(error).__name__}: {message}" + (f" ({place})" if place else "")


def _place(error: BaseException, source: bool) -> str | None:
    """File and line of the innermost frame outside Poise, Python and installed packages, and with `source` its code."""
    if isinstance(error, SyntaxError):
        return None  # its message has both
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if _is_of_user(file):
            here = Path.cwd()
            place = f"{file.relative_to(here) if file.is_relative_to(here) else file}:{frame.lineno}"
            return f"{place} in {frame.name}: {frame.line}" if source else place
    return None


def _one_line(message: str) -> str:
    """A message without its line breaks; of an error in TorchScript, which is a traceback, its end and the place."""
    frames = _SCRIPT_FRAME.findall(message)
    if "TorchScript" not in message or not frames:
        return " ".join(message.split())
    file, line, name = frames[-1]
    last = message.strip().splitlines()[-1].removeprefix("RuntimeError: ")
    return f"{last} (TorchScript, {file}:{line} in {name})"


def _is_of_user(file: Path) -> bool:
    if not file.is_file():  # "<frozen importlib._bootstrap>", "<eval_with_key>.0"
        return False
    installed = any(part in _PACKAGES for part in file.parts)
    return not installed and not any(file.is_relative_to(folder) for folder in _LIBRARIES)
