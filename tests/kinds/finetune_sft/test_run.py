"""The kind as a whole: the same steps however a batch is split, the same bits after a kill, the model it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from poise import kinds
from poise.data.text.batches import TextBatches, load_text
from poise.errors import UserError
from poise.finetune.losses import LOSSES, fused
from poise.kinds.finetune_sft import run as finetune_sft
from poise.kinds.finetune_sft.spec import FinetuneSftSpec
from poise.models.language import open_folder
from poise.observe.rows import read_rows
from poise.store.runs import Run, open_run
from poise.train.context import Context

WORLD = {"entities": 4, "relations": 4, "answers": 6, "tail": 3, "pretrain": 8}
LORA = {"name": "lora", "rank": 2, "alpha": 8, "dropout": 0.2, "targets": ["q_proj", "down_proj"]}
SGD = {"steps": 4, "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0}, "log_every": 1}
GEM = {"name": "gem", "beta": 0.7, "variant": "logsigmoid"}


def spec_of(name: str, store: Path, **changes: Any) -> FinetuneSftSpec:
    values = {
        "kind": "finetune.sft",
        "name": name,
        "seed": 3,
        "store": str(store),
        "model": {"name": "llama", "hidden": 32, "layers": 1, "heads": 1},
        "data": {"name": "world", "split": "pretrain", "world": WORLD},
        "batch_size": 16,
        "train": {
            "steps": 6,
            "optimizer": {"name": "adamw", "lr": 0.01},
            "checkpoint": {"every": {"steps": 2}, "keep": 10},
            "evaluate_every": {"steps": 3},
            "log_every": 1,
        },
    }
    return FinetuneSftSpec.model_validate({**values, **changes})


def finish(spec: FinetuneSftSpec) -> Run:
    run = open_run(spec.store, spec.name)
    run.storage.create(run.key("spec.yaml"), b"")  # a run exists once it has a spec; the engine writes it
    kinds.run(spec, Context(run))
    return run


def summary_of(run: Run) -> dict[str, Any]:
    return json.loads(run.read("result.json"))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load(run.read("artifacts/model/model.safetensors"))


def checkpoints(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of every checkpoint."""
    files = [file for file in run.files("checkpoints/") if file.endswith(".safetensors")]
    return {f"{file}/{name}": value for file in files for name, value in load(run.read(file)).items()}


def rows(run: Run) -> list[dict[str, Any]]:
    return read_rows(run.read(name) for name in run.files("metrics/rows-")).to_pylist()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base(store: Path) -> Run:
    train = {"epochs": 4, "optimizer": {"name": "adamw", "lr": 0.01}, "log_every": 1}
    return finish(spec_of("base", store, train=train))


class Killed(BaseException):
    """Not an Exception: nothing in the loop may catch it and tidy up."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch):
    """Makes the next reading of one batch the end of the process, once."""
    honest = TextBatches.batch

    def arm(index: int) -> None:
        def batch(self: TextBatches, at: int):
            if at == index:
                monkeypatch.setattr(TextBatches, "batch", honest)
                raise Killed
            return honest(self, at)

        monkeypatch.setattr(TextBatches, "batch", batch)

    return arm


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in fp64, so that only what a test changes can differ."""
    opened = finetune_sft.open_language_model

    def open_in_double(*arguments):
        model, tokenizer = opened(*arguments)
        return model.double(), tokenizer

    monkeypatch.setattr(finetune_sft, "open_language_model", open_in_double)


