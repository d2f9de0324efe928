"""Typed specs of runs: from YAML to validated sections, with precise errors."""

from poise.spec.base import SpecModel, field_error
from poise.spec.inputs import Input
from poise.spec.interval import Interval
from poise.spec.load import dump, json_schema, load, load_document, parse, sha256
from poise.spec.metrics import (
    ExtraMetrics,
    MetricFunction,
    MetricSource,
    extra_names,
    find_source,
    row_sources,
    summary_sources,
)
from poise.spec.problems import Problem, SpecError
from poise.spec.run import RunSpec, SamplerSpec, WorkersSpec, all_inputs
from poise.spec.values import CodeReference, ExactNumber, Name, RunName

__all__ = [
    "CodeReference",
    "ExactNumber",
    "ExtraMetrics",
    "Input",
    "Interval",
    "MetricFunction",
    "MetricSource",
    "Name",
    "Problem",
    "RunName",
    "RunSpec",
    "SamplerSpec",
    "SpecError",
    "SpecModel",
    "WorkersSpec",
    "all_inputs",
    "dump",
    "extra_names",
    "field_error",
    "find_source",
    "json_schema",
    "load",
    "load_document",
    "parse",
    "row_sources",
    "sha256",
    "summary_sources",
]
