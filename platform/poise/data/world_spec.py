"""The spec of a generated world of facts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from poise.spec import ExactNumber, SpecModel, field_error

__all__ = ["WorldSpec"]


class WorldSpec(SpecModel):
    """A generated world of facts: questions about entities, each with a known distribution of answers."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of the world; runs that share a model need the same world")
    entities: int = Field(16, ge=2, le=500, description="number of entities that the questions are about")
    relations: int = Field(8, ge=2, le=16, description="number of questions about each entity, such as its capital")
    answers: int = Field(12, ge=4, le=500, description="number of possible answers to the questions of one relation")
    certain: Annotated[ExactNumber, Field(ge=0, le=1)] = Field(
        ExactNumber("1/2"), description="share of the questions that have one answer"
    )
    ambiguous: Annotated[ExactNumber, Field(ge=0, le=1)] = Field(
        ExactNumber("3/8"),
        description="share of the questions that have two to four answers; the remaining questions are long-tailed",
    )
    tail: int = Field(8, ge=2, le=500, description="number of answers of a long-tailed question, in Zipf's proportions")
    pretrain: int = Field(64, ge=1, le=100_000, description="examples of each question in the split pretrain")
    tune: int = Field(4, ge=1, le=100_000, description="examples of each question in the split tune")

    @model_validator(mode="after")
    def _consistent(self) -> WorldSpec:
        if self.certain.exact + self.ambiguous.exact > 1:
            raise field_error("ambiguous", f"the shares {self.certain} and {self.ambiguous} add up to more than 1")
        if self.tail > self.answers:
            raise field_error("tail", f"a tail of {self.tail} is longer than the {self.answers} answers of a relation")
        return self

    @property
    def num_questions(self) -> int:
        """The number of questions: one for each relation of each entity."""
        return self.entities * self.relations
