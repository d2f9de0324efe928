"""An autoencoder and a report on the manifold as a whole: the numbers are those of checkpoints and verdicts."""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from poise import kinds
from poise.data.images.datasets import to_float
from poise.engine.lifecycle import claim
from poise.errors import UserError
from poise.kinds import KINDS, report_sections, result_classes
from poise.kinds.common.trained_classifier import open_trained
from poise.kinds.robust_manifold.result import RobustManifoldResult
from poise.kinds.robust_train.step import RobustStep
from poise.kinds.robust_vae.result import RobustVaeResult
from poise.kinds.robust_vae.run import held_out, open_vae
from poise.kinds.robust_vae.spec import RobustVaeSpec
from poise.models.sizes import count_parameters
from poise.models.spec import VaeSpec
from poise.models.vae import ConditionalVae, build_vae
from poise.observe.rows import read_rows
from poise.observe.timers import PhaseTimers
from poise.report.page import render
from poise.report.record import load_record
from poise.report.table import comparison
from poise.robust.attacks import pgd
from poise.robust.manifold import EigenspaceThreat, eigenbasis, elbo_parts, subspace_residual
from poise.robust.noise import Noise
from poise.spec.seeds import derive_seed
from poise.store.runs import Run, open_run
from poise.train.context import Context
from poise.train.task import StepContext

DATA = {"name": "digits", "batch_size": 50, "limit": 600, "validation": 100}
CPU = torch.device("cpu")


def go(store: str, name: str, kind: str, **values: object) -> Run:
    run, spec = (
        open_run(store, name),
        KINDS[kind].model_validate({"kind": kind, "name": name, "store": store, **values}),
    )
    with claim(run, spec):
        kinds.run(spec, Context(run))
    return run


def vae(store: str, name: str = "vae", **changes: object) -> Run:
    train = {"epochs": 60, "optimizer": {"name": "adamw", "lr": 0.003}, "evaluate_every": {"epochs": 20}}
    train["checkpoint"] = {"every": {"epochs": 60}}
    return go(
        store, name, "robust.vae", **{"model": {"latent": 6, "width": 64}, "data": DATA, "train": train, **changes}
    )


def manifold(store: str, name: str, **changes: object) -> Run:
    values = {"runs": ["net"], "eigenspace": {"rank": 12}, "num_examples": 60, "latent": {"vae": "vae", "steps": 5}}
    return go(store, name, "robust.manifold", **{**values, **changes})


