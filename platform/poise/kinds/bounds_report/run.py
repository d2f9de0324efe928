"""`kind: bounds.report`: generalisation bounds of trained classifiers, beside the measured gaps.

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

from poise.bounds import BOUNDS, BoundInput
from poise.bounds.complexity import covering_complexity, frobenius_product, pac_bayes_complexity, spectral_product
from poise.bounds.margins import clean_margins, data_radius, margin_percentile, on_grid
from poise.bounds.operators import LayerNorms, Network, network_norms
from poise.data.images.batches import Dataset, load
from poise.data.images.datasets import ImageSet, to_float
from poise.errors import PoiseError, UserError
from poise.kinds.bounds_report.result import BoundsReportResult, LayerResult, MarginResult, NetworkResult
from poise.kinds.bounds_report.spec import BoundsReportSpec
from poise.kinds.common.attack_description import describe_threats
from poise.kinds.common.robust_accuracy import robust_accuracy
from poise.kinds.common.target_model import open_model, wrap_user_model
from poise.kinds.common.target_model_spec import TargetModelSpec
from poise.kinds.common.trained_classifier import open_trained, trained_runs
from poise.kinds.common.user_model import count_classes, explain_backward, unwrap_user_model
from poise.observe.events import event
from poise.observe.progress import Progress
from poise.robust.spec import Threats
from poise.robust.threats import Threat
from poise.spec.seeds import derive_seed
from poise.store.result import write_result
from poise.train.context import Context

__all__ = ["run"]

_BATCH = 1024
_FLAGS = {
    "mode": "operator",
    "biases": "left out: the theorems have none",
    "norms": "measured after training, no union over norm caps",
    "margins": "of clean images; a union over powers of 2 pays for their choice",
    **{name: bound.note for name, bound in BOUNDS.items() if bound.note},
}


def run(spec: BoundsReportSpec, context: Context) -> None:
    """Measure every classifier; leave `artifacts/bounds.json` and the result."""
    names, unfinished = context.on_main(partial(trained_runs, spec.store, spec.runs))
    if unfinished and context.is_main:
        context.run.append_events([event("left_out", why="trials that did not finish", runs=unfinished)])

    # Each classifier is opened when it is measured, so that one at a time is in memory.
    openers = [partial(_open_run, spec, name, context) for name in names]
    for label, model in zip(model_labels(spec.models), spec.models, strict=True):
        openers.append(partial(_open_model, spec, label, model, context))
    total = len(openers)
    networks = []
    for index, open_classifier in enumerate(openers):
        if context.is_main:
            context.report(Progress(spec.name, "measure", index, total, index, total, unit="networks"))
        networks.append(_measure(spec, open_classifier(), context))
    context.on_main(partial(_write_results, spec, networks, context))


@dataclass(frozen=True)
class Classifier:
    """A network to report on: `name` and `weights` as texts, and the `step` of its weights if they are of a run."""

    name: str
    weights: str
    step: int | None
    model: nn.Module
    data: Dataset
    threats: Threats
    batch_size: int


def _open_run(spec: BoundsReportSpec, name: str, context: Context) -> Classifier:
    trained = open_trained(spec.store, name, context.device)
    threats = spec.threats or trained.spec.evaluate.threats or trained.spec.threats
    batch_size = trained.spec.evaluate.batch_size
    return Classifier(name, trained.selected, trained.step, trained.model, trained.data, threats, batch_size)


def model_labels(models: Sequence[TargetModelSpec]) -> list[str]:
    """A distinct label of each model for tables: its function, its file or both.

    Equal labels get the index of the model in the spec.
    """
    labels = [" with ".join(filter(None, (model.function, model.file))) for model in models]
    return [label if labels.count(label) == 1 else f"{label} (models[{index}])" for index, label in enumerate(labels)]


def _open_model(spec: BoundsReportSpec, name: str, model: TargetModelSpec, context: Context) -> Classifier:
    assert spec.threats is not None  # validated by the spec
    assert spec.data is not None  # likewise
    data = load(spec.data, spec.seed)
    opened = open_model(model, data.shape, data.classes, context.device)
    classes = count_classes(opened.model, data.test, data.classes, f"{name}: the model")
    network = wrap_user_model(opened, classes)
    return Classifier(name, opened.weights, None, network, data, spec.threats, spec.batch_size)


def _measure(
    spec: BoundsReportSpec, classifier: Classifier, context: Context
) -> tuple[NetworkResult, list[LayerNorms]]:
    """The result of one network, and the norms of its layers."""
    data = classifier.data
    accuracy = {
        "train": _accuracy(spec, classifier, data.train, context),
        "test": _accuracy(spec, classifier, data.test, context),
    }
    theory, layers = context.on_main(partial(_theory, spec, classifier))
    result = NetworkResult(
        run=classifier.name,
        selected=classifier.weights,
        step=classifier.step,
        attacks=describe_threats(classifier.threats),
        accuracy=accuracy,
        gap={measure: accuracy["train"][measure] - accuracy["test"][measure] for measure in accuracy["train"]},
        **theory,
    )
    return result, layers


def _accuracy(spec: BoundsReportSpec, classifier: Classifier, images: ImageSet, context: Context) -> dict[str, float]:
    chosen = images.choose(spec.num_examples)
    with explain_backward(classifier.model):
        evaluation = robust_accuracy(
            classifier.model,
            chosen,
            classifier.threats,
            batch_size=classifier.batch_size,
            seed=derive_seed(spec.seed, "evaluate"),
            context=context,
        )
    return evaluation.summary()


def _theory(spec: BoundsReportSpec, classifier: Classifier) -> tuple[dict[str, Any], list[LayerNorms]]:
    """The fields of a `NetworkResult` with norms, radii, margins and bounds; and the norms of all layers. On rank 0."""
    try:
        network = network_norms(unwrap_user_model(classifier.model), classifier.data.shape)
    except ValueError as error:
        raise UserError(f"{classifier.name}: {error}") from None
    train = classifier.data.train
    threats = [Threat(norm, threat.eps) for norm, threat in classifier.threats.items()]
    radii = {
        "clean": _radius(spec, train, network, [Threat("l2", 0.0)]),
        "robust": _radius(spec, train, network, threats),
    }
    if not min(radii.values()) > 0:
        raise UserError(
            f"{classifier.name}: all training images are the constant that the network subtracts: their radius is 0, "
            "and a bound needs one above 0; look at the data set"
        )
    log10 = {
        "spectral_product": spectral_product(network),
        "frobenius_product": frobenius_product(network),
        "covering_complexity": covering_complexity(network),
        "pac_bayes_complexity": pac_bayes_complexity(network),
    }
    margins = _margins(classifier, train.choose(spec.num_examples))
    margin = margin_percentile(margins, float(spec.percentile), spec.margins)
    bounds = {}
    used_margin = margin
    if margin > 0:
        # The bounds hold for a margin chosen before training: a union over a grid pays for choosing it afterwards.
        used_margin, share = on_grid(margin)
        delta = float(spec.delta) * share
        for risk, radius in radii.items():
            bounds[risk] = _bounds(BoundInput(network, radius, used_margin, len(train), delta))
    fields = {
        "samples": len(train),
        "depth": len(network.layers),
        "width": network.width,
        "parameters": network.parameters,
        "homogeneous": network.homogeneous,
        "fixes_zero": network.fixes_zero,
        "left_out": _inapplicable_bounds(spec, network, margins, margin),
        "radius": radii,
        "margin": _margin_result(margins, margin, used_margin) if margin > 0 else None,
        "log10": log10,
        "bounds": bounds,
        "decomposition": _decomposition(radii, margin, log10),
        "layers": [
            LayerResult(name=layer.name, sigma_lo=layer.sigma_lo, sigma_hi=layer.sigma_hi) for layer in network.layers
        ],
    }
    return fields, list(network.layers)


def _margin_result(margins: Tensor, percentile: float, used: float) -> MarginResult:
    below = float((margins < used).double().mean())
    return MarginResult(percentile=percentile, used=used, below=below)


def _inapplicable_bounds(spec: BoundsReportSpec, network: Network, margins: Tensor, margin: float) -> list[str]:
    """Which bounds do not apply to this network, and why, as texts."""
    reasons = []
    if not margin > 0:
        wrong = 100 * float((margins <= 0).double().mean())
        cure = "set margins: correct" if spec.margins == "all" and wrong < 100 else "train it longer"
        reasons.append(
            f"no bound: {wrong:.1f} % of its training images are misclassified, so that the percentile "
            f"{spec.percentile} of their margins is not above 0; {cure}"
        )
    theorems: dict[str, list[str]] = {}  # by the assumption that the network violates
    for bound in BOUNDS.values():
        violation = bound.violation(network)
        if violation is not None and bound.theorem not in theorems.setdefault(violation, []):
            theorems[violation].append(bound.theorem)
    for violation, names in theorems.items():
        reasons.append(f"{' and '.join(f'no {name}' for name in names)}: {violation}")
    return reasons


def _radius(spec: BoundsReportSpec, images: ImageSet, network: Network, threats: list[Threat]) -> float:
    """The largest 2-norm of an input, over all training images and every ball that the adversary may choose."""
    shift = network.shift.cpu()
    radii = []
    for batch in torch.split(images.images, _BATCH):
        for threat in threats:
            radii.append(data_radius(to_float(batch), threat, spec.radius, shift=shift))
    return max(radii)


@torch.no_grad()
def _margins(classifier: Classifier, images: ImageSet) -> Tensor:
    """The clean margins of the images, (N,). PoiseError where an output is NaN."""
    device = next(classifier.model.parameters()).device
    batches = zip(torch.split(images.images, _BATCH), torch.split(images.labels, _BATCH), strict=True)
    batch_margins = []
    for x, y in batches:
        logits = classifier.model(to_float(x.to(device)))  # (B, classes)
        batch_margins.append(clean_margins(logits, y.to(device)).cpu())
    margins = torch.cat(batch_margins)
    if bool(margins.isnan().any()):
        image = int(margins.isnan().int().argmax())
        raise PoiseError(f"{classifier.name}: the output for training image {image} is not finite: it has diverged")
    return margins


def _bounds(inputs: BoundInput) -> dict[str, float | None]:
    """log10 of each bound on the gap; None where it does not apply. `vacuous` is the smallest of the explicit ones."""
    values: dict[str, float | None] = {}
    for name, bound in BOUNDS.items():
        values[name] = bound.value(inputs) if bound.violation(inputs.network) is None else None
    explicit = [values[name] for name, bound in BOUNDS.items() if bound.is_explicit]
    values["vacuous"] = min((value for value in explicit if value is not None), default=None)
    return values


def _decomposition(radii: Mapping[str, float], margin: float, log10: Mapping[str, float]) -> dict[str, float | None]:
    """log10 of the factors by which bounds of two networks differ: data, adversary, margin and complexity."""
    return {
        "radius": math.log10(radii["clean"]),
        "adversary": math.log10(radii["robust"] / radii["clean"]),
        "margin": -math.log10(margin) if margin > 0 else None,
        "complexity": log10["pac_bayes_complexity"] / 2,
    }


def _write_results(
    spec: BoundsReportSpec, networks: list[tuple[NetworkResult, list[LayerNorms]]], context: Context
) -> None:
    """On rank 0: write all norms of the layers, and the result."""
    complete = []
    for network, layers in networks:
        layer_norms = [asdict(layer) for layer in layers]
        complete.append({**network.model_dump(), "layers": layer_norms})
    sources = {name: bound.source for name, bound in BOUNDS.items()}
    artifact = {"flags": _FLAGS, "sources": sources, "networks": complete}
    context.run.write("artifacts/bounds.json", json.dumps(artifact, indent=1).encode())
    result = BoundsReportResult(
        run=spec.name,
        seed=spec.seed,
        num_examples=spec.num_examples,
        percentile=float(spec.percentile),
        margins=spec.margins,
        radius=spec.radius,
        delta=float(spec.delta),
        bounds={name: bound.theorem for name, bound in BOUNDS.items() if bound.in_tables},
        networks=[network for network, _ in networks],
    )
    write_result(context.run, result)
