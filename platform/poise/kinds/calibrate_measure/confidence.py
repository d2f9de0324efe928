"""Confidence and correctness of a model on each question, and measures of calibration over all questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.calibrate.clustering import Clusterer, Clusters
from poise.calibrate.ece import auroc, brier, debiased_ece, ece, noise_floor, reliability, smooth_ece
from poise.calibrate.ece_interval import unbiased_ece
from poise.calibrate.extract import EMPTY, MARKERS, NO_ANSWER, VERSION, Rule, extract
from poise.calibrate.grade import matches_alias
from poise.calibrate.sem_ece import entropy, graded_over_splits, margin, sem1, sem2_exact
from poise.data.text.examples import Question
from poise.inference.sampler import Sample
from poise.kinds.calibrate_measure.result import AnswerCounts, ListedQuestion
from poise.kinds.calibrate_measure.spec import CalibrateMeasureSpec
from poise.stats import Estimate, paired_bootstrap, wilson

__all__ = ["SCHEMA", "QuestionResult", "describe_protocol", "score_question", "summarize"]

Array = NDArray[np.float64]

ESTIMATES = ("sem1", "sem2")
LISTED_QUESTIONS = 10
"""At most so many questions are listed on the page as hardest, and as confidently wrong."""
HIGH_CONFIDENCE = 0.9
"""A wrong answer with at least this Sem1 is confidently wrong."""
HISTOGRAM_CELLS = 20
NO_ANSWER_WARNING = 0.1
"""A larger share of questions or of responses without an answer gives a warning."""


@dataclass(frozen=True)
class QuestionResult:
    """One question after n samples, whose answers lie in K classes of equal meaning.

    Where no sample has an answer, K and both confidences are 0 and `modal` is NO_ANSWER.

    Attributes:
        n: samples, those without an answer included.
        empty: blank samples; they are in no class.
        no_answer: samples without an answer, such as those truncated before it; they are in no class.
        truncated: samples that reached the largest number of tokens.
        modal: the label of the most frequent class, the deployed answer.
        gap: sem1 - sem2; a label-free measure of how uncertain the choice of the class is.
        correct: whether the deployed answer is correct.
        Y_split: mean grade of the answer that one half of the samples deploys.
        true_confidence: the probability that the model gives to the modal class; None outside a world, and where the
            samples were not drawn from the model's own distribution.
        true_probability: the probability that the world gives to the modal class; None in the same cases.
        flags: of "tie", "abstained", "empty", "no_answer" those that apply.
        labels: of the classes, [K].
        counts: samples in each class, [K].
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


_TEXT = pa.string()
_REAL = pa.float64()
_INT = pa.int32()
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
"""The columns of `artifacts/questions.parquet`, a row for each `QuestionResult`."""


