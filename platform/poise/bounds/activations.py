"""The properties of activations that bounds need: Lipschitz constant, homogeneity, and whether they map 0 to 0."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["Activation", "activation_of"]


@dataclass(frozen=True)
class Activation:
    """The properties of an elementwise function f that bounds need.

    `lipschitz`: the largest absolute slope. `homogeneous`: f(c x) = c f(x) for every c >= 0, which PAC-Bayes bounds use
    to balance the layers. `fixes_zero`: f(0) = 0, without which the covering arguments do not hold.
    """

    lipschitz: float
    homogeneous: bool = False
    fixes_zero: bool = True


_SELU_SLOPE = 1.0507009873554804934193349852946 * 1.6732632423543772848170429916717
_FIXED_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(1, homogeneous=True),
    nn.ReLU6: Activation(1),
    nn.Tanh: Activation(1),
    nn.Tanhshrink: Activation(1),
    nn.Softshrink: Activation(1),
    nn.Softsign: Activation(1),
    nn.CELU: Activation(1),
    nn.SELU: Activation(_SELU_SLOPE),
    nn.SiLU: Activation(1.0998393201288669),
    nn.Mish: Activation(1.0884981612508700),
    nn.Hardswish: Activation(1.5),
    nn.Softplus: Activation(1, fixes_zero=False),
    nn.LogSigmoid: Activation(1, fixes_zero=False),
    nn.Sigmoid: Activation(1 / 4, fixes_zero=False),
    nn.Hardsigmoid: Activation(1 / 6, fixes_zero=False),
}
"""The activations whose constants do not depend on their options."""

_GELU_SLOPES = {"none": 1.1289041451850000, "tanh": 1.1289930686582000}


def activation_of(module: nn.Module) -> Activation | None:
    """The properties of an activation module; None for any other module."""
    for kind, activation in _FIXED_ACTIVATIONS.items():
        if type(module) is kind:
            return activation
    if isinstance(module, nn.LeakyReLU):
        return Activation(max(1.0, abs(module.negative_slope)), homogeneous=True)
    if isinstance(module, nn.PReLU):
        return Activation(max(1.0, module.weight.abs().max().item()), homogeneous=True)
    if isinstance(module, nn.ELU):
        return Activation(max(1.0, abs(module.alpha)))
    if isinstance(module, nn.GELU):
        return Activation(_GELU_SLOPES[module.approximate])
    if isinstance(module, nn.Hardtanh):
        return Activation(1, fixes_zero=module.min_val <= 0 <= module.max_val)
    return None
