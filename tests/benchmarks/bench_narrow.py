"""The gradient of a convolution's input by oneDNN, by PyTorch's own kernel, and in the two ways of `attacks.narrow`.

Images in the plain layout, one thread, milliseconds, the least of 20 turns each. A star marks what an attack would use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from poise.robust.attacks.narrow import by_columns, by_phases, is_narrow, uses_phases

TURNS = 20
# images, channels, side, filters, kernel, stride, padding
SHAPES = (
    *((400, 1, 28, 4, 5, 2, 2), (128, 1, 28, 32, 5, 1, 2), (128, 1, 8, 16, 3, 1, 1), (400, 4, 14, 8, 5, 2, 2)),
    *((128, 1, 28, 32, 5, 2, 2), (128, 3, 32, 8, 3, 2, 1), (128, 3, 32, 16, 3, 2, 1), (8, 3, 224, 64, 7, 2, 3)),
    *((128, 4, 28, 16, 4, 2, 1), (64, 3, 64, 96, 4, 4, 0)),
    *((128, 8, 16, 16, 5, 2, 2), (128, 3, 32, 16, 3, 1, 1), (128, 8, 16, 16, 3, 1, 1), (128, 16, 16, 16, 3, 1, 1)),
)


def milliseconds(run: Callable[[], Tensor]) -> float:
    run()
    least = float("inf")
    for _ in range(TURNS):
        began = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - began)
    return 1000 * least


def compare(images: int, channels: int, side: int, filters: int, kernel: int, stride: int, padding: int) -> None:
    layer = nn.Conv2d(channels, filters, kernel, stride, padding).requires_grad_(False)
    x = torch.rand(images, channels, side, side, requires_grad=True)
    y = layer(x)
    upstream = torch.randn_like(y)

    def gradient() -> Tensor:
        return torch.autograd.grad(y, x, upstream, retain_graph=True)[0]

    taken = {"oneDNN": milliseconds(gradient)}
    with torch.backends.mkldnn.flags(enabled=False):
        taken["PyTorch's own"] = milliseconds(gradient)
    for way in (by_columns, by_phases):
        taken[way.__name__] = milliseconds(partial(way(layer), upstream, x.shape))
    used = "oneDNN" if not is_narrow(layer) else "by_phases" if uses_phases(layer) else "by_columns"
    print(
        f"  {images:>3} x {channels:>2} x {side:>3}^2, {filters:>2} filters {kernel}^2, stride {stride}",
        *(f"{name}{'*' if name == used else ' '} {spent:7.2f}" for name, spent in taken.items()),
        sep="   ",
        flush=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    for shape in SHAPES:
        compare(*shape)


if __name__ == "__main__":
    main()
