"""Self-play as a whole, in this process, from a Llama that has learned the answers to three questions of a world."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from poise.align.games import exploitability
from poise.align.oracles import with_other_answer
from poise.align.selfplay import SelfPlayMethod
from poise.align.selfplay import base as method_base
from poise.data.synthetic_facts import make_world
from poise.data.text.batches import text_batch
from poise.data.text.examples import TextExample, encode_completion, encode_prompt
from poise.data.world_spec import WorldSpec
from poise.errors import PoiseError, UserError
from poise.inference.sampler import Sample
from poise.inference.transformers_sampler import TransformersSampler
from poise.kinds import result_classes
from poise.kinds.align_selfplay import iterations as selfplay
from poise.kinds.align_selfplay import run as align_selfplay
from poise.kinds.align_selfplay.questions import load_game_questions, response_text
from poise.kinds.align_selfplay.report import SECTION
from poise.kinds.align_selfplay.spec import AlignSelfplaySpec
from poise.models.language import answer_logprobs, export, new_llama, open_folder
from poise.models.spec import LanguageModelSpec
from poise.observe.rows import read_rows
from poise.observe.sinks import NullSink
from poise.report.record import load_record
from poise.store.runs import open_run
from poise.train.context import Context

WORLD = {"entities": 2, "relations": 2, "answers": 4, "certain": 0, "ambiguous": 1, "tail": 4}
MPO = {"name": "mpo", "alpha": 0.1, "eta": 1, "period": 2, "inner_steps": 3, "opponents": 16}
NASH_RS = {"name": "nash_rs", "tau": 0.5, "proposals": 16, "inner_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of one layer that gives the listed answers their true probabilities, to within a few percent."""
    torch.set_num_threads(1)
    world = make_world(WorldSpec(**WORLD))
    tokenizer = world.tokenizer()
    model = new_llama(LanguageModelSpec(name="llama", hidden=32, layers=1, heads=1), tokenizer, seed=0)
    truths = [
        (question.prompt, name, p)
        for question in world.questions("prefer")
        for name, p in question.distribution.items()
    ]
    examples = [TextExample(encode_prompt(tokenizer, q), encode_completion(tokenizer, a)) for q, a, _ in truths]
    batch, weights = text_batch(examples), torch.tensor([p for _, _, p in truths])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.mT, batch.labels, reduction="none").sum(1)
        (losses * weights).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    where = tmp_path_factory.mktemp("model")
    export(model, tokenizer, where)
    return where


def spec_of(folder: Path, store: Path, name: str = "play", iterations: int = 4, lr: float = 1e-3, **changes):
    values = {
        "kind": "align.selfplay",
        "name": name,
        "store": str(store),
        "model": {"folder": str(folder)},
        "questions": {"name": "world", "split": "prefer", "world": WORLD},
        "oracle": {"name": "cyclic"},
        "method": MPO,
        "prompts": 3,
        "rollouts": 8,
        "max_tokens": 4,
        "sampler": {"backend": "transformers"},
        "train": {
            "epochs": iterations,
            "optimizer": {"name": "adamw", "lr": lr, "weight_decay": 0},
            "checkpoint": {"keep": 100},
            "log_every": 2,
        },
    }
    return AlignSelfplaySpec.model_validate({**values, **changes})


@contextmanager
def sampler(spec, folder, of=TransformersSampler):
    yield of(folder)


def play(spec, of=TransformersSampler):
    run = open_run(spec.store, spec.name)
    align_selfplay.run(spec, Context(run, sampler=lambda section, where: sampler(section, where, of)))
    return run


def test_a_response_counts_once_however_many_steps_learn_from_it(folder, tmp_path):
    shown, counts = [], Counter()

    class Sink(NullSink):
        def inc(self, name, value=1.0, **labels):
            counts[name] += value

    opened = {"sampler": lambda section, where: sampler(section, where)}
    run = open_run(tmp_path, "play")
    align_selfplay.run(spec_of(folder, tmp_path), Context(run, sink=Sink(), report=shown.append, **opened))
    assert counts["poise_steps_total"] == 4 * MPO["inner_steps"]
    assert counts["poise_examples_total"] == 4 * 3 * 8  # iterations, prompts, rollouts
    last = [progress for progress in shown if progress.stage == "train"][-1]
    assert last.examples_per_s > 0


