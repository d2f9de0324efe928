"""File systems of clusters that lack calls: Lustre without `flock`, shares without hard links, disks that fail.

The calls really fail, in processes of their own: a library put before libc answers for the file system.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int lacks(const char *call) { const char *all = getenv("LACKS"); return all && strstr(all, call) != NULL; }
static int refuse(int error) { errno = error; return -1; }

int flock(int file, int how) { return refuse(ENOSYS); }
int lockf(int file, int how, off_t size) { return refuse(ENOSYS); }

int link(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "link");
    return lacks("link") ? refuse(EPERM) : real(from, to);
}

int linkat(int a, const char *from, int b, const char *to, int flags) {
    int (*real)(int, const char *, int, const char *, int) = dlsym(RTLD_NEXT, "linkat");
    return lacks("link") ? refuse(EPERM) : real(a, from, b, to, flags);
}

int fsync(int file) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    struct stat status;
    fstat(file, &status);
    return lacks("fsync") && S_ISDIR(status.st_mode) ? refuse(EINVAL) : real(file);
}

ssize_t read(int file, void *into, size_t size) {
    ssize_t (*real)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
    char place[64], path[4096];
    snprintf(place, sizeof place, "/proc/self/fd/%d", file);
    ssize_t length = lacks("read") ? readlink(place, path, sizeof path - 1) : 0;
    path[length > 0 ? length : 0] = 0;
    return strstr(path, "step-00000020/model.bin") ? refuse(EIO) : real(file, into, size);
}
"""

CONTEND = """
import sys
from poise.store.folder import FolderStorage
storage, name = FolderStorage(__import__("pathlib").Path(sys.argv[1])), sys.argv[2]
print(storage.create("run/created", name.encode()))
storage.create("run/count", b"0 by nobody")
won = 0
while won < 20:
    seen = storage.read("run/count")
    won += storage.compare_and_swap("run/count", b"%d by %s" % (int(seen.split()[0]) + 1, name.encode()), seen)
"""

LEASE = """
import sys
from poise.errors import RunBusyError
from poise.store.runs import open_run
run = open_run(sys.argv[1], "digits")
for start in range(3):
    with run.lease() as lease:
        run.claim_spec("kind: robust.train\\n", "a" * 64)
        run.start("robust.train", "a" * 64)
        lease.check()
        try:
            run.lease().__enter__()
        except RunBusyError:
            print("one at a time")
assert not run.verify()
"""

UNREADABLE = """
import sys, tempfile
from pathlib import Path
from poise.store.runs import open_run
run, scratch = open_run(sys.argv[1], "digits"), Path(tempfile.mkdtemp())
for step in (10, 20):
    (scratch / "model.bin").write_bytes(bytes([step]) * 100)
    run.checkpoints.commit(step, scratch, info={})
commit, damages = run.checkpoints.latest_valid(scratch / "into")
print(commit.step, *damages)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs gcc and Linux to make system calls fail")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    library = folder / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, folder / "shim.c", "-ldl"], check=True)
    return library


def python(shim: Path, lacks: str, code: str, *arguments: str) -> str:
    environment = {**os.environ, "LD_PRELOAD": str(shim), "LACKS": lacks}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("lacks", ["fsync", "link fsync"])
def test_exclusion_needs_neither_flock_nor_hard_links(shim: Path, tmp_path: Path, lacks: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda name: python(shim, lacks, CONTEND, str(tmp_path), name), "abc"))
    assert sorted(said) == ["False\n", "False\n", "True\n"]
    assert (tmp_path / "run" / "created").read_text() == "abc"[said.index("True\n")]
    assert (tmp_path / "run" / "count").read_text().startswith("60 by ")  # each swap counted once
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["count", "created"]


@pytest.mark.parametrize("lacks", ["fsync", "link fsync"])
def test_a_run_is_started_again_and_again_where_calls_are_missing(shim: Path, tmp_path: Path, lacks: str) -> None:
    assert python(shim, lacks, LEASE, str(tmp_path)) == "one at a time\n" * 3


def test_a_checkpoint_that_the_disk_cannot_read_is_stepped_over(shim: Path, tmp_path: Path) -> None:
    said = python(shim, "read", UNREADABLE, str(tmp_path))
    assert said.startswith("10 step-00000020/model.bin: ")
    assert "the disk cannot read it" in said


def test_who_died_alone_in_a_folder_keeps_nobody_out(tmp_path: Path) -> None:
    from poise.store.folder_lock import CONTENDER, alone_in

    dead = subprocess.run(
        [sys.executable, "-c", "import json, dataclasses; from poise.store.process import ProcessId as P;"
         "print(json.dumps(dataclasses.asdict(P.current())))"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (tmp_path / f"{CONTENDER}0").write_text(dead)
    hours_ago = tmp_path / f"{CONTENDER}1"
    hours_ago.write_text(dead.replace('"space": "', '"space": "another machine, '))
    os.utime(hours_ago, (1, 1))
    with alone_in(tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
