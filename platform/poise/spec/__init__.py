"""What a run is: typed specs, YAML in, precise errors out."""

from poise.spec.base import Section
from poise.spec.values import Name, Real

__all__ = ["Name", "Real", "Section"]
