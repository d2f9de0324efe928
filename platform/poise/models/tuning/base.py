"""The base class of the ways to tune a language model."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from poise.spec.registry import MethodSection

__all__ = ["Tuning"]


class Tuning(MethodSection, ABC):
    """Base of the ways to tune: a section `tuning` of a spec, whose fields are its options.

    In this order: `prepare` before anything is exported or trained, `add_adapters` before training, and
    `merge_adapters` after it.
    """

    @abstractmethod
    def prepare(self, model: nn.Module) -> list[str]:
        """Check the options against the model, which may be changed.

        Returns:
            Sentences for the user, such as which weights are not trained.

        Raises:
            UserError: the options do not fit the model.
        """

    @abstractmethod
    def add_adapters(self, model: nn.Module, seed: int) -> nn.Module:
        """The model to train: those of its parameters that require a gradient are trained.

        New weights are initialised from `seed`.

        Raises:
            UserError: this model cannot be tuned in this way.
        """

    @abstractmethod
    def merge_adapters(self, model: nn.Module) -> nn.Module:
        """From the trained model to one of the original architecture that computes the same."""

    def describe(self) -> str:
        """The way and its options for tables; by default its name."""
        return self.name
