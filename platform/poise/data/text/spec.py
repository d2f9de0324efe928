"""The specs of texts that a language model is trained on."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from poise.data.text.row_spec import RowFiles, RowFunction, Suffix
from poise.data.world_spec import WorldSpec
from poise.spec import CodeReference, SpecModel

__all__ = ["FunctionText", "JsonlText", "ParquetText", "TextRows", "TextSpec", "WorldText"]


class _TextSource(SpecModel):
    """What kinds ask of a text to train on before they read it."""

    @property
    def known_world(self) -> WorldSpec | None:
        """The world whose true answers the texts are drawn from; None where the true distribution is not known."""
        return None

    @property
    def num_known_examples(self) -> int | None:
        """The number of training examples, where it is known before they are read."""
        return None

    @property
    def has_validation(self) -> bool:
        """Whether examples are held out."""
        return True


class WorldText(_TextSource):
    """Questions of a generated world with answers drawn from their true distributions."""

    name: Literal["world"]
    split: Literal["pretrain", "tune"] = Field(
        "pretrain", description="pretrain has many examples of each question, tune a few"
    )
    world: WorldSpec = Field(WorldSpec(), description="the world")

    @property
    def known_world(self) -> WorldSpec:
        """The world."""
        return self.world

    @property
    def num_known_examples(self) -> int:
        """The examples of all questions in this split."""
        per_question = self.world.pretrain if self.split == "pretrain" else self.world.tune
        return self.world.num_questions * per_question


class _TextRows(_TextSource):
    validation: int | None = Field(
        None, ge=0, description="examples held out by a seeded permutation (default: a tenth, at most 1000)"
    )
    max_tokens: int = Field(512, ge=2, le=1_000_000, description="longest prompt and completion together, in tokens")
    too_long: Literal["error", "cut"] = Field(
        "error", description="error refuses longer examples, cut drops the tokens beyond the limit"
    )

    @property
    def has_validation(self) -> bool:
        """Whether `validation` is not 0."""
        return self.validation != 0


class _TextFiles(RowFiles):
    prompt: str = Field("prompt", description="field with the text before the answer")
    completion: str = Field("completion", description="field with the answer; only its tokens are learned")


class JsonlText(_TextRows, _TextFiles):
    """Prompts and completions in JSON lines."""

    suffix: ClassVar[Suffix] = ".jsonl"

    name: Literal["jsonl"]


class ParquetText(_TextRows, _TextFiles):
    """Prompts and completions in Parquet columns."""

    suffix: ClassVar[Suffix] = ".parquet"

    name: Literal["parquet"]


class FunctionText(_TextRows, RowFunction):
    """Prompts and completions from a function of the user's code."""

    section: ClassVar[str] = "data"
    prompt: ClassVar[str] = "prompt"
    completion: ClassVar[str] = "completion"

    name: Literal["function"]
    function: CodeReference = Field(
        description="package.module:function in your code that returns rows: mappings with the texts `prompt` and "
        "`completion`"
    )


TextRows = JsonlText | ParquetText | FunctionText
"""Texts that are read row by row."""

TextSpec = Annotated[WorldText | TextRows, Field(discriminator="name")]
