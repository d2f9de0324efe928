"""A model of the user's own, as the kinds call it: what it raises is said with its name, the batch and the line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import PoiseError, UserError
from poise.user_code import describe_error

__all__ = ["UserModel", "bare", "explain_backward"]

_AUTOGRAD = Path(torch.__file__).parent / "autograd" / "graph.py"
"""Every backward pass has a frame in it."""


class UserModel(nn.Module):
    """The module of a user, called `name` in messages. It maps images (N, ...) to logits (N, num_classes), unchanged.

    It has been shown two images already; what goes wrong later, with a batch of another size or in a later call, is a
    UserError. No forward hook, which a TorchScript model does not take.
    """

    def __init__(self, module: nn.Module, name: str, num_classes: int) -> None:
        super().__init__()
        self.module, self.name, self.num_classes = module, name, num_classes
        self._batch_shapes = [torch.Size()]  # of the last batch; in a list, which is set faster than an attribute

    def forward(self, x: Tensor) -> Tensor:
        self._batch_shapes[0] = x.shape
        try:
            logits: Tensor = self.module(x)
        except PoiseError:
            raise
        except Exception as error:
            raise self.explain(error, "on") from error
        shape = (len(x), self.num_classes)
        if not isinstance(logits, Tensor) or logits.shape != shape or not _is_alike(logits, x):
            shown = f"{_type_name(logits)} for a batch of shape {tuple(x.shape)}"
            wanted = f"logits of floats {shape} on {x.device.type}, as it did at first"
            raise UserError(f"the model {self.name} returned {shown}: it has to return {wanted}")
        return logits

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """That of the module itself, without another prefix."""
        return self.module.state_dict(*arguments, **options)

    def explain(self, error: Exception, where: str) -> UserError:
        """What the model raised `where` it met its last batch, and what a model has to do instead."""
        what = f"raised {type(error).__name__} {where} a batch of shape {tuple(self._batch_shapes[0])}"
        cure = (
            "set a smaller batch_size"
            if isinstance(error, torch.OutOfMemoryError)
            else "it has to take batches of any size, any number of times"
        )
        described = describe_error(error, source=True).removeprefix(f"{type(error).__name__}: ")
        return UserError(f"the model {self.name} {what}: {described}; {cure}")


def bare(model: nn.Module) -> nn.Module:
    """The module of the user itself, whose layers can be read."""
    return model.module if isinstance(model, UserModel) else model


@contextmanager
def explain_backward(model: nn.Module) -> Iterator[None]:
    """Turn what the backward pass of a `UserModel` raises into a UserError; all else passes through.

    A forward is explained by the model itself. Its graph is run by torch, which knows nothing of it.
    """
    try:
        yield
    except PoiseError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not isinstance(model, UserModel) or not any(Path(frame.filename) == _AUTOGRAD for frame in frames):
            raise
        raise model.explain(error, "in the backward pass of") from error


def _is_alike(logits: Tensor, x: Tensor) -> bool:
    return logits.is_floating_point() and logits.device == x.device


def _type_name(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device.type}"
    return type(value).__name__
