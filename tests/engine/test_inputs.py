"""What a run reads is part of it: killed, its inputs swapped, it is not continued; finished, it is not shown as new."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from poise.cli import cli
from poise.data.synthetic_facts import World, make_world
from poise.data.world_spec import WorldSpec
from poise.engine.launch import launch
from poise.errors import UserError
from poise.kinds import KINDS
from poise.models.build import build
from poise.models.language import export, new_llama
from poise.models.spec import LanguageModelSpec, ModelSpec
from poise.observe.progress import Display, Progress
from poise.observe.sinks import NullSink
from poise.spec import RunSpec
from poise.store.inputs import read_inputs
from poise.store.runs import Run, open_run

WORLD = {"entities": 20, "relations": 16, "pretrain": 2}


class Killer(Display):
    """Ends the driver as Ctrl-C does, at the first progress for which `is_time` holds."""

    def __init__(self, is_time: Callable[[Progress], bool]) -> None:
        super().__init__(io.StringIO())
        self.is_time = is_time

    def show(self, progress: Progress) -> None:
        if self.is_time(progress):
            raise KeyboardInterrupt


def run(values: dict[str, Any], display: Display | None = None) -> Run:
    spec = KINDS[values["kind"]].model_validate(values)
    launch(spec, "local", None, display or Display(io.StringIO()), NullSink())
    return open_run(spec.store, spec.name)


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        run(values)
    return str(caught.value)


def said(values: dict[str, Any]) -> str:
    """What is printed while a spec is run."""
    stream = io.StringIO()
    run(values, Display(stream))
    return stream.getvalue()


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(WorldSpec(**WORLD))


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    tokenizer = world.tokenizer()
    model = new_llama(LanguageModelSpec(name="llama", hidden=32, layers=1, heads=1), tokenizer, 0)
    export(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def sft(folder: Path, data: Path, name: str = "tuned") -> dict[str, Any]:
    return {
        "kind": "finetune.sft",
        "name": name,
        "store": str(folder.parent / "runs"),
        "model": {"folder": str(folder)},
        "data": {"name": "jsonl", "path": str(data), "validation": 0},
        "batch_size": 16,
        "train": {
            "steps": 6,
            "optimizer": {"name": "adamw", "lr": 0.01},
            "checkpoint": {"every": {"steps": 2}, "keep": 9},
            "log_every": 1,
        },
    }


def write_text(world: World, path: Path, change: Callable[[str], str] = str) -> None:
    rows = [{"prompt": prompt, "completion": " " + change(answer)} for prompt, answer in world.texts("pretrain")[:64]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_training_goes_on_with_its_own_text_and_no_other(world, folder, tmp_path):
    data = tmp_path / "train.jsonl"
    write_text(world, data)
    whole = run(sft(folder, data, "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(sft(folder, data), Killer(lambda progress: progress.step >= 4))
    stopped = open_run(tmp_path / "runs", "tuned")
    assert [commit.step for commit in stopped.checkpoints.commits()]
    names = world.texts("pretrain")
    write_text(world, data, lambda answer: names[0][1])
    message = refused(sft(folder, data))
    shown = CliRunner().invoke(cli, ["runs", "show", str(tmp_path / "runs" / "tuned")]).output
    assert re.search(r"data\.path +train\.jsonl +[\d,]+ +[0-9a-f]{16}", shown)
    assert f"data.path: {data} has changed" in message
    assert "put back" in message
    assert "--set name=tuned-2" in message
    assert stopped.manifest().status == "running"
    write_text(world, data)  # the same bytes, written later
    ended = run(sft(folder, data))
    assert ended.read("artifacts/model/model.safetensors") == whole.read("artifacts/model/model.safetensors")
    assert {record.file for record in read_inputs(ended).values()} >= {
        "train.jsonl",
        "model.safetensors",
        "config.json",
    }


def test_two_models_are_not_measured_under_one_name(folder, tmp_path):
    values = {
        "kind": "calibrate.measure",
        "name": "measured",
        "store": str(tmp_path / "runs"),
        "model": {"folder": str(folder)},
        "questions": {"name": "world", "world": WORLD},
        "samples": 2,
        "decoding": {"max_tokens": 2},
        "sampler": {"backend": "transformers"},
        "bootstrap": 10,
    }
    measured = open_run(tmp_path / "runs", "measured")
    with pytest.raises(KeyboardInterrupt):
        run(values, Killer(lambda progress: bool(measured.files("samples/"))))
    assert len(measured.files("samples/")) == 1
    other_weights(folder)
    assert f"model.folder: {folder}/model.safetensors has changed" in refused(values)
    values["name"] = "another"
    assert run(values).manifest().status == "finished"


MODULE = """\
import torch
from helpers import weights