def summary(run: Run) -> dict:
    return json.loads(run.read("result.json"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("runs"))
    go(
        folder,
        "net",
        "robust.train",
        model={"name": "cnn", "width": 4},
        data=DATA,
        threats={"linf": {"eps": 0.05, "steps": 2}},
        objective={"name": "at"},
        train={
            "epochs": 10,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluate_every": {"epochs": 10},
            "checkpoint": {"every": {"epochs": 10}},
        },
        evaluate={"threats": {"linf": {"eps": 0.1, "steps": 4}, "l2": {"eps": 1, "steps": 4}}, "num_examples": 60},
    )
    vae(folder)
    return folder


@pytest.fixture(scope="module")
def finished(store: str) -> Run:
    return manifold(store, "where")


def test_the_parts_of_the_elbo_are_the_closed_forms() -> None:
    """The density and the KL of normals by torch.distributions."""
    mean, log_variance = torch.randn(5, 3, dtype=torch.double), torch.randn(5, 3, dtype=torch.double)
    x, images = torch.rand(2, 5, 1, 2, 4, dtype=torch.double)
    density, kl = elbo_parts(x, images, mean, log_variance, torch.tensor(-1.3, dtype=torch.double))
    p, q = (
        torch.distributions.Normal(images, math.exp(-1.3)),
        torch.distributions.Normal(mean, (log_variance / 2).exp()),
    )
    assert torch.allclose(density, -p.log_prob(x).flatten(1).sum(1))
    assert torch.allclose(kl, torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(1))


def closed_form_size(spec: VaeSpec, shape: tuple[int, int, int], classes: int) -> int:
    """The number of parameters of the autoencoder of images of `shape` (C, H, W)."""
    pixels, width, total = math.prod(shape), spec.width, 1  # one: the deviation of the pixels
    for inputs, outputs in [(pixels + classes, 2 * spec.latent), (spec.latent + classes, pixels)]:
        total += (inputs + 1) * width + (width + 1) * width + (width + 1) * outputs
    return total


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_an_autoencoder_is_as_large_as_its_closed_form_and_draws_from_its_seed_alone(
    shape: tuple[int, int, int],
) -> None:
    spec = VaeSpec(latent=5, width=12)
    before = torch.get_rng_state()
    one, same, other = (build_vae(spec, shape=shape, classes=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert count_parameters(one) == closed_form_size(spec, shape, 4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.encoder[0].weight, other.encoder[0].weight)
    x, y = torch.rand(6, *shape), torch.arange(6) % 4
    code = one.code(x, y)
    assert torch.equal(code[:, 5:], torch.nn.functional.one_hot(y, 4).float())
    images, mean, _, deviation = one(x, y, torch.zeros(6, 5))
    assert torch.equal(code[:, :5], mean)
    assert torch.allclose(one.images(code), images)
    assert images.shape == x.shape
    assert 0 < images.min() < images.max() < 1
    assert deviation.item() == pytest.approx(math.log(0.2))


def test_the_elbo_of_the_summary_is_that_of_the_best_weights_and_training_has_raised_it(store: str) -> None:
    run = open_run(store, "vae")
    told, (model, data) = summary(run), open_vae(store, "vae", CPU)
    again = held_out(model, data.test, 0, Context(run))
    assert told["measured"] == again
    x, y = to_float(data.test.images), data.test.labels
    density, kl = elbo_parts(x, *model(x, y, Noise.of(0, "elbo", range(len(x))).normal(6)))
    assert told["measured"]["elbo"] == pytest.approx(-(density + kl).mean().item(), rel=1e-5)
    rows = read_rows(run.read(name) for name in run.files("metrics/rows-")).to_pylist()
    elbo = {row["step"]: row["value"] for row in rows if (row["split"], row["name"]) == ("validation", "elbo")}
    assert elbo[told["best_step"]] == max(elbo.values()) > min(elbo.values()) + 1
    train, labels = to_float(data.train.images), data.train.labels
    means = torch.stack([train[labels == label].mean(0) for label in range(10)])
    without_codes = -64 / 2 * (1 + math.log(2 * math.pi * (x - means[y]).square().mean().item()))
    assert told["measured"]["elbo"] > without_codes + 1
    assert told["measured"]["error"] < 0.9 * (x - means[y]).square().mean()
    assert told["parameters"] == closed_form_size(VaeSpec(latent=6, width=64), (1, 8, 8), 10)


def test_an_autoencoder_measures_what_it_says(store: str, assert_measured: Callable[..., None]) -> None:
    run = open_run(store, "vae")
    assert_measured(RobustVaeSpec.model_validate(yaml.safe_load(run.read("spec.yaml"))), run)


def test_the_numbers_are_those_of_the_matrix_of_verdicts(finished: Run) -> None:
    (net,) = summary(finished)["classifiers"]
    matrix = pq.read_table(io.BytesIO(finished.read("artifacts/evaluation-net.parquet"))).to_pydict()
    assert matrix.pop("example") == list(range(60))
    clean, reconstruction, latent = (sum(matrix[name]) / 60 for name in ("clean", "reconstruction", "latent"))
    assert net["clean"] == pytest.approx(clean)
    assert net["latent"] == pytest.approx(
        {"reconstruction": reconstruction, "accuracy": latent, "success": 1 - latent / reconstruction}
    )
    assert set(net["accuracy"]) == {
        f"{where}/{norm}" for where in ("full", "on_manifold", "off_manifold") for norm in ("linf", "l2")
    }
    for name, accuracy in net["accuracy"].items():
        assert accuracy == pytest.approx(sum(matrix[name]) / 60)
        assert net["success"][name] == pytest.approx(1 - accuracy / clean)
    assert net["dimensions"] == {"full": 64, "on_manifold": 12, "off_manifold": 52}
    assert 0.5 < net["explained"] < 1


def test_clean_and_the_full_ball_are_what_the_run_itself_has_measured(store: str, finished: Run) -> None:
    (net,) = summary(finished)["classifiers"]
    told = summary(open_run(store, "net"))["accuracy"]["best"]
    assert net["clean"] == told["clean"]
    two = 2 / 60 + 1e-9  # images; random starts have other noise
    assert net["accuracy"]["full/linf"] == pytest.approx(told["robust/linf"], abs=two)
    assert net["accuracy"]["full/l2"] == pytest.approx(told["robust/l2"], abs=two)


def test_on_the_manifold_is_the_eigenspace_of_the_training_images_of_each_class(store: str, finished: Run) -> None:
    (net,) = summary(finished)["classifiers"]
    trained = open_trained(store, "net", CPU)
    train, test = trained.data.train, trained.data.test.choose(60)
    basis = eigenbasis(to_float(train.images), train.labels, 12)
    assert net["explained"] == basis.explained
    x, y = to_float(test.images), test.labels
    assert net["distance"] == pytest.approx(basis.to(x).distance(x, y).mean().item())
    options = {"steps": 4, "noise": Noise.of(derive_seed(0, "evaluate"), "off_manifold/l2", range(60))}
    off = pgd(trained.model, x, y, EigenspaceThreat("l2", 1.0, basis=basis.to(x), labels=y, off=True), **options)
    assert net["accuracy"]["off_manifold/l2"] == pytest.approx(off.correct.double().mean().item(), abs=1 / 60)
    for where in ("on_manifold", "off_manifold"):
        assert 0 <= net["residual"][f"{where}/l2"]["share"] < net["residual"]["full/l2"]["share"] < 1


def test_without_an_autoencoder_and_with_one_shared_eigenspace(store: str) -> None:
    told = summary(manifold(store, "shared", eigenspace={"rank": 30, "shared": True}, latent=None))
    assert told["eigenspace"] == {"rank": 30, "shared": True}
    assert told["latent"] is None
    assert told["classifiers"][0]["latent"] is None


def test_both_are_shown_on_a_page_and_in_a_terminal(store: str, finished: Run) -> None:
    records = [load_record(finished, result_classes()), load_record(open_run(store, "vae"), result_classes())]
    page = render(records, "manifold", report_sections())
    attacked, autoencoder = (record.result for record in records)
    assert isinstance(attacked, RobustManifoldResult)
    assert isinstance(autoencoder, RobustVaeResult)
    (net,) = attacked.classifiers
    assert net.latent is not None
    for value in (*net.success.values(), net.latent.success):
        assert f"{100 * value:.1f}" in page
    assert f"{autoencoder.measured['elbo']:.4g}" in page
    assert page.count("Evidence lower bound") >= 2
    terminal = Console(file=io.StringIO(), width=120)
    for table in comparison(records, report_sections()):
        terminal.print(table)
    assert all(word in terminal.file.getvalue() for word in ("full ball", "reconstructions", "ELBO"))


def test_at_eps_zero_nothing_falls_and_codes_are_reconstructions(store: str) -> None:
    run = manifold(store, "none", threats={"l2": {"eps": 0, "steps": 2}}, latent={"vae": "vae", "eps": 0, "steps": 2})
    (net,) = summary(run)["classifiers"]
    assert set(net["success"].values()) == {0}
    assert net["latent"]["success"] == 0
    assert net["latent"]["accuracy"] == net["latent"]["reconstruction"] > 0.5


def test_the_result_does_not_hang_on_the_batch_size(store: str, finished: Run) -> None:
    again = summary(manifold(store, "batches", batch_size=7))["classifiers"][0]
    whole = summary(finished)["classifiers"][0]
    assert again["accuracy"] == pytest.approx(whole["accuracy"], abs=1 / 60)
    assert again["latent"] == pytest.approx(whole["latent"], abs=2 / 60)


class Ranked(Context):
    """A rank among threads of one process."""

    def gather(self, value: object) -> list[object]:
        self.box[self.rank] = value
        self.barrier.wait()
        values = list(self.box)
        self.barrier.wait()
        return values

    def broadcast(self, value: object) -> object:
        return self.gather(value)[0]


def test_two_ranks_find_what_one_finds(store: str, finished: Run) -> None:
    values = {"runs": ["net"], "eigenspace": {"rank": 12}, "num_examples": 60, "latent": {"vae": "vae", "steps": 5}}
    spec = KINDS["robust.manifold"].model_validate({"kind": "robust.manifold", "name": "two", "store": store, **values})
    run, box, barrier = open_run(store, "two"), [None, None], threading.Barrier(2, timeout=60)
    ranks = [Ranked(run, rank=rank, world_size=2) for rank in (0, 1)]
    for rank in ranks:
        rank.box, rank.barrier = box, barrier
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(kinds.run, spec), ranks))
    (one,), (two,) = summary(finished)["classifiers"], summary(run)["classifiers"]
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=1.01 / 60)
    assert two["distance"] == pytest.approx(one["distance"], rel=1e-5)
    assert two["residual"]["on_manifold/l2"] == pytest.approx(one["residual"]["on_manifold/l2"], rel=0.02)
    assert two["latent"]["reconstruction"] == one["latent"]["reconstruction"]


