"""What a gang does without, so that it starts sooner; that it works is shown by every test on Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

DRIVER = """\
import sys
import poise.engine.errand, poise.engine.gang, poise.engine.trials, poise.report.page
assert "torch" not in sys.modules
"""

CALLBACKS = """\
from ray.train import ScalingConfig
from poise.engine.errand import run_errand
from poise.engine.trainer import ProcessGroup, Trainer
trainer = Trainer(
    run_errand, private={private}, backend_config=ProcessGroup("gloo"), scaling_config=ScalingConfig(num_workers=2)
)
print(*(type(each).__name__ for each in trainer._create_default_callbacks()))
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_driver_and_rays_controller_do_without_torch():
    python(DRIVER)


@pytest.mark.parametrize("private", [True, False])
def test_placement_groups_are_tidied_up_only_where_the_cluster_outlives_its_driver(private):
    callbacks = python(CALLBACKS.format(private=private)).split()
    assert ("PlacementGroupCleanerCallback" in callbacks) != private
    assert "BackendSetupCallback" in callbacks
    assert "DatasetsCallback" not in callbacks
