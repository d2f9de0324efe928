"""The kind as a whole on small worlds: a sampler that answers as its distribution says, and transformers."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from poise import kinds
from poise.calibrate.ece import auroc, brier, debiased_ece, ece, smooth_ece
from poise.calibrate.ece_interval import unbiased_ece
from poise.calibrate.sem_ece import sem1, sem2_exact
from poise.data.synthetic_facts import World, make_world
from poise.data.text.examples import Question, encode_completion
from poise.data.world_spec import WorldSpec
from poise.errors import PoiseError, UserError
from poise.inference.sampler import (
    Decoding,
    ProgressCallback,
    Request,
    Sample,
    Sampler,
    no_progress,
)
from poise.inference.transformers_sampler import TransformersSampler
from poise.kinds import report_sections, result_classes
from poise.kinds.calibrate_measure.report import SECTION
from poise.kinds.calibrate_measure.spec import CalibrateMeasureSpec
from poise.models.language import export, new_llama
from poise.models.spec import LanguageModelSpec
from poise.observe.rows import read_rows
from poise.report.page import render
from poise.report.record import load_record
from poise.stats import wilson
from poise.store.runs import Run, open_run
from poise.train.context import Context

WORLD = {"entities": 10, "relations": 4}
Answers = Mapping[str, float]


class Oracle:
    """Answers each question from a known distribution of names."""

    version = 0

    def __init__(self, world: World, believes: Callable[[Question], Answers]) -> None:
        self.asked: list[str] = []
        self._believes = {question.id: dict(believes(question)) for question in world.questions("evaluate")}
        self._tokenizer = world.tokenizer()

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, on_progress: ProgressCallback = no_progress
    ) -> list[list[Sample]]:
        self.asked += [request.id for request in requests]
        return [[self._sample(request, index, decoding) for index in range(request.n)] for request in requests]

    def _sample(self, request: Request, index: int, decoding: Decoding) -> Sample:
        names, shares = zip(*self._believes[request.id].items(), strict=True)
        name = names[np.random.default_rng(request.seed + index).choice(len(names), p=shares)]
        tokens = encode_completion(self._tokenizer, name)
        logprobs = (math.log(self._believes[request.id][name]), *[0.0] * (len(tokens) - 1))
        cut, whole = decoding.max_tokens, len(tokens) <= decoding.max_tokens
        return Sample(request.id, index, tokens[:cut], logprobs[:cut], "stop" if whole else "length", 0)


class Mute(Oracle):
    """Cannot answer."""

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, on_progress: ProgressCallback = no_progress
    ) -> list[list[Sample]]:
        raise AssertionError("nothing was to be drawn")


def truth(question: Question) -> Answers:
    return question.distribution or {}


def sharpened(question: Question) -> Answers:
    """Too sure: the true probabilities to the power of 3."""
    powers = {name: p**3 for name, p in truth(question).items()}
    return {name: p / math.fsum(powers.values()) for name, p in powers.items()}


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(WorldSpec(**WORLD))


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that has learned nothing, and the words of the world."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = world.tokenizer()
    model = LanguageModelSpec(name="llama", hidden=32, layers=1, heads=1)
    export(new_llama(model, tokenizer, 0), tokenizer, path)
    return path


def spec_of(folder: Path, **changes: object) -> CalibrateMeasureSpec:
    values = {
        "kind": "calibrate.measure",
        "name": "measured",
        "model": {"folder": str(folder)},
        "questions": {"name": "world", "world": WORLD},
        "samples": 20,
        "decoding": {"max_tokens": 4},
        "sampler": {"backend": "transformers"},
        "bootstrap": 60,
    }
    return CalibrateMeasureSpec.model_validate({**values, **changes})


def measured(spec: CalibrateMeasureSpec, run: Run, sampler: Sampler) -> SimpleNamespace:
    @contextmanager
    def opened(spec: object, folder: Path) -> Iterator[Sampler]:
        yield sampler

    kinds.run(spec, Context(run, sampler=opened))
    rows = pq.read_table(io.BytesIO(run.read("artifacts/questions.parquet"))).to_pylist()
    summary = json.loads(run.read("result.json"))
    return SimpleNamespace(rows=rows, summary=summary, value=lambda name: summary["metrics"][name][0], run=run)


@pytest.fixture(scope="module")
def knows(world: World, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What is found of a model that knows the truth."""
    run = open_run(tmp_path_factory.mktemp("runs"), "measured")
    return measured(spec_of(folder), run, Oracle(world, truth))


