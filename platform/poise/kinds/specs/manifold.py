"""`kind: robust.vae` and `kind: robust.manifold`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from poise.data.spec import DataSpec, known_sizes
from poise.kinds.specs.cost import in_bytes
from poise.models.spec import VaeSpec, num_vae_parameters
from poise.robust.spec import Eigenspace, Threats
from poise.spec import Input, MetricSource, Real, RunName, RunSpec, Section, row_sources, summary_sources
from poise.train.spec import TrainSpec

__all__ = ["LatentSpec", "RobustManifoldSpec", "RobustVaeSpec"]


class RobustVaeSpec(RunSpec):
    """Training of a conditional variational autoencoder, whose decoder attacks on the manifold go through."""

    kind: Literal["robust.vae"]
    model: VaeSpec = Field(VaeSpec(), description="size of the autoencoder")
    data: DataSpec = Field(description="data set, batches and augmentation")
    train: TrainSpec = Field(description="length, optimizer, schedule, checkpoints")

    @model_validator(mode="after")
    def _fits(self) -> RobustVaeSpec:
        self.workers.check_shares("data.batch_size", self.data.batch_size)
        return self

    def metrics(self) -> dict[str, MetricSource]:
        """The evidence lower bound and its parts."""
        names = ("elbo", "reconstruction", "kl", "error")
        at_the_end = summary_sources(["measured"], names, "test")
        if self.data.validation == 0:
            return row_sources(["loss"], "train") | at_the_end | row_sources(names, "test")
        return row_sources(["loss"], "train") | at_the_end | row_sources(names, "validation", during=True)

    def cost(self) -> list[str]:
        """Steps, images and bytes."""
        sizes = known_sizes(self.data)
        if sizes is None:
            return ["steps, parameters and bytes: known when the data set is read"]
        weights = num_vae_parameters(self.model, sizes.shape, sizes.classes)
        steps_per_epoch = self.train.plan(sizes.train // self.data.batch_size).steps
        steps = self.train.total_steps(steps_per_epoch)
        return [
            f"{steps:,} optimizer steps, {steps / steps_per_epoch:.4g} epochs of {sizes.train:,} images",
            f"{weights:,} parameters, {in_bytes(4 * weights)}",
        ]


class LatentSpec(Section):
    """A ball around the code of each image, and the projected gradient ascent that searches it."""

    vae: RunName = Field(description="finished run of robust.vae on images of the same shape and classes")
    norm: Literal["linf", "l2"] = Field("linf", description="norm of the ball, in latent coordinates")
    eps: Annotated[Real, Field(ge=0, le=1_000_000)] = Field(
        Real(1), description="radius of the ball; codes of the prior have a standard deviation of 1 in each coordinate"
    )
    steps: int = Field(40, ge=1, le=1000, description="gradient steps of one run of the attack")
    step_size: Annotated[Real, Field(gt=0, le=1_000_000)] | None = Field(
        None, description="length of a step in the ball's norm; default: steps that decay from eps to 0 on a cosine"
    )
    restarts: int = Field(1, ge=1, le=1000, description="runs; those after the first start at random")

    def inputs(self) -> Iterator[Input]:
        """The autoencoder."""
        yield Input(("vae",), "run", self.vae, kinds=("robust.vae",))


class RobustManifoldSpec(RunSpec):
    """How trained classifiers withstand attacks on the data manifold, off it, and anywhere in the same balls."""

    kind: Literal["robust.manifold"]
    runs: list[RunName] = Field(
        min_length=1, max_length=1000, description="finished runs of robust.train; a sweep stands for all its trials"
    )
    eigenspace: Eigenspace = Field(description="what counts as the manifold of the images")
    threats: Threats | None = Field(
        None, description="the balls and how they are searched, by PGD; default, of each run, those of its test"
    )
    latent: LatentSpec | None = Field(None, description="attack on the codes that an autoencoder gives the images")
    examples: int = Field(1000, ge=1, description="test images to attack, the same share of each class")
    batch_size: int = Field(256, ge=1, le=65_536, description="images attacked at once; the result does not hang on it")

    def inputs(self) -> Iterator[Input]:
        """The classifiers, and what the sections read."""
        for index, name in enumerate(self.runs):
            yield Input(("runs", index), "run", name, kinds=("robust.train", "sweep"))
        yield from super().inputs()

    def cost(self) -> list[str]:
        """Image gradients of the attacks, where the threats are known."""
        lines = [f"{len(self.runs)} runs: an exact principal component analysis of the training images of each"]
        if self.threats:
            gradients = 3 * sum(threat.steps * threat.restarts for _, threat in self.threats.items())
            lines.append(f"at most {self.examples * gradients:,} image gradients for each: anywhere, on and off")
        if self.latent:
            lines.append(f"at most {self.examples * self.latent.steps * self.latent.restarts:,} gradients of codes")
        return lines
