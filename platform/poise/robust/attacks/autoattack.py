"""AutoAttack: four attacks without parameters to tune, each on the examples that withstood the attacks before it.

Source: Croce and Hein, 2020 and (l1) 2021.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from poise.robust.attacks.apgd import apgd
from poise.robust.attacks.base import AttackResult, attack_mode, scores
from poise.robust.attacks.eot import AveragedModel
from poise.robust.attacks.fab import fab
from poise.robust.attacks.sanity_checks import (
    RANDOMISED,
    check_inputs,
    gradient_masking,
    require_logits,
    sanity_warnings,
)
from poise.robust.attacks.square import square
from poise.robust.noise import Noise, Source, as_noise
from poise.robust.threats import Threat

__all__ = ["Stage", "UnionResult", "Version", "autoattack", "rand_stages", "stages", "union_attack"]

Version = Literal["standard", "rand"]


@dataclass(frozen=True)
class Stage:
    """An attack with its threat and options bound: (model, x, y, noise) -> AttackResult."""

    name: str
    attack: Callable[..., AttackResult]
    threat: Threat
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Source = None) -> AttackResult:
        """Attack images x (N, ...) with labels (N,). The noise is folded with the name, so that stages differ."""
        streams = as_noise(noise, x).fold_in(zlib.crc32(self.name.encode()))
        batch = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return self.attack(model, x, y, self.threat, noise=streams, **self.options, **batch)


def stages(threat: Threat, num_classes: int, batch_size: int | None = None) -> tuple[Stage, ...]:
    """The `standard` sequence: APGD-CE, APGD-T, FAB-T and Square, to be run one by one.

    APGD takes 100 steps; under l1 its 100 are spread over radii 3, 2 and 1 times eps, with 5 runs of APGD-CE and 5
    targets of APGD-T instead of 1 and 9. FAB-T has 9 targets, Square 5,000 queries. There are never more targets than
    other classes. With 2 or 3 classes APGD-T maximises the targeted margin, since the targeted DLR loss needs 4.

    Where few examples remain, runs towards several targets share batches of up to `batch_size`, with the same result.

    Raises:
        ValueError: fewer than two classes.
    """
    if num_classes < 2:
        raise ValueError(f"an attack needs at least 2 classes to move between, not {num_classes}")
    ce_runs, dlr_targets = (5, 5) if threat.norm == "l1" else (1, 9)
    others = num_classes - 1
    apgd_ce = {"loss": "ce", "steps": 100, "restarts": ce_runs}
    apgd_t = {"loss": "targeted", "steps": 100, "targets": min(dlr_targets, others)}
    return (
        Stage("apgd-ce", apgd, threat, apgd_ce, batch_size),
        Stage("apgd-t", apgd, threat, apgd_t, batch_size),
        Stage("fab-t", fab, threat, {"steps": 100, "targets": min(9, others)}, batch_size),
        Stage("square", square, threat, {"queries": 5000}),
    )


def rand_stages(threat: Threat, num_classes: int, batch_size: int | None = None) -> tuple[Stage, ...]:
    """The `rand` sequence, for randomised models: APGD on the cross entropy, then on the DLR loss, no other attack.

    Run it on an `AveragedModel`. With two classes, where the DLR loss has no denominator, the margin takes its place.
    Raises ValueError as `stages` does.
    """
    first, *_ = stages(threat, num_classes, batch_size)
    loss = "dlr" if num_classes >= 3 else "cw"
    return first, replace(first, name="apgd-dlr", options={**first.options, "loss": loss})


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    version: Version = "standard",
    noise: Source = None,
    batch_size: int = 256,
    draws: int = 20,
) -> AttackResult:
    """Run `stages(threat, K)`, each from the original images, on the examples that withstood all stages before it.

    Version "rand" is for randomised models: it runs `rand_stages` on their mean prediction over `draws` draws.

    `adversarial` holds the point that fooled the model, or the image itself where none did. Reasons to distrust the
    result (see `sanity_checks`) are UserWarnings; those before the attack are checked on the first batch.

    Args:
        model: maps (N, ...) images to (N, K) logits, K >= 2.
        x, y: images (N, ...) in [0, 1], N > 0; true labels (N,) int64.
        noise: see `noise.Source`. The result depends neither on the batch size nor on the other examples (up to the
            rounding of the model).
        batch_size: examples per batch.

    Raises:
        ValueError: no examples, pixels outside [0, 1] or NaN, labels that are not a class, or an unknown version.
        PoiseError: logits, or a gradient, that are not finite.
    """
    if version not in ("standard", "rand"):
        raise ValueError(f"version {version!r} of AutoAttack is not known here: use 'standard' or 'rand'")
    y = check_inputs(x, y, threat)
    is_randomised = version == "rand"
    if is_randomised:
        model = AveragedModel(model, draws)
    clean, num_classes = _prepare(model, x, y, batch_size, randomised=is_randomised)
    make_stages = rand_stages if is_randomised else stages
    sequence = make_stages(threat, num_classes, batch_size)
    return _run_sequence(model, x, y, clean, sequence, as_noise(noise, x), batch_size)


@dataclass(frozen=True)
class UnionResult:
    """Which example withstood which threats.

    Attributes:
        names: of the threats, in the order in which they were tried.
        adversarial: like x, the first point that fooled the model, or the image itself.
        robust: bool (N, threats); column t is True where the model withstood threats 0..t. An example that is fooled
            is not attacked again, so that a later False says nothing about that threat alone.
    """

    names: tuple[str, ...]
    adversarial: Tensor
    robust: Tensor

    @property
    def correct(self) -> Tensor:
        """bool (N,): the examples that withstood the union of all threats."""
        return self.robust[:, -1]


def union_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Mapping[str, Threat],
    *,
    noise: Source = None,
    batch_size: int = 256,
) -> UnionResult:
    """AutoAttack under each threat in turn, on the examples that withstood all threats before it.

    The union is exact, and an example is not attacked any more once it is fooled. Arguments, warnings and errors are
    those of `autoattack`; also ValueError without a threat.
    """
    if not threats:
        raise ValueError("a union of no threats: name at least one")
    y = check_inputs(x, y, *threats.values())
    robust, num_classes = _prepare(model, x, y, batch_size)
    streams = as_noise(noise, x)
    adversarial = x.clone()
    columns = []
    for name, threat in threats.items():
        # each threat has streams of its own, so that its result does not depend on the threats before it
        threat_noise = streams.fold_in(zlib.crc32(name.encode()))
        sequence = stages(threat, num_classes, batch_size)
        result = _run_sequence(model, x, y, robust, sequence, threat_noise, batch_size)
        fooled = robust & ~result.correct  # by this threat, for the first time
        adversarial[fooled] = result.adversarial[fooled]
        robust = result.correct
        columns.append(robust)
    return UnionResult(tuple(threats), adversarial, torch.stack(columns, dim=1))


def _prepare(
    model: nn.Module, x: Tensor, y: Tensor, batch_size: int, *, randomised: bool = False
) -> tuple[Tensor, int]:
    """Which examples are right, bool (N,), and the number of classes.

    Raises for logits that are not valid, and warns of masked gradients.
    """
    with attack_mode(model):
        logits = torch.cat([scores(model, batch) for batch in torch.split(x, batch_size)])
    require_logits(logits, y)
    for warning in sanity_warnings(model, x[:batch_size], y[:batch_size], ("ce", "cw")):
        if not (randomised and warning.startswith(RANDOMISED)):
            warnings.warn(warning, stacklevel=3)
    return logits.argmax(1) == y, logits.shape[1]


def _run_sequence(
    model: nn.Module, x: Tensor, y: Tensor, robust: Tensor, sequence: tuple[Stage, ...], noise: Noise, batch_size: int
) -> AttackResult:
    """Run the stages in turn on the examples that are `robust`, bool (N,), before them."""
    adversarial = x.clone()
    for stage in sequence:
        before = robust
        robust = robust.clone()
        for rows in torch.split(before.nonzero().flatten(), batch_size):
            if len(rows):  # a split of no examples is one empty batch
                result = stage(model, x[rows], y[rows], noise.select(rows))
                fooled = ~result.correct
                robust[rows] = result.correct
                adversarial[rows[fooled]] = result.adversarial[fooled]
        if stage.name == "square" and (warning := gradient_masking(before, robust)):
            warnings.warn(warning, stacklevel=3)
    return AttackResult(adversarial, robust)
