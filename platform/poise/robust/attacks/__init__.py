"""Attacks on an image classifier: each returns an `AttackResult`, with the guarantees of `attacks.base`."""

from collections.abc import Callable

from torch import Tensor

from poise.robust.attacks.apgd import apgd, apgd_perturb
from poise.robust.attacks.autoattack import UnionResult, autoattack, union_attack
from poise.robust.attacks.base import AttackResult, BNMode, attack_mode
from poise.robust.attacks.eot import AveragedModel
from poise.robust.attacks.fab import fab
from poise.robust.attacks.losses import LOSSES, Loss, cross_entropy, cw_loss, dlr, kl_from
from poise.robust.attacks.msd import msd, msd_perturb
from poise.robust.attacks.pgd import perturb, pgd
from poise.robust.attacks.square import square

__all__ = [
    "EVAL_ATTACKS",
    "LOSSES",
    "TRAINING_ATTACKS",
    "AttackResult",
    "AveragedModel",
    "BNMode",
    "Loss",
    "UnionResult",
    "apgd",
    "apgd_perturb",
    "attack_mode",
    "autoattack",
    "cross_entropy",
    "cw_loss",
    "dlr",
    "fab",
    "kl_from",
    "msd",
    "msd_perturb",
    "perturb",
    "pgd",
    "square",
    "union_attack",
]

EVAL_ATTACKS: dict[str, Callable[..., AttackResult]] = {"pgd": pgd, "apgd": apgd}
"""The attacks that a `ThreatSpec` can name, for evaluation."""

TRAINING_ATTACKS: dict[str, Callable[..., Tensor]] = {"pgd": perturb, "apgd": apgd_perturb}
"""The attacks that a `ThreatSpec` can name, for training."""
