"""The guides keep their word: every command in them is executed, every link leads somewhere, every key is listed."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from fork_server import ForkServer
from poise.kinds import KINDS
from poise.spec import load

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

RAY = "tests/end_to_end/test_ray.py"
EXTEND = "tests/test_extend.py"
KILLED = f"{EXTEND}::test_a_run_with_the_objective_that_is_killed_ends_with_the_same_bits"
QUICKSTART = "tests/test_jobs.py::test_the_quickstart_with_small_sizes_in_one_process"
JOBS = f"{RAY}::test_a_spec_is_sent_as_a_job_followed_listed_and_stopped"
TORCHRUN = f"{RAY}::test_two_processes_under_torchrun_that_a_signal_stops_are_two_ray_workers"
LAUNCH = "torchrun --standalone --nproc-per-node=2"
CLUSTER = "tests/cluster/test_cluster.py::test_a_cluster_comes_takes_a_job_and_goes"
BY_HAND = "tests/cluster/test_cluster.py::test_a_head_that_is_started_by_hand_asks_for_the_token_that_was_made_first"
CHART = "tests/helm/test_chart.py"
ELSEWHERE = {
    "poise check spec.yaml": f"{EXTEND}::test_every_example_is_a_short_file_and_is_refused_without_the_permission",
    "poise run spec.yaml --allow-code --engine local": f"{EXTEND}::run",
    "poise run spec.yaml --allow-code --engine local --set name=whole": KILLED,
    "timeout -s KILL 12 poise run spec.yaml --allow-code --engine local --set name=killed || true": KILLED,
    "poise run spec.yaml --allow-code --engine local --set name=killed": KILLED,
    "make run": QUICKSTART,
    "make test": "tests/test_guides.py::test_make_knows_every_target",
    "poise run jobs/quickstart.yaml": QUICKSTART,
    "poise run jobs/digits.yaml --address 127.0.0.1:6379": "tests/end_to_end/conftest.py::uninterrupted",
    "poise cluster up": CLUSTER,
    "poise cluster status": CLUSTER,
    "poise cluster down": CLUSTER,
    "poise cluster token": BY_HAND,
    "export RAY_AUTH_MODE=token": BY_HAND,
    "ray start --head": BY_HAND,
    "ray job submit --working-dir . -- poise run jobs/digits.yaml --set store=$PWD/runs": CLUSTER,
    "helm install demo helm/poise --set workers.gpu.enabled=true": f"{CHART}::test_the_settings_of_the_guide",
    "helm install first helm/poise --set job.enabled=true --set-file job.spec=jobs/digits.yaml"
    " --set 'job.set={store=s3://bucket/runs}'": f"{CHART}::test_the_settings_of_the_guide",
    "poise submit jobs/digits.yaml --set store=$PWD/runs": JOBS,
    "poise status poise-digits": JOBS,
    "poise logs poise-digits --follow": JOBS,
    "poise stop poise-digits": JOBS,
    f"{LAUNCH} -m poise run jobs/digits.yaml --engine local": TORCHRUN,
    f"{LAUNCH} -m poise run jobs/digits.yaml --engine local --set name=pair": TORCHRUN,
}
"""Commands that start Ray, processes of their own or all tests, and what executes the same with another spec."""

TINY = {
    "epochs: 30": "epochs: 1",
    "width: 16": "width: 4",
    "validation: 200": "validation: 20, limit: 200",
    "steps: 20, restarts: 2": "steps: 1",
    "steps: 40, restarts: 2": "steps: 1",
}
"""What makes the digits of the scratch copy cheap; the commands themselves are executed as they are written."""


@dataclass(frozen=True)
class Command:
    """One command of a guide: a line, or the lines of a loop or a continuation."""

    guide: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.guide.name}:{self.line}: {self.text}"


def commands(guide: Path) -> list[Command]:
    """The commands in the ```sh blocks of a guide, in order, without comments."""
    found: list[Command] = []
    language, begun, pending = None, 0, ""
    for number, line in enumerate(guide.read_text().splitlines(), 1):
        if fence := re.match(r"\s*```(\w*)", line):
            language = fence[1] if language is None else None
            assert not pending, f"{guide.name}:{begun}: a command that does not end: {pending}"
        elif language == "sh" and (text := re.sub(r"(^|\s)#.*", "", line).rstrip()):
            begun = begun if pending else number
            pending = f"{pending}\n{text}" if pending else text.strip()
            if not text.endswith("\\") and not (pending.startswith("for ") and not pending.endswith("done")):
                found.append(Command(guide, begun, pending))
                pending = ""
    return found


