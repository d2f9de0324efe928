"""What the answers to each question say of a model: a row per question, and the measures over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.calibrate.cluster import Clusters
from poise.calibrate.cluster import exact as cluster
from poise.calibrate.ece import auroc, brier, debiased_ece, ece, noise_floor, reliability, smooth_ece
from poise.calibrate.ece_interval import unbiased_ece
from poise.calibrate.extract import EMPTY, MARKERS, NO_ANSWER, VERSION, Rule, extract
from poise.calibrate.grade import matches_alias
from poise.calibrate.sem_ece import entropy, graded_over_splits, margin, sem1, sem2_exact
from poise.data.examples import Question
from poise.kinds.specs.calibrate import CalibrateMeasureSpec
from poise.models.sampling import Sample
from poise.stats import Estimate, paired_bootstrap, wilson

__all__ = ["SCHEMA", "Asked", "asked", "described", "summarised"]

Array = NDArray[np.float64]

ESTIMATES = ("sem1", "sem2")
LISTED, SURE, CELLS = 10, 0.9, 20
NO_ANSWER_WARNING = 0.1
"""A larger share of questions or of responses without an answer is warned of."""


@dataclass(frozen=True)
class Asked:
    """One question after n samples, whose answers lie in K classes: `labels` and `counts` [K]; `modal` is deployed.

    `empty` samples are blank and `no_answer` ones have no answer, such as the `truncated` ones that were cut before it:
    they are in n and in no class. Where nothing was answered K and both confidences are 0 and `modal` is NO_ANSWER.
    `gap` = sem1 - sem2 says how uncertain the choice of the class is, without a label. `Y_split` is the mean grade of
    what a half of the answers deploys. In a world, `true_confidence` is the probability that the model gives to the
    modal class, and `true_probability` the one that the world gives it; elsewhere, and where the answers were not drawn
    from the model's own distribution, both are None.
    """

    qid: str
    question: str
    n: int
    empty: int
    no_answer: int
    truncated: int
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
        **dict.fromkeys(("n", "empty", "no_answer", "truncated", "K"), _INT),
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
    said = [extract(t, finished=not s.is_truncated, rule=rule) for t, s in zip(texts, samples, strict=True)]
    answers = [answer for answer in said if answer not in MARKERS]
    classes = cluster(question.prompt, answers)
    counts, silent = classes.counts, len(said) - len(answers)
    answered = bool(counts)
    best = counts.index(max(counts)) if answered else -1
    grades = [int(matches_alias(label, question.answers)) for label in classes.labels]
    first = sem1(counts, unanswered=silent) if answered else 0.0
    second = sem2_exact(counts, unanswered=silent) if answered else 0.0
    modal = classes.labels[best] if answered else NO_ANSWER
    truth = question.distribution if exact and answered else None
    drawn = [sample for sample, answer in zip(samples, said, strict=True) if answer not in MARKERS]
    return Asked(
        qid=question.id,
        question=question.prompt,
        n=len(said),
        empty=said.count(EMPTY),
        no_answer=said.count(NO_ANSWER),
        truncated=sum(sample.finish == "length" for sample in samples),
        K=len(counts),
        modal=modal,
        sem1=first,
        sem2=second,
        margin=margin(counts) if answered else 0.0,
        gap=first - second,
        entropy=entropy(counts) if answered else 0.0,
        correct=answered and bool(grades[best]),
        Y_split=graded_over_splits(counts, grades, unanswered=silent) if answered else 0.0,
        true_confidence=None if truth is None else _probability(drawn, classes, best),
        true_probability=None if truth is None else sum(p for a, p in truth.items() if matches_alias(modal, [a])),
        flags=tuple(_flags(classes, said, best)),
        labels=classes.labels,
        counts=counts,
    )


def _probability(samples: Sequence[Sample], classes: Clusters, best: int) -> float:
    """The probability that the model gives to a class: the sum over the different responses in it."""
    responses = {s.tokens: s.logprobs for s, k in zip(samples, classes.assign, strict=True) if k == best}
    return min(1.0, math.fsum(math.exp(math.fsum(logprobs)) for logprobs in responses.values()))


def _flags(classes: Clusters, said: Sequence[str], best: int) -> list[str]:
    counts = classes.counts
    found = {"tie": bool(counts) and counts.count(counts[best]) > 1, "abstained": not counts}
    found |= {"empty": EMPTY in said, "no_answer": NO_ANSWER in said}
    return [name for name, is_so in found.items() if is_so]


def summarised(rows: Sequence[Asked], *, bins: int, reps: int) -> dict[str, Any]:
    """The measures with their intervals `[value, low, high]` (None where undefined), and what figures are drawn from.

    coverage: the share of questions with an answer. `accuracy` is over all questions, where no answer is a wrong one;
    everything else is over the answered ones, save ece_all, where a question without an answer has confidence 0.

    ece, smooth_ece and debiased_ece are estimates with an upward bias and have no interval; unbiased_ece estimates what
    ece does, without the bias, and has one. noise_floor: the ece that a calibrated model with these confidences would
    show. In a world, true/ece is the true calibration error: the ECE with the model's exact probability of its deployed
    answer as confidence. true/error puts the world's probability of that answer in place of its grade as well, so that
    it is free of noise, and 0 for a model that knows the truth.
    """
    answered = [row for row in rows if row.K]
    shares = {name: _column(answered, name) for name in ESTIMATES}
    y = _column(answered, "correct")
    metrics = _accuracies(rows, answered) | _errors(rows, answered, bins, reps)
    if answered:
        metrics |= paired_bootstrap(_means(answered), len(answered), reps=reps)
    return {
        "coverage": len(answered) / len(rows),
        "warnings": _warnings(rows),
        "answers": {
            "drawn": sum(row.n for row in rows),
            **{name: sum(getattr(row, name) for row in rows) for name in ("empty", "no_answer", "truncated")},
            "tied_questions": sum("tie" in row.flags for row in rows),
        },
        "metrics": {name: [_finite(value) for value in estimate] for name, estimate in metrics.items()},
        "noise_floor": {name: _finite(noise_floor(c, bins)) for name, c in shares.items()},
        "reliability": {name: _bins(c, y, bins) for name, c in shares.items()},
        "histogram": {name: _histogram(c) for name, c in shares.items()},
        "hardest": [_listed(row) for row in sorted(rows, key=lambda row: -row.gap)[:LISTED] if row.gap > 0],
        "confidently_wrong": [
            _listed(row) for row in sorted(rows, key=lambda row: -row.sem1) if row.sem1 >= SURE and not row.correct
        ][:LISTED],
    }


def _warnings(rows: Sequence[Asked]) -> list[str]:
    """What makes these numbers say little: questions without an answer, responses that were cut or hold none."""
    drawn, found = sum(row.n for row in rows), []
    unanswered = sum(not row.K for row in rows) / len(rows)
    if unanswered > NO_ANSWER_WARNING:
        found.append(
            f"{unanswered:.0%} of the questions have no answer: they count as wrong in the accuracy, and the "
            "calibration errors are those of the other questions"
        )
    truncated = sum(row.truncated for row in rows) / drawn
    if truncated > NO_ANSWER_WARNING:
        found.append(
            f"{truncated:.0%} of the responses were cut at decoding.max_tokens; what was cut before its answer is no "
            "answer: let the model write more, or end its answers earlier"
        )
    other = (sum(row.no_answer + row.empty for row in rows)) / drawn
    if other > NO_ANSWER_WARNING and other > truncated:
        found.append(f"{other:.0%} of the responses hold no answer: blank, cut, or without an `Answer:` line")
    return found


def described(spec: CalibrateMeasureSpec) -> str:
    """Everything that the numbers depend on, in one line."""
    half, decoding = spec.samples // 2, spec.decoding
    return (
        f"n={spec.samples}, temperature {decoding.temperature}, top_p {decoding.top_p}, at most {decoding.max_tokens} "
        f"tokens; answer: {spec.answer} (v{VERSION}), classes and grades: exact; Sem2 over all "
        f"{half}/{spec.samples - half} splits, uniform ties; ECE (L1) over {spec.bins} bins of equal width, exact "
        f"edges, its 95% interval by test inversion with {spec.bootstrap:,} draws; smECE with full ends; accuracy: "
        f"Wilson interval; other intervals: percentiles of {spec.bootstrap:,} resamples of the questions"
    )


def _accuracies(rows: Sequence[Asked], answered: Sequence[Asked]) -> dict[str, Estimate]:
    """Rates, whose interval has width where all agree."""
    found = {}
    for name, part in (("accuracy", rows), ("answered/accuracy", answered)):
        share = float(np.mean([row.correct for row in part])) if part else math.nan
        found[name] = Estimate(share, *(wilson(share, len(part)) if part else (math.nan, math.nan)))
    return found


def _errors(rows: Sequence[Asked], answered: Sequence[Asked], bins: int, reps: int) -> dict[str, Estimate]:
    """Errors that are sums of magnitudes: one estimate with an interval, the others without."""
    y, found = _column(answered, "correct"), dict[str, Estimate]()
    for name in ESTIMATES:
        c = _column(answered, name)
        found[f"{name}/ece"] = _plain(ece(c, y, bins))
        found[f"{name}/unbiased_ece"] = unbiased_ece(c, y, bins, reps=reps)
        found[f"{name}/ece_all"] = _plain(ece(_column(rows, name), _column(rows, "correct"), bins))
        found[f"{name}/debiased_ece"] = _plain(debiased_ece(c, y, bins))
        found[f"{name}/smooth_ece"] = _plain(smooth_ece(c, y, ends="full"))
    found["difference/ece"] = _plain(found["sem1/ece"].value - found["sem2/ece"].value)
    if _is_known(answered):
        own = _column(answered, "true_confidence")
        found["true/ece"] = _plain(ece(own, y, bins))
        found["true/unbiased_ece"] = unbiased_ece(own, y, bins, reps=reps)
        found["true/error"] = _plain(ece(own, _column(answered, "true_probability"), bins))
    return found


def _plain(value: float) -> Estimate:
    """A number without an interval."""
    return Estimate(value, math.nan, math.nan)


def _is_known(answered: Sequence[Asked]) -> bool:
    """Whether the model's own probability of each answer is known."""
    return bool(answered) and all(row.true_confidence is not None for row in answered)


def _means(answered: Sequence[Asked]) -> Callable[[NDArray[np.int64]], dict[str, float]]:
    """What is a mean over the questions with the given indices, or a smooth function of means."""
    shares, y = {name: _column(answered, name) for name in ESTIMATES}, _column(answered, "correct")
    own = _column(answered, "true_confidence") if _is_known(answered) else None

    def statistic(i: NDArray[np.int64]) -> dict[str, float]:
        found = {}
        for name, column in shares.items():
            c = column[i]
            found[f"{name}/confidence"] = float(c.mean())
            found[f"{name}/bias"] = float(c.mean() - y[i].mean())
            found[f"{name}/brier"] = brier(c, y[i])
            found[f"{name}/auroc"] = auroc(c, y[i])
        found["difference/confidence"] = found["sem1/confidence"] - found["sem2/confidence"]
        if own is not None:
            found["true/confidence"] = float(own[i].mean())
            found |= {f"true/{name}_bias": float((column[i] - own[i]).mean()) for name, column in shares.items()}
        return found

    return statistic


def _column(rows: Sequence[Asked], name: str) -> Array:
    return np.array([getattr(row, name) for row in rows], dtype=np.float64)


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