@pytest.mark.parametrize("loss", [{"name": "ce"}, GEM])
def test_a_step_is_the_same_however_its_batch_is_split(loss, tmp_path, monkeypatch, in_double):
    """4 x 4, 2 x 8 and 1 x 16 examples, of 2 and of 3 tokens."""

    def split(parts: int, name: str = "split") -> tuple[dict[str, torch.Tensor], list[float]]:
        train = {**SGD, "accumulate": parts}
        run = finish(spec_of(f"{name}-{parts}", tmp_path, batch_size=16 // parts, train=train, loss=loss))
        return weights(run), [row["value"] for row in rows(run) if row["split"] == "train" and row["name"] == "loss"]

    whole, losses = split(1)
    for parts in (2, 4):
        again, told = split(parts)
        assert told == pytest.approx(losses, rel=1e-6)
        assert all(torch.allclose(again[name], value, rtol=0, atol=1e-7) for name, value in whole.items())

    loss_class = LOSSES[loss["name"]]
    honest = loss_class.loss
    monkeypatch.setattr(loss_class, "loss", lambda self, logits, labels, normalizer: honest(self, logits, labels))
    wrong, _ = split(4, "mean-of-means")
    assert not all(torch.allclose(wrong[name], value, rtol=0, atol=1e-4) for name, value in whole.items())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_head_in_parts_takes_the_steps_of_the_logits_of_the_batch(name, tmp_path, monkeypatch, in_double):
    sizes = []
    loss_class = LOSSES[name]
    honest = loss_class.loss

    def counted(self, logits, labels, **options):
        sizes.append(len(labels))
        return honest(self, logits, labels, **options)

    monkeypatch.setitem(fused.VALUES_AT_ONCE, "cpu", 1000)
    monkeypatch.setattr(loss_class, "loss", counted)
    parts = finish(spec_of("parts", tmp_path, loss={"name": name}, train=SGD))
    assert len(sizes) > 4, "each step took all tokens at once"
    monkeypatch.setattr(loss_class, "per_token", False)
    sizes.clear()
    whole = finish(spec_of("whole", tmp_path, loss={"name": name}, train=SGD))
    assert len(sizes) == 4
    assert [row["value"] for row in rows(parts)] == pytest.approx([row["value"] for row in rows(whole)], rel=1e-9)
    wanted = weights(whole)
    assert all(torch.allclose(value, wanted[at], rtol=0, atol=1e-9) for at, value in weights(parts).items())


def test_noise_on_embeddings_is_that_of_the_step_in_training_alone(base, store, kill_at):
    options = {"model": {"run": "base"}, "train": SGD}
    plain = finish(spec_of("plain", store, **options))
    whole = finish(spec_of("noisy", store, neftune_alpha=5, **options))
    assert summary_of(whole)["objective"] == "ce, neftune 5"
    assert not any(torch.equal(value, weights(plain)[name]) for name, value in weights(whole).items())
    kill_at(2)
    with pytest.raises(Killed):
        finish(spec_of("noisy-killed", store, neftune_alpha=5, **options))
    assert rows(finish(spec_of("noisy-killed", store, neftune_alpha=5, **options))) == rows(whole)
    untrained = {"steps": 1, "optimizer": {"name": "sgd", "lr": 1e-12, "momentum": 0}}
    measured = [
        summary_of(finish(spec_of(name, store, model={"run": "base"}, train=untrained, **changes)))["measured"]
        for name, changes in (("untrained", {}), ("untrained-noisy", {"neftune_alpha": 100}))
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6), "the evaluation was noisy"


def test_an_epoch_is_a_pass_over_the_examples_however_many_batches_make_a_step(tmp_path):
    train = {"epochs": 2, "accumulate": 3, "optimizer": {"name": "adamw", "lr": 0.01}}
    spec = spec_of("passes", tmp_path, train=train)
    assert "6 optimizer steps, 2 epochs of 128 examples: 256 examples" in spec.cost()[0]
    summary = summary_of(finish(spec))
    assert summary["step"] == 6  # of 3, 3 and 2 batches, twice
    assert summary["tokens"]["learned_from"] == 2 * summary["tokens"]["supervised"]


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path, fork_server):
    alone = finish(spec_of("alone", tmp_path, loss=GEM, train=SGD))
    path, both = tmp_path / "spec.yaml", open_run(tmp_path, "both")
    spec = spec_of("both", tmp_path, loss=GEM, train=SGD)
    path.write_text(json.dumps(spec.model_dump(mode="json", exclude_none=True)))
    done = fork_server.run_ranks(["-m", "poise", "run", str(path), "--engine", "local", "--set", "workers.count=2"])
    assert done.returncode == 0, done.stderr
    one, two = rows(alone), rows(both)
    assert [(row["step"], row["name"]) for row in one] == [(row["step"], row["name"]) for row in two]
    assert [row["value"] for row in two] == pytest.approx([row["value"] for row in one], rel=1e-5)
    assert summary_of(both)["tokens"] == summary_of(alone)["tokens"]


@pytest.mark.parametrize(
    ("tuning", "step"), [({"name": "full"}, 1), ({"name": "full"}, 5), (LORA, 0), (LORA, 3), (LORA, 4)]
)
def test_killed_at_any_step_it_ends_in_the_same_bits(tuning, step, base, store, kill_at, request):
    name = f"{tuning['name']}-{step}"
    options = {"model": {"run": "base"}, "tuning": tuning, "loss": GEM}
    whole = finish(spec_of(f"whole-{name}", store, **options))
    kill_at(step)
    with pytest.raises(Killed):
        finish(spec_of(f"killed-{name}", store, **options))
    killed = finish(spec_of(f"killed-{name}", store, **options))
    assert rows(killed) == rows(whole)
    wanted, found = checkpoints(whole), checkpoints(killed)
    assert found.keys() == wanted.keys()
    assert [at for at, value in wanted.items() if not torch.equal(found[at].nan_to_num(7), value.nan_to_num(7))] == []
    assert summary_of(killed) == {**summary_of(whole), "run": f"killed-{name}"}
    assert killed.read("artifacts/model/model.safetensors") == whole.read("artifacts/model/model.safetensors")


def test_low_rank_tuning_moves_its_adapters_alone_and_leaves_a_plain_merged_model(base, store, tmp_path):
    run = finish(spec_of("lora", store, model={"run": "base"}, tuning=LORA))
    before, after = weights(base), weights(run)
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layer = "model.layers.0"
    assert moved == {f"{layer}.self_attn.q_proj.weight", f"{layer}.mlp.down_proj.weight"}
    stored = load(run.read("checkpoints/step-00000006/model.safetensors"))
    assert len(stored) == 4
    for name in moved:
        place = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (stored[f"{place}.lora_{letter}.default.weight"] for letter in "AB")
        assert torch.allclose(after[name], before[name] + 8 / 2 * b @ a, rtol=0, atol=1e-6)
    summary = summary_of(run)
    assert summary["trainable"] == sum(value.numel() for value in stored.values())
    assert summary["parameters"] == summary["trainable"] + sum(value.numel() for value in before.values())


def test_the_model_that_is_left_is_the_one_that_was_measured(base):
    summary, folder = summary_of(base), Path(base.url.removeprefix("file://")) / "artifacts/model"
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files <= {path.name for path in folder.iterdir()}
    model, tokenizer = open_folder(folder)
    spec = spec_of("base", folder)
    validation = load_text(spec.data, tokenizer, spec.seed).validation
    nats, spread, tokens = 0.0, 0.0, 0
    for example in validation:  # one at a time, unpadded
        ids = torch.tensor([[*example.prompt, *example.completion]])
        log_p = model(input_ids=ids).logits[0].detach().double().log_softmax(-1)
        for at in range(len(example.prompt), ids.shape[1]):
            nats -= float(log_p[at - 1, ids[0, at]])
            spread -= float((log_p[at - 1].exp() * log_p[at - 1]).sum())
            tokens += 1
    assert summary["measured"]["ce"] == pytest.approx(nats / tokens, rel=1e-5)
    assert summary["measured"]["entropy"] == pytest.approx(spread / tokens, rel=1e-5)
    last = {row["name"]: row["value"] for row in rows(base) if row["split"] == "validation" and row["step"] == 32}
    assert last == pytest.approx(summary["measured"], rel=1e-6)


def test_it_measures_what_it_says(base, store, assert_measured):
    assert_measured(spec_of("base", store), base)


def test_a_world_knows_the_floor(base):
    summary = summary_of(base)
    measured = summary["measured"]
    assert 0.2 < summary["floor"] < 1
    assert measured["excess"] == pytest.approx(measured["answer_ce"] - summary["floor"])
    assert 0 < measured["excess"] < 2  # it has learned, and no model is below
    assert 0 < measured["outside"] < 0.5
    assert summary["tokens"]["examples"] == 16 * 8
    assert summary["tokens"]["learned_from"] == 4 * summary["tokens"]["supervised"]
    assert summary["tokens_per_answer"] == summary["tokens"]["supervised"] / 128
    assert 0 < summary["supervised_share"] < 0.5


def test_the_preview_shows_what_is_learned_and_what_is_not(base):
    preview = summary_of(base)["preview"]
    tokens, learned = [pair[0] for pair in preview], [pair[1] for pair in preview]
    assert tokens[:2] == ["<s>", "the"]
    assert learned[: tokens.index("?")] == [None] * tokens.index("?")
    assert learned[tokens.index("?") :] == [*tokens[tokens.index("?") + 1 :], "</s>"]


def test_gem_starts_from_the_loss_it_says_and_keeps_more_entropy(base, store):
    """Few examples, many passes: cross entropy sharpens the answers, GEM less so."""
    tune = {"name": "world", "split": "tune", "world": WORLD}
    train = {"steps": 60, "optimizer": {"name": "adamw", "lr": 0.003}, "evaluate_every": {"steps": 60}}
    ends = {}
    for loss in ({"name": "ce"}, {"name": "gem"}):
        run = finish(spec_of(f"tuned-{loss['name']}", store, model={"run": "base"}, data=tune, train=train, loss=loss))
        ends[loss["name"]] = summary_of(run)
    assert ends["gem"]["objective"] == "gem (linear, beta 0.7)"
    assert ends["gem"]["measured"]["answer_entropy"] > ends["ce"]["measured"]["answer_entropy"] + 0.05


def test_the_best_weights_are_left_when_they_are_asked_for(base, store):
    """A learning rate that ruins the model after the first evaluation: best and final differ."""
    ruin = {"name": "linear", "points": [[0, 0.01], [0.5, 0.01], [0.51, 1], [1, 1]]}
    train = {
        "steps": 6, "optimizer": {"name": "sgd", "lr": 5}, "schedule": ruin, "evaluate_every": {"steps": 3}
    }  # fmt: skip
    run = finish(spec_of("best", store, model={"run": "base"}, train=train, export="best"))
    summary = summary_of(run)
    assert (summary["best_step"], summary["step"], summary["selected"]) == (3, 6, "best")
    stored = load(run.read("checkpoints/step-00000003/model.safetensors"))
    assert all(torch.equal(value, stored[name]) for name, value in weights(run).items())
    values = {row["step"]: row["value"] for row in rows(run) if row["split"] == "validation" and row["name"] == "ce"}
    assert values[3] < values[6]
    assert summary["measured"]["ce"] == pytest.approx(values[3], rel=1e-6)


def test_files_of_one_s_own_from_the_command_line(base, store, tmp_path, fork_server):
    """JSON lines, and a model of another run of the same store."""
    tokenizer = open_folder(Path(base.url) / "artifacts/model")[1]
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and word not in ("the", "of")][:6]
    lines = [{"prompt": f"the {a} of {b} ?", "completion": f" {c}"} for a in words for b in words for c in words[:2]]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = f"""
kind: finetune.sft
name: own
store: {store}
model: {{run: base}}
data: {{name: jsonl, path: {tmp_path}/data.jsonl, validation: 8}}
batch_size: 8
loss: {{name: gem}}
tuning: {{name: lora, rank: 4}}
train: {{epochs: 2, optimizer: {{name: adamw, lr: 1e-2}}, precision: bf16}}
"""
    (tmp_path / "own.yaml").write_text(spec)
    done = fork_server.run(["-m", "poise", "run", str(tmp_path / "own.yaml"), "--engine", "local"])
    assert done.returncode == 0, done.stderr
    assert "examples/s" in done.stderr
    run = open_run(store, "own")
    assert run.manifest().status == "finished"
    summary = summary_of(run)
    assert summary["floor"] is None
    assert set(summary["measured"]) == {"ce", "entropy"}
    assert summary["tokens"]["examples"] == 64
    model, _ = open_folder(Path(run.url) / "artifacts/model")
    assert sum(weight.numel() for weight in model.parameters()) == summary["parameters"] - summary["trainable"]


