"""From a network to its affine layers as linear operators, in the order of evaluation.

The network is traced; a list of its modules would not show where residual arms, normalisations and poolings act.
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
from poise.bounds.paths import Block, LayerPath, PathElement
from poise.bounds.walk import BATCH, NetworkWalk
from poise.user_code import describe_error

__all__ = ["Block", "LayerNorms", "LayerPath", "Network", "PathElement", "network_norms", "operator_norms"]


@dataclass(frozen=True)
class Network:
    """The properties of a network that bounds need.

    `layers`, and the `path` of data through them. `shift`: the constant that the network subtracts from its input
    before anything else (broadcasts against one example), so that its data radius is that of x - shift. `homogeneous`:
    whether every activation is a ReLU, or one with another slope below 0, as PAC-Bayes bounds require. `fixes_zero`:
    whether every activation maps 0 to 0, as covering arguments require.
    """

    layers: Sequence[LayerNorms]
    path: LayerPath
    shift: Tensor
    homogeneous: bool
    fixes_zero: bool = True

    @classmethod
    def chain(cls, layers: Sequence[LayerNorms]) -> Network:
        """A network of layers one after the other, with ReLU between them."""
        return cls(layers, tuple(range(len(layers))), torch.zeros(()), True)

    @property
    def width(self) -> int:
        """The number of rows of the widest layer."""
        return max(layer.width for layer in self.layers)

    @property
    def parameters(self) -> int:
        """The number of parameters in all kernels, without biases."""
        return sum(layer.parameters for layer in self.layers)


def operator_norms(model: nn.Module, input_shape: Sequence[int]) -> list[LayerNorms]:
    """One record per affine layer of `model` for inputs (N, *input_shape), in the order of evaluation.

    See `network_norms`, whose result also has the path through the layers.
    """
    return list(network_norms(model, input_shape).layers)


def network_norms(model: nn.Module, input_shape: Sequence[int]) -> Network:
    """Trace `model` in eval mode and measure each affine layer as an operator, in float64; the model is not changed.

    Batch normalisation after a layer is folded into the rows of that layer. Before a ReLU and a layer (pre-activation
    blocks) it is folded into the columns of that layer: ReLU(s x) = |s| ReLU(sign(s) x). Elsewhere it is a fixed map of
    norm max |s|. Group and layer normalisation is a fixed map of Lipschitz constant max |gain| / sqrt(eps), reached
    where a group is constant. Where the network begins with sums and products of the input with constants, scale * (x -
    shift), the scale is a fixed map. Constants that are added anywhere else are biases.

    Raises:
        ValueError: an unknown operation, or a network that cannot be traced; the message names it.
    """
    traced = _trace(model, input_shape)
    with torch.no_grad():
        walk = NetworkWalk(traced)
        path = walk.path_to_output()
        if not walk.layers:
            raise ValueError("the network has no layer with weights: there are no norms to report")
        norms = [measure(layer) for layer in walk.layers]
    shift = torch.zeros(()) if walk.shift is None else walk.shift
    return Network(norms, path, shift, walk.homogeneous, walk.fixes_zero)


def _trace(model: nn.Module, input_shape: Sequence[int]) -> fx.GraphModule:
    """A float64 copy of the model as a graph, with the shape of every node. ValueError for any error in its forward."""
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
        with torch.no_grad(), redirect_stderr(io.StringIO()):  # ShapeProp prints the traceback of an error
            ShapeProp(traced).propagate(images)
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(f"the network cannot be run in float64: {describe_error(cause)}") from error
    return traced