def make():
    layer = torch.nn.Linear(64, 10)
    with torch.no_grad():
        layer.weight.copy_(weights())
    return torch.nn.Sequential(torch.nn.Flatten(), layer)
"""
HELPERS = "import torch\n\ndef weights():\n    return torch.ones(10, 64)\n"


def evaluation(store: Path, **model: Any) -> dict[str, Any]:
    return {
        "kind": "robust.evaluate",
        "name": "judged",
        "store": str(store),
        "model": model,
        "data": {"name": "digits", "limit": 100},
        "num_examples": 20,
        "attacks": [{"attack": "fgsm", "threat": {"norm": "linf", "eps": 0.1}}],
    }


@pytest.mark.usefixtures("allow_code")
def test_code_that_was_corrected_does_not_show_the_old_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrected.py").write_text(MODULE)
    (tmp_path / "helpers.py").write_text(HELPERS)
    values = evaluation(tmp_path / "runs", function="corrected:make")
    assert "nothing was run" not in said(values)
    again = said(values)
    assert "[judged] finished at 20" in again
    assert "UTC; nothing was run" in again
    (tmp_path / "helpers.py").write_text(HELPERS.replace("ones", "zeros"))
    message = refused(values)
    assert "model.function: helpers.py has changed" in message
    assert "corrected.py" not in message
    (tmp_path / "helpers.py").unlink()
    assert "nothing was run" in said(values)  # what has been deleted since cannot differ


def test_a_state_dict_that_was_replaced_is_not_taken_for_the_first(tmp_path):
    model = build(ModelSpec(width=4), shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.4,), seed=3)
    file = tmp_path / "net.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    values = evaluation(tmp_path / "runs", file=str(file), width=4)
    run(values)
    save_file({name: value.contiguous() * 2 for name, value in model.state_dict().items()}, file)
    assert f"model.file: {file} has changed" in refused(values)


def npz(path: Path, seed: int) -> None:
    import numpy as np

    draw = np.random.default_rng(seed)
    arrays = {f"x_{part}": draw.integers(0, 256, (40, 8, 8), dtype=np.uint8) for part in ("train", "test")}
    np.savez(path, **arrays, **{f"y_{part}": np.arange(40) % 3 for part in ("train", "test")})


def training(store: Path, root: Path | str, name: str = "trained", **changes: Any) -> dict[str, Any]:
    return {
        "kind": "robust.train",
        "name": name,
        "store": str(store),
        "model": {"width": 4},
        "data": {"name": "npz", "root": str(root), "batch_size": 8, "validation": 8},
        "threats": {"linf": {"eps": 0.1, "steps": 1}},
        "objective": {"name": "at"},
        "train": {"epochs": 1},
        "evaluate": {"threats": {"linf": {"eps": 0.1, "steps": 1}}},
        **changes,
    }


def test_a_run_that_was_made_again_is_another_one(tmp_path):
    npz(tmp_path / "images.npz", 0)
    train = training(tmp_path / "runs", tmp_path)
    run(train)
    judge = evaluation(tmp_path / "runs", run="trained") | {"data": None}
    run(judge)
    import shutil

    shutil.rmtree(tmp_path / "runs" / "trained")
    run(training(tmp_path / "runs", tmp_path, seed=1))
    assert "model.run: run 'trained' has changed" in refused(judge)


def test_a_network_is_not_measured_on_other_images_than_its_own(tmp_path):
    npz(tmp_path / "images.npz", 0)
    run(training(tmp_path / "runs", tmp_path))
    npz(tmp_path / "images.npz", 1)
    judge = evaluation(tmp_path / "runs", run="trained") | {"data": None}
    assert f"data.root: {tmp_path}/images.npz has changed" in refused(judge)


def test_what_a_run_that_committed_nothing_was_begun_with_does_not_bind_it(tmp_path):
    (tmp_path / "images.npz").write_bytes(b"cut off")
    values = training(tmp_path / "runs", tmp_path)
    assert "cannot be read" in refused(values)
    npz(tmp_path / "images.npz", 0)
    assert run(values).manifest().status == "finished"


def test_a_sweep_starts_no_trial_on_other_images(tmp_path):
    npz(tmp_path / "images.npz", 0)
    sweep = {
        "kind": "sweep",
        "name": "swept",
        "store": str(tmp_path / "runs"),
        "base": {**training(tmp_path / "runs", tmp_path), "name": "swept"},
        "space": {"seed": {"grid": [0, 1]}},
        "metric": "clean",
        "mode": "max",
    }

    class Once(Display):
        def remove(self, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sweep, Once(io.StringIO()))
    npz(tmp_path / "images.npz", 1)
    assert f"base.data.root: {tmp_path}/images.npz has changed" in refused(sweep)
    assert not open_run(tmp_path / "runs", "swept-0001").exists()


def test_a_pipeline_names_the_stage_and_does_not_wait_for_it(tmp_path):
    npz(tmp_path / "images.npz", 0)
    stages = {key: {**training(tmp_path / "runs", tmp_path), "name": f"line-{key}"} for key in ("first", "second")}
    bounds = {"kind": "bounds.report", "name": "line-bounds", "store": str(tmp_path / "runs"), "runs": ["line-first"]}
    line = {"kind": "pipeline", "name": "line", "store": str(tmp_path / "runs")}
    line["stages"] = {**stages, "bounds": {**bounds, "num_examples": 10}}
    run(line)
    npz(tmp_path / "images.npz", 1)
    message = refused(line)
    assert "run 'line-first'" in message
    assert "data.root" in message


def test_images_on_s3_are_known_by_their_etag(tmp_path, s3_store):
    from poise.store.storage import open_storage

    bucket = s3_store.rpartition("/")[0]
    images = open_storage(f"{bucket}/images")
    npz(tmp_path / "images.npz", 0)
    images.upload(tmp_path / "images.npz", "images.npz")
    values = training(tmp_path / "runs", f"{bucket}/images")
    done = run(values)
    (record,) = read_inputs(done).values()
    assert record.etag
    assert record.bytes == (tmp_path / "images.npz").stat().st_size
    images.upload(tmp_path / "images.npz", "images.npz")  # the same bytes
    assert "nothing was run" in said(values)
    npz(tmp_path / "images.npz", 1)
    images.upload(tmp_path / "images.npz", "images.npz")
    assert "images.npz has changed" in refused(values)


def test_every_path_and_run_that_a_spec_can_name_is_an_input():
    """A field of a spec that holds a place, and that no `inputs` yields, would not be compared."""
    named = {"root", "path", "folder", "file", "function", "run", "runs", "vae"}
    declared = {
        "DataSpec.root", "JsonlText.path", "ParquetText.path", "JsonlQuestions.path", "CsvQuestions.path",
        "ParquetQuestions.path", "LanguageModelSpec.folder",
        "LanguageModelSpec.run", "TargetModelSpec.run", "TargetModelSpec.file", "TargetModelSpec.function",
        "ModelSpec.function", "DataSpec.function", "FunctionText.function", "FunctionQuestions.function",
        "MetricFunction.function", "RecheckSpec.run",
        "RobustManifoldSpec.runs", "BoundsReportSpec.runs", "LatentSpec.vae",
    }  # fmt: skip
    found: set[str] = set()
    seen: set[type] = set()

    def walk(annotation: Any) -> None:
        from pydantic import BaseModel

        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation in seen:
                return
            seen.add(annotation)
            for key, field in annotation.model_fields.items():
                if key in named:
                    found.add(f"{annotation.__name__}.{key}")
                walk(field.annotation)
        for inner in getattr(annotation, "__args__", ()):
            walk(inner)

    for kind in KINDS.values():
        walk(kind)
    assert found == declared
    assert all(isinstance(kind, type) and issubclass(kind, RunSpec) for kind in KINDS.values())


def test_a_spec_lists_what_it_reads_and_where_it_says_so(tmp_path):
    npz(tmp_path / "images.npz", 0)
    torch.manual_seed(0)
    spec = KINDS["robust.train"].model_validate(training(tmp_path / "runs", tmp_path))
    assert [(each.where, each.kind, each.place) for each in spec.inputs()] == [("data.root", "files", str(tmp_path))]
