"""From a network to its affine layers as linear operators, in the order in which data meets them.

The network is traced, never listed: residual arms, normalisations and poolings are found where they act. What cannot be
read raises; nothing is skipped but the biases, which the theorems do not have (papers/bounds.md, 1.1 and 1.4 to 1.6).
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.functional import relu
from torch.nn.modules.batchnorm import _BatchNorm

from poise.bounds.affine import Affine, LayerNorms, measure

__all__ = ["Block", "LayerNorms", "Network", "Path", "Unit", "network_norms", "operator_norms"]

SILU_LIPSCHITZ = 1.0998393194634333  # the largest slope of x * sigmoid(x)


@dataclass(frozen=True)
class Block:
    """Two arms from one point that are summed; an arm without a layer is the identity."""

    main: Path
    shortcut: Path


Unit = int | float | Block
"""The index of a layer, the Lipschitz constant of a fixed map, or a residual block."""
Path = tuple[Unit, ...]


@dataclass(frozen=True)
class Network:
    """What the bounds need of a network.

    `layers` and the `path` that data takes through them; `shift`, what the network subtracts from its input before
    anything else (broadcasts against one example), so that its data radius is that of x - shift; `homogeneous`, whether
    every activation is a ReLU.
    """

    layers: Sequence[LayerNorms]
    path: Path
    shift: Tensor
    homogeneous: bool

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
    the columns of that layer: ReLU(s x) = |s| ReLU(sign(s) x). Elsewhere it is a fixed map of norm max |s|.
    The scale of an input normalisation is a fixed map, its mean is the `shift`.

    Raises:
        ValueError: an operation that is not known, or a network that cannot be traced; the message names it.
    """
    copied = copy.deepcopy(model).double().eval()
    try:
        traced = fx.symbolic_trace(copied if list(copied.children()) else nn.Sequential(copied))
    except fx.proxy.TraceError as error:
        raise ValueError(f"the network cannot be traced, its forward depends on values: {error}") from error
    device = next((parameter.device for parameter in copied.parameters()), torch.device("cpu"))
    with torch.no_grad():
        ShapeProp(traced).propagate(torch.zeros(1, *input_shape, dtype=torch.float64, device=device))
        walk = _Walk(traced)
        path = walk.to_the_end()
        return Network([measure(layer) for layer in walk.layers], path, walk.shift, walk.homogeneous)


@dataclass(frozen=True)
class _Flow:
    """What a node carries: the path behind it, and factors per channel that the next layer has yet to take."""

    path: Path = ()
    scale: Tensor | None = None

    def through(self, constant: float) -> _Flow:
        """Behind a fixed map."""
        return self if constant == 1 else replace(self, path=(*self.path, constant))

    def settled(self) -> _Flow:
        """With the waiting factors taken as a fixed map: nothing else can take them."""
        return self if self.scale is None else _Flow(self.path).through(self.scale.max().item())


