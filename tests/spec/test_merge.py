"""The one rule of merging: of the function itself, and wherever a spec lays a section over another."""

from __future__ import annotations

import pytest

from poise.kinds.pipeline.spec import PipelineSpec
from poise.kinds.sweep.spec import SweepSpec
from poise.spec.merge import merge
from poise.spec.reader import read_document

BASE = {"train": {"epochs": 2, "optimizer": {"name": "sgd", "lr": 0.1}}, "attacks": [1, 2], "averaging": {"start": 1}}
CASES = [
    ({}, BASE),
    ({"train": {"epochs": 3}}, {**BASE, "train": {**BASE["train"], "epochs": 3}}),
    ({"attacks": [3]}, {**BASE, "attacks": [3]}),
    ({"averaging": None}, {**BASE, "averaging": None}),
    ({"train": {"optimizer": {"name": "sgd", "lr": 1}}},
     {**BASE, "train": {"epochs": 2, "optimizer": {"name": "sgd", "lr": 1}}}),
    ({"train": {"optimizer": {"name": "adamw"}}},
     {**BASE, "train": {"epochs": 2, "optimizer": {"name": "adamw"}}}),
    ({"train": 3}, {**BASE, "train": 3}),
    ({"attacks": {"one": 1}}, {**BASE, "attacks": {"one": 1}}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "merged"), CASES)
def test_mappings_are_merged_and_everything_else_replaces(changes, merged):
    assert merge(BASE, changes) == merged
    assert merge({}, BASE, {}, changes, {}) == merged


def test_merging_changes_none_of_its_layers():
    base = {"train": {"epochs": 2}}
    merged = merge(base, {"train": {"lr": 1}})
    merged["train"]["epochs"] = 5
    assert base == {"train": {"epochs": 2}}


@pytest.mark.parametrize(("changes", "merged"), CASES)
def test_stages_profiles_sweeps_and_merge_keys_follow_the_rule(changes, merged):
    tree = {"name": "p", "common": {"shared": BASE}, "stages": {"a": {"use": "shared", **changes}}}
    assert PipelineSpec.expand(tree)[0]["stages"]["a"] == {"name": "p-a", **merged}

    document = read_document(f"profiles: {{p: {_flow(changes)}}}\n" + _block(BASE), "spec.yaml")
    document.take_profile("p")
    assert document.tree == merged

    document = read_document(f"base: &base {_flow(BASE)}\nother:\n  <<: *base\n" + _block(changes, "  "), "spec.yaml")
    assert document.tree["other"] == merged

    workers = {"workers": {"count": 2, "gpus": 1}, "base": {"workers": {"count": 1}}}
    assert SweepSpec.expand(workers)[0]["base"] == {"workers": {"count": 1, "gpus": 1}}


def _flow(value: object) -> str:
    """The value as YAML on one line."""
    return str(value).replace("None", "null")


def _block(mapping: dict[str, object], indent: str = "") -> str:
    return "".join(f"{indent}{key}: {_flow(value)}\n" for key, value in mapping.items())
