"""Attacks on an image classifier: each returns an `AttackResult`, and keeps the contract of `attacks.contract`."""

from collections.abc import Callable

from torch import Tensor

from poise.robust.attacks.apgd import apgd, apgd_perturb
from poise.robust.attacks.autoattack import UnionResult, autoattack, union_attack
from poise.robust.attacks.contract import AttackResult, BNMode, attack_mode
from poise.robust.attacks.eot import AveragedModel
from poise.robust.attacks.fab import fab
from poise.robust.attacks.losses import LOSSES, Loss, cross_entropy, dlr, kl_from, margin
from poise.robust.attacks.msd import msd, msd_perturb
from poise.robust.attacks.pgd import perturb, pgd
from poise.robust.attacks.square import square

__all__ = [
    "LOSSES",
    "PERTURB",
    "SEARCH",
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
    "dlr",
    "fab",
    "kl_from",
    "margin",
    "msd",
    "msd_perturb",
    "perturb",
    "pgd",
    "square",
    "union_attack",
]

SEARCH: dict[str, Callable[..., AttackResult]] = {"pgd": pgd, "apgd": apgd}
"""The attacks that a `ThreatSpec` names and gives its options to, for evaluation."""

PERTURB: dict[str, Callable[..., Tensor]] = {"pgd": perturb, "apgd": apgd_perturb}
"""The same, for training."""
