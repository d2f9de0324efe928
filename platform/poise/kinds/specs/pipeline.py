"""`kind: pipeline`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from poise.kinds.specs.stage import Job
from poise.kinds.specs.sweep import SweepSpec
from poise.spec import Input, Name, RunSpec, mistake
from poise.spec.problems import Path, dotted

__all__ = ["PipelineSpec"]

_REFERENCE = re.compile(r"\$\{([^}]*)\}")

Stage = Annotated[Job | SweepSpec, Field(discriminator="kind")]


class PipelineSpec(RunSpec):
    """Stages that are run in order, each a run of its own; stages that are finished are skipped.

    `common` holds, by name, what several stages share; a stage with `use: NAME` has that laid under it. Where a stage
    names a run, `${stage}` is the run of an earlier stage.
    """

    shares_batches: ClassVar[bool] = False

    kind: Literal["pipeline"]
    stages: dict[Name, Stage] = Field(min_length=1, max_length=100, description="the runs, by name, in order")

    @classmethod
    def expand(cls, tree: dict[str, Any]) -> tuple[dict[str, Any], dict[Path, Path]]:
        """Give each stage what it does not say itself: `common`, and name, seed, store and workers of the pipeline."""
        stages, common = tree.get("stages"), tree.get("common", {})
        if not isinstance(stages, dict) or not isinstance(common, dict):
            return tree, {}
        head: dict[str, Any] = {key: tree[key] for key in ("seed", "store", "workers") if key in tree}
        full, copies, names = dict[str, Any](), dict[Path, Path](), dict[str, str]()
        for stage, body in stages.items():
            full[stage] = body
            if not isinstance(body, dict):
                continue
            use, shared = body.get("use"), {}
            if isinstance(use, str) and isinstance(common.get(use), dict):
                shared, body = common[use], {key: value for key, value in body.items() if key != "use"}
                copies[("stages", stage)] = ("common", use)
            full[stage] = _resolved(_overlay({**head, "name": f"{tree.get('name')}-{stage}"}, shared, body), names)
            if full[stage].get("kind") == "sweep":
                full[stage], _ = SweepSpec.expand(full[stage])
            names[stage] = str(full[stage]["name"])
        return {**{key: value for key, value in tree.items() if key != "common"}, "stages": full}, copies

    @model_validator(mode="before")
    @classmethod
    def _used(cls, tree: Any) -> Any:
        stages = tree.get("stages") if isinstance(tree, dict) else None
        for stage, body in stages.items() if isinstance(stages, dict) else ():
            if isinstance(body, dict) and "use" in body:
                raise mistake(f"stages.{stage}.use", f"nothing in `common` is called {body['use']!r}")
        return tree

    @model_validator(mode="after")
    def _read_in_order(self) -> PipelineSpec:
        """A stage reads runs of stages before it; what else it reads is looked up when the pipeline starts."""
        later = {stage.name: key for key, stage in self.stages.items()}
        for key, stage in self.stages.items():
            for each in stage.inputs():
                if each.kind == "run" and each.place in later:
                    place = dotted(("stages", key, *each.path))
                    raise mistake(place, f"{each.place} is the run of stage {later[each.place]}, which comes later")
            later.pop(stage.name, None)
        return self

    @model_validator(mode="after")
    def _own_names(self) -> PipelineSpec:
        names = [stage.name for stage in self.stages.values()]
        if len(set(names)) < len(names):
            raise ValueError("two stages have the same run name; leave `name` out of `common`")
        return self

    def inputs(self) -> Iterator[Input]:
        """What the stages read, the runs of each other left out: they are not made yet when the first one starts."""
        made = {stage.name for stage in self.stages.values()}
        sweeps = tuple(f"{stage.name}-" for stage in self.stages.values() if isinstance(stage, SweepSpec))
        for each in super().inputs():
            if each.kind != "run" or not (each.place in made or each.place.startswith(sweeps)):
                yield each

    def cost(self) -> list[str]:
        """What each stage costs."""
        return [f"{stage.name}: {line}" for stage in self.stages.values() for line in stage.cost()]


def _resolved(value: Any, names: dict[str, str]) -> Any:
    """A text that is `${stage}` replaced by the run of that stage; one that is not earlier is left as it is."""
    if isinstance(value, dict):
        return {key: _resolved(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, names) for inner in value]
    if isinstance(value, str):
        found = _REFERENCE.fullmatch(value)
        return names.get(found[1], value) if found else value
    return value


def _overlay(*layers: dict[str, Any]) -> dict[str, Any]:
    """Mappings laid over each other, section by section; the last that says something wins."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = _overlay(result[key], value) if both else value
    return result
