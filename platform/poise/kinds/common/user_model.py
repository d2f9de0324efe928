"""A model from the user's code: how it is made, tried and called. Its errors name the model, the batch and the line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.data.images.datasets import ImageSet, to_float
from poise.errors import PoiseError, UserError
from poise.models.spec import ModelSpec
from poise.robust.attacks import attack_mode
from poise.user_code import current_folder_first, describe_error, explain_errors, load_attribute

__all__ = [
    "UserModel",
    "build_classifier",
    "call_function",
    "check_state",
    "count_classes",
    "explain_backward",
    "make_module",
    "unwrap_user_model",
]

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


def build_classifier(spec: ModelSpec, images: ImageSet, classes: int, seed: int) -> nn.Module:
    """The network of `make_module` in training mode, once it has been tried on two images.

    Raises:
        UserError: the function fails, or the network cannot classify these images or has nothing to train.
    """
    name = f"the model {spec.function}"
    model = make_module(spec, seed)
    with torch.random.fork_rng(devices=[]):
        count_classes(model, images, classes, name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.function: {name} has no parameter to train")
    return model.train()


def make_module(spec: ModelSpec, seed: int) -> nn.Module:
    """The network that the user's function returns, on the CPU.

    Its random weights are a function of `seed`, as far as torch draws them; the global random state is not changed.

    Raises:
        UserError: as `call_function`, or the state dict of the network holds something else than tensors.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = call_function(str(spec.function), spec.arguments, "model.function")
    check_state(model, str(spec.function))
    return model


def call_function(reference: str, arguments: Mapping[str, Any], where: str) -> nn.Module:
    """The module that the user's function returns for these arguments; `where` is the field that names the function.

    Raises:
        UserError: code is not allowed, the function fails, or it returns something else.
    """
    function = load_attribute(reference, where)
    with explain_errors(f"{where}: {reference}"), current_folder_first():
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise UserError(f"{where}: {reference} returned a {type(model).__name__}, not an nn.Module")
    return model


def check_state(model: nn.Module, name: str) -> None:
    """Check that the state dict holds tensors only, as its digest needs. UserError otherwise."""
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"the model {name} has {key} in its state dict, which is a {type(value).__name__}, not a tensor: keep "
                "it out of there, or make it a buffer"
            )


def count_classes(model: nn.Module, images: ImageSet, classes: int, name: str = "the model") -> int:
    """The number of logits of the model, from its output on two images; `name` stands for the model in messages.

    A forward pass with gradients is tried as well.

    Raises:
        UserError: the forward of the model fails, or it does not return logits of at least so many `classes`.
    """
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    x = to_float(images.images[:2].to(device))
    shape = tuple(x.shape[1:])
    explain_forward = explain_errors(f"{name} does not take images {shape}", defect=f"{name} fails on images {shape}")
    with explain_forward, attack_mode(model), torch.no_grad():
        logits = model(x)
    explain_gradient = explain_errors(f"{name} fails on images {shape} that need a gradient")
    with explain_gradient, attack_mode(model), torch.enable_grad():
        model(x.clone().requires_grad_().clone())
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
        output = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"{name} gives {output} for {len(x)} images: logits (N, classes) of floats are needed")
    if logits.shape[1] < classes:
        raise UserError(f"{name} tells {logits.shape[1]} classes apart and the data set has {classes}")
    return int(logits.shape[1])


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
