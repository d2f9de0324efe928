"""A model from the user's code, as the kinds call it: its errors name the model, the batch and the line."""

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

__all__ = ["UserModel", "explain_backward", "unwrap_user_model"]

_AUTOGRAD = Path(torch.__file__).parent / "autograd" / "graph.py"
"""The file of torch that has a frame in the traceback of every backward pass."""


class UserModel(nn.Module):
    """The module of a user, called `name` in messages. It maps images (N, ...) to logits (N, num_classes), unchanged.

    `count_classes` has already called it on two images. An error in a later call, such as with a batch of another size,
    becomes a UserError. It wraps the module instead of using a forward hook, because a TorchScript model takes none.
    """

    def __init__(self, module: nn.Module, name: str, num_classes: int) -> None:
        super().__init__()
        self.module = module
        self.name = name
        self.num_classes = num_classes
        # The shape of the last batch. In a list, because nn.Module makes setting an attribute slow.
        self._batch_shapes = [torch.Size()]

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
            returned = f"{_type_name(logits)} for a batch of shape {tuple(x.shape)}"
            expected = f"logits of floats {shape} on {x.device.type}, as it did at first"
            raise UserError(f"the model {self.name} returned {returned}: it has to return {expected}")
        return logits

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """The state dict of the user's module, without a prefix."""
        return self.module.state_dict(*arguments, **options)

    def explain(self, error: Exception, where: str) -> UserError:
        """A UserError with what the model raised, for which batch, and what to do; `where` precedes "a batch"."""
        what = f"raised {type(error).__name__} {where} a batch of shape {tuple(self._batch_shapes[0])}"
        cure = (
            "set a smaller batch_size"
            if isinstance(error, torch.OutOfMemoryError)
            else "it has to take batches of any size, any number of times"
        )
        described = describe_error(error, source=True).removeprefix(f"{type(error).__name__}: ")
        return UserError(f"the model {self.name} {what}: {described}; {cure}")


def unwrap_user_model(model: nn.Module) -> nn.Module:
    """The user's module, whose layers can be inspected; any other model unchanged."""
    return model.module if isinstance(model, UserModel) else model


@contextmanager
def explain_backward(model: nn.Module) -> Iterator[None]:
    """Turn errors of the backward pass of a `UserModel` into a UserError; all others pass through.

    Errors of the forward pass are explained by `UserModel.forward`. The backward pass is run by torch, outside of it.
    """
    try:
        yield
    except PoiseError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        is_backward = any(Path(frame.filename) == _AUTOGRAD for frame in frames)
        if not isinstance(model, UserModel) or not is_backward:
            raise
        raise model.explain(error, "in the backward pass of") from error


def _is_alike(logits: Tensor, x: Tensor) -> bool:
    return logits.is_floating_point() and logits.device == x.device


def _type_name(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device.type}"
    return type(value).__name__
