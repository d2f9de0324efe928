"""Errors of the user's code as one line with its file and line."""

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

    Errors of Poise are not changed. torch raises RuntimeError and ValueError for tensors that do not fit. Any other
    exception is a defect of the code; for it, the message begins with `defect` instead of `what`, unless that is None.
    """
    try:
        yield
    except PoiseError:
        raise
    except Exception as error:
        is_tensor_error = isinstance(error, RuntimeError | ValueError) and not isinstance(error, NotImplementedError)
        summary = what if is_tensor_error or defect is None else defect
        raise UserError(f"{summary}: {describe_error(error)}") from error


def describe_error(error: BaseException, *, source: bool = False) -> str:
    """An error as `AttributeError: message (mymodel.py:12)`, without the place where no frame is in the user's code.

    With `source`, the message is put on one line, and the place is `mymodel.py:12 in forward: y = self.haed(x)`.
    """
    message = str(error)
    place = _place(error, source)
    if source:
        message = _one_line(message)
    return f"{type(error).__name__}: {message}" + (f" ({place})" if place else "")


def _place(error: BaseException, source: bool) -> str | None:
    """File and line of the innermost frame outside Poise, Python and installed packages; with `source` also its code.

    None where there is no such frame.
    """
    if isinstance(error, SyntaxError):
        return None  # its message has file and line
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if _is_user_file(file):
            working_directory = Path.cwd()
            path = file.relative_to(working_directory) if file.is_relative_to(working_directory) else file
            place = f"{path}:{frame.lineno}"
            return f"{place} in {frame.name}: {frame.line}" if source else place
    return None


def _one_line(message: str) -> str:
    """A message on one line. The message of an error in TorchScript is a traceback: its last line, file and line."""
    frames = _SCRIPT_FRAME.findall(message)
    if "TorchScript" not in message or not frames:
        return " ".join(message.split())
    file, line, name = frames[-1]
    last = message.strip().splitlines()[-1].removeprefix("RuntimeError: ")
    return f"{last} (TorchScript, {file}:{line} in {name})"


def _is_user_file(file: Path) -> bool:
    if not file.is_file():  # such as "<frozen importlib._bootstrap>" and "<eval_with_key>.0"
        return False
    installed = any(part in _PACKAGES for part in file.parts)
    return not installed and not any(file.is_relative_to(folder) for folder in _LIBRARIES)