def test_a_model_that_knows_the_truth_has_no_true_error(knows, world):
    questions = {question.id: question for question in world.questions("evaluate")}
    for row in knows.rows:
        known = questions[row["qid"]].distribution[row["modal"]]
        assert row["true_confidence"] == pytest.approx(known, abs=1e-12)
        assert row["true_probability"] == pytest.approx(known, abs=1e-12)
    assert knows.value("true/error") == pytest.approx(0, abs=1e-12)
    assert knows.value("true/sem1_bias") > 0.01  # it is chosen and scored on the same answers
    assert abs(knows.value("true/sem2_bias")) < knows.value("true/sem1_bias")


def test_a_model_that_is_too_sure_is_found_out(world, folder, tmp_path, knows):
    found = measured(spec_of(folder), open_run(tmp_path, "measured"), Oracle(world, sharpened))
    assert found.value("true/error") > 0.1
    assert found.value("true/ece") > knows.value("true/ece") + 0.05
    assert found.value("sem1/bias") > knows.value("sem1/bias") + 0.05


def test_the_summary_is_what_the_rows_say(knows):
    rows, y = knows.rows, [row["correct"] for row in knows.rows]
    assert knows.summary["num_examples"] == len(rows) == 40
    assert knows.summary["coverage"] == 1
    assert knows.value("accuracy") == pytest.approx(np.mean(y))
    for name in ("sem1", "sem2"):
        conf = [row[name] for row in rows]
        assert knows.value(f"{name}/confidence") == pytest.approx(np.mean(conf))
        assert knows.value(f"{name}/bias") == pytest.approx(np.mean(conf) - np.mean(y))
        for measure, f in {"ece": ece, "debiased_ece": debiased_ece, "brier": brier, "auroc": auroc}.items():
            assert knows.value(f"{name}/{measure}") == pytest.approx(f(conf, y))
        assert knows.value(f"{name}/smooth_ece") == pytest.approx(smooth_ece(conf, y, ends="full"))
        bins = knows.summary["reliability"][name]
        assert sum(bins["count"]) == sum(knows.summary["histogram"][name]) == 40
    assert knows.value("difference/ece") == pytest.approx(knows.value("sem1/ece") - knows.value("sem2/ece"))
    for name, (value, low, high) in knows.summary["metrics"].items():
        if name.endswith(("/ece", "ece_all", "smooth_ece", "debiased_ece", "true/error")):
            assert low is high is None, f"{name} is biased: no interval round it covers"
        elif low is not None:
            assert low <= value <= high, name
    for name in ("sem1", "sem2"):
        conf = [row[name] for row in rows]
        assert knows.summary["metrics"][f"{name}/unbiased_ece"] == list(unbiased_ece(conf, y, reps=60))
    assert knows.summary["metrics"]["accuracy"][1:] == list(wilson(np.mean(y), 40))
    told = read_rows([knows.run.read("metrics/test.parquet")]).to_pylist()
    assert {row["name"]: row["value"] for row in told}["sem2/ece"] == knows.value("sem2/ece")


def test_it_measures_what_it_says(knows, folder, assert_measured):
    assert_measured(spec_of(folder), knows.run)
    cold = spec_of(folder, decoding={"max_tokens": 4, "temperature": 0.5})  # the exact confidence is not known there
    assert set(spec_of(folder).metrics()) - set(cold.metrics()) == {
        name for name in spec_of(folder).metrics() if "true/" in name
    }


def test_a_row_is_what_its_counts_say(knows):
    for row in knows.rows:
        assert sum(row["counts"]) == row["n"] == 20
        assert len(row["counts"]) == len(row["labels"]) == row["K"]
        assert row["modal"] == row["labels"][row["counts"].index(max(row["counts"]))]
        assert (row["sem1"], row["sem2"]) == (sem1(row["counts"]), sem2_exact(row["counts"]))
        assert row["gap"] == row["sem1"] - row["sem2"] >= 0
        tied = sorted(row["counts"])[-2:]
        assert ("tie" in row["flags"]) == (len(tied) == 2 and tied[0] == tied[1])
        assert 0 <= row["Y_split"] <= 1


def test_measuring_again_draws_nothing_and_gives_the_same_numbers(knows, world, folder):
    files = ("artifacts/questions.parquet", "result.json", "metrics/test.parquet")
    before = [knows.run.read(name) for name in files]
    measured(spec_of(folder), knows.run, Mute(world, truth))
    assert [knows.run.read(name) for name in files] == before


def test_other_samples_are_never_taken_for_these(knows, world, folder):
    with pytest.raises(UserError, match="other prompts, seeds or decoding"):
        measured(spec_of(folder, seed=1), knows.run, Oracle(world, truth))


