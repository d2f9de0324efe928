"""`kind: robust.manifold`: do trained classifiers fall to perturbations on the data manifold, or to those off it?

checkpoint -> the same balls searched anywhere, within the eigenspace of each class, at right angles to it
           -> codes of a conditional autoencoder -> accuracy, success, and how far the box has led off the subspace
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from poise.data.batches import Dataset
from poise.data.sets import ImageSet, unit_pixels
from poise.data.spec import DataSpec
from poise.errors import UserError
from poise.kinds.eigenspaces import eigenspaces
from poise.kinds.measure import described
from poise.kinds.robust_vae import open_vae
from poise.kinds.specs.manifold import LatentSpec, RobustManifoldSpec
from poise.kinds.trained import Trained, open_trained, trained_runs
from poise.models.vae import ConditionalVae
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.robust.attacks import SEARCH, AttackResult, pgd
from poise.robust.evaluate import Evaluation, EvaluationAttack, evaluate
from poise.robust.manifold import Decoded, Departure, Eigenbasis, Latent, Within, departure
from poise.robust.noise import Noise
from poise.robust.spec import Norm, ThreatSpec
from poise.robust.threats import Threat
from poise.spec.seeds import derive_seed
from poise.train.context import Context

__all__ = ["run"]

_WHERE = ("anywhere", "on", "off")


def run(spec: RobustManifoldSpec, context: Context) -> None:
    """Attack every run and leave `artifacts/summary.json`, and for each run the matrix of verdicts as Parquet."""
    names, unfinished = context.together(partial(trained_runs, spec.store, spec.runs))
    if unfinished and context.leads:
        context.run.append_events([event("left_out", why="trials that did not finish", runs=unfinished)])
    generator = None if spec.latent is None else open_vae(spec.store, spec.latent.vae, context.device)
    bases: dict[tuple[int, DataSpec], Eigenbasis] = {}  # trials of a sweep mostly share their images
    classifiers = []
    for index, name in enumerate(names):
        if context.leads:
            context.report(Progress(spec.name, "measure", index, len(names), index, len(names), unit="networks"))
        trained = open_trained(spec.store, name, context.device)
        images = trained.spec.seed, trained.spec.data
        if images not in bases:
            bases[images] = context.together(partial(eigenspaces, spec.eigenspace, trained.data.train))
        classifiers.append(_measured(spec, trained, bases[images], generator, context))
    context.together(partial(_keep, spec, classifiers, context))


def _measured(
    spec: RobustManifoldSpec,
    trained: Trained,
    basis: Eigenbasis,
    generator: tuple[ConditionalVae, Dataset] | None,
    context: Context,
) -> dict[str, Any]:
    """All that is said of one classifier."""
    threats = spec.threats or trained.spec.evaluate.threats or trained.spec.threats
    try:
        basis.groups(trained.data.test.labels)
    except ValueError as error:
        raise UserError(f"run {trained.name}: {error}: set eigenspace.shared: true") from None
    bench = _Bench(spec, trained.data.test.choose(spec.examples), context)
    searches = [_Search(where, norm, each, basis) for norm, each in threats.items() for where in _WHERE]
    found = bench.evaluate(trained.model, {f"{each.where}/{each.norm}": each for each in searches})
    codes = None
    if spec.latent is not None and generator is not None:
        codes = bench.attack_codes(trained.model, _fitting(spec.latent, trained, *generator), spec.latent)
    context.together(partial(_keep_matrix, trained.name, found, codes, context))
    inside, pixels = basis.rank, basis.mean.shape[1]
    return {
        "run": trained.name,
        "selected": trained.selected,
        "step": trained.step,
        "objective": trained.spec.objective.name,
        "examples": bench.total,
        "attacks": described(threats),
        "dimensions": {"anywhere": pixels, "on": inside, "off": pixels - inside},
        "explained": basis.explained,
        "distance": bench.mean(basis.to(bench.x).distance(bench.x, bench.y)),
        "clean": found.accuracy("clean"),
        "accuracy": {name: found.accuracy(name) for name in found.names[1:]},
        "success": {name: _success(found, name) for name in found.names[1:]},
        "departure": {f"{each.where}/{each.norm}": each.left(bench) for each in searches},
        "latent": None if codes is None else _of_codes(codes),
    }


class _Search:
    """The search of one ball: anywhere in it, on the manifold or off it.

    It notes how far what it finds has left the subspace; for a search anywhere, how far it has left the manifold.
    """

    def __init__(self, where: str, norm: Norm, spec: ThreatSpec, basis: Eigenbasis) -> None:
        self.where, self.norm = where, norm
        self._spec, self._basis = spec, basis
        self._left: list[Departure] = []

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
        eps = float(self._spec.eps)
        within = Within(self.norm, eps, basis=self._basis.to(x), labels=y, off=self.where == "off")
        threat = Threat(self.norm, eps) if self.where == "anywhere" else within
        search, options = SEARCH[self._spec.attack], self._spec.options()
        result = search(model, x, y, threat, noise=noise, **options)
        self._left.append(departure(x, result.adversarial, within))
        return result

    def left(self, bench: _Bench) -> dict[str, float | None]:
        """Means over the images that were attacked, on all ranks; None where there was none."""
        parts = {name: [getattr(left, name) for left in self._left] for name in ("residual", "share", "clipped")}
        return {name: bench.mean(torch.cat(values) if values else torch.empty(0)) for name, values in parts.items()}


class _Bench:
    """The images that are attacked: this rank's share of them, and what all ranks have found."""

    def __init__(self, spec: RobustManifoldSpec, images: ImageSet, context: Context) -> None:
        self.total, self._spec, self._context = len(images), spec, context
        self._mine = torch.arange(context.rank, len(images), context.world_size)
        share = images.select(self._mine)
        self.x, self.y = unit_pixels(share.images.to(context.device)), share.labels.to(context.device)

    def evaluate(
        self, model: nn.Module, attacks: Mapping[str, EvaluationAttack], x: Tensor | None = None
    ) -> Evaluation:
        """Attack the images, or what stands for them in `x`; every rank gets the verdicts on all of them."""
        seed = derive_seed(self._spec.seed, "evaluate")
        x = self.x if x is None else x
        size = self._spec.batch_size
        evaluation = evaluate(model, x, self.y, attacks, batch_size=size, seed=seed, indices=self._mine)
        correct = torch.empty(self.total, len(evaluation.names), dtype=torch.bool)
        for rank, part in enumerate(self._context.gather(evaluation.correct)):
            correct[rank :: self._context.world_size] = part
        return Evaluation(evaluation.names, correct)

    def attack_codes(self, classifier: nn.Module, vae: ConditionalVae, latent: LatentSpec) -> Evaluation:
        """Verdicts on the reconstructions ("clean") and on what attacked codes decode to ("latent")."""
        threat = Latent(latent.norm, float(latent.eps), width=vae.latent)
        size = None if latent.step_size is None else float(latent.step_size)
        options: dict[str, Any] = {"steps": latent.steps, "step_size": size, "restarts": latent.restarts}

        def attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
            return pgd(model, x, y, threat, noise=noise, random_start=False, **options)

        with torch.no_grad():
            codes = vae.code(self.x, self.y)
        return self.evaluate(Decoded(classifier, vae.images), {"latent": attack}, codes)

    def mean(self, values: Tensor) -> float | None:
        """The mean of a value per image over all ranks; None over no image."""
        parts = self._context.gather((float(values.double().sum()), len(values)))
        count = sum(n for _, n in parts)
        return sum(total for total, _ in parts) / count if count else None


