"""What a worker group does without, so that it starts sooner; that it works is shown by every test on Ray."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from poise.engine.ray.trainer import _LocalScalingPolicy
from poise.engine.ray.worker_args import WorkerArgs
from poise.kinds import KINDS

CONTROLLER = """\
import pickle, sys
import poise.engine.ray.trainer
args = pickle.loads(bytes.fromhex("{args}"))
assert "torch" not in sys.modules
assert args.spec.kind == "robust.train"
assert "torch" in sys.modules
"""

CALLBACKS = """\
from ray.train import ScalingConfig
from poise.engine.ray.worker_args import run_worker
from poise.engine.ray.trainer import ProcessGroup, Trainer
trainer = Trainer(
    run_worker, private={private}, backend_config=ProcessGroup("gloo"), scaling_config=ScalingConfig(num_workers=2)
)
print(*(type(each).__name__ for each in trainer._create_default_callbacks()))
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rays_controller_does_without_torch():
    """It is sent the arguments of the workers, whose spec needs torch once it is asked for."""
    values = {
        "kind": "robust.train",
        "name": "sent",
        "model": {"name": "cnn"},
        "data": {"name": "digits"},
        "threats": {"linf": {"eps": 0.1}},
        "objective": {"name": "at"},
        "train": {"epochs": 1},
    }
    args = WorkerArgs(pickle.dumps(KINDS["robust.train"].model_validate(values)), "/runs", "token", "/", None)
    python(CONTROLLER.format(args=pickle.dumps(args).hex()))


@pytest.mark.parametrize("private", [True, False])
def test_placement_groups_are_tidied_up_only_where_the_cluster_outlives_its_driver(private):
    callbacks = python(CALLBACKS.format(private=private)).split()
    assert ("PlacementGroupCleanerCallback" in callbacks) != private
    assert "BackendSetupCallback" in callbacks
    assert "DatasetsCallback" not in callbacks


def test_a_private_cluster_is_never_asked_to_grow():
    """The decisions are Ray's, without a coordinator; under other names of Ray's methods this fails."""
    config = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    policy = _LocalScalingPolicy(config)
    policy.after_controller_start(None)
    decision = policy.make_decision_for_non_running_worker_group()
    assert (decision.num_workers, decision.resources_per_worker) == (2, {"CPU": 1})
    assert isinstance(policy.make_decision_for_running_worker_group(None, None), NoopDecision)
    assert policy._coordinator_client is None
    assert "_initialize_and_run_controller" in vars(DataParallelTrainer)