def test_transformers_answers_and_its_confidence_is_what_it_scores(folder, tmp_path):
    """true_confidence comes from the log-probabilities of the samples; a forward pass over them says the same."""
    drawn: list[list[Sample]] = []

    class Remembering(TransformersSampler):
        def generate(self, requests, decoding, on_progress):
            drawn.extend(super().generate(requests, decoding, on_progress))
            return drawn

    sampler = Remembering(folder)
    found = measured(spec_of(folder, samples=4, decoding={"max_tokens": 6}), open_run(tmp_path, "measured"), sampler)
    assert found.summary["answers"]["drawn"] == 160
    for row, samples in list(zip(found.rows, drawn, strict=True))[:8]:
        cut = row["modal"] == "<NOANSWER>"
        said = {s.tokens: s.request for s in samples if (s.finish == "length") == cut}
        if not cut:  # all answers differ, so the first is the modal one
            said = dict(list(said.items())[:1])
        else:  # nothing was answered, so nothing is deployed
            assert (row["true_confidence"], row["K"], row["sem1"], row["sem2"]) == (None, 0, 0, 0)
            continue
        prompt = AutoTokenizer.from_pretrained(folder)(row["question"]).input_ids
        scores = sampler.score([prompt] * len(said), list(said))
        total = math.fsum(math.exp(math.fsum(score)) for score in scores)
        assert row["true_confidence"] == pytest.approx(total, rel=1e-4)


def test_a_folder_that_disagrees_with_itself_is_read_in_one_way(world, folder, tmp_path):
    """Two tokens may end a response: the sampler stops at both, and the samples do not say how likely each was."""
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 5}))
    found = measured(spec_of(other, samples=2), open_run(tmp_path, "measured"), Oracle(world, truth))
    (warning,) = found.summary["warnings"]
    assert "ends a text with token 2 and the model's configs with [5]" in warning
    assert [event["what"] for event in found.run.events() if event["event"] == "warning"] == [warning]
    assert {row["true_confidence"] for row in found.rows} == {None}
    assert found.value("accuracy") > 0


def test_prompts_that_leave_no_room_are_refused_before_a_sampler_is_opened(folder, tmp_path):
    def never(spec: object, folder: Path) -> Iterator[Sampler]:
        raise AssertionError("nothing was to be opened")

    context = Context(open_run(tmp_path, "measured"), sampler=never)
    with pytest.raises(UserError, match=r"^question '.*do not fit into the 255 .*; lower decoding.max_tokens$"):
        kinds.run(spec_of(folder, decoding={"max_tokens": 250}), context)


def test_answers_that_were_cut_are_no_answers(world, folder, tmp_path):
    found = measured(spec_of(folder, decoding={"max_tokens": 1}), open_run(tmp_path, "measured"), Oracle(world, truth))
    assert {row["modal"] for row in found.rows} == {"<NOANSWER>"}
    assert (found.summary["coverage"], found.value("accuracy")) == (0, 0)
    assert found.summary["answers"]["no_answer"] == found.summary["answers"]["drawn"] == 800
    assert found.summary["metrics"]["sem1/ece"] == [None, None, None]
    assert "sem1/auroc" not in found.summary["metrics"]
    assert {row["sem1"] for row in found.rows} == {0}, "agreement in being cut off is no confidence"
    assert found.summary["confidently_wrong"] == []
    assert found.summary["warnings"][0].startswith("100% of the questions have no answer")
    assert "cut at decoding.max_tokens" in found.summary["warnings"][1]
    record = replace(load_record(found.run, result_classes()), kind="calibrate.measure")
    assert any(table.title == "Warnings" for table in SECTION.tables([record]))
    assert "of the questions have no answer" in render([record], "t", report_sections())


def test_cut_answers_lower_the_agreement_and_are_never_deployed(world, folder, tmp_path):
    """Of every ten responses six are cut: the most frequent answer is among the other four."""

    class Rambling(Oracle):
        def _sample(self, request, index, decoding):
            sample = super()._sample(request, index, decoding)
            if index % 10 < 6:
                return Sample(request.id, index, sample.tokens[:-1], sample.logprobs[:-1], "length", 0)
            return sample

    sure = Rambling(world, lambda question: {next(iter(truth(question))): 1.0})
    found = measured(spec_of(folder), open_run(tmp_path, "measured"), sure)
    for row in found.rows:
        assert (row["n"], row["truncated"], row["no_answer"], row["counts"]) == (20, 12, 12, [8])
        assert (row["sem1"], row["K"]) == (8 / 20, 1)
        assert row["sem2"] == sem2_exact([8], unanswered=12)
    assert found.summary["coverage"] == 1
    assert [text[:3] for text in found.summary["warnings"]] == ["60%"]


