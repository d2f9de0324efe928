"""Tables and figures of robust training: accuracy under each threat, and the curves of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from poise.kinds.robust_train import figures as monitor_figures
from poise.kinds.robust_train.result import RobustTrainResult
from poise.report import figures
from poise.report.blocks import (
    Cell,
    Column,
    RenderedFigure,
    Row,
    Section,
    Table,
    draw,
    metric_tables,
    number,
    percent,
)
from poise.report.curves import color_of, label, ordered
from poise.report.record import RunRecord, with_result

__all__ = ["SECTION"]


def _tables(records: Sequence[RunRecord]) -> Iterator[Table]:
    results = with_result(records, RobustTrainResult)
    accuracies = [_plain(values) for _, result in results for values in result.accuracy.values()]
    measures = ordered(measure for values in accuracies for measure in values)
    selected = [_selected(result) for _, result in results]
    best = {measure: _highest(selected, measure) for measure in measures}
    yield Table(
        title="Test accuracy in percent, 95% intervals",
        caption="Test accuracy in percent, with 95% Wilson intervals below; robust columns are under attack, "
        "\u201cunion\u201d counts an image only if it withstands every attack. Bold: highest of the "
        "selected checkpoints.",
        heading="run",
        columns=[Column(label(measure), figures.css_color(color_of(measure, measures))) for measure in measures],
        rows=[row for record in records for row in _rows(record, measures, best)],
    )
    yield from _overfitting(results, measures)
    yield from metric_tables({record.name: result.extra_metrics.get(result.selected, {}) for record, result in results})
    yield from _attacks(results)


def _plain(accuracy: Mapping[str, float]) -> dict[str, float]:
    """Accuracies by measure, without the prefix `robust/`."""
    return {name.removeprefix("robust/"): value for name, value in accuracy.items()}


def _highest(accuracies: Sequence[Mapping[str, float]], measure: str) -> float:
    """The highest finite accuracy of this measure; NaN where there is none."""
    values = [accuracy.get(measure, math.nan) for accuracy in accuracies]
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _selected(result: RobustTrainResult) -> dict[str, float]:
    """Accuracies of the selected checkpoint; {} where none was evaluated."""
    return _plain(result.accuracy[result.checkpoints[0]]) if result.accuracy else {}


def _overfitting(results: Sequence[tuple[RunRecord, RobustTrainResult]], measures: Sequence[str]) -> Iterator[Table]:
    """Accuracy of the best checkpoint minus that of the final one; for a run that was stopped, the reason."""
    if not any(result.best_minus_final for _, result in results):
        return
    rows = []
    for record, result in results:
        difference = _plain(result.best_minus_final)
        points = [100 * difference[measure] if measure in difference else None for measure in measures]
        note = f"stopped at step {result.stopped.step:,}: {result.stopped.why}" if result.stopped else ""
        rows.append(Row(record.name, note, [number(value, form="+.1f") for value in points]))
    yield Table(
        title="Best minus final checkpoint, points",
        caption="Test accuracy of the best checkpoint minus that of the final one, in points. The best is chosen on "
        "held-out training images. A large difference is robust overfitting.",
        heading="run",
        columns=[Column(label(measure)) for measure in measures],
        rows=rows,
    )


def _rows(record: RunRecord, measures: Sequence[str], best: Mapping[str, float]) -> Iterator[Row]:
    """A row for each evaluated checkpoint, the selected one first."""
    result = record.result
    if not isinstance(result, RobustTrainResult) or not result.accuracy:
        yield Row(record.name, "not evaluated", [percent(math.nan) for _ in measures])
        return
    for checkpoint in result.checkpoints:
        is_selected = checkpoint == result.checkpoints[0]
        accuracy = _plain(result.accuracy[checkpoint])
        cells = []
        for measure in measures:
            value = accuracy.get(measure, math.nan)
            cells.append(percent(value, result.num_examples, top=is_selected and value == best[measure]))
        step = result.step_of(checkpoint)
        note = f"{checkpoint}, step {step:,}, n={result.num_examples:,}, seed {result.seed}"
        yield Row(record.name, note, cells, is_selected)


def _attacks(results: Sequence[tuple[RunRecord, RobustTrainResult]]) -> Iterator[Table]:
    """One row per threat and attack, with the runs that were attacked in this way."""
    runs: dict[tuple[str, str], list[str]] = {}
    for record, result in results:
        for norm, attack in result.attacks.items():
            runs.setdefault((norm, attack.words), []).append(record.name)
    order = ordered(norm for norm, _ in runs)
    rows = []
    for (norm, words), names in sorted(runs.items(), key=lambda item: order.index(item[0][0])):
        run_names = "all runs" if len(names) == len(results) else ", ".join(names)
        rows.append(Row(label(norm), run_names, [Cell(words)], False))
    if rows:
        yield Table("", "The attacks behind the robust columns.", "threat", [Column("attack", prose=True)], rows)


def _figures(records: Sequence[RunRecord]) -> Iterator[RenderedFigure | None]:
    results = with_result(records, RobustTrainResult)
    finals = [(record.name, _selected(result), result.num_examples) for record, result in results]
    caption = "Selected checkpoint of each run on the test images, with 95% Wilson intervals."
    yield draw("final", "Clean and robust test accuracy", figures.final_bars(finals), caption)


def _details(anchor: str, record: RunRecord) -> Iterator[RenderedFigure | None]:
    rows = record.rows
    best = record.result.selected_step if record.result else None
    yield draw(
        f"{anchor}-accuracy",
        "Accuracy",
        figures.accuracy_curves(rows, best),
        "Solid: held-out validation images under the threats of training. Dotted: training batches under the training "
        "attack. A widening gap is robust overfitting.",
    )
    yield draw(
        f"{anchor}-weights",
        "Adaptive weights",
        figures.weight_curves(rows),
        "Weight of each threat in the training objective.",
    )
    yield draw(
        f"{anchor}-gap",
        "Robust gap",
        monitor_figures.gap_curves(rows),
        "Accuracy on training images minus that on held-out ones, under equal attacks.",
    )
    yield draw(
        f"{anchor}-overfitting",
        "Catastrophic overfitting",
        monitor_figures.overfitting_curves(rows),
        "A fixed batch of training images: accuracy under one step and under many, and the cosine between input "
        "gradients at the image and at a random point of the ball. Dashed: alarm.",
    )
    yield draw(
        f"{anchor}-steps",
        "Sum of step sizes",
        monitor_figures.step_sizes(rows),
        "Bounds on the robust gap by stability grow with it.",
    )


SECTION = Section(
    "Robustness",
    RobustTrainResult,
    _tables,
    _figures,
    _details,
    drawn=("clean", "accuracy", "robust/*", "weight/*", "overfitting/*"),
)
