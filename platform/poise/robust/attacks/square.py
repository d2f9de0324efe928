"""Square attack: random search over local squares, which uses the scores of the model and no gradient.

Sources: Andriushchenko, Croce, Flammarion and Hein, 2020, for linf and l2; Croce and Hein, 2021, for l1.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from poise.errors import PoiseError
from poise.robust.attacks.base import (
    AttackResult,
    attack_mode,
    choose,
    scores,
)
from poise.robust.attacks.losses import cw_loss
from poise.robust.attacks.sanity_checks import check_inputs, require_logits
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.threats import Threat

__all__ = ["pair", "square", "window_share"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Steps, in units of 1/10,000 of the queries, after which the area of the windows is halved."""
_BLOCK = 25
"""Queries between two checks which examples are fooled: each check synchronises with the device."""


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    queries: int = 5000,
    restarts: int = 1,
    p_init: float = 0.8,
    noise: Source = None,
) -> AttackResult:
    """Black-box attack for evaluation: an example is correct only if the model withstands every candidate.

    Each query changes one window of the best point so far, at a place and with signs of the example's own. The change
    is kept where it lowers the margin z_y - max_{k != y} z_k. `adversarial` holds the first fooling point, or, if there
    is none, the point of least margin of the last run. An example is dropped within a few queries of being fooled.

    Args:
        model: maps images to (N, K) logits.
        x, y: images (N, C, H, W), or vectors (N, d), which count as (N, 1, 1, d); true labels (N,) int64.
        queries: evaluations of one run, including the start; the schedule of window sizes stretches over them.
        restarts: number of runs, each on the examples that are not fooled yet.
        p_init: share of the image that the first windows cover, see `window_share`.
        noise: see `noise.Source`.

    Raises:
        ValueError: x has another shape, or see `sanity_checks.check_inputs`.
        PoiseError: the model's scores of an example were not numbers.
    """
    y = check_inputs(x, y, threat)
    if x.ndim not in (2, 4):
        raise ValueError(f"square attacks images (N, C, H, W) or vectors (N, d), not the shape {tuple(x.shape)}")
    grid = tuple(x.shape[1:]) if x.ndim == 4 else (1, 1, x.shape[1])
    search = _Search(model, threat, grid, x.shape[1:], queries, p_init)
    streams = as_noise(noise, x)
    with attack_mode(model):
        logits = scores(model, x)
        require_logits(logits, y)
        adversarial = x.clone()
        correct = logits.argmax(1) == y
        for run in range(restarts if threat.eps > 0 else 0):
            alive = correct.nonzero().flatten()
            if len(alive) == 0:
                break
            with torch.inference_mode():
                run_noise = streams.select(alive).fold_in(run)
                point, still_correct = search.run(x[alive], y[alive], run_noise, alive)
                adversarial[alive] = point
                correct[alive] = still_correct
    return AttackResult(adversarial, correct)


