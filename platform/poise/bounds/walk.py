"""Along the nodes of a traced network: where its affine layers act, and what lies between them.

What cannot be read raises; nothing is skipped but the biases, which the theorems do not have (papers/bounds.md, 1.1 and
1.4 to 1.6).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poise.bounds.activations import Activation, activation_of
from poise.bounds.affine import Affine
from poise.bounds.functional import equivalent_module

__all__ = ["BATCH", "Block", "NetworkWalk", "Path", "Unit"]

BATCH = 2
"""Examples in the batch that shapes are propagated with: with one, a view could not be told from a change of batch."""


@dataclass(frozen=True)
class Block:
    """Two arms from one point that are summed; an arm without a layer is the identity."""

    main: Path
    shortcut: Path


Unit = int | float | Block
"""The index of a layer, the Lipschitz constant of a fixed map, or a residual block."""
Path = tuple[Unit, ...]


@dataclass(frozen=True)
class _InputMap:
    """The input x after nothing but sums and products with constants: scale * (x - shift)."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class _Flow:
    """What a node carries: the path behind it, and factors per channel that the next layer has yet to take.

    `input_map` is there as long as nothing but constants has met the input.
    """

    path: Path = ()
    scale: Tensor | None = None
    input_map: _InputMap | None = None

    def through(self, constant: float) -> _Flow:
        """Behind a fixed map."""
        return self if constant == 1 else replace(self, path=(*self.path, constant))

    def settled(self) -> _Flow:
        """With the waiting factors taken as a fixed map: nothing else can take them."""
        return self if self.scale is None else _Flow(self.path).through(self.scale.abs().max().item())


