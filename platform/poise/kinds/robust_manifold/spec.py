"""`kind: robust.manifold`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from poise.kinds.common.target_model_spec import classifier_inputs
from poise.robust.spec import Eigenspace, Eps, StepSize, Threats
from poise.robust.step_sizes import DECAYING_STEPS
from poise.spec import ExactNumber, Input, RunName, RunSpec, SpecModel

__all__ = ["LatentSpec", "RobustManifoldSpec"]


class LatentSpec(SpecModel):
    """A ball around the code of each image, and the projected gradient ascent that searches it."""

    vae: RunName = Field(description="finished run of robust.vae on images of the same shape and classes")
    norm: Literal["linf", "l2"] = Field("linf", description="norm of the ball, in latent coordinates")
    eps: Eps = Field(
        ExactNumber(1),
        description="radius of the ball; codes of the prior have a standard deviation of 1 in each coordinate",
    )
    steps: int = Field(40, ge=1, le=1000, description="gradient steps of one run of the attack")
    step_size: StepSize | None = Field(
        None, description=f"length of a step in the ball's norm; default: {DECAYING_STEPS}"
    )
    restarts: int = Field(1, ge=1, le=1000, description="runs; those after the first start at random")

    def inputs(self) -> Iterator[Input]:
        """The autoencoder."""
        yield Input(("vae",), "run", self.vae, kinds=("robust.vae",))


class RobustManifoldSpec(RunSpec):
    """Accuracy of trained classifiers under attacks on the data manifold, off it, and in the full balls."""

    kind: Literal["robust.manifold"]
    runs: list[RunName] = Field(
        min_length=1, max_length=1000, description="finished runs of robust.train; a sweep stands for all its trials"
    )
    eigenspace: Eigenspace = Field(description="what counts as the manifold of the images")
    threats: Threats | None = Field(
        None, description="the balls and the PGD attacks in them; default, for each run, those of its test"
    )
    latent: LatentSpec | None = Field(None, description="attack on the codes that an autoencoder gives the images")
    num_examples: int = Field(1000, ge=1, description="test images to attack, the same share of each class")
    batch_size: int = Field(256, ge=1, le=65_536, description="images attacked at once; does not affect the result")

    def inputs(self) -> Iterator[Input]:
        """The runs of the classifiers, and the inputs of the sections."""
        yield from classifier_inputs(self.runs)
        yield from super().inputs()

    def cost(self) -> list[str]:
        """Image gradients of the attacks, where the threats are known."""
        lines = [f"{len(self.runs)} runs: an exact principal component analysis of the training images of each"]
        if self.threats:
            gradients = 3 * sum(threat.steps * threat.restarts for _, threat in self.threats.items())
            lines.append(
                f"at most {self.num_examples * gradients:,} image gradients for each: the full ball, on and off"
            )
        if self.latent:
            lines.append(f"at most {self.num_examples * self.latent.steps * self.latent.restarts:,} gradients of codes")
        return lines