def links(guide: Path) -> list[str]:
    """Targets of links and images in the prose of a guide."""
    prose = re.sub(r"```.*?```", "", guide.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(guide: Path) -> set[str]:
    """The headings of a guide as the fragments of links to them."""
    headings = re.findall(r"^#+ (.+)$", guide.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def project(folder: Path) -> Path:
    """Make `folder` look like the project to a command, with a spec of digits that takes seconds."""
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    (folder / ".venv").symlink_to(sys.prefix)
    spec = folder / "jobs/digits.yaml"
    text = spec.read_text()
    for slow, quick in TINY.items():
        assert slow in text, f"the spec no longer says {slow!r}"
        text = text.replace(slow, quick)
    spec.write_text(text.replace("    evaluate:\n", "    evaluate:\n      num_examples: 20\n"))
    return folder


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    empty = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}
    alone = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT / "platform")}
    return {**kept, **empty, **alone, "PATH": path}


FORKED = """\
import os, sys
from pathlib import Path
sys.path.insert(0, {support!r})
from fork_server import ForkServer
server = ForkServer(Path({folder!r}))
sys.exit(server.start(["-m", "poise", *sys.argv[1:]], sys.stdout, sys.stderr).wait())
"""
"""Executes `poise` by the fork server: the guides call it two dozen times, and its imports take seconds each time."""


def script(guide: Path, client: Path) -> str:
    """The commands of a guide that no other test executes, as one script; ports are free ones of this machine.

    `client` is a file of FORKED; it executes `poise`, which has to be on the path all the same.
    """
    lines = ["set -e", f'poise() {{ type -P poise > /dev/null && {sys.executable} -S {client} "$@"; }}']
    ports = {"5555": str(free_port()), "9464": str(free_port())}
    for command in commands(guide):
        if command.text not in ELSEWHERE:
            text = re.sub("|".join(ports), lambda port: ports[port[0]], command.text)
            lines += [f"echo '>>> {guide.name}:{command.line}' >&2", text]
            if text.endswith("&"):
                (port,) = re.findall(r"-p (\d+)", text)
                lines.append(f"until (: </dev/tcp/127.0.0.1/{port}) 2>/dev/null; do sleep 0.1; done")
    return "\n".join(lines)


