"""The process of Ray that starts a worker group does without torch."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from ray.train import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from poise.engine.ray.process_group import PrivateTrainer, ProcessGroup
from poise.engine.ray.worker_args import WorkerArgs, run_worker
from poise.kinds import KINDS

CONTROLLER = """\
import pickle, sys
from poise.engine.ray.process_group import ProcessGroup
pickle.loads(pickle.dumps(ProcessGroup("gloo"))).backend_cls()
args = pickle.loads(bytes.fromhex("{args}"))
assert "torch" not in sys.modules
assert args.spec.kind == "robust.train"
assert "torch" in sys.modules
"""


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
    code = CONTROLLER.format(args=pickle.dumps(args).hex())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("trainer_class", [PrivateTrainer, DataParallelTrainer])
def test_placement_groups_are_cleaned_up_only_where_the_cluster_outlives_its_driver(trainer_class):
    trainer = trainer_class(
        run_worker, backend_config=ProcessGroup("gloo"), scaling_config=ScalingConfig(num_workers=2)
    )
    callbacks = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
    assert ("PlacementGroupCleanerCallback" in callbacks) == (trainer_class is DataParallelTrainer)
    assert "BackendSetupCallback" in callbacks
