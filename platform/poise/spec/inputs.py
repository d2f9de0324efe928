"""The inputs of a run besides its spec: files, other runs, code of the user. Sections of a spec declare them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from poise.spec.problems import Path, dotted

__all__ = ["Input"]


@dataclass(frozen=True)
class Input:
    """One thing that a spec names and a run reads.

    Attributes:
        path: where the spec names it.
        kind: files of a folder or of S3, the outputs of another run of the store, a module of the user, or a module of
            an installed package that registers it (`plugin`), which needs no permission.
        place: a folder, a file or an S3 address; the name of a run; `package.module:attribute`.
        pattern: for files, a regular expression of the names below `place` that are read; empty where `place` is a
            file.
        kinds: for a run, the kinds of jobs whose outputs can be read.
        modules: for a plugin, all modules whose code it runs.
    """

    path: Path
    kind: Literal["files", "run", "code", "plugin"]
    place: str
    pattern: str = ""
    kinds: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    def below(self, *prefix: str | int) -> Input:
        """This input with the path that it has from a section that contains this one at `prefix`."""
        return replace(self, path=(*prefix, *self.path))

    @property
    def where(self) -> str:
        """Its path in the spec for messages, such as `data.root`."""
        return dotted(self.path)