def tensors(run, step: int, scratch: Path) -> dict[str, torch.Tensor]:
    where = run.checkpoints.fetch(run.checkpoints.at(step), scratch / f"{run.name}-{step}")
    return {
        f"{file.stem}/{name}": value for file in where.glob("*.safetensors") for name, value in load_file(file).items()
    }


CYCLIC = {"name": "cyclic"}
TRANSITIVE = {"name": "matrix", "matrix": [[0.5, 0.1, 0.2], [0.9, 0.5, 0.7], [0.8, 0.3, 0.5]]}


@pytest.mark.parametrize(
    ("method", "oracle", "goal"),
    [(MPO, TRANSITIVE, "distance"), (NASH_RS | {"proposals": 256}, CYCLIC, "distance_regularised")],
)
def test_self_play_comes_nearer_to_its_equilibrium(method, oracle, goal, folder, tmp_path):
    train = {
        "epochs": 20,
        "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0},
        "schedule": {"name": "linear"},
    }
    train |= {"checkpoint": {"every": {"epochs": 20}}, "evaluate_every": {"epochs": 20}}
    run = play(spec_of(folder, tmp_path, train=train, method=method, oracle=oracle, rollouts=64))
    summary = json.loads(run.read("result.json"))
    assert summary["final"][goal] < 0.5 * summary["start"][goal]
    assert summary["final"]["exploitability"] < summary["start"]["exploitability"]


def test_what_is_left_agrees_with_itself(folder, tmp_path, assert_measured):
    run = play(spec_of(folder, tmp_path))
    assert_measured(spec_of(folder, tmp_path), run)
    summary, table = (json.loads(run.read(name)) for name in ("result.json", "artifacts/selfplay.json"))
    for when in ("start", "final"):
        policies = np.array([question[when]["policy"] for question in table["questions"]])
        assert policies.sum(1) == pytest.approx(1)
        assert summary[when]["policy"] == pytest.approx(policies.mean(0))
        gains = [exploitability(with_other_answer(table["matrix"]), p) for p in policies]
        assert summary[when]["exploitability"] == pytest.approx(np.mean(gains))
    rows = read_rows(run.read(name) for name in run.files("metrics/") if name.endswith(".parquet")).to_pylist()
    held_out = {
        row["step"]: row["value"] for row in rows if (row["split"], row["name"]) == ("validation", "exploitability")
    }
    assert list(held_out) == [0, 3, 6, 9, 12]
    assert (held_out[0], held_out[12]) == (summary["start"]["exploitability"], summary["final"]["exploitability"])
    assert_shown(run, summary)
    model, tokenizer = open_folder(Path(run.storage.url) / run.key("artifacts/model"))
    first = table["questions"][0]
    answers = [encode_completion(tokenizer, answer) for answer in first["answers"]]
    (scores,) = answer_logprobs(model, [encode_prompt(tokenizer, first["prompt"])], [answers])
    assert scores.exp().tolist() == pytest.approx(first["final"]["policy"][:3], abs=1e-5)


def test_an_answer_is_ended_by_any_token_that_ends_a_response(folder, tmp_path):
    """Sampler and oracle stop at any stop token; the evaluation gives an answer the probability of them all."""
    other = Path(shutil.copytree(folder, tmp_path / "model"))
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [5, 0]}))
    train = {"epochs": 1, "optimizer": {"name": "adamw", "lr": 1e-12, "weight_decay": 0}}
    run = play(spec_of(other, tmp_path, train=train))
    summary = json.loads(run.read("result.json"))
    assert "the tokenizer ends a text with token 2" in summary["warnings"][0]
    assert [event["what"] for event in run.events() if event["event"] == "warning"] == summary["warnings"]
    model, tokenizer = open_folder(other)
    question = json.loads(run.read("artifacts/selfplay.json"))["questions"][0]
    prompt = encode_prompt(tokenizer, question["prompt"])
    for answer, probability in zip(question["answers"], question["start"]["policy"], strict=False):
        tokens = encode_completion(tokenizer, f" {answer}", question["prompt"])[:-1]
        (scores,) = answer_logprobs(model, [prompt], [[(*tokens, end) for end in (2, 5, 0)]])
        assert probability == pytest.approx(float(scores.double().exp().sum()), abs=1e-6)