@pytest.mark.parametrize("tuning", [{"name": "full"}, {"name": "lora", "rank": 4}])
def test_a_real_llama_with_tied_embeddings_takes_a_step(tuning, shared_data, tmp_path):
    folder = shared_data / "lm/stories260K-hf-hd32"
    lines = [{"prompt": "Once upon a time", "completion": f" there was a {thing}."} for thing in ("cat", "dog", "fox")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    data = {"name": "jsonl", "path": str(tmp_path / "data.jsonl"), "validation": 2}
    train = {"steps": 1, "optimizer": {"name": "adamw", "lr": 1e-3}}
    run = finish(
        spec_of("story", tmp_path, model={"folder": str(folder)}, data=data, batch_size=4, train=train, tuning=tuning)
    )
    before, after = load_file(folder / "model.safetensors"), weights(run)
    assert after.keys() == before.keys()  # tied weights are left once, as they came
    moved = sum(not torch.equal(before[name], after[name]) for name in before)
    assert moved == (len(before) if tuning["name"] == "full" else 5 * 7)
    assert 0 < summary_of(run)["measured"]["ce"] < math.log(512)
    left = AutoModelForCausalLM.from_pretrained(Path(run.url) / "artifacts/model")
    assert left.lm_head.weight is left.model.embed_tokens.weight
    finish(
        spec_of("story", tmp_path, model={"folder": str(folder)}, data=data, batch_size=4, train=train, tuning=tuning)
    )
    assert [event["step"] for event in run.events() if event["event"] == "start"] == [0, 1]


def test_a_layer_that_is_not_there_is_named(base, store):
    with pytest.raises(UserError, match="no linear layer 'q_prj'; did you mean 'q_proj'"):
        finish(spec_of("typo", store, model={"run": "base"}, tuning={**LORA, "targets": ["q_prj"]}))


def test_a_step_without_a_token_to_learn_is_refused(base, store, monkeypatch):
    monkeypatch.setattr(TextBatches, "supervised", lambda self, index: 0)
    with pytest.raises(UserError, match="no token to learn"):
        finish(spec_of("nothing", store, model={"run": "base"}))


def test_mistakes_are_found_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="takes its words from a world"):
        spec_of("new", tmp_path, data={"name": "jsonl", "path": "x"})
    with pytest.raises(ValueError, match="16 does not divide by 3 workers"):
        spec_of("three", tmp_path, workers={"count": 3})
    assert "6 optimizer steps, 0.75 epochs of 128 examples: 96 examples" in spec_of("cost", tmp_path).cost()