def score_question(
    question: Question,
    samples: Sequence[Sample],
    texts: Sequence[str],
    rule: Rule,
    clusterer: Clusterer,
    *,
    exact: bool,
) -> QuestionResult:
    """Extract, cluster and grade the `samples` of a question; `texts` are their decoded responses.

    `exact`: the samples were drawn at temperature 1 from the whole distribution, so the probability of each response is
    known. The probability of the modal class is then the sum over the distinct responses in it: these are all there
    are in a world, where each name is written in one way.
    """
    extracted = [
        extract(text, finished=not sample.is_truncated, rule=rule) for text, sample in zip(texts, samples, strict=True)
    ]
    # a marker says why a sample has no answer; such samples form no class, or their agreement would be confidence
    is_answer = [answer not in MARKERS for answer in extracted]
    answers = list(compress(extracted, is_answer))
    num_unanswered = len(extracted) - len(answers)
    classes = clusterer.cluster(question.prompt, answers)
    counts = classes.counts
    common: dict[str, Any] = {
        "qid": question.id,
        "question": question.prompt,
        "n": len(extracted),
        "empty": extracted.count(EMPTY),
        "no_answer": extracted.count(NO_ANSWER),
        "truncated": sum(sample.finish == "length" for sample in samples),
        "flags": tuple(_flags(classes, extracted)),
        "labels": classes.labels,
        "counts": counts,
    }
    if not counts:
        return QuestionResult(
            **common,
            K=0,
            modal=NO_ANSWER,
            sem1=0.0,
            sem2=0.0,
            margin=0.0,
            gap=0.0,
            entropy=0.0,
            correct=False,
            Y_split=0.0,
            true_confidence=None,
            true_probability=None,
        )

    modal_class = counts.index(max(counts))  # of a tie, the first
    modal = classes.labels[modal_class]
    grades = [int(matches_alias(label, question.answers)) for label in classes.labels]
    sem1_confidence = sem1(counts, unanswered=num_unanswered)
    sem2_confidence = sem2_exact(counts, unanswered=num_unanswered)
    true_confidence = true_probability = None
    if exact and question.distribution is not None:
        answered_samples = list(compress(samples, is_answer))  # in the order of `classes.assign`
        true_confidence = _class_probability(answered_samples, classes, modal_class)
        true_probability = sum(p for answer, p in question.distribution.items() if matches_alias(modal, [answer]))
    return QuestionResult(
        **common,
        K=len(counts),
        modal=modal,
        sem1=sem1_confidence,
        sem2=sem2_confidence,
        margin=margin(counts),
        gap=sem1_confidence - sem2_confidence,
        entropy=entropy(counts),
        correct=bool(grades[modal_class]),
        Y_split=graded_over_splits(counts, grades, unanswered=num_unanswered),
        true_confidence=true_confidence,
        true_probability=true_probability,
    )


def _class_probability(samples: Sequence[Sample], classes: Clusters, index: int) -> float:
    """The probability that the model gives to a class: the sum over the distinct responses in it."""
    # by tokens, since a response that was sampled twice has its probability once
    responses = {
        sample.tokens: sample.logprobs
        for sample, assigned in zip(samples, classes.assign, strict=True)
        if assigned == index
    }
    probabilities = (math.exp(math.fsum(logprobs)) for logprobs in responses.values())
    return min(1.0, math.fsum(probabilities))


def _flags(classes: Clusters, extracted: Sequence[str]) -> list[str]:
    counts = classes.counts
    conditions = {
        "tie": bool(counts) and counts.count(max(counts)) > 1,
        "abstained": not counts,
        "empty": EMPTY in extracted,
        "no_answer": NO_ANSWER in extracted,
    }
    return [name for name, applies in conditions.items() if applies]


def summarize(rows: Sequence[QuestionResult], *, bins: int, reps: int) -> dict[str, Any]:
    """Fields of a `CalibrateMeasureResult`: measures as `[value, low, high]` (None where undefined), data of figures.

    coverage: the share of questions with an answer. `accuracy` is over all questions, where no answer is a wrong one;
    all other measures are over the answered ones, except ece_all, where a question without an answer has confidence 0.

    ece, smooth_ece and debiased_ece are estimates with an upward bias and have no interval; unbiased_ece estimates the
    same quantity as ece without the bias, and has an interval. noise_floor: the ece that a calibrated model with these
    confidences would show. In a world, true/ece is the true calibration error: the ECE with the model's exact
    probability of its deployed answer as confidence. true/error also replaces the grade by the world's probability of
    that answer, so that it has no noise, and is 0 for a model with the true distribution.
    """
    answered = [row for row in rows if row.K]
    confidences = {name: _column(answered, name) for name in ESTIMATES}
    correct = _column(answered, "correct")
    metrics = _accuracies(rows, answered) | _calibration_errors(rows, answered, bins, reps)
    if answered:
        metrics |= paired_bootstrap(_statistic(answered), len(answered), reps=reps)
    hardest = [row for row in sorted(rows, key=lambda row: -row.gap)[:LISTED_QUESTIONS] if row.gap > 0]
    confidently_wrong = [
        row for row in sorted(rows, key=lambda row: -row.sem1) if row.sem1 >= HIGH_CONFIDENCE and not row.correct
    ][:LISTED_QUESTIONS]
    return {
        "coverage": len(answered) / len(rows),
        "warnings": _warnings(rows),
        "answers": AnswerCounts(
            drawn=sum(row.n for row in rows),
            empty=sum(row.empty for row in rows),
            no_answer=sum(row.no_answer for row in rows),
            truncated=sum(row.truncated for row in rows),
            tied_questions=sum("tie" in row.flags for row in rows),
        ),
        "metrics": {name: [_finite(value) for value in estimate] for name, estimate in metrics.items()},
        "noise_floor": {name: _finite(noise_floor(values, bins)) for name, values in confidences.items()},
        "reliability": {name: _reliability_bins(values, correct, bins) for name, values in confidences.items()},
        "histogram": {name: _histogram(values) for name, values in confidences.items()},
        "hardest": [_listed_question(row) for row in hardest],
        "confidently_wrong": [_listed_question(row) for row in confidently_wrong],
    }


