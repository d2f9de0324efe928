"""What cannot run is said before anything starts, all at once and with its line; no name is claimed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from safetensors.numpy import save_file

from poise.cli import cli
from poise.errors import UserError
from poise.kinds import KINDS
from poise.kinds.check import find_errors
from poise.spec import load
from poise.store.runs import open_run

ROBUST = {
    "kind": "robust.train",
    "name": "one",
    "model": {"width": 4},
    "data": {"name": "digits"},
    "threats": {"linf": {"eps": 0.1, "steps": 1}},
    "objective": {"name": "at"},
    "train": {"steps": 1},
}
EVALUATE = {
    "kind": "robust.evaluate",
    "name": "judged",
    "data": {"name": "digits"},
    "attacks": [{"attack": "fgsm", "threat": {"norm": "linf", "eps": 0.1}}],
}
TUNE = {"kind": "finetune.sft", "name": "tuned", "train": {"steps": 1}}
MEASURE = {"kind": "calibrate.measure", "name": "measured"}
PLAY = {
    "kind": "align.selfplay",
    "name": "played",
    "questions": {"name": "world", "split": "prefer"},
    "oracle": {"name": "cyclic"},
    "method": {"name": "mpo", "period": 20},
    "train": {"epochs": 1},
}


def write(values: dict[str, Any]) -> Path:
    Path("spec.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return Path("spec.yaml")


def refused(values: dict[str, Any], command: str = "check", *arguments: str) -> str:
    outcome = CliRunner().invoke(cli, [command, str(write(values)), *arguments])
    assert isinstance(outcome.exception, UserError), outcome.output
    return str(outcome.exception)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def jsonl(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_a_folder_of_images_that_is_not_there_claims_no_name(tmp_path):
    values = {**ROBUST, "data": {"name": "mnist", "root": "nope"}}
    for command in (["check"], ["run", "--engine", "local"]):
        message = refused(values, *command)
        assert re.search(rf"spec.yaml:7: data.root: the folder nope \(here: {tmp_path}/nope\) is not there", message)
        assert "nothing is downloaded" in message
    assert not Path("runs").exists()
    outcome = CliRunner().invoke(cli, ["check", "--spec-only", "spec.yaml"])
    assert outcome.exit_code == 0
    assert outcome.output.startswith("kind: robust.train")


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("mnist", ["train-images-idx3-ubyte"], "has no train-labels-idx1-ubyte.gz or"),
        ("cifar10", ["data_batch_1"], "pickled files are never read"),
        ("cifar10", ["readme.txt"], "has no data_batch_1.bin"),
        ("npz", ["a.npz", "b.npz"], "holds 2 npz files"),
        ("npz", ["a.npz"], "holds no y_train, only x_train"),
        ("images", ["train.parquet"], "train.parquet cannot be read"),
    ],
)
def test_a_folder_without_the_files_of_its_set(name, files, message):
    Path("images").mkdir()
    for file in files:
        Path("images", file).write_bytes(b"")
        if file.endswith(".npz"):
            np.savez(Path("images", file), x_train=np.zeros(1))
    assert message in refused({**ROBUST, "data": {"name": name, "root": "images"}})


def test_a_sweep_is_read_where_its_trials_can_be():
    base = {key: value for key, value in ROBUST.items() if key != "name"}
    sweep = {
        "kind": "sweep",
        "base": base,
        "metric": "robust/union",
        "mode": "max",
        "space": {"seed": {"grid": [1, 2]}},
    }
    report = {"kind": "bounds.report", "runs": ["line-tried"]}
    values = {"kind": "pipeline", "name": "line", "stages": {"tried": sweep, "report": report}}
    assert find_errors(load(write(values), KINDS)) == []
    vae = {"kind": "robust.vae", "data": {"name": "digits"}, "train": {"steps": 1}}
    values["stages"]["tried"] = {**sweep, "base": vae, "metric": "elbo"}
    assert "line-tried' is a sweep of robust.vae; name a run of robust.train or" in refused(values)


def test_every_mistake_is_said_at_once_with_its_line():
    values = {"kind": "pipeline", "name": "line", "stages": {}}
    values["stages"]["net"] = {key: value for key, value in ROBUST.items() if key != "name"}
    values["stages"]["net"]["data"] = {"name": "svhn", "root": "nowhere"}
    values["stages"]["judge"] = {**EVALUATE, "model": {"run": "gone"}}
    values["stages"]["tune"] = {**TUNE, "model": {"run": "line-net"}, "data": {"name": "jsonl", "path": "rows.jsonl"}}
    del values["stages"]["judge"]["name"]
    message = refused(values)
    lines = Path("spec.yaml").read_text().splitlines()
    for path, line, text in (
        ("stages.net.data.root", "root: nowhere", "is not there"),
        ("stages.judge.model.run", "run: gone", "there is no run 'gone'"),
        ("stages.tune.model.run", "run: line-net", "is a robust.train; name a run of finetune.sft or"),
        ("stages.tune.data.path", "path: rows.jsonl", "is not there"),
    ):
        number = 1 + next(index for index, each in enumerate(lines) if each.strip() == line)
        assert re.search(rf"spec.yaml:{number}: {path}: .*{re.escape(text)}", message), message
    assert "4 mistakes; nothing was run." in message


def test_a_run_of_an_earlier_stage_is_no_mistake():
    net = {key: value for key, value in ROBUST.items() if key != "name"}
    judge = {**EVALUATE, "name": "p-judge", "model": {"run": "${net}"}}
    write({"kind": "pipeline", "name": "p", "stages": {"net": net, "judge": judge}})
    assert CliRunner().invoke(cli, ["check", "spec.yaml"]).exit_code == 0


def test_a_run_that_has_no_result_or_another_kind():
    run = open_run("runs", "young")
    run.claim_spec("kind: robust.train\n", "a" * 64)
    run.start("robust.train", "a" * 64)
    assert "run 'young' has no result yet, it is interrupted: run it to its end first" in refused(
        {**EVALUATE, "model": {"run": "young"}}
    )
    assert "is a robust.train" in refused(
        {**MEASURE, "model": {"run": "young"}, "questions": {"name": "world"}, "sampler": {"backend": "transformers"}}
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere:make", "there is no module 'nowhere'"),
        ("mine:mak", "module 'mine' defines no 'mak'; did you mean 'make'"),
        ("broken:make", "broken.py:1: not valid Python"),
    ],
)
def test_a_function_that_is_not_there(function, message):
    Path("mine.py").write_text("def make():\n    raise RuntimeError('never called')\n")
    Path("broken.py").write_text("def make(:\n")
    assert f"model.function: {message}" in refused({**EVALUATE, "model": {"function": function}}).replace(
        f"{Path.cwd()}/", ""
    )
    write({**EVALUATE, "model": {"function": "mine:make"}})
    assert CliRunner().invoke(cli, ["check", "spec.yaml"]).exit_code == 0


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("net.pt", "pickles are never read"),
        ("gone.safetensors", "is not there"),
        ("cut.safetensors", "is damaged: its header is longer than the file"),
    ],
)
def test_a_state_dict_that_is_none(file, message):
    save_file({"weight": np.zeros(100)}, "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:20])
    assert message in refused({**EVALUATE, "model": {"file": file}})


def test_a_hub_name_is_told_that_nothing_is_downloaded():
    values = {**TUNE, "model": {"folder": "Qwen/Qwen2.5-0.5B"}, "data": {"name": "jsonl", "path": "rows.jsonl"}}
    jsonl("rows.jsonl", {"prompt": "a", "completion": "b"})
    message = refused(values)
    assert "model.folder: there is no folder 'Qwen/Qwen2.5-0.5B'" in message
    assert "nothing is downloaded" in message


def test_answers_that_a_model_cannot_hold_after_any_prompt(family_folder):
    model = {"folder": str(family_folder("llama"))}  # 128 positions; a prompt has one token, scoring takes one more
    questions = {"name": "world"}  # its prompts are not counted before the run
    for most, mistaken in ((126, False), (127, True)):
        measure = {**MEASURE, "model": model, "questions": questions, "decoding": {"max_tokens": most}}
        play = {**PLAY, "model": model, "max_tokens": most}
        sweep = {
            "kind": "sweep", "name": "tried", "base": {**measure, "name": "tried"}, "metric": "accuracy",
            "mode": "max", "space": {"samples": {"grid": [2, 3]}, "decoding.max_tokens": {"grid": [8, most]}},
        }  # fmt: skip
        found = {
            values["kind"]: [each.path for each in find_errors(KINDS[values["kind"]].model_validate(values))]
            for values in (measure, play, sweep)
        }
        places = {
            "calibrate.measure": ("decoding", "max_tokens"),
            "align.selfplay": ("max_tokens",),
            "sweep": ("base", "decoding", "max_tokens"),
        }
        assert found == {kind: [place] if mistaken else [] for kind, place in places.items()}


def test_what_a_cluster_may_have_is_refused_here_and_not_there():
    values = {**ROBUST, "data": {"name": "mnist", "root": "/shared/mnist"}, "store": "/shared/runs"}
    spec = KINDS["robust.train"].model_validate(values)
    assert {mistake.absent for mistake in find_errors(spec)} == {True}
    spec = KINDS["robust.evaluate"].model_validate({**EVALUATE, "model": {"run": "there"}, "store": "/shared/runs"})
    assert {mistake.absent for mistake in find_errors(spec)} == {True}
    message = refused(values, "submit", "--address", "http://127.0.0.1:9")
    assert "not there" not in message  # it gets as far as looking for the cluster
    Path("rows.jsonl").write_text("no json\n")
    rows = {"name": "jsonl", "path": str(Path("rows.jsonl").absolute())}
    tune = {**TUNE, "store": "/shared/runs", "model": {"folder": "/shared/model"}, "data": rows}
    assert "rows.jsonl:1: this line is no JSON" in refused(tune, "submit", "--address", "http://127.0.0.1:9")


def test_the_values_of_a_sweep_are_looked_at_and_not_what_they_replace():
    Path("model").mkdir()
    jsonl("a.jsonl", {"prompt": "a", "completion": "b"})
    base = {**TUNE, "model": {"run": "x"}, "data": {"name": "jsonl", "path": "replaced.jsonl"}}
    del base["name"]
    sweep = {"kind": "sweep", "name": "s", "base": base, "metric": "ce", "mode": "min"}
    sweep["space"] = {"data.path": {"grid": ["a.jsonl", "b.jsonl"]}}
    message = refused(sweep)
    assert "b.jsonl (here:" in message
    assert "a.jsonl" not in message.replace("b.jsonl", "")
    assert "replaced" not in message


def test_questions_without_the_named_fields():
    file = jsonl("q.jsonl", {"problem": "who", "answer": ["me"]})
    values = {**MEASURE, "model": {"folder": "m"}, "questions": {"name": "jsonl", "path": file}}
    message = refused(values)
    assert "questions.path" in message
    assert "there is no 'question', only answer, problem; questions.question names the field" in message
    assert message.count("problem") == 1
    values["questions"] = {"name": "jsonl", "path": jsonl("q.jsonl", {"question": "who", "answer": [], "reply": "me"})}
    assert "set question and answers to fields of the file, which has answer, question, reply" in refused(values)


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [("{question} {context}", "{context}"), ("{b}{question}{a_1}", "{a_1}, {b}"), ("{{hint}} {question}", "{hint}")],
)
def test_a_placeholder_that_nothing_fills_is_refused(prompt, unknown):
    message = refused({**MEASURE, "model": {"folder": "m"}, "questions": {"name": "world"}, "prompt": prompt})
    assert f"prompt: nothing is known to fill in for {unknown}; the only placeholder is {{question}}" in message


def test_braces_that_are_text_stay():
    prompt = r'{question} \boxed{x} \frac{a}{b} x_{i} {"answer": 1} {} { word }'
    values = {**MEASURE, "model": {"folder": "m"}, "questions": {"name": "world"}, "prompt": prompt}
    assert KINDS["calibrate.measure"].model_validate(values).prompt == prompt


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_questions_of_other_formats_without_the_named_fields(name):
    if name == "csv":
        Path("q.csv").write_text('problem,answer\n"who,\nand why",me\n')
    else:
        pq.write_table(pa.table({"problem": ["who"], "answer": ["me"]}), "q.parquet")
    values = {**MEASURE, "model": {"folder": "m"}, "questions": {"name": name, "path": f"q.{name}"}}
    assert "there is no 'question', only answer, problem; questions.question names the field" in refused(values)
    values["questions"]["question"] = "problem"
    assert "questions" not in refused(values)  # the model is what is wrong now
    Path(f"q.{name}").write_bytes(b"\xff\xfe")
    assert re.search("is no (CSV|Parquet) file", refused(values))


ROWS = [
    ({"instruction": "a", "input": "", "output": "b"}, "alpaca rows (instruction, input, output): set prompt: inst"),
    ({"instruction": "a", "input": "x", "output": "b"}, "join instruction and input into the prompt"),
    ({"messages": [{"role": "user", "content": "a"}]}, "chat messages (role, content)"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "ShareGPT turns (from, value)"),
    ({"conversations": [], "chosen": {}, "rejected": {}}, "preference pairs (chosen, rejected)"),
    ({"text": "once"}, "plain text (text)"),
    ({"question": "a", "answer": "b"}, "set prompt: question and completion: answer"),
    ({"a": "b"}, 'set prompt to the field that holds it, or write rows {"prompt": ..., "completion": ...}'),
    ({"prompt": "a", "completion": ["b"]}, "'completion' is list, not text"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), ROWS, ids=[message[:20] for _, message in ROWS])
def test_rows_of_other_trainers_are_called_by_their_name(row, message):
    assert message in found_in(jsonl("rows.jsonl", row))


def test_a_json_list_is_not_json_lines():
    Path("rows.json").write_text(json.dumps([ROWS[0][0]] * 2))
    message = found_in("rows.json")
    assert "rows.json is no file *.jsonl and no folder that holds one: write them as JSON lines, one row a" in message
    assert message.index("*.jsonl; these are alpaca rows") < message.index("set prompt: instruction")
    Path("rows.json").write_text("[1, 2]")
    assert "write rows" in found_in("rows.json")


def found_in(path: str) -> str:
    """What is wrong with a file of text."""
    data = {"name": "jsonl", "path": path}
    values = {**TUNE, "model": {"run": "x"}, "store": "s3://elsewhere", "data": data}
    return " ".join(each.message for each in find_errors(KINDS["finetune.sft"].model_validate(values)))


PUBLISHED = {
    "chat/alpaca_en_demo.json": "alpaca rows",
    "chat/sharegpt_dummy_conversation.json": "ShareGPT turns",
    "chat/glaive_toolcall_en_demo.json": "ShareGPT turns",
    "chat/dpo_en_demo.json": "preference pairs",
    "chat/c4_demo.jsonl": "plain text",
    "preference/hh-rlhf_harmless-base_test.jsonl.gz": "preference pairs",
    "qa/gsm8k/test.jsonl": "set prompt: question",
}


@pytest.mark.parametrize(("file", "message"), PUBLISHED.items())
def test_published_files_are_recognised(shared_data, file, message):
    assert message in found_in(str(shared_data / file))


def test_the_lines_of_python_in_the_guide_make_files_that_are_read(shared_data, tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs/specs.md").read_text()
    section = guide.partition("### Text of other trainers")[2].partition("\n### ")[0]
    blocks = re.findall(r"^```text\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    names = ("alpaca.json", "chat.json", "pairs.jsonl.gz")
    files = ("chat/alpaca_en_demo.json", "chat/sharegpt_dummy_conversation.json")
    files = (*files, "preference/hh-rlhf_harmless-base_test.jsonl.gz")
    for name, file, block in zip(names, files, blocks, strict=True):
        Path(name).symlink_to(shared_data / file)
        if "AutoTokenizer" in block:  # a folder with a chat template is not at hand
            block = re.sub(r"^from transformers.*\n", "", block, flags=re.MULTILINE)
            block = re.sub(
                r"^template = .*$", "def template(turns, **_):\n    return str(turns)", block, flags=re.MULTILINE
            )
        exec(block, {})
        assert found_in("train.jsonl") == ""
        assert len(Path("train.jsonl").read_text().splitlines()) > 400


def test_columns_of_parquet_are_looked_at():
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), "rows.parquet")
    data = {"name": "parquet", "path": "rows.parquet"}
    values = {**TUNE, "model": {"run": "x"}, "store": "s3://elsewhere", "data": data}
    (found,) = find_errors(KINDS["finetune.sft"].model_validate(values))
    assert (
        "rows.parquet:1: there is no 'prompt', only answer, question: these are questions: set prompt" in found.message
    )
    Path("images").mkdir()
    for column, message in (("picture", "no column 'image' or 'img'"), ("image", "column 'label' holds string")):
        for part in ("train", "test"):
            pq.write_table(pa.table({column: [b"x"], "label": ["cat"]}), f"images/{part}.parquet")
        assert message in refused({**ROBUST, "data": {"name": "images", "root": "images"}})


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_published_images_are_found(shared_data, name):
    data = {"name": name, "root": str(shared_data / "images" / name)}
    assert find_errors(KINDS["robust.train"].model_validate({**ROBUST, "data": data})) == []


def test_a_published_model_is_found(shared_data):
    folder = {"folder": str(shared_data / "lm" / "stories260K-hf-hd32")}
    questions = {"name": "jsonl", "path": str(shared_data / "qa" / "NQ-open.dev.jsonl")}
    spec = KINDS["calibrate.measure"].model_validate({**MEASURE, "model": folder, "questions": questions})
    assert find_errors(spec) == []


def test_nothing_heavy_is_imported(shared_data):
    """What takes seconds: transformers, ray. The clock of a busy machine would say less."""
    write({
        **MEASURE,
        "model": {"folder": str(shared_data / "lm" / "stories260K-hf-hd32")},
        "questions": {"name": "jsonl", "path": str(shared_data / "qa" / "NQ-open.dev.jsonl")},
    })  # fmt: skip
    code = (
        "import sys\nfrom poise.cli import cli\ncli(['check', 'spec.yaml'], standalone_mode=False)\n"
        "print(sorted({'transformers', 'peft', 'ray', 'boto3', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("assignments", "blamed"),
    [
        (["data={name: digits, bach_size: 3}"], r"--set data: data\.bach_size: unknown key"),
        (["threats.linf={eps: 8/0}"], r"--set threats\.linf: threats\.linf\.eps: "),
        (["workers.count=3"], r"--set workers\.count: data\.batch_size: 128 does not divide by 3 workers"),
        (["seed=4", "workers.count=3"], r"--set workers\.count: data\.batch_size"),
        (["train.epochs=2"], r"--set train\.epochs: train: .*either epochs or steps"),
        (["data.root=/x"], r"--set data\.root: data: digits comes with"),
    ],
)
def test_a_mistake_of_an_assignment_is_not_blamed_on_a_line_of_the_file(assignments, blamed):
    values = {**ROBUST, "data": {"name": "digits", "batch_size": 128}}
    message = refused(values, "check", *(part for text in assignments for part in ("--set", text)))
    assert re.search(blamed, message), message
    assert "spec.yaml:" not in message


def test_a_mistake_of_the_file_stays_with_its_line_whatever_is_set():
    assert "spec.yaml:1: kind: 'robust.tran'" in refused({**ROBUST, "kind": "robust.tran"}, "check", "--set", "seed=1")


def test_a_store_that_cannot_be_made_is_refused(tmp_path):
    """/proc takes no folder, even from root; a file is no place for one either. Nothing is left by the look."""
    Path("file").write_text("")
    for store, why in (("/proc/poise", "/proc: "), ("file/runs/deep", f"{tmp_path}/file is a file, not a folder")):
        for command in ("check", "run"):
            message = refused(ROBUST, command, "--set", f"store={store}")
            assert re.search(rf"store: {store} cannot be made \({why}.*\): name a folder that can be written", message)
    assert find_errors(load(write({**ROBUST, "store": "new/deep"}), KINDS)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "spec.yaml"]
