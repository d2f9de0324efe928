"""A `calibrate.measure` run on the default sampler of a CPU: 200 questions of 60 tokens and more, 20 samples each.

It must end without an engine dying, whatever the prompts' lengths; what is printed is its time. The model has 260,000
parameters, so the time is that of the machinery: starting Ray and an engine, sampling, extraction, intervals.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from poise.store.runs import open_run

QUESTIONS, SAMPLES, TOKENS = 200, 20, 64
DATA = Path(os.environ.get("POISE_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SPEC = """\
kind: calibrate.measure
name: measured
store: {store}
model: {{folder: {model}}}
questions: {{name: jsonl, path: {questions}}}
samples: {samples}
decoding: {{max_tokens: {tokens}}}
"""


def main() -> None:
    model = DATA / "lm" / "stories260K-hf-hd32"
    if not model.is_dir():
        print("  sampler  not measured: set POISE_SHARED_DATA to the folder of shared data")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lengths = _write_questions(folder / "questions.jsonl", model)
        settings = {"store": folder / "runs", "model": model, "questions": folder / "questions.jsonl"}
        (folder / "spec.yaml").write_text(SPEC.format(**settings, samples=SAMPLES, tokens=TOKENS))
        began = time.monotonic()
        command = [sys.executable, "-m", "poise", "run", str(folder / "spec.yaml"), "--engine", "ray"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        run = open_run(str(folder / "runs"), "measured")
        restarts = [event for event in run.events() if event["event"] == "sampler_restart"]
        summary = json.loads(run.read("result.json"))
        print(
            f"  sampler  {QUESTIONS} questions of {min(lengths)} to {max(lengths)} tokens, {SAMPLES} samples each: "
            f"{summary['tokens']:,} tokens drawn, {seconds:.0f} s from start to end, {len(restarts)} engines died"
        )


def _write_questions(path: Path, model: Path) -> list[int]:
    """The first questions of SimpleQA that have 60 tokens, and how many tokens each has."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths: list[int] = []
    lines: list[str] = []
    with (DATA / "qa" / "simple_qa_test_set.csv").open(newline="") as rows:
        for row in csv.DictReader(rows):
            length = len(tokenizer(row["problem"]).input_ids)
            if length >= 60 and len(lines) < QUESTIONS:
                lengths.append(length)
                lines.append(json.dumps({"question": row["problem"], "answer": [row["answer"]]}))
    path.write_text("\n".join(lines) + "\n")
    return lengths


if __name__ == "__main__":
    main()