def _warnings(rows: Sequence[QuestionResult]) -> list[str]:
    """Reasons why these measures say little: questions without an answer, responses that were cut or have none."""
    warnings = []
    num_samples = sum(row.n for row in rows)
    unanswered = sum(not row.K for row in rows) / len(rows)
    if unanswered > NO_ANSWER_WARNING:
        warnings.append(
            f"{unanswered:.0%} of the questions have no answer: they count as wrong in the accuracy, and the "
            "calibration errors are those of the other questions"
        )
    truncated = sum(row.truncated for row in rows) / num_samples
    if truncated > NO_ANSWER_WARNING:
        warnings.append(
            f"{truncated:.0%} of the responses were cut at decoding.max_tokens; what was cut before its answer is no "
            "answer: let the model write more, or end its answers earlier"
        )
    without_answer = (sum(row.no_answer + row.empty for row in rows)) / num_samples
    if without_answer > NO_ANSWER_WARNING and without_answer > truncated:
        warnings.append(
            f"{without_answer:.0%} of the responses hold no answer: blank, cut, or without an `Answer:` line"
        )
    return warnings


def describe_protocol(spec: CalibrateMeasureSpec) -> str:
    """All settings that the numbers depend on, in one line."""
    half = spec.samples // 2
    decoding = spec.decoding
    return (
        f"n={spec.samples}, temperature {decoding.temperature}, top_p {decoding.top_p}, at most {decoding.max_tokens} "
        f"tokens; answer: {spec.answer} (v{VERSION}), classes: {spec.clustering.describe()}, grades: exact; Sem2 over "
        f"all {half}/{spec.samples - half} splits, uniform ties; ECE (L1) over {spec.bins} bins of equal width, exact "
        f"edges, its 95% interval by test inversion with {spec.bootstrap:,} draws; smECE with full ends; accuracy: "
        f"Wilson interval; other intervals: percentiles of {spec.bootstrap:,} resamples of the questions"
    )


def _accuracies(rows: Sequence[QuestionResult], answered: Sequence[QuestionResult]) -> dict[str, Estimate]:
    """Accuracies with Wilson intervals, which have width even where all questions are answered correctly."""
    accuracies = {}
    for name, part in (("accuracy", rows), ("answered/accuracy", answered)):
        if part:
            share = float(np.mean([row.correct for row in part]))
            accuracies[name] = Estimate(share, *wilson(share, len(part)))
        else:
            accuracies[name] = Estimate(math.nan, math.nan, math.nan)
    return accuracies


