"""Results of all kinds: written and read again, refused where they do not fit, and read by a path."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from poise.errors import IntegrityError, UserError
from poise.kinds import result_classes
from poise.kinds.align_selfplay.result import AlignSelfplayResult, PolicyResult
from poise.kinds.bounds_report.result import BoundsReportResult, LayerResult, MarginResult, NetworkResult
from poise.kinds.calibrate_measure.result import AnswerCounts, CalibrateMeasureResult, ListedQuestion
from poise.kinds.common.attack_description import AttackDescription
from poise.kinds.finetune_sft.result import FinetuneSftResult, TokenCounts
from poise.kinds.robust_evaluate.result import (
    BallResult,
    RecheckCounts,
    RecheckResult,
    RobustEvaluateResult,
    StageSummary,
)
from poise.kinds.robust_manifold.result import (
    ClassifierResult,
    EigenspaceResult,
    LatentResult,
    RobustManifoldResult,
    SubspaceResult,
)
from poise.kinds.robust_train.result import EarlyStopResult, RobustTrainResult
from poise.kinds.robust_vae.result import RobustVaeResult
from poise.kinds.sweep.result import SweepResult, TrialResult
from poise.store.result import (
    RunResult,
    has_result,
    kind_of_result,
    parts_of,
    read_result,
    require_result,
    write_result,
)
from poise.store.runs import Run, open_run

NAN = math.nan
ATTACK = AttackDescription(
    attack="pgd", norm="linf", eps=8 / 255, steps=20, step_size=None, restarts=1, words="PGD-20, eps 8/255"
)
TRAINED = RobustTrainResult(
    run="r",
    seed=7,
    warnings=["the learning rate is high"],
    objective="at",
    step=100,
    best_step=60,
    selected="best",
    parameters=1_000,
    num_examples=50,
    attacks={"linf": ATTACK},
    accuracy={"best": {"clean": 0.1 + 0.2, "robust/linf": NAN}, "final": {"clean": 0.5, "robust/linf": 0.25}},
    validation={"best": {"clean": 0.75}},
    num_validation_examples=20,
    best_minus_final={"clean": -0.2, "robust/linf": NAN},
    stopped=EarlyStopResult(step=100, why="catastrophic overfitting"),
)
NETWORK = NetworkResult(
    run="net",
    selected="best",
    step=60,
    attacks={"linf": ATTACK},
    accuracy={"train": {"clean": 1.0}, "test": {"clean": 0.9}},
    gap={"clean": 0.1, "robust/union": NAN},
    samples=250,
    depth=4,
    width=8,
    parameters=1_000,
    homogeneous=True,
    fixes_zero=False,
    left_out=["PAC-Bayes: the network is smooth"],
    radius={"clean": 8.0, "robust": 8.5},
    margin=MarginResult(percentile=0.3, used=0.25, below=0.05),
    log10={"spectral_product": 3.5, "pac_bayes_complexity": NAN},
    bounds={"clean": {"arc": 2.5, "pac_bayes": None}, "robust": {}},
    decomposition={"adversary": 0.0, "norms": None},
    layers=[LayerResult(name="body.0", sigma_lo=1.25, sigma_hi=1.3)],
)
QUESTION = ListedQuestion(
    question="who?", answers=[("ann", 3), ("bob", 2)], K=2, sem1=0.6, sem2=0.4, gap=0.2, correct=False
)
POLICY = PolicyResult(exploitability=0.25, distance=NAN, outside=0.125, policy=[0.5, NAN, 0.125])
RESULTS: list[RunResult] = [
    TRAINED,
    RobustEvaluateResult(
        run="r",
        seed=7,
        num_examples=90,
        model="run net, best",
        selected="best",
        split="test",
        accuracy={"best": {"clean": 0.9, "robust/linf": 0.5, "robust/union": 0.5}},
        intervals={"clean": (0.82, 0.95)},
        threats={"linf": BallResult(norm="linf", eps=0.05, words="linf eps 1/20")},
        stages=[
            StageSummary(
                name="fgsm-linf", threat="linf", attack="FGSM, eps 1/20", attacked=81, fooled=36,
                still_correct=0.5, union=0.5, gradients=81, queries=81,
            )
        ],
        weights_sha256="0" * 64,
        rechecked=RecheckResult(run="e", stages={"fgsm-linf": RecheckCounts(stored=36, fools=36, feasible=35)}),
    ),
    RobustVaeResult(
        run="r", seed=7, objective="ELBO", step=10, best_step=None, parameters=9, measured={"elbo": -3.5, "kl": NAN}
    ),
    RobustManifoldResult(
        run="r",
        seed=7,
        eigenspace=EigenspaceResult(rank=12, shared=True),
        latent="PGD-5 on codes",
        classifiers=[
            ClassifierResult(
                run="net", selected="best", step=60, objective="at", num_examples=60, attacks={"linf": ATTACK},
                dimensions={"full": 64, "on_manifold": 12, "off_manifold": 52}, explained=0.75,
                distance=None, clean=0.9,
                accuracy={"on_manifold/linf": 0.8}, success={"on_manifold/linf": None},
                residual={"on_manifold/linf": SubspaceResult(residual=None, share=0.125, clipped=0.0)},
                latent=LatentResult(reconstruction=0.5, accuracy=None, success=None),
            )
        ],
    ),
    BoundsReportResult(
        run="r", seed=7, num_examples=60, percentile=5.0, margins="correct", radius="data", delta=0.05,
        networks=[NETWORK, NETWORK.model_copy(update={"margin": None, "step": None})],
    ),
    FinetuneSftResult(
        run="r", seed=7, objective="ce", step=10, best_step=5, selected="best", parameters=9, tuning="lora (rank 4)",
        trainable=3, measured={"ce": 0.3, "entropy": NAN}, floor=None,
        tokens=TokenCounts(examples=8, all=80, supervised=20, learned_from=40),
        supervised_share=0.25, tokens_per_answer=2.5, preview=[("<s>", None), (None, "ann")],
    ),
    AlignSelfplayResult(
        run="r", seed=7, step=10, best_step=10, parameters=9, method="mpo", oracle="cycle", iterations=5,
        num_questions=3, num_responses=40, equilibrium=[0.5, 0.5, 0.0], start=POLICY,
        final=POLICY.model_copy(update={"distance_regularised": 0.5}),
    ),
    CalibrateMeasureResult(
        run="r", seed=7, num_examples=40, tokens=800, protocol="n=5", coverage=0.975,
        answers=AnswerCounts(drawn=200, empty=1, no_answer=2, truncated=3, tied_questions=4),
        metrics={"accuracy": (0.7, 0.6, 0.8), "sem1/auroc": (None, None, None)},
        noise_floor={"sem1": 0.04, "sem2": None},
        reliability={"sem1": {"count": [12, 88], "confidence": [0.25, 0.97]}}, histogram={"sem1": [0, 100]},
        hardest=[QUESTION], confidently_wrong=[],
    ),
    SweepResult(
        run="r", seed=7, metric="robust/union", mode="max", judgement={"scheduler": {"name": "asha"}},
        judged_by="robust/union on the validation split", judged_on="validation", best="r-0001", failed=["r-0000"],
        trials=[
            TrialResult(run="r-0000", status="failed", values={"threats.linf.eps": "8/255"}, metric=None, step=None,
                        test={}, error="broke"),
            TrialResult(run="r-0001", status="finished", values={"threats.linf.eps": 0.1, "train": {"epochs": 2}},
                        metric=0.5, step=40, test={"clean": 0.9}, num_examples=40, num_tested=200),
        ],
        parts=["r-0000", "r-0001"],
    ),
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(tmp_path, "r")


def with_nan_as_text(value: object) -> object:
    """The same value with NaN as "NaN", so that NaN equals NaN."""
    if isinstance(value, dict):
        return {key: with_nan_as_text(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_nan_as_text(inner) for inner in value]
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def test_every_kind_has_a_result_here() -> None:
    assert {result.kind: type(result) for result in RESULTS} == dict(result_classes())


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.kind)
def test_a_result_is_read_as_it_was_written(run: Run, result: RunResult) -> None:
    write_result(run, result)
    again = require_result(run, result_classes()[result.kind])
    assert type(again) is type(result)
    assert with_nan_as_text(again.model_dump()) == with_nan_as_text(result.model_dump())
    assert "NaN" not in run.read("result.json").decode()
    assert (kind_of_result(run), has_result(run)) == (result.kind, True)
    first = run.read("result.json")
    write_result(run, again)
    assert run.read("result.json") == first


def test_nan_is_null_in_the_file_and_nan_again_where_the_field_is_a_score(run: Run) -> None:
    write_result(run, TRAINED)
    written = json.loads(run.read("result.json"))
    assert written["accuracy"]["best"] == {"clean": 0.1 + 0.2, "robust/linf": None}
    assert written["best_minus_final"]["robust/linf"] is None
    again = require_result(run, RobustTrainResult)
    assert math.isnan(again.accuracy["best"]["robust/linf"])
    assert math.isnan(again.best_minus_final["robust/linf"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_must_be_finite_and_is_not_is_an_error_and_writes_nothing(run: Run, value: float) -> None:
    result = RobustEvaluateResult(run="r", seed=0, num_examples=1, accuracy={"best": {"clean": value}})
    with pytest.raises(ValueError, match=r"accuracy\.best\.clean"):
        write_result(run, result)
    assert not has_result(run)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"kind": "robust.vae"}, "kind: Input should be 'robust.train'", id="another kind"),
        pytest.param({"schema_version": 2}, "schema_version: Input should be 1", id="another version"),
        pytest.param({"colour": 1}, "colour: Extra inputs are not permitted", id="unknown field"),
        pytest.param({"accuracy": {"best": {"clean": "high"}}}, "accuracy.best.clean: Input should be a valid number",
                     id="no number"),
        pytest.param({"attacks": {"linf": {"attack": "pgd"}}}, "attacks.linf.norm: Field required", id="within a part"),
    ],
)  # fmt: skip
def test_a_result_that_does_not_fit_names_the_file_and_the_field(
    run: Run, change: dict[str, object], field: str
) -> None:
    run.write("result.json", json.dumps({**TRAINED.model_dump(mode="json"), **change}).encode())
    with pytest.raises(IntegrityError) as refused:
        read_result(run, RobustTrainResult)
    assert str(refused.value).startswith(f"{run.url}/result.json is damaged: {field}")
    with pytest.raises(IntegrityError, match="is damaged"):
        require_result(run, RobustTrainResult)


@pytest.mark.parametrize("data", [b"", b"[1", b"[1]", TRAINED.model_dump_json().encode()[:-1]])
def test_a_result_that_is_cut_names_the_file_whoever_reads_it(run: Run, data: bytes) -> None:
    run.write("result.json", data)
    readers = (lambda run: read_result(run, RobustTrainResult), parts_of, kind_of_result)
    for read in readers:
        with pytest.raises(IntegrityError, match=r"/r/result\.json is damaged: (Invalid JSON|Input should be)"):
            read(run)


def test_a_result_cannot_be_changed_nor_made_of_fields_that_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TRAINED.step = 3
    with pytest.raises(ValueError, match="Extra inputs"):
        RobustVaeResult(run="r", seed=0, step=1, best_step=1, parameters=1, measured={}, color=1)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("accuracy.best.clean", 0.1 + 0.2),
        ("accuracy.final.robust/linf", 0.25),
        ("validation.best.clean", 0.75),
        ("attacks.linf.eps", 8 / 255),
        ("stopped.step", 100.0),
        ("step", 100.0),
        ("accuracy.best.robust/linf", None),  # NaN
        ("accuracy.best", None),
        ("accuracy.averaged.clean", None),
        ("accuracy.best.clean.more", None),
        ("objective", None),
        ("warnings.0", None),
        ("", None),
    ],
)
def test_a_number_is_found_by_its_dotted_path(path: str, number: float | None) -> None:
    assert TRAINED.number(path) == number


def test_a_truth_is_no_number() -> None:
    by_kind = {result.kind: result for result in RESULTS}
    assert by_kind["robust.manifold"].number("eigenspace.rank") == 12
    assert by_kind["robust.manifold"].number("eigenspace.shared") is None


def test_the_parts_of_a_result_are_named_whatever_its_kind(run: Run) -> None:
    assert parts_of(run) == []
    assert kind_of_result(run) is None
    for result in RESULTS:
        write_result(run, result)
        assert parts_of(run) == (["r-0000", "r-0001"] if result.kind == "sweep" else [])


def test_no_result_is_none_or_a_sentence(run: Run) -> None:
    assert read_result(run, RobustTrainResult) is None
    assert not has_result(run)
    with pytest.raises(UserError, match=r"run 'r' in .* has no result yet: run it to its end first"):
        require_result(run, RobustTrainResult)


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.kind)
def test_what_the_record_and_a_sweep_ask_of_any_result(result: RunResult) -> None:
    """The steps, the counts behind its means by split, and the facts of the head of a page."""
    steps, counts, facts = {
        "robust.train": ((100, 60), (None, 20, 50), {"objective": "at", "step": "100", "parameters": "1,000"}),
        "robust.evaluate": ((None, None), (None, 90, 90), {"examples": "90"}),
        "robust.vae": ((10, None), (None, None, None), {"objective": "ELBO", "step": "10", "parameters": "9"}),
        "robust.manifold": ((None, None), (None, None, None), {}),
        "bounds.report": ((None, None), (None, 60, 60), {"examples": "60"}),
        "finetune.sft": ((10, 5), (None, None, None), {"objective": "ce", "step": "10", "parameters": "9"}),
        "align.selfplay": ((10, 10), (None, None, None), {"step": "10", "parameters": "9"}),
        "calibrate.measure": ((None, None), (None, 40, 40), {"questions": "40"}),
        "sweep": ((None, None), (None, None, None), {}),
    }[result.kind]
    assert (result.last_step, result.selected_step) == steps
    assert tuple(map(result.num_examples_of, ("train", "validation", "test"))) == counts
    assert dict(result.facts()) == facts
