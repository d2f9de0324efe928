"""Which files the user's own code consists of, and what it defines, without running it."""

from __future__ import annotations

import pytest

from poise.errors import UserError
from poise.spec.code import attributes, code_files

FILES = {
    "own/__init__.py": "from own.deep import *\n",
    "own/net.py": "import torch\nfrom . import blocks\nfrom .deep import inner as it\n\ndef make():\n    import late\n",
    "own/blocks.py": "raise RuntimeError('never run')\n",
    "own/deep/__init__.py": "",
    "own/deep/inner.py": "width = height = 3\n",
    "own/unused.py": "",
    "late.py": "import own.net\n",
    "torchless.py": "import own.blocks as b\nif True:\n    def make(): pass\nclass Net: pass\nfor each in (): pass\n",
    "broken.py": "def make(:\n",
    "lazy.py": "def __getattr__(name): ...\n",
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)


def test_the_files_are_the_module_its_packages_and_what_it_imports_beside_it():
    own = ["late.py", "own/__init__.py", "own/blocks.py", "own/deep/__init__.py", "own/deep/inner.py", "own/net.py"]
    assert sorted(code_files("own.net:make")) == own
    assert sorted(code_files("torchless:make")) == [
        "own/__init__.py", "own/blocks.py", "own/deep/__init__.py", "torchless.py",
    ]  # fmt: skip


def test_of_an_installed_package_only_the_module_itself_is_taken():
    assert len(code_files("pydantic.main:BaseModel")) == 2  # with that of the package
    assert len(code_files("json.decoder:JSONDecoder")) == 2


def test_what_a_module_defines():
    assert attributes("torchless:make") == {"b", "make", "Net", "each"}
    assert attributes("own.deep.inner:x") == {"width", "height"}
    assert attributes("own:make") is None  # a star
    assert attributes("lazy:make") is None


@pytest.mark.parametrize("reference", ["nowhere:make", "own.nowhere:make"])
def test_a_module_that_is_not_there_is_named(reference):
    with pytest.raises(UserError, match=r"there is no module .*nowhere"):
        code_files(reference)


def test_a_module_that_is_no_python_is_named_with_its_line():
    with pytest.raises(UserError, match=r"broken\.py:1: not valid Python"):
        attributes("broken:make")