class Reading:
    """A shell that executes a guide in a folder of its own."""

    def __init__(self, guide: Path, folder: Path, server: ForkServer) -> None:
        self.output = folder / "output"
        client = folder / "client.py"
        client.write_text(FORKED.format(support=str(ROOT / "tests/support"), folder=str(server.address.parent)))
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                ["bash", "-c", script(guide, client)], cwd=project(folder), env=environment(),
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Exit code and output, once all is executed; what it left in the background is ended."""
        try:
            return self.process.wait(timeout=540), self.output.read_text()[-4000:]
        finally:
            self.stop()

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def readings(tmp_path: Path, fork_server: ForkServer) -> Iterator[dict[Path, Reading]]:
    """All guides at once: each spends most of its time on imports, on one core."""
    started: dict[Path, Reading] = {}
    for guide in GUIDES:
        (tmp_path / guide.stem).mkdir()
        started[guide] = Reading(guide, tmp_path / guide.stem, fork_server)
    yield started
    for reading in started.values():
        reading.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_is_executed(readings):
    ends = {guide.name: reading.end() for guide, reading in readings.items()}
    for code, output in ends.values():
        assert code == 0, output


def test_every_guide_has_commands_and_the_ones_left_out_are_executed_elsewhere():
    written = {command.text for guide in GUIDES for command in commands(guide)}
    assert set(ELSEWHERE) <= written, "the table names commands that no guide has"
    assert {guide.name for guide in GUIDES if not commands(guide)} == {"dependencies.md"}
    for text, place in ELSEWHERE.items():
        file, _, test = place.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(), f"{text}: there is no {place}"


def test_a_command_that_fails_is_caught(tmp_path, fork_server):
    guide = tmp_path / "guide.md"
    guide.write_text("```sh\npoise check jobs/digits.yaml  # sound\npoise check jobs/none.yaml\npoise runs list\n```\n")
    assert [command.text.split()[-1] for command in commands(guide)] == [
        "jobs/digits.yaml",
        "jobs/none.yaml",
        "list",
    ]
    code, output = Reading(guide, tmp_path, fork_server).end()
    assert code == 2
    assert re.search(r"guide.md:3\n.*jobs/none.yaml: no such file", output)
    assert "guide.md:4" not in output


def test_blocks_of_commands_are_marked_as_such():
    """A block in another shell language, or in none, would hide its commands from the tests."""
    for guide in GUIDES:
        opening = re.findall(r"^\s*```(\w*)\n.*?^\s*```$", guide.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert set(opening) <= {"sh", "yaml", "text", "python"}, guide.name


def test_make_knows_every_target():
    named = {name for guide in GUIDES for name in re.findall(r"`?\bmake ([a-z]+)`", guide.read_text())}
    named |= {command.text.split()[1] for guide in GUIDES for command in commands(guide) if command.text[:5] == "make "}
    assert {"run", "test"} <= named
    for target in named:
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    recipe = subprocess.run(["make", "--dry-run", "run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "poise run jobs/quickstart.yaml" in recipe


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_links_lead_somewhere(guide):
    for link in links(guide):
        if link.startswith(("https://", "http://")):
            continue
        path, _, fragment = link.partition("#")
        target = (guide.parent / path).resolve() if path else guide
        assert target.exists(), f"{guide.name}: {link}"
        assert target.is_relative_to(ROOT), f"{guide.name}: {link}"
        assert not fragment or fragment in anchors(target), f"{guide.name}: {link}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_specs_in_the_guides_are_sound(guide, tmp_path):
    blocks = re.findall(r"^```yaml\n(.*?)^```$", guide.read_text(), flags=re.MULTILINE | re.DOTALL)
    for number, text in enumerate(block for block in blocks if "kind:" in block):
        if "kind: mylab." in text:
            continue  # of a package that tests/test_extend.py puts on Python's path, and runs
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert load(path, KINDS).name


def test_the_mistakes_in_the_readme_are_reported_as_it_says(tmp_path, fork_server):
    readme = (ROOT / "README.md").read_text()
    (spec,) = re.findall(r"^```yaml\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    (said,) = re.findall(r"^```text\n(poise:\n.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    for sound, slip in {
        "cnn": "resnet19",
        "digits}": "digits, batchsize: 64}",
        "0.1": "8/0",
        "epochs": "epoch",
    }.items():
        spec = spec.replace(sound, slip, 1)
    (tmp_path / "first.yaml").write_text(spec)
    done = fork_server.run(["-m", "poise", "check", "first.yaml"], cwd=tmp_path, env=environment())
    assert (done.returncode, done.stderr) == (2, said)


def test_the_page_of_specs_lists_every_key_as_it_is():
    generate = runpy.run_path(str(ROOT / "docs/generate.py"))
    text = (ROOT / "docs/specs.md").read_text()
    assert generate["regenerated"](text) == text, "docs/specs.md is stale: run `python docs/generate.py`"
    for kind in KINDS.values():
        missing = generate["sections"](kind) - generate["listed"](text)
        assert not [section for section in missing if set(section.model_fields) != {"name"}]


def test_pictures_are_small_and_readable_without_light():
    assert (ROOT / "docs/page.png").stat().st_size < 300_000
    assert "prefers-color-scheme: dark" in (ROOT / "docs/architecture.svg").read_text()