@dataclass
class _Walk:
    """Follows the nodes of a traced network in their order."""

    traced: fx.GraphModule
    layers: list[Affine] = field(default_factory=list)
    shift: Tensor = field(default_factory=lambda: torch.zeros(()))
    homogeneous: bool = True

    def to_the_end(self) -> Path:
        flows: dict[fx.Node, _Flow] = {}
        for node in self.traced.graph.nodes:
            if node.op == "output":
                return flows[node.args[0]].settled().path
            if node.op != "get_attr":
                flows[node] = self._step(node, [flows[arg] for arg in node.args if arg in flows])
        raise ValueError("the network has no output")

    def _step(self, node: fx.Node, inputs: list[_Flow]) -> _Flow:
        if node.op == "placeholder":
            return _Flow()
        if node.op == "call_module":
            module = self.traced.get_submodule(str(node.target))
            for kind, step in _MODULES.items():
                if isinstance(module, kind):
                    return step(self, node, module, *inputs)
            raise _unknown(node, type(module).__name__)
        if node.op == "call_function" and node.target in _FUNCTIONS:
            return _FUNCTIONS[node.target](self, node, *inputs)
        raise _unknown(node, getattr(node.target, "__name__", str(node.target)))

    def _affine(self, layer: Affine, flow: _Flow) -> _Flow:
        self.layers.append(layer if flow.scale is None else layer.scaled(columns=flow.scale))
        return _Flow((*flow.path, len(self.layers) - 1))

    def linear(self, node: fx.Node, module: nn.Linear, flow: _Flow) -> _Flow:
        if len(_shape(node)) != 1:
            raise _unknown(node, f"Linear on maps of shape {_shape(node)}")
        layer = Affine(str(node.target), module.weight, _shape(node.all_input_nodes[0]), _shape(node))
        return self._affine(layer, flow)

    def convolution(self, node: fx.Node, module: nn.Conv2d, flow: _Flow) -> _Flow:
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            raise _unknown(node, f"Conv2d with padding {module.padding!r} of {module.padding_mode}")
        stride, padding, dilation = (_pair(value) for value in (module.stride, module.padding, module.dilation))
        inside, outside = _shape(node.all_input_nodes[0]), _shape(node)
        layer = Affine(
            str(node.target), module.weight, inside, outside, stride, padding, dilation, groups=module.groups
        )
        return self._affine(layer, flow)

    def normalisation(self, node: fx.Node, module: _BatchNorm, flow: _Flow) -> _Flow:
        if module.running_var is None:
            raise _unknown(node, "BatchNorm without running statistics")
        gain = torch.ones_like(module.running_var) if module.weight is None else module.weight
        scale = gain / (module.running_var + module.eps).sqrt()
        before, last = node.all_input_nodes[0], flow.path[-1] if flow.path else None
        if isinstance(last, int) and len(before.users) == 1 and self._is_affine(before):
            self.layers[last] = self.layers[last].scaled(rows=scale)
            return flow
        return replace(flow, scale=scale.abs() if flow.scale is None else flow.scale * scale.abs())

    def _is_affine(self, node: fx.Node) -> bool:
        affine = (nn.Conv2d, nn.Linear)
        return node.op == "call_module" and isinstance(self.traced.get_submodule(str(node.target)), affine)

    def smooth(self, node: fx.Node, module: nn.Module, flow: _Flow) -> _Flow:
        self.homogeneous = False
        return flow.settled().through(SILU_LIPSCHITZ if isinstance(module, nn.SiLU) else 1)

    def same(self, node: fx.Node, *rest: Any) -> _Flow:
        flow: _Flow = rest[-1]
        return flow

    def flatten(self, node: fx.Node, *rest: Any) -> _Flow:
        flow: _Flow = rest[-1]
        shape = _shape(node.all_input_nodes[0])
        if _shape(node) != (math.prod(shape),):
            raise _unknown(node, "flatten of anything but a whole example")
        return flow if flow.scale is None else replace(flow, scale=flow.scale.repeat_interleave(math.prod(shape[1:])))

    def max_pool(self, node: fx.Node, module: nn.MaxPool2d, flow: _Flow) -> _Flow:
        if _pair(module.dilation) != (1, 1):
            raise _unknown(node, "MaxPool2d with dilation")
        return flow.through(math.sqrt(_overlap(_pair(module.kernel_size), _pair(module.stride))))

    def mean_pool(self, node: fx.Node, module: nn.AvgPool2d, flow: _Flow) -> _Flow:
        if module.ceil_mode or module.divisor_override or _pair(module.padding) != (0, 0):
            raise _unknown(node, "AvgPool2d with padding, ceil_mode or another divisor")
        kernel = _pair(module.kernel_size)
        return flow.through(math.sqrt(_overlap(kernel, _pair(module.stride)) / math.prod(kernel)))

    def mean_pool_to(self, node: fx.Node, module: nn.AdaptiveAvgPool2d, flow: _Flow) -> _Flow:
        inside, outside = _shape(node.all_input_nodes[0])[1:], _shape(node)[1:]
        if any(side % into for side, into in zip(inside, outside, strict=True)):
            raise _unknown(node, f"AdaptiveAvgPool2d from {inside} to {outside}, windows of unequal size")
        return flow.through(math.sqrt(math.prod(outside) / math.prod(inside)))

    def add(self, node: fx.Node, *flows: _Flow) -> _Flow:
        if len(flows) != 2 or len({_shape(arg) for arg in node.all_input_nodes}) > 1:
            raise _unknown(node, "a sum that is not of two feature maps of one shape")
        one, other = (flow.settled().path for flow in flows)
        return _Flow(_joined(one, other))

    def subtract(self, node: fx.Node, *flows: _Flow) -> _Flow:
        if len(flows) != 1 or node.all_input_nodes[0].op != "placeholder":
            raise _unknown(node, "a difference that is not that of the input and a constant")
        self.shift = self._constant(node)
        return flows[0]

    def divide(self, node: fx.Node, *flows: _Flow) -> _Flow:
        constant = self._constant(node)
        return flows[0].settled().through(1 / constant.abs().min().item())

    def _constant(self, node: fx.Node) -> Tensor:
        """The second operand: a number, or a buffer or parameter of the network."""
        value = node.args[1]
        if isinstance(value, fx.Node) and value.op == "get_attr":
            owner, _, name = str(value.target).rpartition(".")
            value = getattr(self.traced.get_submodule(owner), name)
        if not isinstance(value, (int, float, Tensor)):
            raise _unknown(node, "a division by a feature map")
        return torch.as_tensor(value, dtype=torch.float64)


_MODULES: dict[type[nn.Module], Callable[..., _Flow]] = {
    nn.Conv2d: _Walk.convolution,
    nn.Linear: _Walk.linear,
    _BatchNorm: _Walk.normalisation,
    nn.ReLU: _Walk.same,
    nn.Softplus: _Walk.smooth,
    nn.SiLU: _Walk.smooth,
    nn.Identity: _Walk.same,
    nn.Dropout: _Walk.same,
    nn.Flatten: _Walk.flatten,
    nn.MaxPool2d: _Walk.max_pool,
    nn.AvgPool2d: _Walk.mean_pool,
    nn.AdaptiveAvgPool2d: _Walk.mean_pool_to,
}
_FUNCTIONS: dict[Any, Callable[..., _Flow]] = {
    relu: _Walk.same,
    torch.relu: _Walk.same,
    torch.flatten: _Walk.flatten,
    operator.add: _Walk.add,
    operator.sub: _Walk.subtract,
    operator.truediv: _Walk.divide,
}


def _joined(main: Path, shortcut: Path) -> Path:
    """The common part of two paths, then what they do apart as one block."""
    common = next((i for i, (a, b) in enumerate(zip(main, shortcut, strict=False)) if a != b), None)
    common = min(len(main), len(shortcut)) if common is None else common
    return (*main[:common], Block(main[common:], shortcut[common:]))


def _overlap(kernel: tuple[int, int], stride: tuple[int, int]) -> int:
    """The most windows that one pixel is in."""
    return math.prod(math.ceil(k / s) for k, s in zip(kernel, stride, strict=True))


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of one example at a node."""
    return tuple(node.meta["tensor_meta"].shape[1:])


def _pair(value: Any) -> tuple[int, int]:
    one, other = (value, value) if isinstance(value, int) else value
    return one, other


def _unknown(node: fx.Node, what: str) -> ValueError:
    return ValueError(f"{node.name}: the norms of {what} are not known; a bound that skipped it would be none")