def test_an_autoencoder_that_is_killed_ends_in_the_same_bits(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"steps": 8, "optimizer": {"name": "adamw"}, "checkpoint": {"every": {"steps": 3}}, "log_every": 1}
    whole = vae(store, "whole", train=train)

    class Killed(BaseException):
        """Nothing may catch it and tidy up."""

    def die(self: ConditionalVae, x: torch.Tensor, *rest: torch.Tensor) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return forward(self, x, *rest)

    calls, forward = [], ConditionalVae.forward
    monkeypatch.setattr(ConditionalVae, "forward", die)
    with pytest.raises(Killed):
        vae(store, "killed", train=train)
    monkeypatch.setattr(ConditionalVae, "forward", forward)
    assert open_run(store, "killed").checkpoints.commits()[-1].step == 3
    torch.manual_seed(99)
    again = vae(store, "killed", train=train)
    assert summary(again) == summary(whole) | {"run": "killed"}
    weights = [open_vae(store, name, CPU)[0].state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"eigenspace": {"rank": 64}}, "eigenspace.rank: class 0 has .* 64 are too many"),
        ({"latent": {"vae": "net"}}, "'net' is a robust.train; name a run of robust.vae"),
        ({"runs": ["vae"]}, "is a robust.vae; name a run of robust.train or sweep"),
        ({"latent": {"vae": "vea"}}, "is it 'vae'"),
    ],
)
def test_runs_and_ranks_that_do_not_fit_are_refused(store: str, changes: dict[str, object], what: str) -> None:
    with pytest.raises(UserError, match=what):
        manifold(store, f"bad-{abs(hash(what))}", **changes)


