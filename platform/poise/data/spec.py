"""The specs of images, texts and questions that a run reads, and their sizes where these are known without reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from poise.spec import CodeReference, ExactNumber, Input, SpecModel, field_error

if TYPE_CHECKING:
    from poise.data.text.records import Row

__all__ = [
    "CsvQuestions",
    "DataSpec",
    "FunctionQuestions",
    "FunctionText",
    "JsonlQuestions",
    "JsonlText",
    "ParquetQuestions",
    "ParquetText",
    "QuestionsSpec",
    "Sizes",
    "Suffix",
    "TextSpec",
    "WorldQuestions",
    "WorldSpec",
    "WorldText",
    "known_sizes",
    "num_validation",
]


Suffix = Literal[".jsonl", ".csv", ".parquet"]
"""The end of the names of files of rows, which tells their format."""

_PARQUET = r"(.*/)?(train|test)([-._][^/]*)?\.parquet"
_IMAGE_FILES = {
    "mnist": r"(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?",
    "cifar10": rf"(data_batch_[1-5]|test_batch)\.bin|{_PARQUET}",
    "cifar100": rf"(train|test)\.bin|{_PARQUET}",
    "svhn": r"(train|test)_32x32\.mat",
    "npz": r"[^/]*\.npz",
    "images": _PARQUET,
    "function": ".*",
}
"""Regular expressions of the file names below `root` that a data set is read from."""


class DataSpec(SpecModel):
    """The `data` section."""

    name: Literal["digits", "mnist", "cifar10", "cifar100", "svhn", "npz", "images", "function"] = Field(
        default="digits",
        description="data set; digits comes with scikit-learn, images is Parquet with encoded images, function is code "
        "of yours",
    )
    root: str | None = Field(
        default=None,
        min_length=1,
        description="folder or s3://bucket/prefix with the files; required for every data set but digits and function",
    )
    function: CodeReference | None = Field(
        default=None,
        description="package.module:function in your code, called with `train` or `test`, that returns images "
        "(N, C, H, W) in [0, 1] or uint8, and labels (N,)",
    )
    arguments: dict[str, Any] = Field(
        default={}, description="keyword arguments that the function is called with; also root, where it is set"
    )
    batch_size: int = Field(
        default=128, ge=1, le=65536, description="training examples per step, over all workers together"
    )
    pad: int = Field(default=0, ge=0, le=64, description="pixels of padding on each side before a random crop")
    pad_mode: Literal["reflect", "zero"] = Field(default="reflect", description="content of the padding")
    flip: bool = Field(default=False, description="mirror half of the training images, left to right")
    validation: int | None = Field(
        default=None,
        ge=0,
        description="training examples held out by a seeded permutation (default: a tenth, at most 1000)",
    )
    limit: int | None = Field(
        default=None,
        ge=2,
        description="number of training examples to use, the same share of each class, validation examples included",
    )
    device_resident: bool = Field(
        default=True, description="keep the training images in device memory; false copies each batch from the host"
    )

    @model_validator(mode="after")
    def _root_fits_name(self) -> DataSpec:
        if self.name == "digits" and self.root is not None:
            raise ValueError("digits comes with scikit-learn: remove root, or name another data set")
        if (self.name == "function") != (self.function is not None):
            raise field_error("function", "name: function and function: PACKAGE.MODULE:FUNCTION belong together")
        if self.arguments and self.function is None:
            raise field_error("arguments", "only a function takes arguments: remove them")
        if self.name not in ("digits", "function") and self.root is None:
            raise ValueError(f"{self.name} is read from files: set root to their folder or to s3://bucket/prefix")
        return self

    def inputs(self) -> Iterator[Input]:
        """The files of the data set and the code. The digits have none: the version of scikit-learn identifies them."""
        if self.root is not None:
            yield Input(("root",), "files", self.root, _IMAGE_FILES[self.name])
        if self.function is not None:
            yield Input(("function",), "code", self.function)


class Sizes(NamedTuple):
    """The number of examples in each split, the shape (C, H, W) of an image, and the number of classes."""

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
    """The sizes of a published data set after `limit` and `validation`; None for a data set of the user."""
    if spec.name not in _PUBLISHED:
        return None
    stored, test, shape, classes = _PUBLISHED[spec.name]
    total = min(stored, spec.limit or stored)
    validation = num_validation(spec, total)
    return Sizes(max(total - validation, 0), validation, test, shape, classes)


def num_validation(spec: DataSpec | JsonlText | ParquetText | FunctionText, total: int) -> int:
    """How many of `total` training examples are held out for validation."""
    return min(1000, total // 10) if spec.validation is None else spec.validation


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


class _RowFiles(SpecModel):
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


class _TextFiles(_RowFiles, _TextSource):
    prompt: str = Field("prompt", description="field with the text before the answer")
    completion: str = Field("completion", description="field with the answer; only its tokens are learned")
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


class JsonlText(_TextFiles):
    """Prompts and completions in JSON lines."""

    suffix: ClassVar[Suffix] = ".jsonl"

    name: Literal["jsonl"]


class ParquetText(_TextFiles):
    """Prompts and completions in Parquet columns."""

    suffix: ClassVar[Suffix] = ".parquet"

    name: Literal["parquet"]


class FunctionText(_TextSource):
    """Prompts and completions from a function of the user's code."""

    prompt: ClassVar[str] = "prompt"
    completion: ClassVar[str] = "completion"

    name: Literal["function"]
    function: CodeReference = Field(
        description="package.module:function in your code that returns rows: mappings with the texts `prompt` and "
        "`completion`"
    )
    arguments: dict[str, Any] = Field({}, description="keyword arguments that the function is called with")
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

    def inputs(self) -> Iterator[Input]:
        """The code."""
        yield Input(("function",), "code", self.function)

    def read_rows(self) -> list[Row]:
        """The rows that the function returns. UserError as `function_rows`."""
        from poise.data.text.records import function_rows  # imports pyarrow

        return function_rows(self.function, self.arguments, "data.function")