@dataclass
class NetworkWalk:
    """Follows the nodes of a traced network in their order, and collects its affine layers and their path.

    The graph has been propagated by `ShapeProp` with a batch of `BATCH` examples.
    """

    traced: fx.GraphModule
    layers: list[Affine] = field(default_factory=list)
    shift: Tensor | None = None
    homogeneous: bool = True
    fixes_zero: bool = True

    def to_the_end(self) -> Path:
        flows: dict[fx.Node, _Flow] = {}
        for node in self.traced.graph.nodes:
            if node.op == "output":
                if not isinstance(node.args[0], fx.Node) or node.args[0] not in flows:
                    raise ValueError("the network returns something else than one tensor")
                return self._entered(node, flows[node.args[0]]).settled().path
            if node.op == "get_attr" or "tensor_meta" not in node.meta:
                continue  # a parameter or buffer, read where it is used, or a size
            operands = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
            try:
                flows[node] = self._step(node, [flows[operand] for operand in operands if operand in flows])
            except (IndexError, TypeError) as error:  # the steps look for their operands by their place
                raise _unknown(node, f"{node.name} with operands by keyword, or without any,") from error
        raise ValueError("the network has no output")

    def _step(self, node: fx.Node, inputs: list[_Flow]) -> _Flow:
        if node.op == "placeholder":
            one = torch.ones((), dtype=torch.float64)
            return _Flow(input_map=_InputMap(one, torch.zeros_like(one)))
        if node.op == "call_module":
            return self._module(node, self.traced.get_submodule(str(node.target)), inputs)
        module = equivalent_module(self.traced, node)
        if module is not None:
            return self._module(node, module, inputs)
        steps = _METHODS if node.op == "call_method" else _FUNCTIONS
        if node.target not in steps:
            raise _unknown(node, getattr(node.target, "__name__", str(node.target)))
        return steps[node.target](self, node, *inputs)

    def _module(self, node: fx.Node, module: nn.Module, inputs: list[_Flow]) -> _Flow:
        flow = self._entered(node, inputs[0])
        activation = activation_of(module)
        if activation is not None:
            return self._activation(activation, flow)
        for kind, step in _MODULES.items():
            if isinstance(module, kind):
                return step(self, node, module, flow)
        raise _unknown(node, type(module).__name__)

    def _entered(self, node: fx.Node, flow: _Flow) -> _Flow:
        """With the constants that met the input as one fixed map and as the shift of the network."""
        known = flow.input_map
        if known is None:
            return flow
        if self.shift is not None and not torch.equal(self.shift, known.shift):
            raise _unknown(node, "a second use of the input, shifted by another constant than the first,")
        self.shift = known.shift
        return _Flow().through(known.scale.abs().max().item())

    def _activation(self, activation: Activation, flow: _Flow) -> _Flow:
        self.homogeneous = self.homogeneous and activation.homogeneous
        self.fixes_zero = self.fixes_zero and activation.fixes_zero
        return (flow if activation.homogeneous else flow.settled()).through(activation.lipschitz)

    def _affine(self, layer: Affine, flow: _Flow) -> _Flow:
        self.layers.append(layer if flow.scale is None else layer.scaled(columns=flow.scale))
        return _Flow((*flow.path, len(self.layers) - 1))

    def linear(self, node: fx.Node, module: nn.Linear, flow: _Flow) -> _Flow:
        if len(_shape(node)) != 1:
            raise _unknown(node, f"Linear on maps of shape {_shape(node)}")
        layer = Affine(str(node.target), module.weight, _shape(node.all_input_nodes[0]), _shape(node))
        return self._affine(layer, flow)

    def convolution(self, node: fx.Node, module: nn.Conv2d, flow: _Flow) -> _Flow:
        if module.padding_mode != "zeros":
            raise _unknown(node, f"Conv2d with a padding of {module.padding_mode}")
        dilation = _pair(module.dilation)
        weight, padding = module.weight, module.padding
        if padding == "same":
            weight, padding = _same_padding(node, weight, dilation)
        layer = Affine(
            str(node.target),
            weight,
            inside=_shape(node.all_input_nodes[0]),
            outside=_shape(node),
            stride=_pair(module.stride),
            padding=(0, 0) if padding == "valid" else _pair(padding),
            dilation=dilation,
            groups=module.groups,
            parameters=module.weight.numel(),
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

    def example_normalisation(
        self, node: fx.Node, module: nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d, flow: _Flow
    ) -> _Flow:
        if getattr(module, "track_running_stats", False):
            raise _unknown(node, "InstanceNorm2d with running statistics")
        gain = 1.0 if module.weight is None else module.weight.abs().max().item()
        self.homogeneous = False
        return flow.settled().through(gain / math.sqrt(module.eps))

    def same(self, node: fx.Node, *rest: Any) -> _Flow:
        flow: _Flow = rest[-1]
        return flow

    def reshape(self, node: fx.Node, *rest: Any) -> _Flow:
        flow = self._entered(node, rest[-1])
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        if math.prod(before) != math.prod(after) or node.meta["tensor_meta"].shape[0] != BATCH:
            raise _unknown(node, f"a reshape of {before} to {after}, which mixes examples,")
        if flow.scale is None or before == after:
            return flow
        if after == (math.prod(before),):
            return replace(flow, scale=flow.scale.repeat_interleave(math.prod(before[1:])))
        return flow.settled()

    def spatial_mean(self, node: fx.Node, flow: _Flow) -> _Flow:
        flow = self._entered(node, flow)
        before = _shape(node.all_input_nodes[0])
        axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
        axes = [axes] if isinstance(axes, int) else axes
        if len(before) != 3 or axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            raise _unknown(node, "a mean over anything but height and width")
        return flow.through(1 / math.sqrt(math.prod(before[1:])))

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
        if len(flows) == 1:
            return self._plus(flows[0], self._constant(node))
        if len({_shape(arg) for arg in node.all_input_nodes}) > 1:
            raise _unknown(node, "a sum that is not of two feature maps of one shape")
        one, other = (self._entered(node, flow).settled().path for flow in flows)
        return _Flow(_joined(one, other))

    def subtract(self, node: fx.Node, *flows: _Flow) -> _Flow:
        if len(flows) != 1:
            raise _unknown(node, "a difference of two feature maps")
        constant = self._constant(node)
        if self._starts_with_constant(node):
            return self._plus(self.negate(node, flows[0]), constant)
        return self._plus(flows[0], -constant)

    def multiply(self, node: fx.Node, *flows: _Flow) -> _Flow:
        if len(flows) != 1:
            raise _unknown(node, "a product of two feature maps")
        return self._times(node, flows[0], self._constant(node))

    def divide(self, node: fx.Node, *flows: _Flow) -> _Flow:
        if len(flows) != 1 or self._starts_with_constant(node):
            raise _unknown(node, "a division by a feature map")
        return self._times(node, flows[0], 1 / self._constant(node))

    def negate(self, node: fx.Node, flow: _Flow) -> _Flow:
        return self._times(node, flow, -torch.ones((), dtype=torch.float64))

    def _plus(self, flow: _Flow, constant: Tensor) -> _Flow:
        """A constant on the input moves its shift; anywhere else it is a bias, which the theorems do not have."""
        known = flow.input_map
        if known is None:
            return flow
        return replace(flow, input_map=_InputMap(known.scale, known.shift - constant / known.scale))

    def _times(self, node: fx.Node, flow: _Flow, constant: Tensor) -> _Flow:
        if not bool((constant != 0).all()) or not bool(constant.isfinite().all()):
            raise _unknown(node, "a product with 0 or with what is not finite")
        known = flow.input_map
        if known is None:
            return flow.settled().through(constant.abs().max().item())
        return replace(flow, input_map=_InputMap(known.scale * constant, known.shift))

    def _starts_with_constant(self, node: fx.Node) -> bool:
        """Whether the first operand is a number, a buffer or a parameter."""
        first = node.args[0]
        return not isinstance(first, fx.Node) or first.op == "get_attr"

    def _constant_node(self, node: fx.Node) -> fx.Node | None:
        """The buffer or parameter among the operands, if one is there."""
        return next((arg for arg in node.all_input_nodes if arg.op == "get_attr"), None)

    def _constant(self, node: fx.Node) -> Tensor:
        """The operand that is no feature map: a number, or a buffer or parameter of the network."""
        buffer = self._constant_node(node)
        if buffer is not None:
            owner, _, name = str(buffer.target).rpartition(".")
            value = getattr(self.traced.get_submodule(owner), name)
        else:
            value = next((arg for arg in node.args[:2] if not isinstance(arg, fx.Node)), None)
        if not isinstance(value, (int, float, Tensor)) or node.kwargs.get("alpha", 1) != 1:
            raise _unknown(node, f"{node.target} of anything but a feature map and a constant")
        return torch.as_tensor(value, dtype=torch.float64)


_MODULES: dict[type[nn.Module], Callable[..., _Flow]] = {
    nn.Conv2d: NetworkWalk.convolution,
    nn.Linear: NetworkWalk.linear,
    nn.InstanceNorm2d: NetworkWalk.example_normalisation,
    _BatchNorm: NetworkWalk.normalisation,
    nn.GroupNorm: NetworkWalk.example_normalisation,
    nn.LayerNorm: NetworkWalk.example_normalisation,
    nn.Identity: NetworkWalk.same,
    nn.Dropout: NetworkWalk.same,
    nn.Dropout2d: NetworkWalk.same,
    nn.Flatten: NetworkWalk.reshape,
    nn.Unflatten: NetworkWalk.reshape,
    nn.MaxPool2d: NetworkWalk.max_pool,
    nn.AvgPool2d: NetworkWalk.mean_pool,
    nn.AdaptiveAvgPool2d: NetworkWalk.mean_pool_to,
}
_FUNCTIONS: dict[Any, Callable[..., _Flow]] = {
    torch.flatten: NetworkWalk.reshape,
    torch.reshape: NetworkWalk.reshape,
    torch.mean: NetworkWalk.spatial_mean,
    operator.add: NetworkWalk.add,
    operator.iadd: NetworkWalk.add,
    torch.add: NetworkWalk.add,
    operator.sub: NetworkWalk.subtract,
    operator.isub: NetworkWalk.subtract,
    torch.sub: NetworkWalk.subtract,
    operator.mul: NetworkWalk.multiply,
    operator.imul: NetworkWalk.multiply,
    torch.mul: NetworkWalk.multiply,
    operator.truediv: NetworkWalk.divide,
    operator.itruediv: NetworkWalk.divide,
    torch.div: NetworkWalk.divide,
    operator.neg: NetworkWalk.negate,
    torch.neg: NetworkWalk.negate,
}
_METHODS: dict[Any, Callable[..., _Flow]] = {
    "flatten": NetworkWalk.reshape,
    "view": NetworkWalk.reshape,
    "reshape": NetworkWalk.reshape,
    "squeeze": NetworkWalk.reshape,
    "contiguous": NetworkWalk.same,
    "clone": NetworkWalk.same,
    "mean": NetworkWalk.spatial_mean,
    "add": NetworkWalk.add,
    "add_": NetworkWalk.add,
    "sub": NetworkWalk.subtract,
    "sub_": NetworkWalk.subtract,
    "mul": NetworkWalk.multiply,
    "mul_": NetworkWalk.multiply,
    "div": NetworkWalk.divide,
    "div_": NetworkWalk.divide,
    "neg": NetworkWalk.negate,
}


def _same_padding(node: fx.Node, weight: Tensor, dilation: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The kernel and the padding that do with equal sides what padding "same" does.

    An even kernel is padded by one pixel more at the end; with a row of zeros before it, it is an odd one.
    """
    padding = []
    for axis, spacing in enumerate(dilation):
        if weight.shape[2 + axis] % 2 == 0:
            if spacing > 1:
                raise _unknown(node, "Conv2d with padding 'same', an even kernel and a dilation")
            zeros = torch.zeros_like(weight.narrow(2 + axis, 0, 1))
            weight = torch.cat([zeros, weight], dim=2 + axis)
        padding.append(spacing * (weight.shape[2 + axis] - 1) // 2)
    return weight, (padding[0], padding[1])


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
