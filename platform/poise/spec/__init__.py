"""Typed specs of runs: from YAML to validated sections, with precise errors."""

from poise.spec.base import SpecModel, field_error
from poise.spec.inputs import Input
from poise.spec.interval import Interval
from poise.spec.load import dump, json_schema, load, load_document, parse, sha256
from poise.spec.metrics import MetricSource, find_source, row_sources, summary_sources
from poise.spec.problems import Problem, SpecError
from poise.spec.run import RunSpec, SamplerSpec, WorkersSpec
from poise.spec.values import ExactNumber, Name, RunName

__all__ = [
    "ExactNumber",
    "Input",
    "Interval",
    "MetricSource",
    "Name",
    "Problem",
    "RunName",
    "RunSpec",
    "SamplerSpec",
    "SpecError",
    "SpecModel",
    "WorkersSpec",
    "dump",
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
