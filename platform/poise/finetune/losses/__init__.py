"""Losses of supervised fine-tuning, by name, and what is measured beside them.

One loss is one file here and one line in `LOSSES`. Everywhere: logits (..., V), labels (...) that are already aligned
with the position that predicts them, IGNORE_INDEX where a token is not supervised. A loss is a sum over supervised
tokens divided by `normalizer`, by default their number. Softmax is computed in at least fp32. Without a supervised
token a loss is zero but still has a gradient, so that in data parallel training no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from poise.finetune.losses.base import IGNORE_INDEX, FinetuneLoss, num_tokens, supervised
from poise.finetune.losses.ce import Ce, cross_entropy, entropy
from poise.finetune.losses.dft import Dft
from poise.finetune.losses.eaft import Eaft
from poise.finetune.losses.entropy_regularized import EntropyRegularized
from poise.finetune.losses.fused import LinearHead, fused_loss
from poise.finetune.losses.gem import Gem, Variant, gem_loss
from poise.finetune.losses.label_smoothing import LabelSmoothing
from poise.finetune.losses.sed import Sed
from poise.finetune.losses.tofu import Tofu
from poise.spec.registry import union_of

__all__ = [
    "IGNORE_INDEX",
    "LOSSES",
    "Ce",
    "Dft",
    "Eaft",
    "EntropyRegularized",
    "FinetuneLoss",
    "Gem",
    "LabelSmoothing",
    "LinearHead",
    "LossSpec",
    "Sed",
    "Tofu",
    "Variant",
    "cross_entropy",
    "entropy",
    "fused_loss",
    "gem_loss",
    "num_tokens",
    "supervised",
]

LOSSES: Mapping[str, type[FinetuneLoss]] = {
    "ce": Ce,
    "gem": Gem,
    "dft": Dft,
    "eaft": Eaft,
    "sed": Sed,
    "tofu": Tofu,
    "label_smoothing": LabelSmoothing,
    "entropy_regularized": EntropyRegularized,
}
"""The class of each loss, by name. `LOSSES["gem"](beta=0.7)` is a loss with its options."""

if TYPE_CHECKING:
    LossSpec = FinetuneLoss
else:
    LossSpec = union_of(LOSSES, FinetuneLoss, "poise.losses")
    """The section `loss` of a spec: one of `LOSSES`, or code of the user or of an installed package."""
