"""The path of data through a network: layers, fixed maps and residual blocks, and its state at one node."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["Block", "InputMap", "LayerPath", "NodeState", "PathElement", "join"]


@dataclass(frozen=True)
class Block:
    """Two arms that start at one point and are summed; an arm without elements is the identity."""

    main: LayerPath
    shortcut: LayerPath


PathElement = int | float | Block
"""The index of a layer, the Lipschitz constant of a fixed map, or a residual block."""
LayerPath = tuple[PathElement, ...]


@dataclass(frozen=True)
class InputMap:
    """The input x after sums and products with constants only: scale * (x - shift)."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class NodeState:
    """The state at a node: the path up to it, and factors per channel that are not in the path yet.

    The next affine layer takes the factors `scale` (C,) into its columns. `input_map` is not None as long as only
    constants were added to the input or multiplied with it.
    """

    path: LayerPath = ()
    scale: Tensor | None = None
    input_map: InputMap | None = None

    def through(self, constant: float) -> NodeState:
        """The state after a fixed map with this Lipschitz constant."""
        return self if constant == 1 else replace(self, path=(*self.path, constant))

    def with_scale_in_path(self) -> NodeState:
        """The state with `scale` turned into a fixed map, where no layer can take it."""
        if self.scale is None:
            return self
        return NodeState(self.path).through(self.scale.abs().max().item())


def join(main: LayerPath, shortcut: LayerPath) -> LayerPath:
    """The common start of two paths, then their remaining elements as one block."""
    common = 0
    while common < min(len(main), len(shortcut)) and main[common] == shortcut[common]:
        common += 1
    return (*main[:common], Block(main[common:], shortcut[common:]))
