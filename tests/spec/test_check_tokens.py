"""Before a run: texts that are too long for the model, counted in its tokens, by the rule of the run itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from poise.data.text.batches import load_text
from poise.data.text.examples import encode_prompt
from poise.errors import UserError
from poise.kinds import KINDS
from poise.kinds.check import FieldError, find_errors
from poise.models.language import open_tokenizer
from poise.models.limits import ModelLimits

LONG = "The cat sat on the mat. " * 12


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_lines(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def mistakes_of(values: dict[str, Any]) -> list[FieldError]:
    return find_errors(KINDS[values["kind"]].model_validate(values))


def measure(folder: Path, question: str, max_tokens: int) -> dict[str, Any]:
    path = write_lines("q.jsonl", [{"question": "who", "answer": "me"}, {"question": question, "answer": "me"}])
    return {"kind": "calibrate.measure", "name": "measured", "model": {"folder": str(folder)},
            "questions": {"name": "jsonl", "path": path}, "decoding": {"max_tokens": max_tokens}}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_after_which_an_answer_does_not_fit(family, family_folder):
    """The models hold 128 tokens, of which scoring takes one; the limit is that of the run, to the token."""
    folder = family_folder(family)
    tokens = len(encode_prompt(open_tokenizer(folder), f"Q: {LONG}"))
    assert tokens < 127
    for room, mistaken in ((127 - tokens, False), (128 - tokens, True)):
        found = mistakes_of({**measure(folder, LONG, room), "prompt": "Q: {question}"})
        assert [each.path for each in found] == ([("decoding", "max_tokens")] if mistaken else [])
    assert "question 'q.jsonl:2'" in found[0].message
    assert f"a prompt of {tokens} tokens and {room} more do not fit into the 127" in found[0].message
    play = {"kind": "align.selfplay", "name": "played", "model": {"folder": str(folder)},
            "questions": {"name": "jsonl", "path": "q.jsonl"}, "oracle": {"name": "cyclic"},
            "method": {"name": "mpo", "period": 20}, "max_tokens": 128 - tokens, "train": {"epochs": 1}}  # fmt: skip
    write_lines("q.jsonl", [{"question": f"Q: {LONG}", "answer": ["a", "b", "c"]}])
    (mistake,) = mistakes_of(play)
    assert mistake.path == ("max_tokens",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "the 128 that the model can hold; shorten it or set too_long: cut"),
        ({"max_tokens": 20}, "data.max_tokens 20; raise it or set too_long: cut"),
        ({"too_long": "cut"}, None),
        ({"too_long": "cut", "prompt": "completion", "completion": "prompt"}, "the prompt alone fills the 128"),
    ],
)
def test_a_text_that_the_model_cannot_hold(data, message, family_folder):
    folder = family_folder("llama")
    path = write_lines("rows.jsonl", [{"prompt": "who", "completion": " me"}, {"prompt": "a", "completion": LONG * 5}])
    values = {"kind": "finetune.sft", "name": "tuned", "model": {"folder": str(folder)},
              "data": {"name": "jsonl", "path": path, **data}, "train": {"steps": 1}}  # fmt: skip
    spec = KINDS["finetune.sft"].model_validate(values)
    found = find_errors(spec)
    if message is None:
        assert found == []
        load_text(spec.data, open_tokenizer(folder), 0, ModelLimits(context=128))
        return
    (mistake,) = found
    assert mistake.path == ("data", "path")
    assert "rows.jsonl:2: " in mistake.message
    assert message in mistake.message
    with pytest.raises(UserError) as caught:
        load_text(spec.data, open_tokenizer(folder), 0, ModelLimits(context=128))
    assert str(caught.value) == mistake.message


def test_texts_that_are_short_in_bytes_need_no_tokenizer(family_folder):
    values = measure(family_folder("llama"), "The cat", 64)
    code = (
        "import sys, json\nfrom poise.kinds import KINDS\nfrom poise.kinds.check import find_errors\n"
        "values = json.loads(sys.argv[1])\nassert find_errors(KINDS[values['kind']].model_validate(values)) == []\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(values)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
