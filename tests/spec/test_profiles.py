"""Profiles: one spec, and the changes that make it small, each with errors where it was written."""

from __future__ import annotations

import pytest

from poise.kinds import KINDS
from poise.spec import SpecError, load

PROFILES = """\
profiles:
  small:
    train: {epochs: 1}
    data: {batch_size: 32}
    objective: {name: avg}
  wrong:
    train:
      epochs: none
"""


def test_a_profile_is_merged_and_names_its_run(valid, write):
    path = write(valid.replace("{name: adt}", "{name: adt, lag: 0}") + PROFILES)
    whole, small = load(path, KINDS), load(path, KINDS, profile="small")
    assert (whole.name, whole.train.epochs, whole.data.batch_size) == ("digits", 2, 64)
    assert (small.name, small.train.epochs, small.data.batch_size) == ("digits-small", 1, 32)
    assert (small.data.name, small.train.optimizer.lr) == ("digits", 0.1)
    assert small.objective.name == "avg"  # another name: nothing of the old section, such as `lag`, is left
    assert load(path, KINDS, ["train.epochs=3", "name=mine"], "small").train.epochs == 3


def test_a_mistake_in_a_profile_is_found_where_it_was_written_and_only_with_it(valid, write):
    path = write(valid + PROFILES)
    load(path, KINDS)
    with pytest.raises(SpecError) as caught:
        load(path, KINDS, profile="wrong")
    line = (valid + PROFILES).splitlines().index("      epochs: none") + 1
    assert f"spec.yaml:{line}: train.epochs" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "profile", "said"),
    [
        (PROFILES, "smal", "--profile smal: is not a profile of .*did you mean 'small'"),
        ("", "small", "the spec has no `profiles`"),
        ("profiles: [small]\n", "small", "profiles: a mapping of names to the changes"),
        ("profiles: {small: 3}\n", None, "profiles: a mapping of names to the changes"),
    ],
)
def test_mistakes_about_profiles(valid, write, text, profile, said):
    with pytest.raises(SpecError, match=said):
        load(write(valid + text), KINDS, profile=profile)
