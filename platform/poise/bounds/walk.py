"""The path of data through the nodes of a traced network: its affine layers, and the maps between them.

An unknown operation raises. Nothing is skipped but the biases, which the theorems do not have.
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
from poise.bounds.paths import InputMap, LayerPath, NodeState, join

__all__ = ["BATCH", "NetworkWalk"]

BATCH = 2
"""The batch size that shapes are propagated with; not 1, so that a reshape that mixes examples can be recognised."""


@dataclass
class NetworkWalk:
    """Goes through the nodes of a traced network in their order, and collects its affine layers and their path.

    `ShapeProp` must have propagated a batch of `BATCH` examples through the graph.
    """

    traced: fx.GraphModule
    layers: list[Affine] = field(default_factory=list)
    shift: Tensor | None = None
    homogeneous: bool = True
    fixes_zero: bool = True

    def path_to_output(self) -> LayerPath:
        """The path from input to output; afterwards `layers` and the other fields are complete."""
        states: dict[fx.Node, NodeState] = {}
        for node in self.traced.graph.nodes:
            if node.op == "output":
                if not isinstance(node.args[0], fx.Node) or node.args[0] not in states:
                    raise ValueError("the network returns something else than one tensor")
                return self._without_input_map(node, states[node.args[0]]).with_scale_in_path().path
            if node.op == "get_attr" or "tensor_meta" not in node.meta:
                continue  # a parameter or buffer, which is read where it is used, or a size
            operands = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node)]
            inputs = [states[operand] for operand in operands if operand in states]
            try:
                states[node] = self._step(node, inputs)
            except (IndexError, TypeError) as error:  # the steps expect their operands by position
                raise _unknown(node, f"{node.name} with operands by keyword, or without any,") from error
        raise ValueError("the network has no output")

    def _step(self, node: fx.Node, inputs: list[NodeState]) -> NodeState:
        """The state at a node from the states of its operands."""
        if node.op == "placeholder":
            one = torch.ones((), dtype=torch.float64)
            return NodeState(input_map=InputMap(one, torch.zeros_like(one)))
        if node.op == "call_module":
            return self._module(node, self.traced.get_submodule(str(node.target)), inputs)
        module = equivalent_module(self.traced, node)
        if module is not None:
            return self._module(node, module, inputs)
        steps = _METHODS if node.op == "call_method" else _FUNCTIONS
        if node.target not in steps:
            raise _unknown(node, getattr(node.target, "__name__", str(node.target)))
        return steps[node.target](self, node, *inputs)

    def _module(self, node: fx.Node, module: nn.Module, inputs: list[NodeState]) -> NodeState:
        """The state after a module, or after a call that is equivalent to one."""
        state = self._without_input_map(node, inputs[0])
        activation = activation_of(module)
        if activation is not None:
            return self._activation(activation, state)
        for kind, step in _MODULES.items():
            if isinstance(module, kind):
                return step(self, node, module, state)
        raise _unknown(node, type(module).__name__)

    def _without_input_map(self, node: fx.Node, state: NodeState) -> NodeState:
        """The state with `input_map` turned into a fixed map and into the shift of the network."""
        input_map = state.input_map
        if input_map is None:
            return state
        if self.shift is not None and not torch.equal(self.shift, input_map.shift):
            raise _unknown(node, "a second use of the input, shifted by another constant than the first,")
        self.shift = input_map.shift
        return NodeState().through(input_map.scale.abs().max().item())

    def _activation(self, activation: Activation, state: NodeState) -> NodeState:
        """The state after an activation."""
        self.homogeneous = self.homogeneous and activation.homogeneous
        self.fixes_zero = self.fixes_zero and activation.fixes_zero
        # a positive factor passes through a homogeneous activation: the next layer can still take it
        before = state if activation.homogeneous else state.with_scale_in_path()
        return before.through(activation.lipschitz)

    def _affine(self, layer: Affine, state: NodeState) -> NodeState:
        """The state after `layer`, which takes the factors that wait."""
        self.layers.append(layer if state.scale is None else layer.scaled(columns=state.scale))
        return NodeState((*state.path, len(self.layers) - 1))

    def linear(self, node: fx.Node, module: nn.Linear, state: NodeState) -> NodeState:
        """A Linear layer on vectors."""
        if len(_shape(node)) != 1:
            raise _unknown(node, f"Linear on maps of shape {_shape(node)}")
        layer = Affine(str(node.target), module.weight, _shape(node.all_input_nodes[0]), _shape(node))
        return self._affine(layer, state)

    def convolution(self, node: fx.Node, module: nn.Conv2d, state: NodeState) -> NodeState:
        """A convolution, with its padding as equal numbers of zeros on both sides."""
        if module.padding_mode != "zeros":
            raise _unknown(node, f"Conv2d with a padding of {module.padding_mode}")
        dilation = _pair(module.dilation)
        weight = module.weight
        padding = module.padding
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
        return self._affine(layer, state)

    def normalisation(self, node: fx.Node, module: _BatchNorm, state: NodeState) -> NodeState:
        """Batch normalisation by running statistics: one factor per channel."""
        if module.running_var is None:
            raise _unknown(node, "BatchNorm without running statistics")
        gain = torch.ones_like(module.running_var) if module.weight is None else module.weight
        scale = gain / (module.running_var + module.eps).sqrt()  # (C,)
        before = node.all_input_nodes[0]
        last = state.path[-1] if state.path else None
        # right after a layer that nothing else uses, the factors go into the rows of that layer
        if isinstance(last, int) and len(before.users) == 1 and self._is_affine(before):
            self.layers[last] = self.layers[last].scaled(rows=scale)
            return state
        scale = scale.abs()
        return replace(state, scale=scale if state.scale is None else state.scale * scale)

    def _is_affine(self, node: fx.Node) -> bool:
        affine = (nn.Conv2d, nn.Linear)
        return node.op == "call_module" and isinstance(self.traced.get_submodule(str(node.target)), affine)

    def example_normalisation(
        self, node: fx.Node, module: nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d, state: NodeState
    ) -> NodeState:
        """Normalisation of each example by its own statistics: a fixed map with constant max |gain| / sqrt(eps)."""
        if getattr(module, "track_running_stats", False):
            raise _unknown(node, "InstanceNorm2d with running statistics")
        gain = 1.0 if module.weight is None else module.weight.abs().max().item()
        self.homogeneous = False
        return state.with_scale_in_path().through(gain / math.sqrt(module.eps))

    def same(self, node: fx.Node, *rest: Any) -> NodeState:
        """An operation that is the identity in eval mode."""
        state: NodeState = rest[-1]
        return state

    def reshape(self, node: fx.Node, *rest: Any) -> NodeState:
        """A reshape within each example."""
        state = self._without_input_map(node, rest[-1])
        before = _shape(node.all_input_nodes[0])
        after = _shape(node)
        if math.prod(before) != math.prod(after) or node.meta["tensor_meta"].shape[0] != BATCH:
            raise _unknown(node, f"a reshape of {before} to {after}, which mixes examples,")
        if state.scale is None or before == after:
            return state
        if after == (math.prod(before),):  # flattened: the factor of a channel applies to all of its pixels
            return replace(state, scale=state.scale.repeat_interleave(math.prod(before[1:])))
        return state.with_scale_in_path()

    def spatial_mean(self, node: fx.Node, state: NodeState) -> NodeState:
        """The mean over height and width, a fixed map."""
        state = self._without_input_map(node, state)
        before = _shape(node.all_input_nodes[0])
        axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
        axes = [axes] if isinstance(axes, int) else axes
        if len(before) != 3 or axes is None or sorted(axis % 4 for axis in axes) != [2, 3]:
            raise _unknown(node, "a mean over anything but height and width")
        return state.through(1 / math.sqrt(math.prod(before[1:])))

    def max_pool(self, node: fx.Node, module: nn.MaxPool2d, state: NodeState) -> NodeState:
        """Max pooling: the square of its norm is the largest number of windows that contain one pixel."""
        if _pair(module.dilation) != (1, 1):
            raise _unknown(node, "MaxPool2d with dilation")
        return state.through(math.sqrt(_overlap(_pair(module.kernel_size), _pair(module.stride))))

    def mean_pool(self, node: fx.Node, module: nn.AvgPool2d, state: NodeState) -> NodeState:
        """Average pooling, a fixed map."""
        if module.ceil_mode or module.divisor_override or _pair(module.padding) != (0, 0):
            raise _unknown(node, "AvgPool2d with padding, ceil_mode or another divisor")
        kernel = _pair(module.kernel_size)
        return state.through(math.sqrt(_overlap(kernel, _pair(module.stride)) / math.prod(kernel)))

    def mean_pool_to(self, node: fx.Node, module: nn.AdaptiveAvgPool2d, state: NodeState) -> NodeState:
        """Average pooling to a size that divides the size of the input."""
        inside = _shape(node.all_input_nodes[0])[1:]
        outside = _shape(node)[1:]
        if any(side % into for side, into in zip(inside, outside, strict=True)):
            raise _unknown(node, f"AdaptiveAvgPool2d from {inside} to {outside}, windows of unequal size")
        return state.through(math.sqrt(math.prod(outside) / math.prod(inside)))

    def add(self, node: fx.Node, *states: NodeState) -> NodeState:
        """The sum of two arms, or of a feature map and a constant."""
        if len(states) == 1:
            return self._plus(states[0], self._constant(node))
        if len({_shape(arg) for arg in node.all_input_nodes}) > 1:
            raise _unknown(node, "a sum that is not of two feature maps of one shape")
        main, shortcut = (self._without_input_map(node, state).with_scale_in_path().path for state in states)
        return NodeState(join(main, shortcut))

    def subtract(self, node: fx.Node, *states: NodeState) -> NodeState:
        """The difference of a feature map and a constant, in either order."""
        if len(states) != 1:
            raise _unknown(node, "a difference of two feature maps")
        constant = self._constant(node)
        if self._starts_with_constant(node):
            return self._plus(self.negate(node, states[0]), constant)
        return self._plus(states[0], -constant)

    def multiply(self, node: fx.Node, *states: NodeState) -> NodeState:
        """The product of a feature map and a constant."""
        if len(states) != 1:
            raise _unknown(node, "a product of two feature maps")
        return self._times(node, states[0], self._constant(node))

    def divide(self, node: fx.Node, *states: NodeState) -> NodeState:
        """A feature map divided by a constant."""
        if len(states) != 1 or self._starts_with_constant(node):
            raise _unknown(node, "a division by a feature map")
        return self._times(node, states[0], 1 / self._constant(node))

    def negate(self, node: fx.Node, state: NodeState) -> NodeState:
        return self._times(node, state, -torch.ones((), dtype=torch.float64))

    def _plus(self, state: NodeState, constant: Tensor) -> NodeState:
        """A constant on the input moves its shift; anywhere else it is a bias, which the theorems do not have."""
        input_map = state.input_map
        if input_map is None:
            return state
        shift = input_map.shift - constant / input_map.scale
        return replace(state, input_map=InputMap(input_map.scale, shift))

    def _times(self, node: fx.Node, state: NodeState, constant: Tensor) -> NodeState:
        if not bool((constant != 0).all()) or not bool(constant.isfinite().all()):
            raise _unknown(node, "a product with 0 or with what is not finite")
        input_map = state.input_map
        if input_map is None:
            return state.with_scale_in_path().through(constant.abs().max().item())
        return replace(state, input_map=InputMap(input_map.scale * constant, input_map.shift))

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


_MODULES: dict[type[nn.Module], Callable[..., NodeState]] = {
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
_FUNCTIONS: dict[Any, Callable[..., NodeState]] = {
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
_METHODS: dict[Any, Callable[..., NodeState]] = {
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
    """A kernel and an equal padding on both sides that compute the same as padding "same".

    For an even kernel, padding "same" pads one pixel more at the end. A row of zeros before the kernel makes it odd.
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


def _overlap(kernel: tuple[int, int], stride: tuple[int, int]) -> int:
    """The largest number of windows that contain one pixel."""
    return math.prod(math.ceil(k / s) for k, s in zip(kernel, stride, strict=True))


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of one example at a node."""
    return tuple(node.meta["tensor_meta"].shape[1:])


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _unknown(node: fx.Node, what: str) -> ValueError:
    return ValueError(f"{node.name}: the norms of {what} are not known; without them there is no bound")
