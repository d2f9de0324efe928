"""`kind: bounds.report`: what the theory promises of trained classifiers, beside what was measured.

checkpoint -> norms of its layers as operators -> bounds on the gap between train and test, clean and under attack
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from poise.bounds.complexity import covering_complexity, frobenius_product, pac_bayes_complexity, spectral_product
from poise.bounds.margins import clean_margins, data_radius, margin_percentile, on_grid
from poise.bounds.operators import Network, network_norms
from poise.bounds.pac_bayes import spectral_pac_bayes
from poise.bounds.rademacher import arc_bound, arc_gap, covering_bound
from poise.data.batches import Dataset, load
from poise.data.sets import ImageSet, unit_pixels
from poise.errors import PoiseError, UserError
from poise.kinds.measure import described, robust_accuracy
from poise.kinds.specs.bounds import BoundsReportSpec
from poise.kinds.specs.evaluation import SubjectSpec
from poise.kinds.subject import as_called, count_classes, open_model
from poise.kinds.trained import open_trained, trained_runs
from poise.kinds.user_model import bare, explain_backward
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.robust.spec import Threats
from poise.robust.threats import Threat
from poise.spec.seeds import derive_seed
from poise.train.context import Context

__all__ = ["run"]

_AT_ONCE = 1024
_FLAGS = {
    "mode": "operator",
    "biases": "left out: the theorems have none",
    "norms": "measured after training, no union over norm caps",
    "margins": "of clean images; a union over powers of 2 pays for their choice",
    "covering": "a shape without constants and logarithms, comparable but no bound",
}


def run(spec: BoundsReportSpec, context: Context) -> None:
    """Measure every run and leave `artifacts/bounds.json` and `artifacts/summary.json`."""
    names, unfinished = context.together(partial(trained_runs, spec.store, spec.runs))
    if unfinished and context.leads:
        context.run.append_events([event("left_out", why="trials that did not finish", runs=unfinished)])
    networks = []
    total = len(names) + len(spec.models)
    openers = [partial(_of_run, spec, name, context) for name in names]
    labels = model_labels(spec.models)
    openers += [partial(_of_model, spec, *named, context) for named in zip(labels, spec.models, strict=True)]
    for index, open_classifier in enumerate(openers):
        if context.leads:
            context.report(Progress(spec.name, "measure", index, total, index, total, unit="networks"))
        networks.append(_measured(spec, open_classifier(), context))
    context.together(partial(_keep, spec, networks, context))


@dataclass(frozen=True)
class Classifier:
    """A network to report on: `name` and `weights` for people, the `step` of its run if it has one."""

    name: str
    weights: str
    step: int | None
    model: nn.Module
    data: Dataset
    threats: Threats
    batch_size: int


def _of_run(spec: BoundsReportSpec, name: str, context: Context) -> Classifier:
    trained = open_trained(spec.store, name, context.device)
    threats = spec.threats or trained.spec.evaluate.threats or trained.spec.threats
    batch_size = trained.spec.evaluate.batch_size
    return Classifier(name, trained.selected, trained.step, trained.model, trained.data, threats, batch_size)


def model_labels(models: Sequence[SubjectSpec]) -> list[str]:
    """What each model is called in tables, no two alike: its function, its file or both, and its place in the spec
    where others have the same."""
    labels = [" with ".join(filter(None, (model.function, model.file))) for model in models]
    return [label if labels.count(label) == 1 else f"{label} (models[{index}])" for index, label in enumerate(labels)]


def _of_model(spec: BoundsReportSpec, name: str, model: SubjectSpec, context: Context) -> Classifier:
    assert spec.threats is not None  # the spec asks for them
    assert spec.data is not None
    data = load(spec.data, spec.seed)
    opened = open_model(model, data.shape, data.classes, context.device)
    classes = count_classes(opened.model, data.test, data.classes, f"{name}: the model")
    network = as_called(opened.model, model, classes)
    return Classifier(name, opened.weights, None, network, data, spec.threats, spec.batch_size)


def _measured(spec: BoundsReportSpec, trained: Classifier, context: Context) -> dict[str, Any]:
    """All that is said of one network."""
    accuracy = {
        split: _accuracy(spec, trained, images, context)
        for split, images in (("train", trained.data.train), ("test", trained.data.test))
    }
    theory = context.together(partial(_theory, spec, trained))
    return {
        "run": trained.name,
        "selected": trained.weights,
        "step": trained.step,
        "attacks": described(trained.threats),
        "accuracy": accuracy,
        "gap": {measure: accuracy["train"][measure] - accuracy["test"][measure] for measure in accuracy["train"]},
        **theory,
    }


def _accuracy(spec: BoundsReportSpec, trained: Classifier, images: ImageSet, context: Context) -> dict[str, float]:
    chosen = images.choose(spec.examples)
    with explain_backward(trained.model):
        evaluation = robust_accuracy(
            trained.model,
            chosen,
            trained.threats,
            batch_size=trained.batch_size,
            seed=derive_seed(spec.seed, "evaluate"),
            context=context,
        )
    return evaluation.summary()


def _theory(spec: BoundsReportSpec, trained: Classifier) -> dict[str, Any]:
    """Norms, radii and margins of one network, and the bounds that they make."""
    try:
        network = network_norms(bare(trained.model), trained.data.shape)
    except ValueError as error:
        raise UserError(f"{trained.name}: {error}") from None
    train = trained.data.train
    balls = [Threat(norm, threat.eps) for norm, threat in trained.threats.items()]
    faced = {"clean": [Threat("l2", 0.0)], "robust": balls}
    radii = {risk: _radius(spec, train, network, balls) for risk, balls in faced.items()}
    if not min(radii.values()) > 0:
        raise UserError(
            f"{trained.name}: all training images are the constant that the network subtracts: their radius is 0, and "
            "a bound needs one above 0; look at the data set"
        )
    log10 = {
        "spectral_product": spectral_product(network),
        "frobenius_product": frobenius_product(network),
        "covering_complexity": covering_complexity(network),
        "pac_bayes_complexity": pac_bayes_complexity(network),
    }
    margins = _margins(trained, train.choose(spec.examples))
    margin = margin_percentile(margins, float(spec.percentile), spec.margins)
    bounds = {}
    if margin > 0:
        used, share = on_grid(margin)
        delta = float(spec.delta) * share
        bounds = {risk: _bounds(network, log10, radius, used, len(train), delta) for risk, radius in radii.items()}
    return {
        "samples": len(train),
        "depth": len(network.layers),
        "width": network.width,
        "parameters": network.parameters,
        "homogeneous": network.homogeneous,
        "fixes_zero": network.fixes_zero,
        "left_out": _left_out(spec, network, margins, margin),
        "radius": radii,
        "margin": {"percentile": margin, "used": used, "below": float((margins < used).double().mean())}
        if margin > 0
        else None,
        "log10": log10,
        "bounds": bounds,
        "decomposition": _decomposition(radii, margin, log10),
        "layers": [asdict(layer) for layer in network.layers],
    }


def _left_out(spec: BoundsReportSpec, network: Network, margins: Tensor, margin: float) -> list[str]:
    """Which bounds this network does not have, and why, for people."""
    reasons = []
    if not margin > 0:
        wrong = 100 * float((margins <= 0).double().mean())
        cure = "set margins: correct" if spec.margins == "all" and wrong < 100 else "train it longer"
        reasons.append(
            f"no bound: {wrong:.1f} % of its training images are misclassified, so that the percentile "
            f"{spec.percentile} of their margins is not above 0; {cure}"
        )
    if not network.fixes_zero:
        reasons.append("no ARC and no cover: an activation does not map 0 to 0, as softplus")
    if not network.homogeneous:
        reasons.append("no PAC-Bayes: an activation is not homogeneous, as ReLU is")
    return reasons


def _radius(spec: BoundsReportSpec, images: ImageSet, network: Network, balls: list[Threat]) -> float:
    """The largest over all training images and every ball that the adversary may choose."""
    shift = network.shift.cpu()
    return max(
        data_radius(unit_pixels(part), ball, spec.radius, shift=shift)
        for part in torch.split(images.images, _AT_ONCE)
        for ball in balls
    )


@torch.no_grad()
def _margins(trained: Classifier, images: ImageSet) -> Tensor:
    device = next(trained.model.parameters()).device
    parts = zip(torch.split(images.images, _AT_ONCE), torch.split(images.labels, _AT_ONCE), strict=True)
    margins = torch.cat([clean_margins(trained.model(unit_pixels(x.to(device))), y.to(device)).cpu() for x, y in parts])
    if bool(margins.isnan().any()):
        image = int(margins.isnan().int().argmax())
        raise PoiseError(f"{trained.name}: the output for training image {image} is not finite: it has diverged")
    return margins


def _bounds(
    network: Network, log10: Mapping[str, float], radius: float, margin: float, samples: int, delta: float
) -> dict[str, float | None]:
    """log10 of each bound on the gap; None where it does not apply. `vacuous` is that of the smallest explicit one."""
    depth = len(network.layers)
    bounds: dict[str, float | None] = dict.fromkeys(
        ("arc", "arc_frobenius", "covering", "pac_bayes", "pac_bayes_shape")
    )
    if network.fixes_zero:
        reach = partial(arc_bound, parameters=network.parameters, depth=depth, radius=radius, samples=samples)
        for name, norms in (("arc", "spectral"), ("arc_frobenius", "frobenius")):
            bounds[name] = arc_gap(reach(log10[f"{norms}_product"]), margin=margin, samples=samples, delta=delta)
        bounds["covering"] = covering_bound(
            log10["covering_complexity"], lipschitz=2 / margin, radius=radius, samples=samples, delta=delta
        )
    if network.homogeneous:
        pac_bayes = spectral_pac_bayes(
            log10["pac_bayes_complexity"],
            product=log10["spectral_product"],
            depth=depth,
            width=network.width,
            radius=radius,
            margin=margin,
            samples=samples,
            delta=delta,
        )
        bounds["pac_bayes"] = pac_bayes.gap
        bounds["pac_bayes_shape"] = pac_bayes.shape
    explicit = [bounds[name] for name in ("arc", "arc_frobenius", "pac_bayes")]
    bounds["vacuous"] = min((bound for bound in explicit if bound is not None), default=None)
    return bounds


def _decomposition(radii: Mapping[str, float], margin: float, log10: Mapping[str, float]) -> dict[str, float | None]:
    """What tells the bounds of two networks apart, as log10 of factors: data, adversary, margin and complexity."""
    return {
        "radius": math.log10(radii["clean"]),
        "adversary": math.log10(radii["robust"] / radii["clean"]),
        "margin": -math.log10(margin) if margin > 0 else None,
        "complexity": log10["pac_bayes_complexity"] / 2,
    }


def _keep(spec: BoundsReportSpec, networks: list[dict[str, Any]], context: Context) -> None:
    context.run.write("artifacts/bounds.json", json.dumps({"flags": _FLAGS, "networks": networks}, indent=1).encode())
    short = [
        {**network, "layers": [{k: layer[k] for k in ("name", "sigma_lo", "sigma_hi")} for layer in network["layers"]]}
        for network in networks
    ]
    summary = {
        "run": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "examples": spec.examples,
        "percentile": float(spec.percentile),
        "margins": spec.margins,
        "radius": spec.radius,
        "delta": float(spec.delta),
        "networks": short,
    }
    context.run.write("artifacts/summary.json", json.dumps(summary, indent=1).encode())
