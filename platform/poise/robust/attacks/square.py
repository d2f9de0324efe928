"""Square attack: random search over local squares, with scores of the model and no gradient.

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
from poise.robust.attacks.checks import check_inputs, require_logits
from poise.robust.attacks.contract import AttackResult, attack_mode, choose, scores
from poise.robust.attacks.losses import margin
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.threats import Threat

__all__ = ["pair", "square", "window_share"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_EVERY = 25  # queries between two looks at who still stands: each look waits for the device


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

    Each query changes one window of the best point so far, at a place and with signs of the example's own, and keeps
    the change where the margin z_y - max_{k != y} z_k falls. `adversarial` holds the first fooling point, or the point
    of least margin of the last run if there is none. An example leaves within a few queries of being fooled.

    Args:
        model: maps images to (N, K) logits.
        x, y: images (N, C, H, W), or vectors (N, d), which count as (N, 1, 1, d); true labels (N,) int64.
        queries: evaluations of one run, the start among them; the schedule of windows stretches over them.
        restarts: runs, each on the examples that still stand.
        p_init: share of the image that the first windows cover, see `window_share`.
        noise: see `noise.Source`.

    Raises:
        ValueError: x has another shape, or see `checks.check_inputs`.
        PoiseError: the model's scores of an example were not numbers.
    """
    y = check_inputs(x, y, threat)
    if x.ndim not in (2, 4):
        raise ValueError(f"square attacks images (N, C, H, W) or vectors (N, d), not the shape {tuple(x.shape)}")
    grid = tuple(x.shape[1:]) if x.ndim == 4 else (1, 1, x.shape[1])
    search, streams = _Search(model, threat, grid, x.shape[1:], queries, p_init), as_noise(noise, x)
    with attack_mode(model):
        logits = scores(model, x)
        require_logits(logits, y)
        adversarial, correct = x.clone(), logits.argmax(1) == y
        for run in range(restarts if threat.eps > 0 else 0):
            alive = correct.nonzero().flatten()
            if len(alive) == 0:
                break
            with torch.inference_mode():
                point, stands = search.run(x[alive], y[alive], streams.pick(alive).at(run), alive)
                adversarial[alive], correct[alive] = point, stands
    return AttackResult(adversarial, correct)


