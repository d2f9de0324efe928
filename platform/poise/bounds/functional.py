"""The module that does the same as a functional call or a method in a traced network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

__all__ = ["equivalent_module"]

_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.leaky_relu: nn.LeakyReLU,
    F.elu: nn.ELU,
    F.selu: nn.SELU,
    F.celu: nn.CELU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.hardswish: nn.Hardswish,
    F.hardtanh: nn.Hardtanh,
    F.softplus: nn.Softplus,
    F.logsigmoid: nn.LogSigmoid,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    F.softsign: nn.Softsign,
    F.max_pool2d: nn.MaxPool2d,
    torch.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.dropout: nn.Dropout,
    F.dropout2d: nn.Dropout2d,
}
_METHODS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
_NOT_OF_A_MODULE = ("input", "inplace", "training", "return_indices", "count_include_pad")


def equivalent_module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """A module that maps the first argument of `node` as the call does; None where there is none.

    A dropout that is active in eval mode has none: it is random.
    """
    if node.op == "call_method":
        kind = _METHODS.get(str(node.target))
        return kind() if kind is not None else None
    kind = _FUNCTIONS.get(node.target)
    if kind is None:
        return None
    arguments = node.normalized_arguments(traced, normalize_to_only_use_kwargs=True)
    options = dict(node.kwargs) if arguments is None else dict(arguments.kwargs)
    if options.get("training") and issubclass(kind, (nn.Dropout, nn.Dropout2d)):
        return None
    return kind(**{name: _value(value) for name, value in options.items() if name not in _NOT_OF_A_MODULE})


def _value(value: Any) -> Any:
    """An option as modules take it: torch writes "as the kernel" as an empty list."""
    return None if isinstance(value, (list, tuple)) and not value else value
