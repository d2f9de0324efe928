"""Helm's engine as a program: a request per line on stdin, as JSON [function, arguments], an answer per line on stdout.

In a process of its own, since it brings a Go runtime, whose signal handlers are not to meet those of pytest.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import helm_python


def render(chart: str, values: dict[str, Any], name: str) -> dict[str, str]:
    """Texts by file. The chart is loaded anew: a handle does not render twice alike."""
    return dict(helm_python.Chart.load(chart).render(values, name=name, namespace="research"))


def lint(chart: str, values: dict[str, Any]) -> dict[str, Any]:
    """What Helm complains of."""
    return dict(helm_python.lint(chart, values, strict=True))


def parse(option: str, expression: str) -> dict[str, Any]:
    """The values that `--set` or `--set-file` mean."""
    read = {"--set": helm_python.parse_set_string, "--set-file": helm_python.parse_set_file}[option]
    return dict(read(expression))


def packed(chart: str, folder: str) -> list[str]:
    """The files in the archive that the chart is packed into."""
    return [file["name"] for file in helm_python.Chart.load(helm_python.Chart.load(chart).save(folder)).files]


if __name__ == "__main__":
    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            answer = {"result": globals()[function](*arguments)}
        except helm_python.HelmError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
