"""Which images, texts and questions a run reads, and how many there are, without reading them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from poise.spec import Input, Real, Section, mistake

__all__ = [
    "CsvQuestions",
    "DataSpec",
    "JsonlQuestions",
    "JsonlText",
    "ParquetQuestions",
    "ParquetText",
    "QuestionsSpec",
    "Sizes",
    "TextSpec",
    "WorldQuestions",
    "WorldSpec",
    "WorldText",
    "known_sizes",
    "num_validation",
]


_PARQUET = r"(.*/)?(train|test)([-._][^/]*)?\.parquet"
_IMAGE_FILES = {
    "mnist": r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?",
    "cifar10": rf"(data_batch_[1-5]|test_batch)\.bin|{_PARQUET}",
    "cifar100": rf"(train|test)\.bin|{_PARQUET}",
    "svhn": r"(train|test)_32x32\.mat",
    "npz": r"[^/]*\.npz",
    "images": _PARQUET,
}
"""Regular expressions of the names below `root` that a data set is read from."""


class DataSpec(Section):
    """The `data` section."""

    name: Literal["digits", "mnist", "cifar10", "cifar100", "svhn", "npz", "images"] = Field(
        default="digits", description="data set; digits comes with scikit-learn, images is Parquet with encoded images"
    )
    root: str | None = Field(
        default=None,
        min_length=1,
        description="folder or s3://bucket/prefix with the files; every set but digits has one",
    )
    batch_size: int = Field(
        default=128, ge=1, le=65536, description="training examples per step, over all workers together"
    )
    pad: int = Field(default=0, ge=0, le=64, description="random crop after padding each side by so many pixels")
    pad_mode: Literal["reflect", "zero"] = Field(default="reflect", description="what the padding holds")
    flip: bool = Field(default=False, description="mirror half of the training images, left to right")
    validation: int | None = Field(
        default=None,
        ge=0,
        description="training examples held out by a seeded permutation (default: a tenth, at most 1000)",
    )
    limit: int | None = Field(
        default=None,
        ge=2,
        description="use only so many training examples, the same share of each class, before holding any out",
    )
    device_resident: bool = Field(
        default=True, description="keep the training images in device memory; false copies each batch from the host"
    )

    @model_validator(mode="after")
    def _root_fits_name(self) -> DataSpec:
        if self.name == "digits" and self.root is not None:
            raise ValueError("digits comes with scikit-learn: remove root, or name another data set")
        if self.name != "digits" and self.root is None:
            raise ValueError(f"{self.name} is read from files: set root to their folder or to s3://bucket/prefix")
        return self

    def inputs(self) -> Iterator[Input]:
        """The files of the data set; those of scikit-learn's digits are known by its version."""
        if self.root is not None:
            yield Input(("root",), "files", self.root, _IMAGE_FILES[self.name])


class Sizes(NamedTuple):
    """Examples in each split, the shape (C, H, W) of an image, the number of classes."""

    train: int
    validation: int
    test: int
    shape: tuple[int, int, int]
    classes: int


_PUBLISHED = {
    "digits": (1437, 360, (1, 8, 8), 10),
    "mnist": (60_000, 10_000, (1, 28, 28), 10),
    "cifar10": (50_000, 10_000, (3, 32, 32), 10),
    "cifar100": (50_000, 10_000, (3, 32, 32), 100),
    "svhn": (73_257, 26_032, (3, 32, 32), 10),
}


def known_sizes(spec: DataSpec) -> Sizes | None:
    """The sizes after `limit` and `validation` if the set is the published one; None for a set of one's own."""
    if spec.name not in _PUBLISHED:
        return None
    stored, test, shape, classes = _PUBLISHED[spec.name]
    total = min(stored, spec.limit or stored)
    validation = num_validation(spec, total)
    return Sizes(max(total - validation, 0), validation, test, shape, classes)