def window_share(step: int, queries: int, p_init: float = 0.8) -> float:
    """The share of the image that the window of this step covers: halved after .1, .5, 2, 5, 10, 20, ... % of them."""
    return p_init * 0.5 ** bisect_left(_HALVINGS, step * 10_000 // queries)


def pair(height: int, width: int, order: int) -> Tensor:
    """(height, width) float64: two bumps, the upper positive and the lower negative, of l_order length 1 together.

    At distance m (in the maximum norm) from its middle a bump has the value sum_{k >= m} (k + 1)^-q up to its border,
    with q = 2 for l2 and 4 for l1.
    """
    power = 4 // order
    upper = _bump(height // 2, width, power)
    lower = _bump(height - height // 2, width, power)
    halves = torch.cat([upper / upper.norm(p=order), -lower / lower.norm(p=order)])
    both: Tensor = halves / halves.norm(p=order)
    return both


def _bump(height: int, width: int, power: int) -> Tensor:
    """(height, width): one bump of `pair`, not normalised."""
    terms = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** -power
    values = terms.flip(0).cumsum(0).flip(0)  # values[m] = sum_{k >= m} (k + 1)^-power
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    distance = torch.maximum(rows.unsqueeze(1), columns)  # (height, width)
    return values[distance]


@lru_cache(maxsize=64)
def _patterns(height: int, width: int, norm: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2, height * width): the pair of bumps one above the other, and side by side."""
    order = 2 if norm == "l2" else 1
    vertical = pair(height, width, order)
    horizontal = pair(width, height, order).T
    return torch.stack([vertical.flatten(), horizontal.flatten()]).to(device, dtype)


@dataclass(frozen=True)
class _Search:
    """Runs of random search. Inside, images are planes (n, C, H * W)."""

    model: nn.Module
    threat: Threat
    grid: tuple[int, ...]  # C, H, W
    shape: torch.Size  # of one example, as the model takes it
    queries: int
    p_init: float

    def run(self, x: Tensor, y: Tensor, noise: Noise, places: Tensor) -> tuple[Tensor, Tensor]:
        """(best points like x, which examples are still correct); `places` (n,) are their indices in the batch."""
        x = x.reshape(len(x), self.grid[0], -1)  # (n, C, H * W)
        best = self.start(x, noise.fold_in(-1))
        margins, fooled = self.margins_and_errors(best, y)
        _require_numbers((margins == margins).long(), range(-1, 0), places)  # NaN is not equal to itself
        result = best.clone()
        correct = ~fooled
        rows = torch.arange(len(x), device=x.device)  # of the examples that are still searched
        for first in range(0, self.queries - 1, _BLOCK):
            keep = correct[rows].nonzero().flatten()
            if len(keep) == 0:
                break
            rows = rows[keep]
            x = x[keep]
            y = y[keep]
            best = best[keep]
            margins = margins[keep]
            noise = noise.select(keep)
            steps = range(first, min(first + _BLOCK, self.queries - 1))
            best, margins, fooled, valid = self.search_block(x, y, best, margins, noise.fold_in(first), steps)
            _require_numbers(valid, steps, places[rows])
            result[rows] = best
            correct[rows] = ~fooled
        return result.view(-1, *self.shape), correct

    def search_block(
        self, x: Tensor, y: Tensor, best: Tensor, margins: Tensor, noise: Noise, steps: range
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take `steps` without synchronising with the device.

        Returns the best points, their margins (n,), which examples are fooled (n,), and for each example the number of
        steps (n,) before its first score that is not a number.
        """
        fooled = torch.zeros_like(y, dtype=torch.bool)
        valid = torch.zeros_like(y)
        width = 5 + self.grid[0]  # numbers per step: two places, an orientation, a sign per channel
        draws = noise.uniform(len(steps) * width, torch.float64).view(-1, len(steps), width)
        for step, draw in zip(steps, draws.unbind(1), strict=True):
            candidate = self.propose(x, best, draw, self.window(step))
            candidate_margins, wrong = self.margins_and_errors(candidate, y)
            better = ((candidate_margins > margins) | wrong) & ~fooled
            best = choose(better, candidate, best)
            # the maximum with NaN is NaN, so that an invalid score is never forgotten
            margins = torch.where(fooled, margins, torch.maximum(margins, candidate_margins))
            fooled = fooled | wrong
            valid += margins == margins
        return best, margins, fooled, valid

    def margins_and_errors(self, planes: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(margins max_{k != y} z_k - z_y, whether the model is wrong), both (n,)."""
        logits = scores(self.model, planes.view(-1, *self.shape))
        return cw_loss(logits, y), logits.argmax(1) != y

    def window(self, step: int) -> tuple[int, int]:
        """(height, width): a square of the step's share, or a rectangle of that area in an image too narrow for it."""
        _, H, W = self.grid
        side = max(round(math.sqrt(window_share(step, self.queries, self.p_init) * H * W)), 1)
        if self.threat.norm != "linf":
            side = max(side, 3) | 1  # odd, so that both bumps have room
        short = min(side, H, W)
        long = min(side * side // short, max(H, W))
        return (short, long) if H <= W else (long, short)

    def start(self, x: Tensor, noise: Noise) -> Tensor:
        """linf: vertical stripes of +-eps. l2 and l1: tiles of a fifth of the side, a pair of bumps in each."""
        C, H, W = self.grid
        if self.threat.norm == "linf":
            signs = _signs(noise.uniform(C * W, x.dtype)).view(-1, C, 1, W)
            stripes = signs.expand(-1, -1, H, -1)  # (n, C, H, W)
            return (x + self.threat.eps * stripes.flatten(2)).clamp(0, 1)
        side = max(min(H, W) // 5, 1)
        rows = H // side
        columns = W // side
        # per tile: a sign for each channel, then the orientation
        draws = noise.uniform((C + 1) * rows * columns, torch.float64).view(-1, C + 1, rows * columns, 1)
        orientation = (draws[:, -1:, :, 0] < 0.5).long()  # (n, 1, tiles)
        patterns = _patterns(side, side, self.threat.norm, x.dtype, x.device)[orientation]  # (n, 1, tiles, area)
        tiles = patterns * _signs(draws[:, :-1]).to(x.dtype)  # (n, C, tiles, area)
        blocks = tiles.transpose(2, 3).flatten(1, 2)  # (n, C * area, tiles), as `fold` takes it
        # the tiles may not fill the image: what remains becomes a margin of zeros
        rest_h = H - rows * side
        rest_w = W - columns * side
        delta = nn.functional.fold(blocks, (H - rest_h, W - rest_w), side, stride=side)
        left = rest_w // 2
        top = rest_h // 2
        delta = nn.functional.pad(delta, (left, rest_w - left, top, rest_h - top))  # (n, C, H, W)
        return x + self.threat.project(x, delta.flatten(2))

    def propose(self, x: Tensor, best: Tensor, draw: Tensor, window: tuple[int, int]) -> Tensor:
        """A candidate for each example: `best` with one window changed.

        draw (n, 5 + C): two places, an orientation, and a sign per channel.
        """
        signs = _signs(draw[:, 5:, None]).to(x.dtype)  # (n, C, 1)
        first = self.window_indices(draw[:, 0:2], window)
        if self.threat.norm == "linf":
            return self.flip(x, best, first, signs)
        second = self.window_indices(draw[:, 2:4], window)
        orientation = (draw[:, 4:5] < 0.5).long()  # (n, 1)
        bumps = _patterns(*window, self.threat.norm, x.dtype, x.device)[orientation]  # (n, 1, area)
        return self.move(x, best, first, second, bumps * signs)

    def flip(self, x: Tensor, best: Tensor, index: Tensor, signs: Tensor) -> Tensor:
        """The window at +-eps, one sign per channel; where that changes nothing, with the opposite signs.

        index (n, C, area) are flat positions of the window, signs (n, C, 1).
        """
        image = x.gather(2, index)  # (n, C, area)
        current = best.gather(2, index)
        new = (image + self.threat.eps * signs).clamp(0, 1)
        opposite = (image + self.threat.eps * -signs).clamp(0, 1)
        unchanged = (new == current).all(2, keepdim=True).all(1, keepdim=True)  # (n, 1, 1)
        return best.scatter(2, index, torch.where(unchanged, opposite, new))

    def move(self, x: Tensor, best: Tensor, first: Tensor, second: Tensor, bumps: Tensor) -> Tensor:
        """The second window gives its length to the first, together with the length of the ball that is not used.

        first and second (n, C, area) are flat positions, bumps (n, C, area) the pattern to add. The unused length is
        shared by the channels. The first window keeps its direction and gains the bumps. In l1 every channel spends C
        times its share, and the projection takes the surplus from the smallest values, which makes sparse points.
        Without a surplus only the box can be violated, so that the costly joint projection is not needed.
        """
        norm = self.threat.norm
        C = x.shape[1]
        order = 2 if norm == "l2" else 1
        delta = best - x
        rest = delta.scatter(2, second, 0).scatter_(2, first, 0)  # delta outside of the two windows
        total = torch.linalg.vector_norm(delta, ord=order, dim=2, keepdim=True) ** order  # (n, C, 1)
        outside = torch.linalg.vector_norm(rest, ord=order, dim=2, keepdim=True) ** order
        unused = (self.threat.eps**order - total.sum(1, keepdim=True)).clamp(min=0)  # (n, 1, 1)
        budget = (unused / C + (total - outside).clamp(min=0)) * (C if norm == "l1" else 1)  # (n, C, 1)
        direction = _unit(bumps + _unit(delta.gather(2, first), order), order)
        moved = rest.scatter_(2, first, direction * budget.pow(1 / order))
        if norm == "l1" and C > 1:
            return x + self.threat.project(x, moved)
        return (x + self.threat.scale_to_ball(moved)).clamp(0, 1)

    def window_indices(self, draw: Tensor, window: tuple[int, int]) -> Tensor:
        """Flat indices (n, C, area) of a window whose corner follows from two numbers per example, draw (n, 2)."""
        C, H, W = self.grid
        height, width = window
        top = (draw[:, :1] * (H - height + 1)).long()  # (n, 1)
        left = (draw[:, 1:] * (W - width + 1)).long()
        indices = top * W + left + _corner_window(height, width, W, draw.device)  # (n, area)
        return indices.unsqueeze(1).expand(-1, C, -1)


@lru_cache(maxsize=64)
def _corner_window(height: int, width: int, row_length: int, device: torch.device) -> Tensor:
    """Flat indices (area,) of a window at the upper left corner of an image whose rows have this length."""
    rows = torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    return (rows.unsqueeze(1) * row_length + columns).flatten()


def _require_numbers(valid: Tensor, steps: range, places: Tensor) -> None:
    """Raise PoiseError unless all `steps` were valid for every example; `valid` (n,) counts the valid ones."""
    if bool((valid < len(steps)).any()):
        index = int(valid.argmin())
        raise PoiseError(
            f"square: the scores of example {int(places[index])} of the batch are not numbers at query "
            f"{steps.start + int(valid[index]) + 2}: the model has diverged, or its precision is too low"
        )


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform)


def _unit(v: Tensor, order: int) -> Tensor:
    """v (n, C, area), scaled to length 1 in l_order per channel; zeros stay zeros."""
    unit: Tensor = v / torch.linalg.vector_norm(v, ord=order, dim=2, keepdim=True).clamp(min=1e-12)
    return unit
