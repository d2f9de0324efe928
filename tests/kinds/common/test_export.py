"""What a run leaves is what it trained, for every family; what would fail at its end is refused before its start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from poise import kinds
from poise.data.text.examples import encode_completion, encode_prompt
from poise.errors import PoiseError, UserError
from poise.kinds import result_classes
from poise.kinds.finetune_sft.report import SECTION
from poise.kinds.finetune_sft.spec import FinetuneSftSpec
from poise.models.language import answer_logprobs, open_folder
from poise.models.tuning import Lora
from poise.report.record import load_record
from poise.store.runs import Run, open_run
from poise.train.context import Context

FAMILIES = ("llama", "qwen2", "gpt2", "gemma2", "mistral")
LINES = [("The cat sat on the", " mat."), ("What is the capital of France?", " Paris"), ("Answer: the old", " poet")]


def spec_of(folder: Path, store: Path, name: str = "tuned", **changes: Any) -> FinetuneSftSpec:
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in LINES * 2]
    (store / "data.jsonl").write_text("\n".join(rows))
    values = {
        "kind": "finetune.sft",
        "name": name,
        "store": str(store),
        "model": {"folder": str(folder)},
        "data": {"name": "jsonl", "path": str(store / "data.jsonl"), "validation": 2},
        "batch_size": 4,
        "train": {"steps": 4, "optimizer": {"name": "adamw", "lr": 0.02}},
    }
    return FinetuneSftSpec.model_validate({**values, **changes})


def finish(spec: FinetuneSftSpec) -> Run:
    run = open_run(spec.store, spec.name)
    run.storage.create(run.key("spec.yaml"), b"")
    kinds.run(spec, Context(run))
    return run


def left(run: Run) -> Path:
    return Path(run.url.removeprefix("file://")) / "artifacts/model"


def last_validation(run: Run) -> float:
    """The cross entropy of the model that was trained, before anything was merged or exported."""
    from poise.observe.rows import read_rows

    rows = read_rows(run.read(name) for name in run.files("metrics/rows-")).to_pylist()
    return [row["value"] for row in rows if (row["split"], row["name"]) == ("validation", "ce")][-1]


def exported_ce(run: Run, spec: FinetuneSftSpec) -> float:
    """That of the model in the store, from the exact probability of each held-out completion."""
    from poise.data.text.batches import load_text

    model, tokenizer = open_folder(left(run))
    examples = load_text(spec.data, tokenizer, spec.seed).validation
    scores = answer_logprobs(model, [e.prompt for e in examples], [[e.completion] for e in examples])
    return -float(torch.cat(scores).sum()) / sum(len(e.completion) for e in examples)


def lora(*targets: str) -> dict[str, Any]:
    return {"name": "lora", "rank": 4, "alpha": 16, **({"targets": list(targets)} if targets else {})}


@pytest.mark.parametrize(
    ("family", "tuning"),
    [
        *((family, {"name": "full"}) for family in FAMILIES),
        *((family, lora()) for family in ("qwen2", "gpt2")),
        *((family, lora("lm_head")) for family in FAMILIES[:4]),  # tied in gpt2 and gemma2
        ("gpt2", lora("c_attn", "mlp.c_fc")),
    ],
)
def test_the_exported_model_is_the_trained_one(family, tuning, family_folder, tmp_path):
    torch.set_num_threads(1)
    spec = spec_of(family_folder(family), tmp_path, tuning=tuning)
    run = finish(spec)
    assert exported_ce(run, spec) == pytest.approx(last_validation(run), rel=1e-4)
    before, after = load_file(family_folder(family) / "model.safetensors"), load_file(left(run) / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if tuning.get("targets") == ["lm_head"]:
        assert moved <= {"lm_head.weight"}  # the embedding that it was tied to stays as it was
        assert not torch.equal(after["lm_head.weight"], before.get("lm_head.weight", torch.zeros(())))
    if "c_attn" in tuning.get("targets", ()):
        assert {name.split(".", 3)[3] for name in moved} == {"attn.c_attn.weight", "mlp.c_fc.weight"}


def test_an_export_that_is_another_model_fails_and_says_so(family_folder, tmp_path, monkeypatch):
    """As a merge that does not merge: what is left would be the base model, and the status finished."""
    monkeypatch.setattr(Lora, "merge_adapters", lambda tuning, model: model.unload())
    spec = spec_of(family_folder("llama"), tmp_path, tuning=lora())
    with pytest.raises(PoiseError, match=r"the exported model is not the one that was trained: .* differ by up to"):
        finish(spec)
    run = open_run(spec.store, spec.name)
    assert run.files("artifacts/") == run.files("result.json") == []
    assert [commit.step for commit in run.checkpoints.commits()][-1] == 4
    monkeypatch.undo()
    finish(spec)  # from the last commit, without another step
    assert (left(run) / "model.safetensors").is_file()


def test_a_setting_that_transformers_does_not_save_is_left_out_and_reported(family_folder, tmp_path):
    folder = Path(shutil.copytree(family_folder("llama"), tmp_path / "model"))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    run = finish(spec_of(folder, tmp_path))
    assert [table.title for table in SECTION.tables([load_record(run, result_classes())])][1:] == ["Warnings"]
    (warning,) = json.loads(run.read("result.json"))["warnings"]
    assert "sets temperature, top_p without do_sample: true" in warning
    assert [event["what"] for event in run.events() if event["event"] == "warning"] == [warning]
    assert "temperature" not in json.loads((left(run) / "generation_config.json").read_text())


def test_what_cannot_be_exported_is_refused_before_the_first_step(family_folder, tmp_path):
    folder = Path(shutil.copytree(family_folder("llama"), tmp_path / "model"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "early_stopping": True}))
    spec = spec_of(folder, tmp_path)
    with pytest.raises(UserError, match="could not be exported at the end of this run: transformers cannot save it"):
        finish(spec)
    run = open_run(spec.store, spec.name)
    assert run.checkpoints.commits() == []
    assert [event for event in run.events() if event["event"] == "start"] == []


def test_a_scratch_folder_without_room_is_found_before_the_first_step(family_folder, tmp_path, monkeypatch):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("poise.kinds.common.export.export", full)
    with pytest.raises(UserError, match=r"cannot save it into .*: .*No space left on device; set TMPDIR"):
        finish(spec_of(family_folder("llama"), tmp_path))


def test_files_of_the_tokenizer_in_folders_are_kept_too(family_folder, tmp_path):
    folder = Path(shutil.copytree(family_folder("llama"), tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    run = finish(spec_of(folder, tmp_path))
    assert (left(run) / "additional_chat_templates/tool.jinja").read_text() == "{{ tools }}"


def experts() -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=20, num_key_value_heads=1, num_local_experts=2, **sizes))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "no linear layer 'q_prj'; did you mean 'q_proj'"),
        (
            "gate_proj",
            r"experts are held in whole tensors \(model.layers.0.mlp.experts.gate_up_proj\)",
        ),
        ("w1", "valid: k_proj, lm_head, o_proj, q_proj, v_proj; its experts are held"),
    ],
)
def test_experts_are_told_from_linear_layers(target, message):
    with pytest.raises(UserError, match=message):
        Lora(targets=[target]).prepare(experts())


def test_experts_that_no_update_reaches_are_reported():
    (note,) = Lora().prepare(experts())
    assert note.startswith("the experts of the model, 5")
    assert Lora(targets=["self_attn.q_proj"]).prepare(experts()) == [note]


def test_a_model_that_stops_with_one_token_is_exported_to_stop_there(family_folder, tmp_path):
    """The whole path: training, export, sampler, for a folder whose files disagree about the end of a text."""
    from poise.inference.sampler import Decoding, Request
    from poise.inference.transformers_sampler import TransformersSampler

    torch.set_num_threads(1)
    train = {"steps": 30, "optimizer": {"name": "adamw", "lr": 0.02}}
    run = finish(spec_of(family_folder("qwen2"), tmp_path, train=train))
    (warning,) = json.loads(run.read("result.json"))["warnings"]
    assert "ends a text with token 2 and the model's configs with [0]" in warning
    _, tokenizer = open_folder(left(run))
    requests = [Request(prompt, encode_prompt(tokenizer, prompt), 4, 9 * row) for row, (prompt, _) in enumerate(LINES)]
    answers = TransformersSampler(left(run)).generate(requests, Decoding(20))
    for (prompt, completion), samples in zip(LINES, answers, strict=True):
        expected = encode_completion(tokenizer, completion, prompt)
        assert [sample.finish for sample in samples if sample.tokens == expected].count("stop") >= 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_that_the_model_cannot_hold_are_refused_before_the_first_step(family, family_folder, tmp_path):
    """Both hold 128 tokens: one would train beyond them without a word, the other end in an index error."""
    spec = spec_of(family_folder(family), tmp_path)
    row = json.dumps({"prompt": "The cat sat on the mat. " * 60, "completion": " The end"})
    (tmp_path / "data.jsonl").write_text(f"{row}\n" * 8)
    with pytest.raises(UserError, match=r"data\.jsonl:1: \d+ tokens are more than the 128 that the model can hold"):
        finish(spec)
    short = spec.model_dump(exclude_none=True)
    short["data"] |= {"too_long": "cut"}
    with pytest.raises(UserError, match="the prompt alone fills the 128 that the model can hold"):
        finish(FinetuneSftSpec.model_validate({**short, "name": "cut"}))
