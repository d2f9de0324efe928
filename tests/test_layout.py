"""The two traps of the layout, and the import contracts between packages."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_platform_is_a_source_root_and_no_package():
    """With an __init__.py there, `import platform` would find our folder: uuid, torch and ray die at import."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert Path(platform.__file__).parent == Path(sysconfig.get_paths()["stdlib"])


def test_platform_is_the_standard_librarys_from_the_root_of_the_project():
    code = "import platform, uuid; platform.system(); print(platform.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert Path(out.strip()).parent == Path(sysconfig.get_paths()["stdlib"])


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("poise.cli", {"torch", "ray", "numpy", "pyarrow", "boto3", "matplotlib", "pydantic"}),
        ("poise.kinds", {"torch", "ray", "numpy", "pyarrow", "boto3", "matplotlib"}),
        ("poise.engine.ray.jobs", {"torch", "vllm", "matplotlib"}),
        ("poise.kinds.robust_train.run", {"ray", "boto3", "vllm", "matplotlib"}),
    ],
)
def test_heavy_imports_happen_where_they_are_used(module, heavy):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not heavy & loaded


def test_looking_at_runs_does_without_torch():
    """`poise runs` and `poise report` import the results and the report sections of all kinds, but no spec."""
    code = (
        "import sys\nfrom poise.kinds import report_sections, result_classes\nimport poise.report.page\n"
        "assert len(report_sections()) == len(result_classes()) > 5\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["runs", "list", "."]])
def test_commands_that_read_no_spec_answer_without_torch(arguments, tmp_path):
    code = (
        f"import sys\nfrom poise.cli import cli\ncli({arguments!r}, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_tests_that_are_run_in_parallel_are_grouped(request):
    """xdist reads the group of a test from its id; without groups, every test would be scheduled by itself."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@tests/test_layout.py")


PLANTED = {
    "robust/threats.py": ("ray", "science packages know torch, numpy and scipy only"),
    "calibrate/ece.py": ("poise.finetune.losses", "science packages do not know each other"),
    "align/games.py": ("poise.robust.threats", "align is a science package that may use the losses of finetune"),
    "bounds/operators.py": ("poise.data.images.spec", "bounds is a science package that may use robust"),
    "inference/sampler.py": ("click", "train and inference are plain torch"),
    "store/runs.py": ("poise.engine.network", "nothing but cli imports engine"),
    "engine/launch.py": ("ray", "only engine.ray imports ray"),
    "engine/ray/jobs.py": ("vllm", "only engine.vllm imports vllm"),
    "report/page.py": ("poise.kinds", "report does not import kinds, which hand it their sections"),
    "spec/base.py": ("poise.train.spec", "the foundations import nothing above them"),
}
"""By file, an import that a contract forbids, and the name of that contract."""


def test_each_import_contract_catches_a_violation(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "platform", tmp_path / "platform", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, (module, _) in PLANTED.items():
        with (tmp_path / "platform/poise" / file).open("a") as source:
            source.write(f"\nimport {module}\n")
    linter = Path(sys.executable).with_name("lint-imports")
    environment = {"PYTHONPATH": str(tmp_path / "platform"), "PATH": "/usr/bin"}
    done = subprocess.run(
        [linter, "--no-cache"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert {contract["name"] for contract in contracts} == {name for _, name in PLANTED.values()}
    assert [name for _, name in PLANTED.values() if f"{name} BROKEN" not in done.stdout] == []
