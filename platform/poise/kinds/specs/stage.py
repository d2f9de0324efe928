"""The kinds that run by themselves: what a stage of a pipeline can be, and what a sweep can vary."""

from __future__ import annotations

from poise.kinds.specs.align import AlignSelfplaySpec
from poise.kinds.specs.bounds import BoundsReportSpec
from poise.kinds.specs.calibrate import CalibrateMeasureSpec
from poise.kinds.specs.evaluation import RobustEvaluateSpec
from poise.kinds.specs.finetune import FinetuneSftSpec
from poise.kinds.specs.manifold import RobustManifoldSpec, RobustVaeSpec
from poise.kinds.specs.robust import RobustTrainSpec

__all__ = ["Job"]

Job = (
    RobustTrainSpec
    | RobustEvaluateSpec
    | RobustVaeSpec
    | RobustManifoldSpec
    | BoundsReportSpec
    | FinetuneSftSpec
    | AlignSelfplaySpec
    | CalibrateMeasureSpec
)
"""The union of the specs of all kinds but `sweep` and `pipeline`; where it is used, `kind` tells which."""
