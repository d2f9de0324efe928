"""`kind: pipeline`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from poise.kinds.jobs import Job
from poise.kinds.sweep.spec import SweepSpec
from poise.spec import Input, Name, RunSpec, field_error
from poise.spec.merge import merge
from poise.spec.problems import Path, dotted

__all__ = ["PipelineSpec"]

_REFERENCE = re.compile(r"\$\{([^}]*)\}")

Stage = Annotated[Job | SweepSpec, Field(discriminator="kind")]


class PipelineSpec(RunSpec):
    """Stages that run in order, each as a run of its own; finished stages are skipped.

    `common` holds, by name, sections that several stages share; a stage with `use: NAME` is merged over that section.
    Where a stage names a run, `${stage}` stands for the run of an earlier stage.
    """

    shares_batches: ClassVar[bool] = False

    kind: Literal["pipeline"]
    stages: dict[Name, Stage] = Field(min_length=1, max_length=100, description="the runs, by name, in order")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> tuple[dict[str, Any], dict[Path, Path]]:
        """Merge into each stage its section of `common`, and name, seed, store and workers of the pipeline.

        Returns:
            The tree without `common`; and for each stage that uses a section of `common`, the path of that section.
        """
        stages = tree.get("stages")
        common = tree.get("common", {})
        if not isinstance(stages, dict) or not isinstance(common, dict):
            return tree, {}
        inherited: dict[str, Any] = {key: tree[key] for key in ("seed", "store", "workers") if key in tree}
        expanded: dict[str, Any] = {}
        copies: dict[Path, Path] = {}
        run_names: dict[str, str] = {}  # of the stages before
        for key, stage in stages.items():
            expanded[key] = stage
            if not isinstance(stage, dict):
                continue
            shared: dict[str, Any] = {}
            use = stage.get("use")
            if isinstance(use, str) and isinstance(common.get(use), dict):
                shared = common[use]
                stage = {name: value for name, value in stage.items() if name != "use"}
                copies[("stages", key)] = ("common", use)
            defaults = {**inherited, "name": f"{tree.get('name')}-{key}"}
            expanded[key] = _resolve_references(merge(defaults, shared, stage), run_names)
            if expanded[key].get("kind") == "sweep":
                expanded[key], _ = SweepSpec.expand(expanded[key])
            run_names[key] = str(expanded[key]["name"])
        rest = {name: value for name, value in tree.items() if name != "common"}
        return {**rest, "stages": expanded}, copies

    @model_validator(mode="before")
    @classmethod
    def _known_uses(cls, tree: Any) -> Any:
        """Refuse a `use` that `expand` left in place, because `common` has no such section."""
        stages = tree.get("stages") if isinstance(tree, dict) else None
        for stage, body in stages.items() if isinstance(stages, dict) else ():
            if isinstance(body, dict) and "use" in body:
                raise field_error(f"stages.{stage}.use", f"nothing in `common` is called {body['use']!r}")
        return tree

    @model_validator(mode="after")
    def _read_in_order(self) -> PipelineSpec:
        """Refuse a stage that reads its own run or that of a later stage. Other inputs are checked at the start."""
        later = {stage.name: key for key, stage in self.stages.items()}
        for key, stage in self.stages.items():
            for named in stage.inputs():
                if named.kind == "run" and named.place in later:
                    path = dotted(("stages", key, *named.path))
                    message = f"{named.place} is the run of stage {later[named.place]}, which comes later"
                    raise field_error(path, message)
            later.pop(stage.name, None)
        return self

    @model_validator(mode="after")
    def _distinct_names(self) -> PipelineSpec:
        names = [stage.name for stage in self.stages.values()]
        if len(set(names)) < len(names):
            raise ValueError("two stages have the same run name; leave `name` out of `common`")
        return self

    def inputs(self) -> Iterator[Input]:
        """The inputs of the stages, except runs of other stages, which do not exist before the pipeline starts."""
        stage_runs = {stage.name for stage in self.stages.values()}
        trial_prefixes = tuple(f"{stage.name}-" for stage in self.stages.values() if isinstance(stage, SweepSpec))
        for named in super().inputs():
            is_stage_run = named.place in stage_runs or named.place.startswith(trial_prefixes)
            if named.kind != "run" or not is_stage_run:
                yield named

    def cost(self) -> list[str]:
        """The cost of each stage."""
        return [f"{stage.name}: {line}" for stage in self.stages.values() for line in stage.cost()]


def _resolve_references(value: Any, run_names: dict[str, str]) -> Any:
    """The tree with each text `${stage}` replaced by the run of that stage; unknown stages are left as they are."""
    if isinstance(value, dict):
        return {key: _resolve_references(inner, run_names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve_references(inner, run_names) for inner in value]
    if isinstance(value, str):
        match = _REFERENCE.fullmatch(value)
        return run_names.get(match[1], value) if match else value
    return value
