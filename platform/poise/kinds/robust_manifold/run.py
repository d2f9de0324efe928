"""`kind: robust.manifold`: are trained classifiers fooled by perturbations on the data manifold, or by those off it?

checkpoint -> attacks in the same balls: in the full ball, within the eigenspace of each class, orthogonal to it
           -> attacks on the codes of a conditional autoencoder -> accuracy, success, residual outside the subspace
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from poise.data.images.batches import Dataset
from poise.data.images.datasets import ImageSet, to_float
from poise.errors import UserError
from poise.kinds.common.attack_description import describe_threats
from poise.kinds.common.eigenspaces import eigenspaces
from poise.kinds.common.robust_accuracy import columns_of, evaluate_shard, matrix_to_parquet
from poise.kinds.common.trained_classifier import TrainedClassifier, open_trained, trained_runs
from poise.kinds.robust_manifold.result import (
    ClassifierResult,
    EigenspaceResult,
    LatentResult,
    RobustManifoldResult,
    SubspaceResult,
)
from poise.kinds.robust_manifold.spec import LatentSpec, RobustManifoldSpec
from poise.kinds.robust_vae.run import open_vae
from poise.models.vae import ConditionalVae
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.robust.attacks import EVAL_ATTACKS, AttackResult, pgd
from poise.robust.evaluate import Evaluation, EvaluationAttack
from poise.robust.manifold import (
    DecodedClassifier,
    Eigenbasis,
    EigenspaceThreat,
    Latent,
    SubspaceResidual,
    subspace_residual,
)
from poise.robust.noise import Noise
from poise.robust.spec import Norm, ThreatSpec
from poise.robust.threats import Threat
from poise.spec.seeds import derive_seed
from poise.store.result import write_result
from poise.train.context import Context

__all__ = ["run"]

_WHERE = ("full", "on_manifold", "off_manifold")


def run(spec: RobustManifoldSpec, context: Context) -> None:
    """Attack every classifier; leave the result, and for each classifier the matrix of its examples as Parquet."""
    names, unfinished = context.on_main(partial(trained_runs, spec.store, spec.runs))
    if unfinished and context.is_main:
        context.run.append_events([event("left_out", why="trials that did not finish", runs=unfinished)])
    vae = None if spec.latent is None else open_vae(spec.store, spec.latent.vae, context.device)
    bases: dict[tuple[int, str], Eigenbasis] = {}  # by data: the trials of a sweep mostly share their images
    classifiers = []
    for index, name in enumerate(names):
        if context.is_main:
            context.report(Progress(spec.name, "measure", index, len(names), index, len(names), unit="networks"))
        trained = open_trained(spec.store, name, context.device)
        data_key = (trained.spec.seed, trained.spec.data.model_dump_json())
        if data_key not in bases:
            bases[data_key] = context.on_main(partial(eigenspaces, spec.eigenspace, trained.data.train))
        classifiers.append(_measure(spec, trained, bases[data_key], vae, context))
    context.on_main(partial(_write_result, spec, classifiers, context))


def _measure(
    spec: RobustManifoldSpec,
    trained: TrainedClassifier,
    basis: Eigenbasis,
    vae: tuple[ConditionalVae, Dataset] | None,
    context: Context,
) -> ClassifierResult:
    """The result of one classifier; rank 0 writes the matrix of its examples."""
    threats = spec.threats or trained.spec.evaluate.threats or trained.spec.threats
    try:
        basis.groups(trained.data.test.labels)
    except ValueError as error:
        raise UserError(f"run {trained.name}: {error}: set eigenspace.shared: true") from None

    # Each ball is searched in the whole space, on the manifold and off it.
    evaluator = _Evaluator(spec, trained.data.test.choose(spec.num_examples), context)
    attacks: dict[str, _SubspaceAttack] = {}
    for norm, threat in threats.items():
        for where in _WHERE:
            attacks[f"{where}/{norm}"] = _SubspaceAttack(where, norm, threat, basis)
    evaluation = evaluator.evaluate(trained.model, attacks)

    # The codes of the autoencoder are attacked if the spec names one.
    latent_evaluation = None
    if spec.latent is not None and vae is not None:
        model, vae_data = vae
        _check_same_images(spec.latent, trained, vae_data)
        latent_evaluation = evaluator.attack_codes(trained.model, model, spec.latent)
    context.on_main(partial(_write_matrix, trained.name, evaluation, latent_evaluation, context))

    pixels = basis.mean.shape[1]
    attack_names = evaluation.names[1:]  # the first is "clean"
    return ClassifierResult(
        run=trained.name,
        selected=trained.selected,
        step=trained.step,
        objective=trained.spec.objective.name,
        num_examples=evaluator.total,
        attacks=describe_threats(threats),
        dimensions={"full": pixels, "on_manifold": basis.rank, "off_manifold": pixels - basis.rank},
        explained=basis.explained,
        distance=evaluator.mean(basis.to(evaluator.x).distance(evaluator.x, evaluator.y)),
        clean=evaluation.accuracy("clean"),
        accuracy={name: evaluation.accuracy(name) for name in attack_names},
        success={name: _success(evaluation, name) for name in attack_names},
        residual={name: attack.residual(evaluator) for name, attack in attacks.items()},
        latent=None if latent_evaluation is None else _latent_result(latent_evaluation),
    )


class _SubspaceAttack:
    """The attack in one ball: `where` is "full", "on_manifold" (in the eigenspace) or "off_manifold" (orthogonal).

    It records how far its adversarial examples leave their subspace; for "full", how far they leave the eigenspace.
    """

    def __init__(self, where: str, norm: Norm, spec: ThreatSpec, basis: Eigenbasis) -> None:
        self._where = where
        self._norm = norm
        self._spec = spec
        self._basis = basis
        self._residuals: list[SubspaceResidual] = []  # of each batch

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
        eps = float(self._spec.eps)
        subspace = EigenspaceThreat(
            self._norm, eps, basis=self._basis.to(x), labels=y, off=self._where == "off_manifold"
        )
        threat = Threat(self._norm, eps) if self._where == "full" else subspace
        attack = EVAL_ATTACKS[self._spec.attack]
        result = attack(model, x, y, threat, noise=noise, **self._spec.options())
        self._residuals.append(subspace_residual(x, result.adversarial, subspace))
        return result

    def residual(self, evaluator: _Evaluator) -> SubspaceResult:
        """Means over the attacked images of all ranks; None where none was attacked."""
        means: dict[str, float | None] = {}
        for name in ("residual", "share", "clipped"):
            batches = [getattr(residual, name) for residual in self._residuals]
            values = torch.cat(batches) if batches else torch.empty(0)
            means[name] = evaluator.mean(values)
        return SubspaceResult.model_validate(means)


class _Evaluator:
    """The shard of the images that this rank attacks; its methods combine the results of all ranks."""

    def __init__(self, spec: RobustManifoldSpec, images: ImageSet, context: Context) -> None:
        self.total = len(images)
        self._spec = spec
        self._context = context
        shard = images.select(torch.tensor(context.shard(len(images)), dtype=torch.int64))
        self.x = to_float(shard.images.to(context.device))
        self.y = shard.labels.to(context.device)

    def evaluate(
        self, model: nn.Module, attacks: Mapping[str, EvaluationAttack], x: Tensor | None = None
    ) -> Evaluation:
        """The evaluation of all images on every rank. `x`: inputs of the model that replace the images of the shard."""
        return evaluate_shard(
            model,
            self.x if x is None else x,
            self.y,
            attacks,
            self.total,
            batch_size=self._spec.batch_size,
            seed=derive_seed(self._spec.seed, "evaluate"),
            context=self._context,
        )

    def attack_codes(self, classifier: nn.Module, vae: ConditionalVae, latent: LatentSpec) -> Evaluation:
        """Attack the codes of the images; "clean" is of their reconstructions, "latent" of decoded attacked codes."""
        threat = Latent(latent.norm, float(latent.eps), width=vae.latent)
        step_size = None if latent.step_size is None else float(latent.step_size)
        options: dict[str, Any] = {"steps": latent.steps, "step_size": step_size, "restarts": latent.restarts}

        def attack(model: nn.Module, x: Tensor, y: Tensor, noise: Noise) -> AttackResult:
            return pgd(model, x, y, threat, noise=noise, random_start=False, **options)

        with torch.no_grad():
            codes = vae.code(self.x, self.y)  # (N, latent)
        return self.evaluate(DecodedClassifier(classifier, vae.images), {"latent": attack}, codes)

    def mean(self, values: Tensor) -> float | None:
        """The mean of a value per image over all ranks; None over no image."""
        by_rank = self._context.gather((float(values.double().sum()), len(values)))
        count = sum(rank_count for _, rank_count in by_rank)
        return sum(total for total, _ in by_rank) / count if count else None


def _check_same_images(latent: LatentSpec, trained: TrainedClassifier, data: Dataset) -> None:
    """UserError where the autoencoder, trained on `data`, has images of another shape or number of classes."""
    if (data.shape, data.classes) != (trained.data.shape, trained.data.classes):
        raise UserError(
            f"latent.vae: {latent.vae!r} was trained on images of shape {data.shape} in {data.classes} classes, and "
            f"{trained.name!r} on {trained.data.shape} in {trained.data.classes}"
        )


def _success(evaluation: Evaluation, name: str) -> float | None:
    """The share of the correctly classified images that the attack fools; None where there is none."""
    clean = evaluation.accuracy("clean")
    return 1 - evaluation.accuracy(name) / clean if clean else None


def _latent_result(evaluation: Evaluation) -> LatentResult:
    return LatentResult(
        reconstruction=evaluation.accuracy("clean"),
        accuracy=evaluation.accuracy("latent"),
        success=_success(evaluation, "latent"),
    )


def _write_matrix(name: str, evaluation: Evaluation, latent_evaluation: Evaluation | None, context: Context) -> None:
    """Write bool [n, attacks] as Parquet: a row per image of the test split, in its order."""
    columns = columns_of(evaluation)
    if latent_evaluation is not None:
        latent_columns = columns_of(latent_evaluation)
        columns["reconstruction"] = latent_columns["clean"]
        columns["latent"] = latent_columns["latent"]
    context.run.write(f"artifacts/evaluation-{name}.parquet", matrix_to_parquet(columns))


def _write_result(spec: RobustManifoldSpec, classifiers: list[ClassifierResult], context: Context) -> None:
    result = RobustManifoldResult(
        run=spec.name,
        seed=spec.seed,
        eigenspace=EigenspaceResult(rank=spec.eigenspace.rank, shared=spec.eigenspace.shared),
        latent=None if spec.latent is None else _describe_latent(spec.latent),
        classifiers=classifiers,
    )
    write_result(context.run, result)


def _describe_latent(latent: LatentSpec) -> str:
    """The attack on the codes as text."""
    runs = f"{latent.restarts} run{'s' if latent.restarts > 1 else ''}"
    return f"codes of {latent.vae}, PGD-{latent.steps}, {latent.norm}, eps {latent.eps}, {runs}"