@pytest.mark.parametrize("objective", ["at", "trades", "msd", "fgsm_rs"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eigenspace_adversarial_training_stays_in_the_eigenspace_of_each_class(objective: str, precision: str) -> None:
    """Whatever the objective makes of them, what the network is trained on differs from the images within the span."""
    spec = KINDS["robust.train"].model_validate(
        {
            "kind": "robust.train",
            "name": "within",
            "model": {"name": "cnn"},
            "data": DATA,
            "threats": {"linf" if objective == "fgsm_rs" else "l2": {"eps": 0.2, "steps": 3}},
            "objective": {"name": objective},
            "train": {"steps": 1},
        }
    )
    x, y = torch.rand(80, 1, 5, 5), torch.arange(80) % 2
    basis = eigenbasis(x, y, 6)
    x, y, seen = 0.3 + 0.4 * x[:10], y[:10], []
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(25, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()) if module.training else None)
    step = RobustStep(spec, model.train(), 10, basis)
    generator = torch.Generator().manual_seed(0)
    turn = StepContext(0, 0, True, generator, PhaseTimers(), lambda value: value)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        step.step(model, (x, y), step.initial(), turn)
    moved = [point - x for point in seen if not torch.equal(point, x)]
    assert moved
    within = EigenspaceThreat("l2", 0.2, basis=basis.to(x), labels=y)
    for delta in moved:
        assert subspace_residual(x, x + delta, within).share.max() < 1e-4
        assert delta.flatten(1).norm(dim=1).median() > 0.1


def test_a_run_within_eigenspaces_is_another_run_and_a_rank_too_high_is_refused(store: str) -> None:
    values = {
        "model": {"name": "cnn", "width": 4},
        "data": DATA,
        "threats": {"linf": {"eps": 0.1, "steps": 2}},
        "objective": {"name": "at"},
        "train": {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
        "evaluate": {"num_examples": 10},
    }
    runs = [
        go(store, f"space-{rank}", "robust.train", **values, **({"eigenspace": {"rank": rank}} if rank else {}))
        for rank in (0, 5)
    ]
    weights = [open_trained(store, run.name, CPU).model.state_dict()["body.0.weight"] for run in runs]
    assert not torch.equal(*weights)
    with pytest.raises(UserError, match=r"eigenspace.rank: class 0 has .* 60 are too many"):
        go(store, "space-60", "robust.train", **values, eigenspace={"rank": 60})


def test_a_class_that_no_training_image_has_is_refused(tmp_path):
    generator, folder = torch.Generator().manual_seed(0), tmp_path / "data"
    folder.mkdir()
    for split, classes in (("train", 3), ("test", 4)):
        encoded = []
        for pixels in torch.randint(0, 256, (60, 8, 8), generator=generator, dtype=torch.uint8).numpy():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            encoded.append(file.getvalue())
        table = pa.table({"image": encoded, "label": [row % classes for row in range(60)]})
        pq.write_table(table, folder / f"{split}.parquet")
    train = {"epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}}
    data = {"name": "images", "root": str(folder), "batch_size": 20, "validation": 12}
    threats = {"linf": {"eps": 0.05, "steps": 1}}
    net = {"model": {"width": 4}, "data": data, "threats": threats, "objective": {"name": "at"}, "train": train}
    go(str(tmp_path / "runs"), "net", "robust.train", **net)
    with pytest.raises(UserError, match=r"run net: the labels go up to 3 .* of 3 classes.*shared: true"):
        manifold(str(tmp_path / "runs"), "where", eigenspace={"rank": 2}, latent=None)
