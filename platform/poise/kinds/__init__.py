"""What can be run: one short file per kind of job, binding spec, data, model, loop and measures."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from poise.kinds.specs.align import AlignSelfplaySpec
from poise.kinds.specs.bounds import BoundsReportSpec
from poise.kinds.specs.calibrate import CalibrateMeasureSpec
from poise.kinds.specs.evaluation import RobustEvaluateSpec
from poise.kinds.specs.finetune import FinetuneSftSpec
from poise.kinds.specs.manifold import RobustManifoldSpec, RobustVaeSpec
from poise.kinds.specs.pipeline import PipelineSpec
from poise.kinds.specs.robust import RobustTrainSpec
from poise.kinds.specs.sweep import SweepSpec
from poise.observe.terminal import plain_warnings
from poise.spec import RunSpec
from poise.store.inputs import record_inputs

if TYPE_CHECKING:
    from poise.train.context import Context

__all__ = ["KINDS", "run"]

KINDS: Mapping[str, type[RunSpec]] = {
    "robust.train": RobustTrainSpec,
    "robust.evaluate": RobustEvaluateSpec,
    "robust.vae": RobustVaeSpec,
    "robust.manifold": RobustManifoldSpec,
    "bounds.report": BoundsReportSpec,
    "finetune.sft": FinetuneSftSpec,
    "align.selfplay": AlignSelfplaySpec,
    "calibrate.measure": CalibrateMeasureSpec,
    "sweep": SweepSpec,
    "pipeline": PipelineSpec,
}


def run(spec: RunSpec, context: Context) -> None:
    """Run `spec` in this worker; every worker of the gang calls it. What it finds is in the store afterwards.

    `kind: a.b` is at home in `poise.kinds.a_b`. Rank 0 compares the inputs with the record first, as they are seen
    here: a worker that is started again may meet other files than the one before it.

    Raises:
        UserError: an input is not the one that the run has begun with.
    """
    context.together(lambda: record_inputs(context.run, spec))
    with plain_warnings():
        import_module(f"poise.kinds.{spec.kind.replace('.', '_')}").run(spec, context)
