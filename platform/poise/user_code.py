"""Code of the user that a spec names as `package.module:attribute`: the permission to run it, its import, its errors.

Such code runs only where the user has allowed it, by `--allow-code` or POISE_ALLOW_CODE=1, because a spec may come from
somebody else. Without the permission nothing of it is imported: its files and names are read, see `spec.code`.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import poise
from poise import env
from poise.errors import PoiseError, UserError

__all__ = [
    "MethodOutputError",
    "allow_code",
    "current_folder_first",
    "describe_error",
    "explain_errors",
    "explain_method",
    "explain_user_frames",
    "is_code_allowed",
    "load_attribute",
    "refusal",
]

_SCRIPT_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')
_PACKAGES = ("site-packages", "dist-packages")
_LIBRARIES = (Path(poise.__file__).parent, Path(sysconfig.get_paths()["stdlib"]))


class MethodOutputError(UserError):
    """A method returned, or passed on, what it must not; see `method_output`. `explain_method` adds the place."""


@contextmanager
def allow_code() -> Iterator[None]:
    """Allow code of the user while the block runs, in this process and in the processes that it starts."""
    before = os.environ.get(env.ALLOW_CODE)
    os.environ[env.ALLOW_CODE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[env.ALLOW_CODE]
        else:
            os.environ[env.ALLOW_CODE] = before


def is_code_allowed() -> bool:
    """Whether code of the user may run in this process."""
    return os.environ.get(env.ALLOW_CODE) == "1"


def refusal(reference: str) -> str:
    """The message for code that is not allowed to run: its module, and how to allow it."""
    module = reference.partition(":")[0]
    return (
        f"{reference} runs code of the module {module}, which this spec may do only with --allow-code "
        f"(or {env.ALLOW_CODE}=1)"
    )


def load_attribute(reference: str, where: str) -> Any:
    """The object that `package.module:attribute` names. The module is imported; the current folder is searched first.

    `where`: the field of the spec that names it, for messages.

    Raises:
        UserError: code is not allowed, the module cannot be imported, or it has no such attribute.
    """
    if not is_code_allowed():
        raise UserError(f"{where}: {refusal(reference)}")
    module, _, name = reference.partition(":")
    with explain_errors(f"{where}: {reference}"), current_folder_first():
        loaded = import_module(module)
        if hasattr(loaded, name):
            return getattr(loaded, name)
    from poise.spec.problems import nearest  # poise.spec imports this module

    raise UserError(f"{where}: module {module!r} defines no {name!r}; {nearest(name, _public_names(loaded))}")


def _public_names(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Search modules in the current folder before all other places while the block runs."""
    current_folder = str(Path.cwd())
    sys.path.insert(0, current_folder)
    try:
        yield
    finally:
        sys.path.remove(current_folder)


@contextmanager
def explain_user_frames(what: str = "code of yours", packages: Collection[str] = ()) -> Iterator[None]:
    """Turn an exception that was raised in code of the user, or below it, into a UserError with its file and line.

    Any other exception passes through. So does one of the communication between workers, even if code of the user has
    asked for it: the worker group is then restarted.

    Args:
        what: what raised it, for the message.
        packages: installed top-level packages whose code counts as that of the user.
    """
    try:
        yield
    except PoiseError:
        raise
    except Exception as error:
        files = _files(error)
        if _is_communication(files) or not any(_is_user_file(file, packages) for file in files):
            raise
        raise UserError(f"{what} raised {describe_error(error, source=True, packages=packages)}") from error


@contextmanager
def explain_method(section: Any, method: str) -> Iterator[None]:
    """Turn an exception of a method of a class outside of Poise into a UserError with its file and line.

    The exception may also be one of the call, such as a parameter that the method does not have, or a
    MethodOutputError; its place is where the method begins. Errors of methods of Poise, and of the communication
    between workers, are left as they are.

    Args:
        section: the object whose method is called in the block; its `name` begins the message.
        method: the name of the method.
    """
    try:
        yield
    except MethodOutputError as error:
        place = _place(error, source=True)
        raise UserError(f"{error} ({place})" if place else f"{error}{_beginning(section, method)}") from error
    except PoiseError:
        raise
    except Exception as error:
        if type(section).__module__.partition(".")[0] == "poise" or _is_communication(_files(error)):
            raise
        place = "" if any(map(_is_user_file, _files(error))) else _beginning(section, method)
        raise UserError(f"{section.name}.{method} raised {describe_error(error, source=True)}{place}") from error


def _files(error: BaseException) -> list[Path]:
    """The file of each frame that an error has passed, outermost first."""
    return [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]


def _is_communication(files: Sequence[Path]) -> bool:
    """Whether an error with frames in these files comes from the communication between workers, or from Ray."""
    for file in files:
        is_of_torch = file.parent.name == "distributed" and "torch" in file.parts
        is_of_ray = any((folder, "ray") in pairwise(file.parts) for folder in _PACKAGES)
        if is_of_torch or is_of_ray:
            return True
    return False


def _beginning(section: Any, method: str) -> str:
    """File and line in which the class defines the method, as ` (mymodel.py:12)`; "" where they are not known."""
    code = getattr(inspect.getattr_static(type(section), method, None), "__code__", None)
    if code is None or not _is_user_file(Path(code.co_filename)):
        return ""
    return f" ({_shown(Path(code.co_filename))}:{code.co_firstlineno})"


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


def describe_error(error: BaseException, *, source: bool = False, packages: Collection[str] = ()) -> str:
    """An error as `AttributeError: message (mymodel.py:12)`, without the place where no frame is in the user's code.

    The message is put on one line. With `source`, the place is `mymodel.py:12 in forward: y = self.haed(x)`. Code of
    the installed `packages` counts as that of the user.
    """
    message = _one_line(str(error))
    place = _place(error, source, packages)
    return f"{type(error).__name__}: {message}" + (f" ({place})" if place else "")


def _place(error: BaseException, source: bool, packages: Collection[str] = ()) -> str | None:
    """File and line of the innermost frame outside Poise, Python and installed packages; with `source` also its code.

    None where there is no such frame.
    """
    if isinstance(error, SyntaxError):
        return None  # its message has file and line
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if _is_user_file(file, packages):
            place = f"{_shown(file)}:{frame.lineno}"
            return f"{place} in {frame.name}: {frame.line}" if source else place
    return None


def _shown(file: Path) -> Path:
    """A file as messages show it: relative to the working directory, if it is below that."""
    working_directory = Path.cwd()
    return file.relative_to(working_directory) if file.is_relative_to(working_directory) else file


def _one_line(message: str) -> str:
    """A message on one line. The message of an error in TorchScript is a traceback: its last line, file and line."""
    frames = _SCRIPT_FRAME.findall(message)
    if "TorchScript" not in message or not frames:
        return " ".join(message.split())
    file, line, name = frames[-1]
    last = message.strip().splitlines()[-1].removeprefix("RuntimeError: ")
    return f"{last} (TorchScript, {file}:{line} in {name})"


def _is_user_file(file: Path, packages: Collection[str] = ()) -> bool:
    """Whether a file is outside of Poise, Python and installed packages, or in one of `packages`."""
    if not file.is_file():  # such as "<frozen importlib._bootstrap>" and "<eval_with_key>.0"
        return False
    for folder, name in pairwise(file.parts):
        if folder in _PACKAGES:
            return name.removesuffix(".py") in packages
    return not any(file.is_relative_to(folder) for folder in _LIBRARIES)
