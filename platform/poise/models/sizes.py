"""The sizes of networks. Networks on torch's meta device have sizes too, and take no memory for their weights."""

from __future__ import annotations

from torch import nn

__all__ = ["count_parameters", "state_bytes"]


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """The number of parameters of a model, each shared one counted once; with `trainable`, of those only."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trainable)


def state_bytes(model: nn.Module) -> int:
    """Bytes of the state dict of a model: parameters, and buffers such as running statistics and their counters."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
