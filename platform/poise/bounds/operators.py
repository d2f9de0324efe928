"""From a network to its affine layers as linear operators, in the order in which data meets them.

The network is traced, never listed: residual arms, normalisations and poolings are found where they act.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from poise.bounds.affine import LayerNorms, measure
from poise.bounds.walk import BATCH, Block, NetworkWalk, Path, Unit
from poise.user_code import describe_error

__all__ = ["Block", "LayerNorms", "Network", "Path", "Unit", "network_norms", "operator_norms"]


@dataclass(frozen=True)
class Network:
    """What the bounds need of a network.

    `layers` and the `path` that data takes through them; `shift`, what the network subtracts from its input before
    anything else (broadcasts against one example), so that its data radius is that of x - shift; `homogeneous`, whether
    every activation is a ReLU or one with another slope below 0, as PAC-Bayes bounds ask; `fixes_zero`, whether every
    activation maps 0 to 0, as covering arguments ask.
    """

    layers: Sequence[LayerNorms]
    path: Path
    shift: Tensor
    homogeneous: bool
    fixes_zero: bool = True

    @classmethod
    def chain(cls, layers: Sequence[LayerNorms]) -> Network:
        """Layers one after the other, ReLU between them."""
        return cls(layers, tuple(range(len(layers))), torch.zeros(()), True)

    @property
    def width(self) -> int:
        """The rows of the widest layer."""
        return max(layer.width for layer in self.layers)

    @property
    def parameters(self) -> int:
        """The numbers in all kernels, biases left out."""
        return sum(layer.parameters for layer in self.layers)


def operator_norms(model: nn.Module, input_shape: Sequence[int]) -> list[LayerNorms]:
    """One record per affine layer of `model` for inputs (N, *input_shape), in the order of evaluation.

    See `network_norms`, which also says how the layers are joined.
    """
    return list(network_norms(model, input_shape).layers)


def network_norms(model: nn.Module, input_shape: Sequence[int]) -> Network:
    """Trace `model` in eval mode and measure each affine layer as an operator, in float64; the model is not touched.

    Batch normalisation after a layer is folded into its rows; before a ReLU and a layer (pre-activated blocks), into
    the columns of that layer: ReLU(s x) = |s| ReLU(sign(s) x). Elsewhere it is a fixed map of norm max |s|. Group and
    layer normalisation is a fixed map of Lipschitz constant max |gain| / sqrt(eps), reached where a group is constant.
    Of sums and products of the input with constants, scale * (x - shift), the scale is a fixed map. Constants that are
    added anywhere else are biases.

    Raises:
        ValueError: an operation that is not known, or a network that cannot be traced; the message names it.
    """
    traced = _trace(model, input_shape)
    with torch.no_grad():
        walk = NetworkWalk(traced)
        path = walk.to_the_end()
        if not walk.layers:
            raise ValueError("the network has no layer with weights: there are no norms to report")
        norms = [measure(layer) for layer in walk.layers]
    shift = torch.zeros(()) if walk.shift is None else walk.shift
    return Network(norms, path, shift, walk.homogeneous, walk.fixes_zero)


def _trace(model: nn.Module, input_shape: Sequence[int]) -> fx.GraphModule:
    """A float64 copy of the model as a graph, with the shape of every node; ValueError for any error of its forward."""
    try:
        copied = copy.deepcopy(model).double().eval()
    except Exception as error:
        raise ValueError(f"the network cannot be copied, to be run in float64: {describe_error(error)}") from error
    try:
        traced = fx.symbolic_trace(copied if list(copied.children()) else nn.Sequential(copied))
    except fx.proxy.TraceError as error:
        raise ValueError(
            f"the network cannot be traced, its forward depends on values: {describe_error(error)}"
        ) from error
    except Exception as error:
        raise ValueError(f"the network cannot be traced: {describe_error(error)}") from error
    device = next((parameter.device for parameter in copied.parameters()), torch.device("cpu"))
    images = torch.zeros(BATCH, *input_shape, dtype=torch.float64, device=device)
    try:
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # it prints the traceback of an error
            ShapeProp(traced).propagate(images)
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"the network cannot be run in float64: {describe_error(cause)}") from error
    return traced
