"""What a run is: typed specs, YAML in, precise errors out."""

from poise.spec.base import Section, mistake
from poise.spec.inputs import Input
from poise.spec.interval import Every
from poise.spec.load import dump, json_schema, load, load_document, parse, sha256
from poise.spec.metrics import MetricSource, find_source, row_sources, summary_sources
from poise.spec.problems import Problem, SpecError
from poise.spec.run import RunSpec, SamplerSpec, WorkersSpec
from poise.spec.values import Name, Real, RunName

__all__ = [
    "Every",
    "Input",
    "MetricSource",
    "Name",
    "Problem",
    "Real",
    "RunName",
    "RunSpec",
    "SamplerSpec",
    "Section",
    "SpecError",
    "WorkersSpec",
    "dump",
    "find_source",
    "json_schema",
    "load",
    "load_document",
    "mistake",
    "parse",
    "row_sources",
    "sha256",
    "summary_sources",
]
