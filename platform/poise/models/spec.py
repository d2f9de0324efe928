"""Which network a run trains, and how large it is, without building it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from poise.errors import UserError
from poise.models.plans import RESIDUAL, SMALLEST_SIDE, VGG, WIDTH, Architecture, ResidualPlan, Shape
from poise.spec import Input, Real, RunName, Section, mistake

__all__ = [
    "Architecture",
    "DecodingSpec",
    "LanguageModelSpec",
    "ModelSpec",
    "Shape",
    "VaeSpec",
    "check_shape",
    "num_llama_parameters",
    "num_parameters",
    "num_vae_parameters",
    "state_bytes",
]


class ModelSpec(Section):
    """The `model` section."""

    name: Architecture = Field(default="cnn", description="architecture")
    activation: Literal["relu", "silu", "softplus"] = Field(
        default="relu", description="activation everywhere in the network; softplus has beta 1"
    )
    width: int | None = Field(
        default=None, ge=1, le=1024, description="channels of the first convolution (default: the architecture's own)"
    )
    normalize: Literal["data", "none"] = Field(
        default="data", description="first layer: subtract mean and divide by std of the training pixels, or nothing"
    )
    channels_last: bool = Field(
        default=True,
        description="keep channels innermost in memory: faster convolutions, other rounding; not in residual networks "
        "narrower than 16, where oneDNN damages memory",
    )

    @property
    def base_width(self) -> int:
        """Channels of the first convolution, the architecture's own unless the spec says otherwise."""
        return self.width or WIDTH[self.name]


class _Size(NamedTuple):
    weights: int
    normed: int = 0  # channels that a batch normalisation follows


def check_shape(shape: Shape, classes: int) -> None:
    """Refuse images and label sets that no architecture here can take.

    Raises:
        UserError: a side under 4 pixels, no channel, or fewer than 2 classes.
    """
    if min(shape[1:]) < SMALLEST_SIDE or shape[0] < 1:
        raise UserError(f"images of shape {shape} are too small: at least 1 channel of {SMALLEST_SIDE}x{SMALLEST_SIDE}")
    if classes < 2:
        raise UserError(f"{classes} class cannot be told apart: the labels need at least 2 classes")


def num_parameters(spec: ModelSpec, shape: Shape, classes: int) -> int:
    """Trainable numbers of the network for images of `shape` (C, H, W) and `classes` labels, in closed form.

    Raises:
        UserError: see `check_shape`.
    """
    check_shape(shape, classes)
    return sum(size.weights + 2 * size.normed for size in _sizes(spec, shape, classes))


def state_bytes(spec: ModelSpec, shape: Shape, classes: int) -> int:
    """Bytes of the state dict in fp32: parameters, running statistics, their int64 counters, mean and std."""
    norms = [size.normed for size in _sizes(spec, shape, classes) if size.normed]
    normalize = 2 * shape[0] if spec.normalize == "data" else 0
    return 4 * (num_parameters(spec, shape, classes) + 2 * sum(norms) + normalize) + 8 * len(norms)


def _sizes(spec: ModelSpec, shape: Shape, classes: int) -> Iterator[_Size]:
    if spec.name in RESIDUAL:
        return _residual(RESIDUAL[spec.name], spec.base_width, shape[0], classes)
    if spec.name in VGG:
        return _vgg(VGG[spec.name], spec.base_width, shape[0], classes)
    return _cnn(spec.base_width, shape, classes)


def _residual(plan: ResidualPlan, width: int, channels: int, classes: int) -> Iterator[_Size]:
    yield _Size(9 * channels * width, normed=0 if plan.preactivated else width)
    inside = width
    for stage, factor in enumerate(plan.stages):
        outside = factor * width
        for block in range(plan.blocks):
            yield _Size(9 * inside * outside, normed=inside if plan.preactivated else outside)
            yield _Size(9 * outside * outside, normed=outside)
            if block == 0 and (stage > 0 or inside != outside):
                yield _Size(inside * outside, normed=0 if plan.preactivated else outside)
            inside = outside
    yield _Size((inside + 1) * classes, normed=inside if plan.preactivated else 0)


def _vgg(stages: tuple[tuple[int, ...], ...], width: int, channels: int, classes: int) -> Iterator[_Size]:
    for factor in (factor for stage in stages for factor in stage):
        yield _Size((9 * channels + 1) * factor * width, normed=factor * width)
        channels = factor * width
    yield _Size((channels + 1) * classes)


def _cnn(width: int, shape: Shape, classes: int) -> Iterator[_Size]:
    channels, height, side = shape
    yield _Size((16 * channels + 1) * width)
    yield _Size((16 * width + 1) * 2 * width)
    yield _Size((2 * width * (height // 4) * (side // 4) + 1) * 4 * width)
    yield _Size((4 * width + 1) * classes)


class DecodingSpec(Section):
    """How tokens are drawn from a language model."""

    max_tokens: int = Field(64, ge=1, le=1_000_000, description="longest response, in tokens")
    temperature: Annotated[Real, Field(ge=0, le=100)] = Field(Real(1), description="of the softmax; 0 is greedy")
    top_p: Annotated[Real, Field(gt=0, le=1)] = Field(
        Real(1), description="draw only among the likeliest tokens that have this probability together"
    )
    stop: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field(
        [], max_length=16, description="a response also ends where its text contains one of these strings"
    )


_MODEL_FILES = r"[^/]*\.(json|safetensors|model|jinja|tiktoken)|vocab\.txt|merges\.txt"
"""Weights, configuration and tokenizer directly below a model folder; what else lies there is not read."""


class LanguageModelSpec(Section):
    """A language model: what another run has left, a folder, or a new Llama; one of `run`, `folder` and `name`."""

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
        chosen = [key for key in sizes if getattr(self, key) != type(self).model_fields[key].default]
        if self.name is None and chosen:
            raise mistake(chosen[0], f"only a new model has a size to choose; that of a {sources[0]} is known")
        if self.hidden not in (width * self.heads for width in (32, 64, 128)):
            raise mistake("hidden", f"{self.hidden} is not {self.heads} heads of 32, 64 or 128 channels each")
        return self

    def inputs(self) -> Iterator[Input]:
        """The other run, or the files of the folder."""
        if self.run is not None:
            yield Input(("run",), "run", self.run, kinds=("finetune.sft", "align.selfplay"))
        if self.folder is not None:
            yield Input(("folder",), "files", self.folder, _MODEL_FILES)


def num_llama_parameters(spec: LanguageModelSpec, vocabulary: int) -> int:
    """Trainable numbers of a new model with so many tokens, in closed form: embedding and head are not tied."""
    layer = 4 * spec.hidden**2 + 3 * spec.hidden * (4 * spec.hidden) + 2 * spec.hidden
    return 2 * vocabulary * spec.hidden + spec.layers * layer + spec.hidden


class VaeSpec(Section):
    """A conditional variational autoencoder of images."""

    latent: int = Field(16, ge=1, le=4096, description="latent coordinates of an image")
    width: int = Field(256, ge=1, le=65_536, description="units of each of the two hidden layers, both ways")


def num_vae_parameters(spec: VaeSpec, shape: Shape, classes: int) -> int:
    """Trainable numbers of the autoencoder of images of `shape` (C, H, W), in closed form."""
    pixels, width = shape[0] * shape[1] * shape[2], spec.width
    ends = ((pixels + classes, 2 * spec.latent), (spec.latent + classes, pixels))
    return 1 + sum((inside + 1) * width + (width + 1) * width + (width + 1) * outside for inside, outside in ends)