def num_validation(spec: DataSpec | JsonlText | ParquetText, total: int) -> int:
    """How many of `total` training examples are held out."""
    return min(1000, total // 10) if spec.validation is None else spec.validation


class WorldSpec(Section):
    """A generated world of facts: questions about entities, each with a known distribution of answers."""

    seed: int = Field(0, ge=0, lt=2**63, description="which world; runs that share a model name the same one")
    entities: int = Field(16, ge=2, le=500, description="things that are asked about")
    relations: int = Field(8, ge=2, le=16, description="what is asked of each thing, such as its capital")
    answers: int = Field(12, ge=4, le=500, description="names that answer the questions of one relation")
    certain: Annotated[Real, Field(ge=0, le=1)] = Field(
        Real("1/2"), description="share of the questions that have one answer"
    )
    ambiguous: Annotated[Real, Field(ge=0, le=1)] = Field(
        Real("3/8"), description="share with two to four answers; the rest of the questions is long-tailed"
    )
    tail: int = Field(8, ge=2, le=500, description="answers of a long-tailed question, in Zipf's proportions")
    pretrain: int = Field(64, ge=1, le=100_000, description="examples of each question in the split pretrain")
    tune: int = Field(4, ge=1, le=100_000, description="examples of each question in the split tune")

    @model_validator(mode="after")
    def _consistent(self) -> WorldSpec:
        if self.certain.exact + self.ambiguous.exact > 1:
            raise mistake("ambiguous", f"the shares {self.certain} and {self.ambiguous} are more than 1 together")
        if self.tail > self.answers:
            raise mistake("tail", f"a tail of {self.tail} is longer than the {self.answers} answers of a relation")
        return self

    @property
    def num_questions(self) -> int:
        """Every relation is asked of every entity."""
        return self.entities * self.relations


class WorldText(Section):
    """Questions of a generated world with answers drawn from their true distributions."""

    name: Literal["world"]
    split: Literal["pretrain", "tune"] = Field("pretrain", description="many examples of each question, or a few")
    world: WorldSpec = Field(WorldSpec(), description="the world")


class _TextFiles(Section):
    path: str = Field(min_length=1, description="file, or folder of such files, here or on s3://")
    prompt: str = Field("prompt", description="field with the text before the answer")
    completion: str = Field("completion", description="field with the answer, which alone is learned")
    validation: int | None = Field(
        None, ge=0, description="examples held out by a seeded permutation (default: a tenth, at most 1000)"
    )
    max_tokens: int = Field(512, ge=2, le=1_000_000, description="longest prompt and completion together, in tokens")
    too_long: Literal["error", "cut"] = Field("error", description="refuse longer examples, or drop what is beyond")

    def inputs(self) -> Iterator[Input]:
        """The file, or those of the folder that have the suffix of the format."""
        yield _rows_input(self.path, f".{getattr(self, 'name')}")  # noqa: B009 - each format has one, of a type of its own


class JsonlText(_TextFiles):
    """Prompts and completions in JSON lines."""

    name: Literal["jsonl"]


class ParquetText(_TextFiles):
    """Prompts and completions in Parquet columns."""

    name: Literal["parquet"]


TextSpec = Annotated[WorldText | JsonlText | ParquetText, Field(discriminator="name")]


class WorldQuestions(Section):
    """Questions of a generated world."""

    name: Literal["world"]
    split: Literal["evaluate", "prefer"] = Field(
        "evaluate", description="every question, or the ambiguous ones with three answers or more"
    )
    world: WorldSpec = Field(WorldSpec(), description="the world")


class _QuestionFiles(Section):
    path: str = Field(min_length=1, description="file, or folder of such files, here or on s3://")
    question: str = Field("question", description="field with the question")
    answers: str = Field("answer", description="field with the accepted answer, or a list of them")
    limit: int | None = Field(
        None, ge=1, description="use only so many questions: a shuffled choice, the same for every seed"
    )

    def inputs(self) -> Iterator[Input]:
        """The file, or those of the folder."""
        yield _rows_input(self.path, f".{getattr(self, 'name')}")  # noqa: B009 - each format has one, of a type of its own


class JsonlQuestions(_QuestionFiles):
    """Questions in JSON lines, with the answers that count as correct."""

    name: Literal["jsonl"]


class CsvQuestions(_QuestionFiles):
    """Questions in CSV files with a line of names, and the answers that count as correct."""

    name: Literal["csv"]


class ParquetQuestions(_QuestionFiles):
    """Questions in Parquet columns, with the answers that count as correct."""

    name: Literal["parquet"]


def _rows_input(path: str, suffix: str) -> Input:
    """Rows of a file, or of every file with this suffix below a folder."""
    return Input(("path",), "files", path, "" if path.endswith(suffix) else rf".*\{suffix}")


QuestionsSpec = Annotated[
    WorldQuestions | JsonlQuestions | CsvQuestions | ParquetQuestions, Field(discriminator="name")
]
