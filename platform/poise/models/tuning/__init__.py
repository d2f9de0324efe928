"""Which weights of a language model are trained, by name. One way is one file here and one line in `TUNINGS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from poise.models.tuning.base import Tuning
from poise.models.tuning.full import Full
from poise.models.tuning.lora import Lora
from poise.spec.registry import union_of

__all__ = ["TUNINGS", "Full", "Lora", "Tuning", "TuningSpec"]

TUNINGS: Mapping[str, type[Tuning]] = {
    "full": Full,
    "lora": Lora,
}
"""The class of each way to tune, by name."""

if TYPE_CHECKING:
    TuningSpec = Tuning
else:
    TuningSpec = union_of(TUNINGS, Tuning, "poise.tuning")
    """The section `tuning` of a spec: one of `TUNINGS`, or code of the user or of an installed package."""
