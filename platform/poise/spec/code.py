"""The user's own code that a spec names as `package.module:attribute`: the files it consists of, not run."""

from __future__ import annotations

import ast
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from poise.errors import UserError

if TYPE_CHECKING:
    from poise.spec.run import RunSpec

__all__ = ["attributes", "code_files", "copy_code", "is_installed", "own_code"]


def code_files(reference: str) -> dict[str, Path]:
    """The source of the module and of every module that it imports from the folder it lies in, by name there.

    The working directory is searched first, then Python's path. Of an installed package only the module itself is
    returned: its version is part of the environment of a run. Imports inside functions count; those made by name at
    run time cannot be seen.

    Raises:
        UserError: there is no such module.
    """
    module = reference.partition(":")[0]
    root = _root(module)
    _check_source(root, module)
    pending, found = [module], dict[str, Path]()
    while pending:
        name = pending.pop()
        for file in _sources(root, name):
            key = file.relative_to(root).as_posix()
            if key not in found:
                found[key] = file
                pending += [] if _is_installed(root) else _imported(file, root)
    return found


def own_code(specs: Iterable[RunSpec], *, lenient: bool = False) -> list[str]:
    """The modules that specs name as `package.module:attribute` and that no other machine has: none is installed.

    `lenient` passes over modules that are not on this machine: others may have them.

    Raises:
        UserError: there is no such module.
    """
    places = dict.fromkeys(each.place for spec in specs for each in spec.inputs() if each.kind == "code")
    return [place for place in places if (not lenient or _is_here(place)) and not is_installed(place)]


def _is_here(reference: str) -> bool:
    try:
        _check_source(_root(module := reference.partition(":")[0]), module)
    except UserError:
        return False
    return True


def copy_code(references: Iterable[str], folder: Path) -> None:
    """Copy modules, and all that they import from where they lie, into a folder from which they can be imported."""
    for reference in references:
        for name, file in code_files(reference).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)


def attributes(reference: str) -> set[str] | None:
    """The names that the module defines at its top level; None where they cannot be told without running it.

    Raises:
        UserError: there is no such module, or it is not valid Python.
    """
    module = reference.partition(":")[0]
    root = _root(module)
    _check_source(root, module)
    names: set[str] = set()
    for node in _top_level(_parsed(_sources(root, module)[-1])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name):
            names.add(node.id)
    return None if "*" in names or "__getattr__" in names else names


def is_installed(reference: str) -> bool:
    """Whether the module belongs to an installed package, to Python or to Poise: every machine has its own.

    Raises:
        UserError: there is no such module.
    """
    module = reference.partition(":")[0]
    return module.partition(".")[0] == "poise" or _is_installed(_root(module))


def _root(module: str) -> Path:
    """The folder that holds the module, or the package that it is in."""
    top = module.partition(".")[0]
    here = str(Path.cwd())
    spec = PathFinder.find_spec(top, [here, *sys.path])
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
    if not places or places[0] is None:
        raise UserError(f"there is no module {top!r} in {here} or on Python's path")
    return Path(places[0]).parent


def _is_installed(root: Path) -> bool:
    """Whether the folder is one of installed packages or of the standard library."""
    paths = {Path(path) for path in sysconfig.get_paths().values()}
    return root in paths or root.name in ("site-packages", "dist-packages")


def _check_source(root: Path, module: str) -> None:
    file = root.joinpath(*module.split("."))
    if not file.with_name(f"{file.name}.py").is_file() and not (file / "__init__.py").is_file():
        raise UserError(f"there is no module {module!r} in {root}")


def _sources(root: Path, module: str) -> list[Path]:
    """The files that importing `module` runs, those of its packages first; empty where it is not below `root`."""
    parts = module.split(".")
    packages = [root.joinpath(*parts[:end], "__init__.py") for end in range(1, len(parts) + 1)]
    files = [*packages, root.joinpath(*parts[:-1], f"{parts[-1]}.py")]
    return [file for file in files if file.is_file()]


def _imported(file: Path, root: Path) -> Iterator[str]:
    """The modules that a file imports, as absolute names; a name taken from a package may be a module of it."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
            yield from (".".join(filter(None, [base, alias.name])) for alias in node.names if alias.name != "*")


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{file}{line}: not valid Python: {error}") from None


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported, what functions and classes hold left out."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from _top_level(node)
