"""Where rows of text come from, in a spec: files of a format, or a function of the user's code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from poise.spec import CodeReference, Input, SpecModel

if TYPE_CHECKING:
    from poise.data.text.records import Row

__all__ = ["RowFiles", "RowFunction", "Suffix"]

Suffix = Literal[".jsonl", ".csv", ".parquet"]
"""The end of the names of files of rows, which tells their format."""


class RowFiles(SpecModel):
    """Rows from files of the format of `suffix`."""

    suffix: ClassVar[Suffix]

    path: str = Field(min_length=1, description="file, or folder of such files, local or on s3://")

    def inputs(self) -> Iterator[Input]:
        """The file, or the files of the folder that have the suffix of the format."""
        is_file = self.path.endswith(self.suffix)
        yield Input(("path",), "files", self.path, "" if is_file else rf".*\{self.suffix}")

    def read_rows(self) -> list[Row]:
        """All rows, in the order of the files. UserError where files are missing or malformed."""
        from poise.data.text.records import read_rows  # imports pyarrow

        return read_rows(self.path, self.suffix)


class RowFunction(SpecModel):
    """Rows from a function of the user's code, which the key `function` of the section `section` names."""

    section: ClassVar[str]

    function: CodeReference
    arguments: dict[str, Any] = Field({}, description="keyword arguments that the function is called with")

    def inputs(self) -> Iterator[Input]:
        """The code."""
        yield Input(("function",), "code", self.function)

    def read_rows(self) -> list[Row]:
        """The rows that the function returns. UserError as `function_rows`."""
        from poise.data.text.records import function_rows  # imports pyarrow

        return function_rows(self.function, self.arguments, f"{self.section}.function")
