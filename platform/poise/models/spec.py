"""The specs of the networks of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from poise.errors import UserError
from poise.models.architectures import SMALLEST_SIDE, WIDTH, Architecture, Shape
from poise.spec import CodeReference, ExactNumber, Input, RunName, SpecModel, field_error

__all__ = [
    "Architecture",
    "DecodingSpec",
    "LanguageModelSpec",
    "ModelSpec",
    "Shape",
    "VaeSpec",
    "check_shape",
]


_ARCHITECTURE_KEYS = ("name", "activation", "width", "normalize", "channels_last")


class ModelSpec(SpecModel):
    """The `model` section: one of Poise's architectures, or a function of the user's code that returns a network."""

    name: Architecture = Field(default="cnn", description="architecture")
    activation: Literal["relu", "silu", "softplus"] = Field(
        default="relu", description="activation everywhere in the network; softplus has beta 1"
    )
    width: int | None = Field(
        default=None, ge=1, le=1024, description="channels of the first convolution (default: that of the architecture)"
    )
    normalize: Literal["data", "none"] = Field(
        default="data", description="first layer: subtract mean and divide by std of the training pixels, or nothing"
    )
    channels_last: bool = Field(
        default=True,
        description="keep channels innermost in memory: faster convolutions, other rounding; ignored for residual "
        "networks narrower than 16, where oneDNN would damage memory",
    )

    function: CodeReference | None = Field(
        default=None,
        description="instead of an architecture: package.module:function in your code that returns an nn.Module on "
        "images in [0, 1]",
    )
    arguments: dict[str, Any] = Field(default={}, description="keyword arguments that the function is called with")

    @model_validator(mode="after")
    def _function_alone(self) -> ModelSpec:
        if self.arguments and self.function is None:
            raise field_error("arguments", "only a function takes arguments: remove them")
        if self.function is not None:
            self._refuse_architecture("function")
        return self

    def _refuse_architecture(self, source: str) -> None:
        """Raise an error if a key of the architecture is set; that of `source` is known."""
        for key in _ARCHITECTURE_KEYS:
            if getattr(self, key) != ModelSpec.model_fields[key].default:
                raise field_error(
                    key, f"the architecture is written for a network of Poise only; that of a {source} is known"
                )

    def inputs(self) -> Iterator[Input]:
        """The code."""
        if self.function is not None:
            yield Input(("function",), "code", self.function)
        yield from super().inputs()

    @property
    def base_width(self) -> int:
        """Channels of the first convolution: `width`, or the default of the architecture."""
        return self.width or WIDTH[self.name]


def check_shape(shape: Shape, classes: int) -> None:
    """Refuse image shapes and numbers of classes that the architectures do not support.

    Raises:
        UserError: a side under 4 pixels, no channel, or fewer than 2 classes.
    """
    if min(shape[1:]) < SMALLEST_SIDE or shape[0] < 1:
        raise UserError(f"images of shape {shape} are too small: at least 1 channel of {SMALLEST_SIDE}x{SMALLEST_SIDE}")
    if classes < 2:
        raise UserError(f"{classes} class cannot be told apart: the labels need at least 2 classes")


class DecodingSpec(SpecModel):
    """The options of sampling from a language model."""

    max_tokens: int = Field(64, ge=1, le=1_000_000, description="longest response, in tokens")
    temperature: Annotated[ExactNumber, Field(ge=0, le=100)] = Field(
        ExactNumber(1), description="temperature of the softmax; 0 is greedy"
    )
    top_p: Annotated[ExactNumber, Field(gt=0, le=1)] = Field(
        ExactNumber(1), description="sample only from the likeliest tokens whose probabilities add up to this share"
    )
    stop: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field(
        [], max_length=16, description="a response also ends where its text contains one of these strings"
    )


_MODEL_FILES = r"[^/]*\.(json|safetensors|model|jinja|tiktoken)|vocab\.txt|merges\.txt"
"""Names of weights, configuration and tokenizer directly in a model folder; other files are not read."""


class LanguageModelSpec(SpecModel):
    """A language model: the result of another run, a folder, or a new Llama; exactly one of `run`, `folder`, `name`."""

    run: RunName | None = Field(None, description="run of the same store whose final model is opened")
    folder: str | None = Field(None, min_length=1, description="folder or s3://bucket/prefix as transformers saves it")
    name: Literal["llama"] | None = Field(None, description="architecture of a new model with random weights")
    hidden: int = Field(64, ge=32, le=16384, description="width of a new model, a multiple of heads")
    layers: int = Field(2, ge=1, le=200, description="layers of a new model")
    heads: int = Field(2, ge=1, le=256, description="attention heads of a new model, of 32, 64 or 128 channels each")
    context: int = Field(256, ge=16, le=1_000_000, description="longest sequence of a new model, in tokens")

    @model_validator(mode="after")
    def _one_source(self) -> LanguageModelSpec:
        sources = [key for key in ("run", "folder", "name") if getattr(self, key) is not None]
        if len(sources) != 1:
            raise ValueError("a language model is one of run: RUN, folder: FOLDER or name: llama")
        sizes = ("hidden", "layers", "heads", "context")
        changed = [key for key in sizes if getattr(self, key) != type(self).model_fields[key].default]
        if self.name is None and changed:
            raise field_error(changed[0], f"only a new model has a size to choose; that of a {sources[0]} is known")
        if self.hidden not in (width * self.heads for width in (32, 64, 128)):
            raise field_error("hidden", f"{self.hidden} is not {self.heads} heads of 32, 64 or 128 channels each")
        return self

    def inputs(self) -> Iterator[Input]:
        """The other run, or the files of the folder."""
        if self.run is not None:
            yield Input(("run",), "run", self.run, kinds=("finetune.sft", "align.selfplay"))
        if self.folder is not None:
            yield Input(("folder",), "files", self.folder, _MODEL_FILES)


class VaeSpec(SpecModel):
    """A conditional variational autoencoder of images."""

    latent: int = Field(16, ge=1, le=4096, description="dimension of the latent code of an image")
    width: int = Field(
        256, ge=1, le=65_536, description="units of each of the two hidden layers of the encoder and of the decoder"
    )
