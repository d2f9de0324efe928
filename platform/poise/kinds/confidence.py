"""What the answers to each question say of a model: a row per question, and the measures over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.calibrate.bootstrap import paired_bootstrap
from poise.calibrate.cluster import Clusters
from poise.calibrate.cluster import exact as cluster
from poise.calibrate.ece import auroc, brier, debiased_ece, ece, noise_floor, reliability, smooth_ece
from poise.calibrate.extract import EMPTY, MARKERS, NO_ANSWER, VERSION, Rule, extract
from poise.calibrate.grade import matches_alias
from poise.calibrate.sem_ece import entropy, graded_over_splits, margin, sem1, sem2_exact
from poise.data.examples import Question
from poise.kinds.specs.calibrate import CalibrateMeasureSpec
from poise.models.sampling import Sample

__all__ = ["SCHEMA", "Asked", "asked", "described", "summarised"]

Array = NDArray[np.float64]

LISTED, SURE, CELLS = 10, 0.9, 20


@dataclass(frozen=True)
class Asked:
    """One question after n answers in K classes: `labels` and `counts` [K]; `modal` is the class that is deployed.

    `gap` = sem1 - sem2 says how uncertain the choice of the class is, without a label. `Y_split` is the mean grade of
    what a half of the answers deploys. In a world, `true_confidence` is the probability that the model gives to the
    modal class, and `true_probability` the one that the world gives it; elsewhere, and where the answers were not drawn
    from the model's own distribution, both are None.
    """

    qid: str
    question: str
    n: int
    K: int
    modal: str
    sem1: float
    sem2: float
    margin: float
    gap: float
    entropy: float
    correct: bool
    Y_split: float
    true_confidence: float | None
    true_probability: float | None
    flags: tuple[str, ...]
    labels: tuple[str, ...]
    counts: tuple[int, ...]


_TEXT, _REAL, _INT = pa.string(), pa.float64(), pa.int32()
SCHEMA = pa.schema(
    {
        **dict.fromkeys(("qid", "question"), _TEXT),
        **dict.fromkeys(("n", "K"), _INT),
        "modal": _TEXT,
        **dict.fromkeys(("sem1", "sem2", "margin", "gap", "entropy"), _REAL),
        "correct": pa.bool_(),
        **dict.fromkeys(("Y_split", "true_confidence", "true_probability"), _REAL),
        "flags": pa.list_(_TEXT),
        "labels": pa.list_(_TEXT),
        "counts": pa.list_(_INT),
    }
)
"""The columns of `artifacts/questions.parquet`, a row for each `Asked`."""


def asked(question: Question, samples: Sequence[Sample], texts: Sequence[str], rule: Rule, *, exact: bool) -> Asked:
    """Extract, cluster and grade the `samples` of a question, whose texts are given.

    `exact`: the samples were drawn at temperature 1 from the whole distribution. Then the probability of each response
    is known, and that of the modal class is the sum over the different responses in it: all there are in a world,
    where a name is written in one way.
    """
    answers = [extract(t, finished=s.finish == "stop", rule=rule) for t, s in zip(texts, samples, strict=True)]
    classes = cluster(question.prompt, answers)
    counts = classes.counts
    best = counts.index(max(counts))
    grades = [int(matches_alias(label, question.answers)) for label in classes.labels]
    first, second, modal = sem1(counts), sem2_exact(counts), classes.labels[best]
    truth = question.distribution if exact else None
    return Asked(
        qid=question.id,
        question=question.prompt,
        n=len(answers),
        K=len(counts),
        modal=modal,
        sem1=first,
        sem2=second,
        margin=margin(counts),
        gap=first - second,
        entropy=entropy(counts),
        correct=bool(grades[best]),
        Y_split=graded_over_splits(counts, grades),
        true_confidence=None if truth is None else _probability(samples, classes, best),
        true_probability=None if truth is None else sum(p for a, p in truth.items() if matches_alias(modal, [a])),
        flags=tuple(_flags(classes, best)),
        labels=classes.labels,
        counts=counts,
    )


def _probability(samples: Sequence[Sample], classes: Clusters, best: int) -> float:
    """The probability that the model gives to a class: the sum over the different responses in it."""
    responses = {s.tokens: s.logprobs for s, k in zip(samples, classes.assign, strict=True) if k == best}
    return min(1.0, math.fsum(math.exp(math.fsum(logprobs)) for logprobs in responses.values()))


def _flags(classes: Clusters, best: int) -> list[str]:
    counts = classes.counts
    found = {"tie": counts.count(counts[best]) > 1, "abstained": classes.labels[best] in MARKERS}
    found |= {"empty": EMPTY in classes.labels, "no_answer": NO_ANSWER in classes.labels}
    return [name for name, is_so in found.items() if is_so]


def summarised(rows: Sequence[Asked], *, bins: int, reps: int) -> dict[str, Any]:
    """The measures with their intervals `[value, low, high]` (None where undefined), and what figures are drawn from.

    coverage: the share of questions whose deployed answer is one; the others count, as wrong. noise_floor: the ECE that
    a calibrated model with these confidences would show. In a world, true/ece is the true calibration error: the ECE
    with the model's exact probability of its deployed answer as confidence. true/error puts the world's probability of
    that answer in place of its grade as well, so that it is free of noise, and 0 for a model that knows the truth.
    """
    shares = {"sem1": _column(rows, "sem1"), "sem2": _column(rows, "sem2")}
    y = _column(rows, "correct")
    found = paired_bootstrap(_statistic(rows, shares, y, bins), len(rows), reps=reps)
    return {
        "coverage": float(np.mean(["abstained" not in row.flags for row in rows])),
        "answers": {
            "drawn": sum(row.n for row in rows),
            "empty": _said(rows, EMPTY),
            "no_answer": _said(rows, NO_ANSWER),
            "tied_questions": sum("tie" in row.flags for row in rows),
        },
        "metrics": {name: [_finite(value) for value in estimate] for name, estimate in found.items()},
        "noise_floor": {name: noise_floor(c, bins) for name, c in shares.items()},
        "reliability": {name: _bins(c, y, bins) for name, c in shares.items()},
        "histogram": {name: _histogram(c) for name, c in shares.items()},
        "hardest": [_listed(row) for row in sorted(rows, key=lambda row: -row.gap)[:LISTED] if row.gap > 0],
        "confidently_wrong": [
            _listed(row) for row in sorted(rows, key=lambda row: -row.sem1) if row.sem1 >= SURE and not row.correct
        ][:LISTED],
    }


def described(spec: CalibrateMeasureSpec) -> str:
    """Everything that the numbers depend on, in one line."""
    half, decoding = spec.samples // 2, spec.decoding
    return (
        f"n={spec.samples}, temperature {decoding.temperature}, top_p {decoding.top_p}, at most {decoding.max_tokens} "
        f"tokens; answer: {spec.answer} (v{VERSION}), classes and grades: exact; Sem2 over all "
        f"{half}/{spec.samples - half} splits, uniform ties; ECE over {spec.bins} bins of equal width, exact edges; "
        f"smECE with full ends; 95% intervals of {spec.bootstrap:,} resamples of the questions"
    )


def _statistic(
    rows: Sequence[Asked], shares: Mapping[str, Array], y: Array, bins: int
) -> Callable[[NDArray[np.int64]], dict[str, float]]:
    """All measures of the questions with the given indices."""
    exact = _column(rows, "true_confidence"), _column(rows, "true_probability")
    known = not any(np.isnan(column).any() for column in exact)

    def statistic(i: NDArray[np.int64]) -> dict[str, float]:
        found = {"accuracy": float(y[i].mean())}
        for name, c in shares.items():
            found |= {f"{name}/{key}": value for key, value in _errors(c[i], y[i], bins).items()}
        for key in ("confidence", "ece"):
            found[f"difference/{key}"] = found[f"sem1/{key}"] - found[f"sem2/{key}"]
        if known:
            own, world = exact[0][i], exact[1][i]
            found |= {"true/confidence": float(own.mean()), "true/ece": ece(own, y[i], bins)}
            found["true/error"] = ece(own, world, bins)
            found |= {f"true/{name}_bias": float((c[i] - own).mean()) for name, c in shares.items()}
        return found

    return statistic


def _errors(c: Array, y: Array, bins: int) -> dict[str, float]:
    return {
        "confidence": float(c.mean()),
        "bias": float(c.mean() - y.mean()),
        "ece": ece(c, y, bins),
        "debiased_ece": debiased_ece(c, y, bins),
        "smooth_ece": smooth_ece(c, y, ends="full"),
        "brier": brier(c, y),
        "auroc": auroc(c, y),
    }


def _column(rows: Sequence[Asked], name: str) -> Array:
    return np.array([getattr(row, name) for row in rows], dtype=np.float64)


def _said(rows: Sequence[Asked], marker: str) -> int:
    """Answers that are `marker`."""
    return sum(count for row in rows for label, count in zip(row.labels, row.counts, strict=True) if label == marker)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bins(c: Array, y: Array, bins: int) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in asdict(reliability(c, y, bins)).items()}


def _histogram(c: Array) -> list[int]:
    """How many confidences lie in each of CELLS cells of equal width, multiples of their width on their own side."""
    cells = np.minimum(np.floor(c * CELLS + 1e-12), CELLS - 1).astype(np.int64)
    return [int(count) for count in np.bincount(cells, minlength=CELLS)]


def _listed(row: Asked) -> dict[str, Any]:
    """A question for the page, its answers from the most frequent on."""
    said = sorted(zip(row.counts, row.labels, strict=True), key=lambda pair: -pair[0])
    answers = [[label, count] for count, label in said[:5]]
    return {"question": row.question, "answers": answers, "K": row.K, "sem1": row.sem1, "sem2": row.sem2,
            "gap": row.gap, "correct": row.correct}  # fmt: skip
