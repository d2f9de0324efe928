"""Helm's engine, asked in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def helm() -> Iterator[Callable[..., Any]]:
    """Calls a function of engine.py; what it raises comes back as RuntimeError("ClassName: message")."""
    program = [sys.executable, str(Path(__file__).with_name("engine.py"))]
    with subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def call(function: str, *arguments: Any) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([function, arguments]) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"])
            return answer["result"]

        yield call
        process.kill()


@pytest.fixture(scope="session")
def render(helm: Callable[..., Any]) -> Callable[..., dict[str, dict[str, Any]]]:
    """What Helm would send, by kind and name."""
    import yaml

    def rendered(values: dict[str, Any], name: str = "demo") -> dict[str, dict[str, Any]]:
        files = helm("render", "helm/poise", values, name)
        texts = [text for file, text in files.items() if file.endswith(".yaml")]
        documents = [document for text in texts for document in yaml.safe_load_all(text) if document]
        return {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}

    return rendered