def _calibration_errors(
    rows: Sequence[QuestionResult], answered: Sequence[QuestionResult], bins: int, reps: int
) -> dict[str, Estimate]:
    """Calibration errors. They are sums of magnitudes, so only `unbiased_ece` has an interval."""
    correct = _column(answered, "correct")
    errors: dict[str, Estimate] = {}
    for name in ESTIMATES:
        confidence = _column(answered, name)
        errors[f"{name}/ece"] = _without_interval(ece(confidence, correct, bins))
        errors[f"{name}/unbiased_ece"] = unbiased_ece(confidence, correct, bins, reps=reps)
        errors[f"{name}/ece_all"] = _without_interval(ece(_column(rows, name), _column(rows, "correct"), bins))
        errors[f"{name}/debiased_ece"] = _without_interval(debiased_ece(confidence, correct, bins))
        errors[f"{name}/smooth_ece"] = _without_interval(smooth_ece(confidence, correct, ends="full"))
    errors["difference/ece"] = _without_interval(errors["sem1/ece"].value - errors["sem2/ece"].value)
    if _has_true_confidence(answered):
        true_confidence = _column(answered, "true_confidence")
        true_probability = _column(answered, "true_probability")
        errors["true/ece"] = _without_interval(ece(true_confidence, correct, bins))
        errors["true/unbiased_ece"] = unbiased_ece(true_confidence, correct, bins, reps=reps)
        errors["true/error"] = _without_interval(ece(true_confidence, true_probability, bins))
    return errors


def _without_interval(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan)


def _has_true_confidence(answered: Sequence[QuestionResult]) -> bool:
    """Whether the model's probability of every deployed answer is known."""
    return bool(answered) and all(row.true_confidence is not None for row in answered)


def _statistic(answered: Sequence[QuestionResult]) -> Callable[[NDArray[np.int64]], dict[str, float]]:
    """The statistic to bootstrap: measures of the questions with the given indices.

    Only means over questions and smooth functions of means are in it: for these the bootstrap is valid.
    """
    confidences = {name: _column(answered, name) for name in ESTIMATES}
    correct = _column(answered, "correct")
    true_confidence = _column(answered, "true_confidence") if _has_true_confidence(answered) else None

    def statistic(indices: NDArray[np.int64]) -> dict[str, float]:
        measures = {}
        y = correct[indices]
        for name, column in confidences.items():
            confidence = column[indices]
            measures[f"{name}/confidence"] = float(confidence.mean())
            measures[f"{name}/bias"] = float(confidence.mean() - y.mean())
            measures[f"{name}/brier"] = brier(confidence, y)
            measures[f"{name}/auroc"] = auroc(confidence, y)
        measures["difference/confidence"] = measures["sem1/confidence"] - measures["sem2/confidence"]
        if true_confidence is not None:
            measures["true/confidence"] = float(true_confidence[indices].mean())
            for name, column in confidences.items():
                measures[f"true/{name}_bias"] = float((column[indices] - true_confidence[indices]).mean())
        return measures

    return statistic


def _column(rows: Sequence[QuestionResult], name: str) -> Array:
    return np.array([getattr(row, name) for row in rows], dtype=np.float64)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _reliability_bins(confidence: Array, correct: Array, bins: int) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in asdict(reliability(confidence, correct, bins)).items()}


def _histogram(confidence: Array) -> list[int]:
    """The number of confidences in each of HISTOGRAM_CELLS cells of equal width; a lower edge belongs to its cell."""
    # Without the small number, rounding would put some multiples of the width into the cell below.
    cells = np.minimum(np.floor(confidence * HISTOGRAM_CELLS + 1e-12), HISTOGRAM_CELLS - 1).astype(np.int64)
    return [int(count) for count in np.bincount(cells, minlength=HISTOGRAM_CELLS)]


def _listed_question(row: QuestionResult) -> ListedQuestion:
    """A question for the page, with its five most frequent answers."""
    by_count = sorted(zip(row.counts, row.labels, strict=True), key=lambda pair: -pair[0])
    return ListedQuestion(
        question=row.question,
        answers=[(label, count) for count, label in by_count[:5]],
        K=row.K,
        sem1=row.sem1,
        sem2=row.sem2,
        gap=row.gap,
        correct=row.correct,
    )
