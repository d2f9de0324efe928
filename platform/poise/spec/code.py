"""The code of the user that a spec names as `package.module:attribute`: its files and names, without running it."""

from __future__ import annotations

import ast
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from poise.errors import UserError

__all__ = ["attributes", "code_files", "copy_code", "is_installed", "own_code", "package_files"]


def code_files(reference: str) -> dict[str, Path]:
    """The source files of a module and of all modules that it imports from its own folder, by path in that folder.

    The working directory is searched first, then Python's path. Of an installed package only the module itself is
    returned: its version is part of the environment of a run. Imports inside functions are followed; imports by a
    computed name are not.

    Raises:
        UserError: there is no such module.
    """
    module = reference.partition(":")[0]
    root = _root(module)
    _check_source(root, module)
    if _is_installed(root):
        return {file.relative_to(root).as_posix(): file for file in _sources(root, module)}
    return _followed(root, module)


def package_files(modules: Iterable[str]) -> dict[str, Path]:
    """The source files of modules of an installed package, and of all modules that they import from that package.

    An editable package is not in a folder of installed packages: as of the user's own code, imports from its whole
    folder are followed. A module without Python source has no file.
    """
    files: dict[str, Path] = {}
    for module in dict.fromkeys(modules):
        top = module.partition(".")[0]
        spec = find_spec(top)  # also finds what the import hook of an editable package provides
        places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
        for place in filter(None, places):  # a namespace package has several
            root = Path(place).parent
            files |= _followed(root, module, top if _is_installed(root) else None)
    return files


def _followed(root: Path, module: str, package: str | None = None) -> dict[str, Path]:
    """The files below `root` that importing `module` may run, by path; with `package`, only of that top-level package.

    Raises:
        UserError: a file is not valid Python.
    """
    pending = [module]
    files: dict[str, Path] = {}
    while pending:
        name = pending.pop()
        if package is not None and name.partition(".")[0] != package:
            continue
        for file in _sources(root, name):
            key = file.relative_to(root).as_posix()
            if key not in files:
                files[key] = file
                pending += _imported_modules(file, root)
    return files


def own_code(references: Iterable[str], *, lenient: bool = False) -> list[str]:
    """The references `package.module:attribute` to modules that are not installed, so only this machine has them.

    With `lenient`, modules that this machine lacks are left out, since other machines may have them.

    Raises:
        UserError: there is no such module.
    """
    unique = dict.fromkeys(references)
    return [ref for ref in unique if (not lenient or _exists(ref)) and not is_installed(ref)]


def _exists(reference: str) -> bool:
    module = reference.partition(":")[0]
    try:
        _check_source(_root(module), module)
    except UserError:
        return False
    return True


def copy_code(references: Iterable[str], folder: Path) -> None:
    """Copy modules, and all modules that they import from their own folder, into a folder that can be imported from."""
    for reference in references:
        for name, file in code_files(reference).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def attributes(reference: str) -> set[str] | None:
    """The names that a module defines at its top level; None where they cannot be determined without running it.

    Raises:
        UserError: there is no such module, or it is not valid Python.
    """
    module = reference.partition(":")[0]
    root = _root(module)
    _check_source(root, module)
    names: set[str] = set()
    for node in _top_level(_parse(_sources(root, module)[-1])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name):
            names.add(node.id)
    return None if "*" in names or "__getattr__" in names else names


def is_installed(reference: str) -> bool:
    """Whether a module belongs to an installed package, to Python or to Poise, so that every machine has it.

    Raises:
        UserError: there is no such module.
    """
    module = reference.partition(":")[0]
    return module.partition(".")[0] == "poise" or _is_installed(_root(module))


def _root(module: str) -> Path:
    """The folder that holds a module, or its top-level package; UserError where there is none."""
    top = module.partition(".")[0]
    working_directory = str(Path.cwd())
    spec = PathFinder.find_spec(top, [working_directory, *sys.path])
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
    if not places or places[0] is None:
        raise UserError(f"there is no module {top!r} in {working_directory} or on Python's path")
    return Path(places[0]).parent


def _is_installed(root: Path) -> bool:
    """Whether the folder is one of installed packages or of the standard library."""
    paths = {Path(path) for path in sysconfig.get_paths().values()}
    return root in paths or root.name in ("site-packages", "dist-packages")


def _check_source(root: Path, module: str) -> None:
    """UserError unless a module or package has Python source below `root`."""
    file = root.joinpath(*module.split("."))
    if not file.with_name(f"{file.name}.py").is_file() and not (file / "__init__.py").is_file():
        raise UserError(f"there is no module {module!r} in {root}")


def _sources(root: Path, module: str) -> list[Path]:
    """The files that importing `module` runs, its packages first; [] where it is not below `root`."""
    parts = module.split(".")
    packages = [root.joinpath(*parts[:end], "__init__.py") for end in range(1, len(parts) + 1)]
    files = [*packages, root.joinpath(*parts[:-1], f"{parts[-1]}.py")]
    return [file for file in files if file.is_file()]


def _imported_modules(file: Path, root: Path) -> Iterator[str]:
    """The absolute names of all modules that a file may import; `from a import b` may import the module a.b."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(_parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = list(package[: len(package) - node.level + 1]) if node.level else []  # of a relative import
            if node.module:
                parts.append(node.module)
            base = ".".join(parts)
            if base:
                yield base
            for alias in node.names:
                if alias.name != "*":
                    yield f"{base}.{alias.name}" if base else alias.name


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{file}{line}: not valid Python: {error}") from None


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported, without the bodies of functions and classes."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from _top_level(node)