TextSpec = Annotated[WorldText | JsonlText | ParquetText | FunctionText, Field(discriminator="name")]


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


class _QuestionFiles(_RowFiles, _QuestionSource):
    question: str = Field("question", description="field with the question")
    answers: str = Field("answer", description="field with the accepted answer, or a list of accepted answers")
    limit: int | None = Field(
        None, ge=1, description="number of questions to use: a shuffled subset, the same for every seed"
    )


class JsonlQuestions(_QuestionFiles):
    """Questions in JSON lines, with the answers that count as correct."""

    suffix: ClassVar[Suffix] = ".jsonl"

    name: Literal["jsonl"]


class CsvQuestions(_QuestionFiles):
    """Questions in CSV files whose first line names the columns, with the answers that count as correct."""

    suffix: ClassVar[Suffix] = ".csv"

    name: Literal["csv"]


class ParquetQuestions(_QuestionFiles):
    """Questions in Parquet columns, with the answers that count as correct."""

    suffix: ClassVar[Suffix] = ".parquet"

    name: Literal["parquet"]


class FunctionQuestions(_QuestionSource):
    """Questions from a function of the user's code, with the answers that count as correct."""

    question: ClassVar[str] = "question"
    answers: ClassVar[str] = "answer"

    name: Literal["function"]
    function: CodeReference = Field(
        description="package.module:function in your code that returns rows: mappings with the text `question` and "
        "`answer`, the accepted answer or a list of accepted answers"
    )
    arguments: dict[str, Any] = Field({}, description="keyword arguments that the function is called with")
    limit: int | None = Field(
        None, ge=1, description="number of questions to use: a shuffled subset, the same for every seed"
    )

    def inputs(self) -> Iterator[Input]:
        """The code."""
        yield Input(("function",), "code", self.function)

    def read_rows(self) -> list[Row]:
        """The rows that the function returns. UserError as `function_rows`."""
        from poise.data.text.records import function_rows  # imports pyarrow

        return function_rows(self.function, self.arguments, "questions.function")


QuestionsSpec = Annotated[
    WorldQuestions | JsonlQuestions | CsvQuestions | ParquetQuestions | FunctionQuestions, Field(discriminator="name")
]