def _fitting(latent: LatentSpec, trained: Trained, vae: ConditionalVae, data: Dataset) -> ConditionalVae:
    if (data.shape, data.classes) != (trained.data.shape, trained.data.classes):
        raise UserError(
            f"latent.vae: {latent.vae!r} was trained on images of shape {data.shape} in {data.classes} classes, and "
            f"{trained.name!r} on {trained.data.shape} in {trained.data.classes}"
        )
    return vae


def _success(found: Evaluation, name: str) -> float | None:
    """The share of the images that are classified right which the attack fools."""
    clean = found.accuracy("clean")
    return 1 - found.accuracy(name) / clean if clean else None


def _of_codes(codes: Evaluation) -> dict[str, float | None]:
    return {
        "reconstruction": codes.accuracy("clean"),
        "accuracy": codes.accuracy("latent"),
        "success": _success(codes, "latent"),
    }


def _keep_matrix(name: str, found: Evaluation, codes: Evaluation | None, context: Context) -> None:
    """bool [n, attacks] as Parquet: a row per image of the test split, in its order."""
    columns = {column: found.correct[:, index].numpy() for index, column in enumerate(found.names)}
    if codes is not None:
        columns |= {"reconstruction": codes.correct[:, 0].numpy(), "latent": codes.correct[:, 1].numpy()}
    sink = io.BytesIO()
    pq.write_table(pa.table({"example": pa.array(range(len(found.correct))), **columns}), sink)
    context.run.write(f"artifacts/verdicts-{name}.parquet", sink.getvalue())


def _keep(spec: RobustManifoldSpec, classifiers: list[dict[str, Any]], context: Context) -> None:
    summary = {
        "run": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "eigenspace": {"rank": spec.eigenspace.rank, "shared": spec.eigenspace.shared},
        "latent": None if spec.latent is None else _words(spec.latent),
        "classifiers": classifiers,
    }
    context.run.write("artifacts/summary.json", json.dumps(summary, indent=1).encode())


def _words(latent: LatentSpec) -> str:
    runs = f"{latent.restarts} run{'s' if latent.restarts > 1 else ''}"
    return f"codes of {latent.vae}, PGD-{latent.steps}, {latent.norm}, eps {latent.eps}, {runs}"
