"""Finished runs, opened by their names for other runs: the spec, the result and the weights that they have left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar, get_args

import yaml

from poise.errors import UserError
from poise.spec import RunSpec
from poise.store.inputs import check_inputs
from poise.store.result import RunResult, require_result
from poise.store.runs import Run, open_run, wrong_kind

__all__ = ["FinishedRun", "open_finished"]

SpecT = TypeVar("SpecT", bound=RunSpec)
ResultT = TypeVar("ResultT", bound=RunResult)


@dataclass(frozen=True)
class FinishedRun(Generic[SpecT, ResultT]):
    """A run that has a result. `poise.train.restore.load_checkpoint` loads the weights of one of its steps."""

    run: Run
    spec: SpecT
    result: ResultT


def open_finished(
    store: str, name: str, spec_class: type[SpecT], result_class: type[ResultT], *, unchanged_inputs: bool = False
) -> FinishedRun[SpecT, ResultT]:
    """The finished run `name`, of the kind of `spec_class`; with `unchanged_inputs`, to read its data again.

    Raises:
        UserError: there is no such run, or it is of another kind, or has no result; with `unchanged_inputs`, its data
            have changed since it was started.
        IntegrityError: its spec or its result is damaged.
    """
    run = open_run(store, name, must_exist=True)
    manifest = run.manifest()
    kinds = get_args(spec_class.model_fields["kind"].annotation)
    if manifest is not None and manifest.kind not in kinds:
        raise UserError(wrong_kind(name, manifest.kind, kinds))
    result = require_result(run, result_class)
    spec = spec_class.model_validate(yaml.safe_load(run.read("spec.yaml")))
    if unchanged_inputs:
        check_inputs(run, spec)
    return FinishedRun(run, spec, result)