def test_what_the_iterations_need_is_tried_before_the_first(folder, tmp_path):
    with pytest.raises(UserError, match=r"^question '.*do not fit into the 255 that the model can hold; lower max_tok"):
        play(spec_of(folder, tmp_path, max_tokens=250))
    renamed = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(renamed / "model.safetensors")
    save_file(
        {name.removeprefix("model."): value for name, value in tensors.items()},
        renamed / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(PoiseError, match="under the names of the folder, and this model has others"):
        play(spec_of(renamed, tmp_path, "renamed"))


def assert_shown(run, summary) -> None:
    """The page and the terminal show the numbers of the summary, and draw the way from the one to the other."""
    record = load_record(run, result_classes())
    (table,) = SECTION.tables([record])
    cells = [cell.text for cell in table.rows[0].cells]
    assert cells[:2] == [f"{summary[when]['exploitability']:.3f}" for when in ("start", "final")]
    assert cells[-1] == "33 / 22 / 44"
    assert len(cells) == len(table.columns)
    assert all(drawn is not None for drawn in (*SECTION.rendered_figures([record]), *SECTION.details("a", record)))


class Killed(BaseException):
    """Not an Exception: nothing may catch it and tidy up."""


@pytest.mark.parametrize("method", [MPO, NASH_RS], ids=["mpo", "nash_rs"])
def test_killed_within_iterations_it_ends_in_the_same_bits(method, folder, tmp_path, monkeypatch):
    spec = spec_of(folder, tmp_path, "whole", method=method)
    whole, loss, steps = play(spec), method_base.selfplay_loss, spec.iterations * spec.method.inner_steps
    for kill in (2, 4):  # losses taken by an attempt before it dies, none of them at the end of an iteration
        calls = iter(range(kill))

        def dying(*arguments, calls=calls):
            if next(calls, None) is None:
                raise Killed
            return loss(*arguments)

        monkeypatch.setattr(method_base, "selfplay_loss", dying)
        with pytest.raises(Killed):
            play(spec.model_copy(update={"name": "killed"}))
    monkeypatch.setattr(method_base, "selfplay_loss", loss)
    killed = play(spec.model_copy(update={"name": "killed"}))
    begun = [event["step"] for event in killed.events() if event["event"] == "start"]
    assert begun[0] == 0
    assert begun[-1] > 0, "it never went on from a checkpoint"
    mine, theirs = tensors(killed, steps, tmp_path), tensors(whole, steps, tmp_path)
    assert mine.keys() == theirs.keys()
    assert [
        name for name, value in mine.items() if not torch.equal(value.nan_to_num(), theirs[name].nan_to_num())
    ] == []
    assert killed.read("artifacts/selfplay.json") == whole.read("artifacts/selfplay.json")


def test_the_magnet_is_the_policy_of_the_last_whole_period(folder, tmp_path):
    run = play(spec_of(folder, tmp_path, iterations=5))
    committed = {step: tensors(run, step, tmp_path) for step in (3, 6, 9, 12, 15)}
    first = dict(open_folder(folder)[0].named_parameters())
    for name, start in first.items():
        assert torch.equal(committed[3][f"task/magnet/{name}"], start)
        assert torch.equal(committed[6][f"task/magnet/{name}"], start)
        for step, since in ((9, 6), (12, 6), (15, 12)):
            assert torch.equal(committed[step][f"task/magnet/{name}"], committed[since][f"model/{name}"])
    assert any(not torch.equal(start, committed[6][f"model/{name}"]) for name, start in first.items())


def test_ranks_and_parts_of_a_batch_share_the_responses_of_one_iteration(folder, tmp_path):
    """Two workers or two accumulated parts learn from what one learns from, in the same order."""

    def advantages(world_size: int, accumulate: int) -> torch.Tensor:
        spec = spec_of(folder, tmp_path, prompts=2, train={"epochs": 1, "accumulate": accumulate})
        model, tokenizer = open_folder(folder)
        asked = load_game_questions(spec, tokenizer)
        oracle = spec.oracle.build({one.prompt: one.answers for one in asked})
        found = []
        for rank in range(world_size):
            context = SimpleNamespace(
                rank=rank, world_size=world_size, device=torch.device("cpu"), on_main=lambda act: act(),
                sink=Context(open_run(tmp_path, "x")).sink, run=SimpleNamespace(name="x"),
            )  # fmt: skip
            selfplay_task = selfplay.SelfPlay(
                spec,
                model,
                asked,
                oracle,
                lambda s: response_text(tokenizer, s),
                TransformersSampler(folder),
                context,
            )
            selfplay_task.start_iteration(0, {})
            assert len(selfplay_task.micro_batches) == accumulate
            found += [rollouts.advantage.flatten() for rollouts in selfplay_task.micro_batches]
        return torch.cat(found)

    alone = advantages(1, 1)
    assert len(alone) == 16
    assert alone.abs().sum() > 0
    assert torch.equal(advantages(2, 1), alone)
    assert torch.equal(advantages(1, 2), alone)


class Deaf(TransformersSampler):
    """Says that it has the new weights, and answers with the old ones."""

    def update_weights(self, weights, version):
        self._version = version


class Stale(TransformersSampler):
    """Takes new weights and tells the old version."""

    def update_weights(self, weights, version):
        super().update_weights(weights, version)
        self._version = 0


class Spo(SelfPlayMethod):
    """The mean preference over the rollouts of the same question (SPO, arXiv 2401.04056)."""

    name: str = "spo"

    def advantage(self, preference):
        assert preference.shape[1:] == (8, 8)
        assert (preference.diagonal(dim1=1, dim2=2) == 0.5).all()
        assert torch.allclose(preference + preference.mT, torch.ones(()))
        return preference.mean(-1) - 0.5


def test_a_method_without_opponents_and_proposals_compares_the_rollouts_of_a_question(folder, tmp_path):
    spec = spec_of(folder, tmp_path, iterations=2).model_copy(update={"method": Spo()})
    summary = json.loads(play(spec).read("result.json"))
    assert summary["method"] == "spo"
    assert summary["final"]["policy"] != summary["start"]["policy"]
    told = "\n".join(spec.cost())
    assert "2 iterations of 1 steps on 3 questions: 48 responses of at most 4 tokens" in told
    assert f"{2 * 3 * 8 * 8:,} judgements" in told


def test_a_sampler_with_other_weights_stops_the_run(folder, tmp_path):
    with pytest.raises(PoiseError, match="nats per token on the same responses"):
        play(spec_of(folder, tmp_path, iterations=8, lr=0.05), Deaf)
    with pytest.raises(PoiseError, match="iteration 1 was answered by weights of version 0"):
        play(spec_of(folder, tmp_path, "stale"), Stale)


def test_a_response_that_was_cut_or_is_odd_is_no_listed_answer(folder):

    tokenizer = open_folder(folder)[1]
    answer = make_world(WorldSpec(**WORLD)).questions("prefer")[0]
    name = next(iter(answer.distribution))
    tokens = encode_completion(tokenizer, name)

    def text(tokens, finish):
        return response_text(tokenizer, Sample("", 0, tokens, (), finish, 0))

    assert text(tokens, "stop") == name
    assert text(tokens[:-1], "length") != name
    assert text((tokenizer.bos_token_id, *tokens), "stop") != name
    assert text(tokens[-1:], "stop") == ""


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"method": {**MPO, "period": 1}}, "period", "greater than or equal to 2"),
        ({"method": {k: v for k, v in MPO.items() if k != "period"}}, "period", "required"),
        ({"method": {**MPO, "inner_steps": 1}}, "inner_steps", "greater than or equal to 2"),
        ({"train": {"steps": 7}}, "train.steps", "no whole iterations"),
        ({"train": {"epochs": 1, "checkpoint": {"every": {"steps": 4}}}}, "checkpoint.every.steps", "no whole"),
        ({"train": {"epochs": 1, "evaluate_every": {"steps": 4}}}, "train.evaluate_every.steps", "no whole"),
        ({"train": {"epochs": 1, "accumulate": 2}}, "prompts", "does not divide by train.accumulate 2"),
        ({"workers": {"count": 2}}, "prompts", "does not divide by 2 workers"),
        ({"model": {"name": "llama"}}, "model.name", "name a `run` or a `folder`"),
        ({"oracle": {"name": "matrix", "matrix": [[0.5, 0.7], [0.4, 0.5]]}}, "matrix", "row 2, column 1"),
        ({"oracle": {"name": "matrix", "matrix": [[0.5, 0.7], [0.3]]}}, "matrix", "2 rows need 2 numbers"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_it_runs(changes, path, message, folder, tmp_path):
    with pytest.raises(ValidationError) as caught:
        spec_of(folder, tmp_path, **changes)
    (error,) = caught.value.errors()
    where = ".".join(map(str, error["loc"])) + "." + str(error.get("ctx", {}).get("path", ""))
    assert path in where
    assert message in error["msg"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 4}, "4 per iteration are more than the 3 questions"),
        ({"max_tokens": 1}, "an answer of [23] tokens, EOS included"),
        ({"oracle": {"name": "matrix", "matrix": [[0.5] * 5] * 5}}, "answers and the oracle ranks 5"),
        ({"method": {**NASH_RS, "tau": 1e-6}}, "method: tau 1e-06 is less than"),
    ],
)
def test_what_does_not_fit_the_questions_is_said(changes, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        play(spec_of(folder, tmp_path, **changes))


def questions_file(path, answers) -> dict[str, str]:
    """The questions of the world, each with these answers."""
    prompts = [question.prompt for question in make_world(WorldSpec(**WORLD)).questions("prefer")]
    path.write_text("\n".join(json.dumps({"question": prompt, "answer": answers}) for prompt in prompts))
    return {"name": "jsonl", "path": str(path)}


def test_answers_that_the_model_cannot_say_are_refused_and_outer_spaces_are_none_of_them(folder, tmp_path):
    world, tokenizer = make_world(WorldSpec(**WORLD)), open_folder(folder)[1]
    known = list(world.questions("prefer")[0].distribution)[:3]
    padded = questions_file(tmp_path / "padded.jsonl", [f" {known[0]}\n", f"{known[1]} ", known[2]])
    asked = load_game_questions(spec_of(folder, tmp_path, questions=padded), tokenizer)
    assert asked[0].answers == tuple(known)
    for answer, tokens in zip(asked[0].answers, asked[0].answer_tokens, strict=True):
        assert response_text(tokenizer, Sample("", 0, tokens, (), "stop", 0)) == answer
    unknown = questions_file(tmp_path / "unknown.jsonl", [known[0], known[1], "Xylophone"])
    with pytest.raises(UserError, match="the answer 'Xylophone' as '<unk>', so that no response is ever that answer"):
        load_game_questions(spec_of(folder, tmp_path, questions=unknown), tokenizer)


def test_the_estimate_counts_what_is_drawn(folder, tmp_path):
    told = "\n".join(spec_of(folder, tmp_path).cost())
    assert "4 iterations of 3 steps on 3 questions: 288 responses of at most 4 tokens" in told
    assert f"{4 * 3 * 8 * 16:,} judgements" in told
