"""The specs of questions that a language model is asked."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from poise.data.text.row_spec import RowFiles, RowFunction, Suffix
from poise.data.world_spec import WorldSpec
from poise.spec import CodeReference, SpecModel

__all__ = [
    "CsvQuestions",
    "FunctionQuestions",
    "JsonlQuestions",
    "ParquetQuestions",
    "QuestionFiles",
    "QuestionRows",
    "QuestionsSpec",
    "WorldQuestions",
]


class _QuestionSource(SpecModel):
    """What kinds ask of questions before they read them."""

    @property
    def known_world(self) -> WorldSpec | None:
        """The world that the questions are of; None where the true distribution of answers is not known."""
        return None

    @property
    def num_known_questions(self) -> int | None:
        """The number of questions, where it is known before they are read."""
        return None


class WorldQuestions(_QuestionSource):
    """Questions of a generated world."""

    name: Literal["world"]
    split: Literal["evaluate", "prefer"] = Field(
        "evaluate", description="evaluate has every question, prefer the ambiguous ones with three answers or more"
    )
    world: WorldSpec = Field(WorldSpec(), description="the world")

    @property
    def known_world(self) -> WorldSpec:
        """The world."""
        return self.world

    @property
    def num_known_questions(self) -> int | None:
        """All questions of the world; how many are ambiguous is known when the world is generated."""
        return self.world.num_questions if self.split == "evaluate" else None


class _QuestionRows(_QuestionSource):
    limit: int | None = Field(
        None, ge=1, description="number of questions to use: a shuffled subset, the same for every seed"
    )


class _QuestionFiles(RowFiles):
    question: str = Field("question", description="field with the question")
    answers: str = Field("answer", description="field with the accepted answer, or a list of accepted answers")


class JsonlQuestions(_QuestionRows, _QuestionFiles):
    """Questions in JSON lines, with the answers that count as correct."""

    suffix: ClassVar[Suffix] = ".jsonl"

    name: Literal["jsonl"]


class CsvQuestions(_QuestionRows, _QuestionFiles):
    """Questions in CSV files whose first line names the columns, with the answers that count as correct."""

    suffix: ClassVar[Suffix] = ".csv"

    name: Literal["csv"]


class ParquetQuestions(_QuestionRows, _QuestionFiles):
    """Questions in Parquet columns, with the answers that count as correct."""

    suffix: ClassVar[Suffix] = ".parquet"

    name: Literal["parquet"]


class FunctionQuestions(_QuestionRows, RowFunction):
    """Questions from a function of the user's code, with the answers that count as correct."""

    section: ClassVar[str] = "questions"
    question: ClassVar[str] = "question"
    answers: ClassVar[str] = "answer"

    name: Literal["function"]
    function: CodeReference = Field(
        description="package.module:function in your code that returns rows: mappings with the text `question` and "
        "`answer`, the accepted answer or a list of accepted answers"
    )


QuestionFiles = JsonlQuestions | CsvQuestions | ParquetQuestions
"""Questions in files."""

QuestionRows = QuestionFiles | FunctionQuestions
"""Questions that are read row by row."""

QuestionsSpec = Annotated[WorldQuestions | QuestionRows, Field(discriminator="name")]