def test_errors_are_of_the_answered_questions_and_those_of_all_stand_beside_them(world, folder, tmp_path):
    ids = [question.id for question in world.questions("evaluate")]

    class Half(Oracle):
        def _sample(self, request, index, decoding):
            sample = super()._sample(request, index, decoding)
            if ids.index(request.id) % 2:
                return Sample(request.id, index, sample.tokens[:-1], sample.logprobs[:-1], "length", 0)
            return sample

    found = measured(spec_of(folder), open_run(tmp_path, "measured"), Half(world, sharpened))
    answered = [row for row in found.rows if row["K"]]
    assert len(answered) == 20
    conf, y = [row["sem1"] for row in answered], [row["correct"] for row in answered]
    assert found.summary["coverage"] == 0.5
    assert found.value("sem1/ece") == pytest.approx(ece(conf, y))
    assert found.value("sem1/ece_all") == pytest.approx(ece(conf + [0.0] * 20, y + [False] * 20))
    assert found.value("answered/accuracy") == pytest.approx(np.mean(y))
    assert found.value("accuracy") == pytest.approx(np.mean(y) / 2)
    assert found.value("true/ece") > 0


def test_away_from_temperature_one_nothing_is_said_of_the_true_confidence(world, folder, tmp_path):
    decoding = {"max_tokens": 4, "temperature": "1/2"}
    found = measured(spec_of(folder, decoding=decoding), open_run(tmp_path, "measured"), Oracle(world, truth))
    assert {row["true_confidence"] for row in found.rows} == {None}
    assert not [name for name in found.summary["metrics"] if name.startswith("true/")]
    assert "temperature 1/2" in found.summary["protocol"]


def test_a_prompt_of_ones_own_and_an_answer_line(world, folder, tmp_path):
    class Talker(Oracle):
        def generate(self, requests, decoding, on_progress):
            assert all(len(request.prompt) == 7 for request in requests)  # <s>, five words of the question, one more
            return super().generate(requests, decoding)

    spec = spec_of(folder, prompt="the {question}", answer="line")
    found = measured(spec, open_run(tmp_path, "measured"), Talker(world, truth))
    assert {row["modal"] for row in found.rows} == {"<NOANSWER>"}  # nobody wrote `Answer:`


def test_an_answer_ends_before_a_stop_string(world, folder, tmp_path):
    """A name is what stands before " of", whatever the model goes on to say; nothing is truncated."""

    class Rambling(Oracle):
        def _sample(self, request, index, decoding):
            assert decoding.stop == (" of",)
            sample = super()._sample(request, index, decoding)
            more = encode_completion(self._tokenizer, "of")[:-1]
            return Sample(
                request.id, index, [*sample.tokens[:-1], *more], [0.0] * (sample.num_tokens), "stop_string", 0
            )

    decoding = {"max_tokens": 8, "stop": [" of"]}
    found = measured(spec_of(folder, decoding=decoding), open_run(tmp_path, "measured"), Rambling(world, truth))
    plain = measured(spec_of(folder, decoding={"max_tokens": 8}), open_run(tmp_path, "plain"), Oracle(world, truth))
    assert [(row["labels"], row["counts"]) for row in found.rows] == [
        (row["labels"], row["counts"]) for row in plain.rows
    ]
    assert found.summary["answers"]["truncated"] == 0
    assert {row["true_confidence"] for row in found.rows} == {None}  # the probability of an answer is not known


def test_questions_from_a_file_are_graded_by_their_aliases(world, folder, tmp_path):
    asked = world.questions("evaluate")[:3]
    rows = [{"id": q.id, "question": q.prompt, "answer": ["nobody", next(iter(truth(q))).upper()]} for q in asked]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sure = Oracle(world, lambda question: {next(iter(truth(question))): 1.0})
    spec = spec_of(folder, questions={"name": "jsonl", "path": str(path)})
    found = measured(spec, open_run(tmp_path / "runs", "measured"), sure)
    assert (found.value("accuracy"), found.value("sem2/ece"), found.summary["num_examples"]) == (1, 0, 3)
    assert sure.asked == [question.id for question in asked]


def test_a_failure_of_the_sampler_is_the_runs(world, folder, tmp_path):
    with pytest.raises(PoiseError, match="no sampler"):
        kinds.run(spec_of(folder), Context(open_run(tmp_path, "measured")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "llama"}}, "a new model knows nothing"),
        ({"prompt": "what?"}, "the question is asked nowhere"),
        ({"decoding": {"temperature": 0}}, "all answers to a question agree"),
        ({"workers": {"count": 2}}, "sampler.engines"),
        ({"samples": 1}, "greater than or equal to 2"),
    ],
)
def test_mistakes_are_refused(folder, changes, message):
    with pytest.raises(ValidationError, match=message):
        spec_of(folder, **changes)


def test_the_cost_is_told(folder):
    told = "\n".join(spec_of(folder).cost())
    assert "40 questions, 800 answers, at most 3,200 tokens" in told
