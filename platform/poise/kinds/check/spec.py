"""The check of a whole spec: its store, every run and function that it names, and every section with files."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

from poise.data.images.spec import DataSpec
from poise.data.text.question_spec import CsvQuestions, JsonlQuestions, ParquetQuestions
from poise.data.text.spec import JsonlText, ParquetText
from poise.errors import PoiseError
from poise.kinds.align_selfplay.spec import AlignSelfplaySpec
from poise.kinds.bounds_report.spec import BoundsReportSpec
from poise.kinds.calibrate_measure.spec import CalibrateMeasureSpec
from poise.kinds.check.field_error import FieldError
from poise.kinds.check.images import image_errors
from poise.kinds.check.inputs import input_errors, why_not_writable
from poise.kinds.check.models import folder_errors, state_dict_errors, target_model_errors
from poise.kinds.check.rows import question_errors, text_errors
from poise.kinds.check.tokens import prompt_errors, text_length_errors
from poise.kinds.common.target_model_spec import TargetModelSpec
from poise.kinds.finetune_sft.spec import FinetuneSftSpec
from poise.kinds.pipeline.spec import PipelineSpec
from poise.kinds.robust_evaluate.spec import RobustEvaluateSpec
from poise.kinds.sweep.spec import SweepSpec
from poise.models.spec import LanguageModelSpec
from poise.spec import RunSpec, SpecModel
from poise.spec.problems import Path

__all__ = ["find_errors"]

_CHECKS: Mapping[type[SpecModel], Callable[[Any], Iterator[FieldError]]] = {
    DataSpec: image_errors,
    JsonlText: text_errors,
    ParquetText: text_errors,
    JsonlQuestions: question_errors,
    CsvQuestions: question_errors,
    ParquetQuestions: question_errors,
    LanguageModelSpec: folder_errors,
    TargetModelSpec: target_model_errors,
    CalibrateMeasureSpec: prompt_errors,
    AlignSelfplaySpec: prompt_errors,
    FinetuneSftSpec: text_length_errors,
    RobustEvaluateSpec: state_dict_errors,
    BoundsReportSpec: state_dict_errors,
}
"""The check of each class of section. The first class that a section is an instance of counts."""

_CHECKED_RUN_KEYS = {"model", "models", "data", "questions", "prompt", "decoding", "max_tokens"}
"""The keys of a run that the checks of a whole run read. Trials that agree in these are checked once."""


def find_errors(spec: RunSpec, *, skip: Collection[str] = ()) -> list[FieldError]:
    """Every error that keeps the runs of a spec from their results and can be found here without running.

    `skip` names finished runs, which are not checked: their inputs may have been removed since.
    """
    errors: dict[FieldError, None] = {}  # an ordered set
    earlier_kinds: dict[str, str] = {}  # run -> kind, of the stages before; for a sweep "sweep of robust.train"
    for prefix, stage in _stages(spec):
        if stage.name not in skip:
            for error in _run_errors(stage, earlier_kinds):
                errors[error.below(prefix)] = None
        earlier_kinds[stage.name] = f"sweep of {stage.base.kind}" if isinstance(stage, SweepSpec) else stage.kind
    return list(errors)


def _stages(spec: RunSpec) -> Iterator[tuple[Path, RunSpec]]:
    """The stages of a pipeline with their paths; any other spec itself."""
    if isinstance(spec, PipelineSpec):
        yield from ((("stages", name), stage) for name, stage in spec.stages.items())
    else:
        yield (), spec


def _run_errors(spec: RunSpec, earlier_kinds: Mapping[str, str]) -> Iterator[FieldError]:
    if "://" not in spec.store:
        store = FilePath(spec.store).expanduser()
        if os.path.isfile(store):
            yield FieldError(("store",), f"{spec.store} is a file, not a folder")
            return
        reason = why_not_writable(store.absolute())
        if reason:
            message = f"{spec.store} cannot be made ({reason}): name a folder that can be written"
            yield FieldError(("store",), message, absent=True)
    for named in dict.fromkeys(spec.inputs()):
        yield from input_errors(named, spec, earlier_kinds)
    for path, section in _sections(spec):
        if isinstance(section, tuple(_CHECKS)):
            yield from _section_errors(path, section)


def _sections(spec: RunSpec) -> Iterator[tuple[Path, SpecModel]]:
    """Every section with its path; of a sweep, the distinct sections of its trials."""
    if not isinstance(spec, SweepSpec):
        yield from _nested_sections(spec, ())
        return
    seen: set[tuple[Path, str]] = set()
    for trial in spec.trials():
        for path, section in _nested_sections(trial.spec, ("base",)):
            if not isinstance(section, tuple(_CHECKS)):
                continue
            # The names of trials differ, so whole runs are compared by the keys that their check reads.
            keys = _CHECKED_RUN_KEYS if isinstance(section, RunSpec) else None
            content = section.model_dump_json(include=keys)
            if (path, content) not in seen:
                seen.add((path, content))
                yield path, section


def _nested_sections(value: Any, path: Path) -> Iterator[tuple[Path, SpecModel]]:
    """`value` if it is a section, then every section inside it, depth first."""
    if isinstance(value, SpecModel):
        yield path, value
        for key, inner in value:
            yield from _nested_sections(inner, (*path, key))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _nested_sections(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _nested_sections(inner, (*path, index))


def _section_errors(path: Path, section: SpecModel) -> Iterator[FieldError]:
    check = next(function for section_class, function in _CHECKS.items() if isinstance(section, section_class))
    try:
        for error in check(section):
            yield error.below(path)
    except PoiseError as error:
        yield FieldError(path, str(error))
