"""The two traps of the layout, and the walls between the rooms."""

from __future__ import annotations

import platform
import subprocess
import sys
import sysconfig
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


def test_the_walls_stand():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("poise.cli", {"torch", "ray", "numpy", "pyarrow", "boto3", "matplotlib", "pydantic"}),
        ("poise.kinds", {"torch", "ray", "numpy", "pyarrow", "boto3", "matplotlib"}),
        ("poise.kinds.robust_train", {"ray", "boto3", "vllm", "matplotlib"}),
    ],
)
def test_heavy_imports_happen_where_they_are_used(module, heavy):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not heavy & loaded


def test_a_science_room_that_reaches_out_is_caught(tmp_path):
    """The contract can fail: the same contracts over a copy of the package in which `robust` imports ray."""
    import shutil

    shutil.copytree(
        ROOT / "platform", tmp_path / "platform", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "platform/poise/robust/threats.py").open("a") as file:
        file.write("\nimport ray\n")
    linter = Path(sys.executable).with_name("lint-imports")
    environment = {"PYTHONPATH": str(tmp_path / "platform"), "PATH": "/usr/bin"}
    done = subprocess.run(
        [linter, "--no-cache"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "poise.robust" in done.stdout
