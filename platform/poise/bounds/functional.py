"""The module that computes the same as a functional call or a method call in a traced network."""

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
_CALL_ONLY = ("input", "inplace", "training", "return_indices", "count_include_pad")
"""Arguments of functions that the modules do not need, or do not have."""


def equivalent_module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """A module that maps the first argument of `node` as the call does; None where there is none.

    A dropout that is active in eval mode has no equivalent module: it is random.
    """
    if node.op == "call_method":
        module_type = _METHODS.get(str(node.target))
        return module_type() if module_type is not None else None
    module_type = _FUNCTIONS.get(node.target)
    if module_type is None:
        return None
    arguments = node.normalized_arguments(traced, normalize_to_only_use_kwargs=True)
    options = dict(node.kwargs) if arguments is None else dict(arguments.kwargs)
    if options.get("training") and issubclass(module_type, (nn.Dropout, nn.Dropout2d)):
        return None
    module_options = {name: _option(value) for name, value in options.items() if name not in _CALL_ONLY}
    return module_type(**module_options)


def _option(value: Any) -> Any:
    """An option as modules take it: functions write "same as the kernel" as an empty list, modules as None."""
    return None if isinstance(value, (list, tuple)) and not value else value
