"""A run as training would leave it, made of formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from poise.kinds.common.attack_description import AttackDescription
from poise.kinds.robust_train.result import RobustTrainResult
from poise.observe.names import PHASES
from poise.observe.rows import Rows, read_rows
from poise.report.record import RunRecord

THREATS = ("linf", "l2", "l1")
STEPS_PER_EPOCH = 45


def _rows(level: float, epochs: int) -> Rows:
    rows = Rows()
    for step in range(5, epochs * STEPS_PER_EPOCH + 1, 5):
        epoch = step / STEPS_PER_EPOCH
        decay = math.exp(-epoch / 3)
        parts = {t: 0.4 + 0.2 * i + 2 * decay + 0.05 * math.sin(step * (i + 1)) for i, t in enumerate(THREATS)}
        drift = 0.25 * math.sin(epoch / 2) * (1 - decay)
        weights = {"linf": 1 / 3 + drift, "l2": 1 / 3 - drift / 4, "l1": 1 / 3 - 3 * drift / 4}
        values = {f"loss/{t}": v for t, v in parts.items()} | {f"weight/{t}": w for t, w in weights.items()}
        accuracy = {f"robust/{t}": level - 0.5 * decay - 0.05 * i + 0.004 * epoch for i, t in enumerate(THREATS)}
        rows.add(step, epoch, "train", {"loss": sum(parts.values()) / 3, **values, **accuracy, "lr": 0.1 * decay})
        if step % STEPS_PER_EPOCH == 0:
            clean = level + 0.2 - 0.5 * decay
            robust = {f"robust/{t}": clean - 0.12 - 0.05 * i for i, t in enumerate(THREATS)}
            extra = {"robust/average": clean - 0.19, "robust/union": clean - 0.3}
            rows.add(step, epoch, "validation", {"clean": clean, **robust, **extra})
            seconds = dict(zip((f"seconds/{p}" for p in PHASES), (0.1, 0.0, 4.0, 1.9, 0.4, 0.2), strict=True))
            rows.add(step, epoch, "timing", {"examples_per_s": 900 + 10 * epoch, **seconds})
    return rows


def attack(words: str) -> AttackDescription:
    """An attack that is described by `words`."""
    return AttackDescription(attack="pgd", norm="linf", eps=8 / 255, steps=20, step_size=None, restarts=1, words=words)


@pytest.fixture(scope="session")
def describe_attack() -> Callable[[str], AttackDescription]:
    return attack


@pytest.fixture(scope="session")
def make_record() -> Callable[..., RunRecord]:
    return build_record


def build_record(name: str = "digits-adt", level: float = 0.7, epochs: int = 12) -> RunRecord:
    """A finished run; `level` sets its accuracies."""
    final = {"clean": level + 0.2, "robust/linf": level, "robust/l2": level - 0.06, "robust/l1": level - 0.1}
    final |= {"robust/average": level - 0.053, "robust/union": level - 0.16}
    best = {measure: value + 0.013 for measure, value in final.items()}
    steps = epochs * STEPS_PER_EPOCH
    return RunRecord(
        name=name,
        kind="robust.train",
        spec_text=f"kind: robust.train\nname: {name}\nthreats:\n  linf: {{eps: 8/255}}\n",
        environment={
            "python": "3.11.9",
            "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
            "packages": {"torch": "2.13.0", "ray": "2.60.0"},
            "cpus": 2,
        },
        result=RobustTrainResult(
            run=name,
            seed=7,
            objective="adt",
            step=steps,
            best_step=steps - 2 * STEPS_PER_EPOCH,
            selected="best",
            num_examples=360,
            attacks={threat: attack(f"PGD-20 in the {threat} ball, eps 8/255, 1 restart") for threat in THREATS},
            accuracy={"best": best, "final": final},
            parameters=123_456,
        ),
        rows=read_rows([_rows(level, epochs).to_parquet()]),
        events=[
            {"time": 1767225600.0, "event": "start", "step": 0, "attempt": 0, "workers": 2},
            {"time": 1767225610.5, "event": "commit", "step": 45, "attempt": 0, "seconds": 0.21},
            {
                "time": 1767225620.5,
                "event": "damaged",
                "what": "checkpoints/step-00000090/model.safetensors: truncated",
            },
            {"time": 1767225621.5, "event": "start", "step": 45, "attempt": 1, "workers": 2},
            {"time": 1767225640.5, "event": "commit", "step": steps, "attempt": 1, "seconds": 0.19},
        ],
        status="finished",
    )
