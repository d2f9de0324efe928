"""`kind: bounds.report`: what the theory promises of trained classifiers, beside what was measured.

checkpoint -> norms of its layers as operators -> bounds on the gap between train and test, clean and under attack
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poise.bounds.complexity import covering_complexity, frobenius_product, pac_bayes_complexity, spectral_product
from poise.bounds.margins import clean_margins, data_radius, margin_percentile, on_grid
from poise.bounds.operators import Network, network_norms
from poise.bounds.pac_bayes import spectral_pac_bayes
from poise.bounds.rademacher import arc_bound, arc_gap, covering_bound
from poise.data.sets import ImageSet, unit_pixels
from poise.errors import UserError
from poise.kinds.measure import described, robust_accuracy
from poise.kinds.specs.bounds import BoundsReportSpec
from poise.kinds.trained import Trained, open_trained, trained_runs
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
    for index, name in enumerate(names):
        if context.leads:
            context.report(Progress(spec.name, "measure", index, len(names), index, len(names), unit="networks"))
        networks.append(_measured(spec, open_trained(spec.store, name, context.device), context))
    context.together(partial(_keep, spec, networks, context))


def _measured(spec: BoundsReportSpec, trained: Trained, context: Context) -> dict[str, Any]:
    """All that is said of one network."""
    threats = spec.threats or trained.spec.evaluate.threats or trained.spec.threats
    accuracy = {
        split: _accuracy(spec, trained, images, threats, context)
        for split, images in (("train", trained.data.train), ("test", trained.data.test))
    }
    theory = context.together(partial(_theory, spec, trained, threats))
    return {
        "run": trained.name,
        "selected": trained.selected,
        "step": trained.step,
        "attacks": described(threats),
        "accuracy": accuracy,
        "gap": {measure: accuracy["train"][measure] - accuracy["test"][measure] for measure in accuracy["train"]},
        **theory,
    }


def _accuracy(
    spec: BoundsReportSpec, trained: Trained, images: ImageSet, threats: Threats, context: Context
) -> dict[str, float]:
    chosen, seed = images.select(slice(spec.examples)), derive_seed(spec.seed, "evaluate")
    size = trained.spec.evaluate.batch_size
    return robust_accuracy(trained.model, chosen, threats, batch_size=size, seed=seed, context=context).summary()


def _theory(spec: BoundsReportSpec, trained: Trained, threats: Threats) -> dict[str, Any]:
    """Norms, radii and margins of one network, and the bounds that they make."""
    try:
        network = network_norms(trained.model, trained.data.shape)
    except ValueError as error:
        raise UserError(f"run {trained.name!r}: {error}") from None
    train = trained.data.train
    faced = {"clean": [Threat("l2", 0.0)], "robust": [Threat(norm, threat.eps) for norm, threat in threats.items()]}
    radii = {risk: _radius(spec, train, network, balls) for risk, balls in faced.items()}
    log10 = {
        "spectral_product": spectral_product(network),
        "frobenius_product": frobenius_product(network),
        "covering_complexity": covering_complexity(network),
        "pac_bayes_complexity": pac_bayes_complexity(network),
    }
    margins = _margins(trained, train.select(slice(spec.examples)))
    margin, bounds = margin_percentile(margins, float(spec.percentile)), {}
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
        "radius": radii,
        "margin": {"percentile": margin, "used": used, "below": float((margins < used).double().mean())}
        if margin > 0
        else None,
        "log10": log10,
        "bounds": bounds,
        "decomposition": _decomposition(radii, margin, log10),
        "layers": [asdict(layer) for layer in network.layers],
    }


def _radius(spec: BoundsReportSpec, images: ImageSet, network: Network, balls: list[Threat]) -> float:
    """The largest over all training images and every ball that the adversary may choose."""
    shift = network.shift.cpu()
    return max(
        data_radius(unit_pixels(part), ball, spec.radius, shift=shift)
        for part in torch.split(images.images, _AT_ONCE)
        for ball in balls
    )


@torch.no_grad()
def _margins(trained: Trained, images: ImageSet) -> Tensor:
    device = next(trained.model.parameters()).device
    parts = zip(torch.split(images.images, _AT_ONCE), torch.split(images.labels, _AT_ONCE), strict=True)
    return torch.cat([clean_margins(trained.model(unit_pixels(x.to(device))), y.to(device)).cpu() for x, y in parts])


def _bounds(
    network: Network, log10: Mapping[str, float], radius: float, margin: float, samples: int, delta: float
) -> dict[str, float | None]:
    """log10 of each bound on the gap; None where it does not apply. `vacuous` is that of the smallest explicit one."""
    depth = len(network.layers)
    reach = partial(arc_bound, parameters=network.parameters, depth=depth, radius=radius, samples=samples)
    arc = {
        name: arc_gap(reach(log10[f"{norms}_product"]), margin=margin, samples=samples, delta=delta)
        for name, norms in (("arc", "spectral"), ("arc_frobenius", "frobenius"))
    }
    pac = spectral_pac_bayes(
        log10["pac_bayes_complexity"], product=log10["spectral_product"], depth=depth, width=network.width,
        radius=radius, margin=margin, samples=samples, delta=delta,
    )  # fmt: skip
    pac_gap = pac.gap if network.homogeneous else None
    return {
        **arc,
        "covering": covering_bound(
            log10["covering_complexity"], lipschitz=2 / margin, radius=radius, samples=samples, delta=delta
        ),
        "pac_bayes": pac_gap,
        "pac_bayes_shape": pac.shape if network.homogeneous else None,
        "vacuous": min(bound for bound in (*arc.values(), pac_gap) if bound is not None),
    }


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
        "run": spec.name, "kind": spec.kind, "seed": spec.seed, "examples": spec.examples,
        "percentile": float(spec.percentile), "radius": spec.radius, "delta": float(spec.delta), "networks": short,
    }  # fmt: skip
    context.run.write("artifacts/summary.json", json.dumps(summary, indent=1).encode())