def window_share(step: int, queries: int, p_init: float = 0.8) -> float:
    """The share of the image that the window of this step covers: halved after .1, .5, 2, 5, 10, 20, ... % of them."""
    return p_init * 0.5 ** bisect_left(_HALVINGS, step * 10_000 // queries)


def pair(height: int, width: int, order: int) -> Tensor:
    """(height, width) float64: two bumps, the upper positive and the lower negative, of l_order length one together.

    At distance m (in the maximum norm) from its middle a bump has the value sum_{k >= m} (k + 1)^-q up to its border,
    with q = 2 for l2 and 4 for l1.
    """
    upper, lower = (_bump(rows, width, 4 // order) for rows in (height // 2, height - height // 2))
    halves = torch.cat([upper / upper.norm(p=order), -lower / lower.norm(p=order)])
    both: Tensor = halves / halves.norm(p=order)
    return both


def _bump(height: int, width: int, power: int) -> Tensor:
    tail = (torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** -power).flip(0).cumsum(0).flip(0)
    away = [(torch.arange(n) - n // 2).abs() for n in (height, width)]
    return tail[torch.maximum(away[0].unsqueeze(1), away[1])]


@lru_cache(maxsize=64)
def _patterns(height: int, width: int, norm: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2, height * width): the pair of bumps one above the other, and side by side."""
    order = 2 if norm == "l2" else 1
    both = torch.stack([pair(height, width, order).flatten(), pair(width, height, order).T.flatten()])
    return both.to(device, dtype)


@dataclass(frozen=True)
class _Search:
    """Runs of random search. Inside, images are planes (n, C, H * W)."""

    model: nn.Module
    threat: Threat
    grid: tuple[int, ...]  # C, H, W
    shape: torch.Size  # of one example, as the model takes it
    queries: int
    p_init: float

    def run(self, x: Tensor, y: Tensor, noise: Noise, names: Tensor) -> tuple[Tensor, Tensor]:
        """(best points like x, which examples stand); `names` (n,) are their places in the whole batch."""
        x = x.reshape(len(x), self.grid[0], -1)
        best = self.start(x, noise.at(-1))
        margins, fooled = self.judge(best, y)
        _require_numbers((margins == margins).long(), range(-1, 0), names)
        found, stands, rows = best.clone(), ~fooled, torch.arange(len(x), device=x.device)
        for first in range(0, self.queries - 1, _EVERY):
            keep = stands[rows].nonzero().flatten()
            if len(keep) == 0:
                break
            rows, x, y, best, margins, noise = rows[keep], x[keep], y[keep], best[keep], margins[keep], noise.pick(keep)
            steps = range(first, min(first + _EVERY, self.queries - 1))
            best, margins, fooled, sound = self.climb(x, y, best, margins, noise.at(first), steps)
            _require_numbers(sound, steps, names[rows])
            found[rows], stands[rows] = best, ~fooled
        return found.view(-1, *self.shape), stands

    def climb(
        self, x: Tensor, y: Tensor, best: Tensor, margins: Tensor, noise: Noise, steps: range
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """These steps without a wait: (best, margins, fooled, steps before an example's scores were no numbers)."""
        fooled, sound = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y)
        width = 5 + self.grid[0]
        draws = noise.uniform(len(steps) * width, torch.float64).view(-1, len(steps), width)
        for step, draw in zip(steps, draws.unbind(1), strict=True):
            candidate = self.propose(x, best, draw, self.window(step))
            margin_of, wrong = self.judge(candidate, y)
            better = ((margin_of > margins) | wrong) & ~fooled
            best = choose(better, candidate, best)
            margins = torch.where(fooled, margins, torch.maximum(margins, margin_of))  # NaN stays
            fooled = fooled | wrong
            sound += margins == margins
        return best, margins, fooled, sound

    def judge(self, planes: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(margins max_{k != y} z_k - z_y, whether the model is wrong), both (n,)."""
        logits = scores(self.model, planes.view(-1, *self.shape))
        return margin(logits, y), logits.argmax(1) != y

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
            stripes = _signs(noise.uniform(C * W, x.dtype)).view(-1, C, 1, W).expand(-1, -1, H, -1)
            return (x + self.threat.eps * stripes.flatten(2)).clamp(0, 1)
        side = max(min(H, W) // 5, 1)
        rows, columns = H // side, W // side
        draws = noise.uniform((C + 1) * rows * columns, torch.float64).view(-1, C + 1, rows * columns, 1)
        turn = (draws[:, -1:, :, 0] < 0.5).long()
        patterns = _patterns(side, side, self.threat.norm, x.dtype, x.device)[turn]  # (n, 1, tiles, area)
        tiles = (patterns * _signs(draws[:, :-1]).to(x.dtype)).transpose(2, 3).flatten(1, 2)
        down, right = H - rows * side, W - columns * side
        delta = nn.functional.fold(tiles, (H - down, W - right), side, stride=side)
        delta = nn.functional.pad(delta, (right // 2, right - right // 2, down // 2, down - down // 2))
        return x + self.threat.project(x, delta.flatten(2))

    def propose(self, x: Tensor, best: Tensor, draw: Tensor, window: tuple[int, int]) -> Tensor:
        """A candidate for each example: `best` with another window. draw (n, 5 + C): two places, a turn, signs."""
        signs = _signs(draw[:, 5:, None]).to(x.dtype)
        first = self.places(draw[:, 0:2], window)
        if self.threat.norm == "linf":
            return self.flip(x, best, first, signs)
        turned = _patterns(*window, self.threat.norm, x.dtype, x.device)[(draw[:, 4:5] < 0.5).long()]
        return self.move(x, best, first, self.places(draw[:, 2:4], window), turned * signs)

    def flip(self, x: Tensor, best: Tensor, index: Tensor, signs: Tensor) -> Tensor:
        """The window at +-eps, a sign per channel: the opposite signs where these would change nothing."""
        here, before = x.gather(2, index), best.gather(2, index)
        new, other = ((here + self.threat.eps * sign).clamp(0, 1) for sign in (signs, -signs))
        same = (new == before).all(2, keepdim=True).all(1, keepdim=True)
        return best.scatter(2, index, torch.where(same, other, new))

    def move(self, x: Tensor, best: Tensor, first: Tensor, second: Tensor, bumps: Tensor) -> Tensor:
        """The second window gives its length to the first, with what the box had left unused, shared by the channels.

        The first keeps its direction and gains the bumps. In l1 every channel spends C times its share, and the
        projection takes the surplus from the smallest values: sparse points. Without a surplus the box alone is left
        to see to, and the costly joint projection is not needed.
        """
        norm, C = self.threat.norm, x.shape[1]
        order = 2 if norm == "l2" else 1
        delta = best - x
        rest = delta.scatter(2, second, 0).scatter_(2, first, 0)
        total, kept = (torch.linalg.vector_norm(t, ord=order, dim=2, keepdim=True) ** order for t in (delta, rest))
        unused = (self.threat.eps**order - total.sum(1, keepdim=True)).clamp(min=0)
        budget = (unused / C + (total - kept).clamp(min=0)) * (C if norm == "l1" else 1)
        new = _unit(bumps + _unit(delta.gather(2, first), order), order) * budget.pow(1 / order)
        moved = rest.scatter_(2, first, new)
        if norm == "l1" and C > 1:
            return x + self.threat.project(x, moved)
        return (x + self.threat.shrink(moved)).clamp(0, 1)

    def places(self, draw: Tensor, window: tuple[int, int]) -> Tensor:
        """Flat indices (n, C, area) of a window whose corner the two numbers draw (n, 2) choose."""
        C, H, W = self.grid
        height, width = window
        top, left = (draw[:, :1] * (H - height + 1)).long(), (draw[:, 1:] * (W - width + 1)).long()
        return (top * W + left + _inside(height, width, W, draw.device)).unsqueeze(1).expand(-1, C, -1)


@lru_cache(maxsize=64)
def _inside(height: int, width: int, row: int, device: torch.device) -> Tensor:
    """Flat indices (area,) of a window at the corner of an image whose rows have this length."""
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    return (rows.unsqueeze(1) * row + columns).flatten()


def _require_numbers(sound: Tensor, steps: range, names: Tensor) -> None:
    if bool((sound < len(steps)).any()):
        index = int(sound.argmin())
        raise PoiseError(
            f"square: the scores of example {int(names[index])} of the batch are not numbers at query "
            f"{steps.start + int(sound[index]) + 2}: the model has diverged, or its precision is too low"
        )


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform)


def _unit(v: Tensor, order: int) -> Tensor:
    unit: Tensor = v / torch.linalg.vector_norm(v, ord=order, dim=2, keepdim=True).clamp(min=1e-12)
    return unit
