"""What can be known of a spec before anything is started: do the files, runs and functions that it names serve?

Of large local files only the beginnings are read, and nothing is opened on a network. What is on S3 is left to the run
that reads it. An answer takes a fraction of a second, and seconds where files of rows are
large: torch is imported only for a state dict, whose names and shapes
are those of a network, and transformers only where the files of a language model alone leave a doubt.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from poise.data.spec import CsvQuestions, DataSpec, JsonlQuestions, JsonlText, ParquetQuestions, ParquetText
from poise.errors import PoiseError, UserError
from poise.kinds.check_finding import Finding, shown
from poise.kinds.check_models import folder_findings, state_dict_findings
from poise.kinds.check_rows import question_findings, text_findings
from poise.kinds.check_tokens import example_too_long, prompt_too_long
from poise.kinds.specs.align import AlignSelfplaySpec
from poise.kinds.specs.bounds import BoundsReportSpec
from poise.kinds.specs.calibrate import CalibrateMeasureSpec
from poise.kinds.specs.evaluation import RobustEvaluateSpec, SubjectSpec
from poise.kinds.specs.finetune import FinetuneSftSpec
from poise.kinds.specs.pipeline import PipelineSpec
from poise.kinds.specs.sweep import SweepSpec
from poise.models.spec import LanguageModelSpec
from poise.spec import Input, RunSpec, Section
from poise.spec.code import attributes
from poise.spec.problems import Path, nearest
from poise.store.runs import Run, open_run

__all__ = ["Mistake", "find_mistakes"]

_OF_A_RUN = {"model", "models", "data", "questions", "prompt", "decoding", "max_tokens"}
"""The keys of a run that are looked at together."""


@dataclass(frozen=True)
class Mistake:
    """Why the spec cannot run as it is.

    Attributes:
        absent: something is not on this machine, and may be on another.
        is_note: it does not keep the spec from running; it is only said.
    """

    path: Path
    message: str
    absent: bool = False
    is_note: bool = False


def find_mistakes(spec: RunSpec, *, skip: Collection[str] = ()) -> list[Mistake]:
    """Everything that keeps the runs of a spec from their results, as far as it can be told from here at once.

    `skip` names runs that are not looked at, since they are finished: what they have read may be gone by now.
    """
    found: dict[Mistake, None] = {}
    made: dict[str, str] = {}  # run -> kind of the stages before, such as "sweep of robust.train"
    for prefix, stage in _stages(spec):
        if stage.name not in skip:
            for mistake in _of_run(stage, made):
                found[replace(mistake, path=(*prefix, *mistake.path))] = None
        made[stage.name] = f"sweep of {stage.base.kind}" if isinstance(stage, SweepSpec) else stage.kind
    return list(found)


def _stages(spec: RunSpec) -> Iterator[tuple[Path, RunSpec]]:
    if isinstance(spec, PipelineSpec):
        yield from ((("stages", name), stage) for name, stage in spec.stages.items())
    else:
        yield (), spec


def _of_run(spec: RunSpec, made: dict[str, str]) -> Iterator[Mistake]:
    if "://" not in spec.store and os.path.isfile(FilePath(spec.store).expanduser()):
        yield Mistake(("store",), f"{spec.store} is a file, not a folder")
        return
    if "://" not in spec.store and (why := _cannot_be_made(FilePath(spec.store).expanduser().absolute())):
        message = f"{spec.store} cannot be made ({why}): name a folder that can be written"
        yield Mistake(("store",), message, absent=True)
    for each in dict.fromkeys(spec.inputs()):
        yield from _of_input(each, spec, made)
    for path, section in _sections(spec):
        if isinstance(section, tuple(_EXAMINED)):
            yield from _examined(path, section)


def _cannot_be_made(folder: FilePath) -> str | None:
    """Why a folder cannot be made where it is to be; None where it is there or can be made.

    A file without a name is opened in the nearest folder that exists: permissions alone do not tell of a file system
    that takes no files, such as /proc, and root passes all of them.
    """
    if os.path.isdir(folder):  # unlike that of pathlib, it raises nothing where access is refused
        return None
    parent = next(place for place in folder.parents if os.path.exists(place))
    if not os.path.isdir(parent):
        return f"{parent} is a file, not a folder"
    try:
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return f"{parent}: {error.strerror}"


def _sections(spec: RunSpec) -> Iterator[tuple[Path, Section]]:
    """Every section with its path; those of a sweep are the sections of its trials, each different one once."""
    if not isinstance(spec, SweepSpec):
        yield from _below(spec, ())
        return
    seen: set[tuple[Path, str]] = set()
    for trial in spec.trials():
        for path, section in _below(trial.spec, ("base",)):
            if isinstance(section, tuple(_EXAMINED)):
                only = _OF_A_RUN if isinstance(section, RunSpec) else None  # its name is that of the trial
                content = section.model_dump_json(include=only)
                if (path, content) not in seen:
                    seen.add((path, content))
                    yield path, section


def _below(value: Any, path: Path) -> Iterator[tuple[Path, Section]]:
    if isinstance(value, Section):
        yield path, value
        for key, inner in value:
            yield from _below(inner, (*path, key))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _below(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _below(inner, (*path, index))


def _of_input(each: Input, spec: RunSpec, made: dict[str, str]) -> Iterator[Mistake]:
    """What is wrong with a run, a module or a place that is named."""
    if each.kind == "run":
        yield from _of_named_run(each, spec, made)
    elif each.kind == "code":
        yield from _of_code(each)


def _of_named_run(each: Input, spec: RunSpec, made: dict[str, str]) -> Iterator[Mistake]:
    if each.place in made:
        yield from _of_kind(each, made[each.place])
        return
    if "://" in spec.store or each.place.rpartition("-")[0] in made:  # a trial of a sweep before
        return
    try:
        run = open_run(spec.store, each.place, must_exist=True)
        manifest = run.manifest()
    except PoiseError as error:
        yield Mistake(each.path, f"{error}", absent=isinstance(error, UserError))
        return
    if manifest is not None:
        yield from _of_kind(each, manifest.kind)
    if not _has_result(run):
        status = run.summary().status
        yield Mistake(each.path, f"run {each.place!r} has no result yet, it is {status}: run it to its end first")


def _of_kind(each: Input, kind: str) -> Iterator[Mistake]:
    head, _, trials = kind.partition(" of ")  # a sweep stands for its trials
    if each.kinds and (head not in each.kinds or (trials and trials not in each.kinds)):
        yield Mistake(
            each.path, f"run {each.place!r} is a {kind}; what is read here is left by {' or '.join(each.kinds)}"
        )


def _has_result(run: Run) -> bool:
    return bool(run.files("artifacts/summary.json"))


def _of_code(each: Input) -> Iterator[Mistake]:
    module, _, name = each.place.partition(":")
    try:
        names = attributes(each.place)
    except UserError as error:
        yield Mistake(each.path, str(error), absent="there is no module" in str(error))
        return
    if names is not None and name not in names:
        yield Mistake(each.path, f"module {module!r} defines no {name!r}; {nearest(name, names)}")


def _examined(path: Path, section: Section) -> Iterator[Mistake]:
    examine = next(function for kind, function in _EXAMINED.items() if isinstance(section, kind))
    try:
        for finding in examine(section):
            key = (int(part) if part.isdigit() else part for part in finding.key.split("."))
            yield Mistake((*path, *key), finding.message, finding.absent, finding.is_note)
    except PoiseError as error:
        yield Mistake(path, str(error))


def _images(spec: DataSpec) -> Iterator[Finding]:
    if spec.root is None or "://" in spec.root:
        return
    root = FilePath(spec.root).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.is_file() else "is not there"
        cure = f"nothing is downloaded: put the files of {spec.name} there"
        yield Finding("root", f"the folder {shown(root)} {what}; {cure}", absent=True)
        return
    from poise.data.files import image_files
    from poise.store.storage import open_storage

    storage = open_storage(spec.root)
    names = [entry.key for entry in storage.list("")]
    for part in ("train", "test"):
        try:
            files = image_files(spec, part, names, storage.url)
            _check_header(root / files[0], part)
        except (UserError, ValueError) as error:
            yield Finding("root", str(error))
            return


def _check_header(file: FilePath, part: str) -> None:
    """ValueError where the columns of a Parquet file, or the arrays of an npz file, are not those that are read."""
    import zipfile

    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        from poise.data.readers import parquet_columns

        try:
            parquet_columns(pq.read_schema(file))
        except (ValueError, pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    if file.suffix == ".npz":
        try:
            with zipfile.ZipFile(file) as content:
                names = content.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        if missing := [name for name in (f"x_{part}", f"y_{part}") if f"{name}.npy" not in names]:
            held = ", ".join(name.removesuffix(".npy") for name in names)
            raise ValueError(f"{file} holds no {' and no '.join(missing)}, only {held}")


def _prompts(spec: CalibrateMeasureSpec | AlignSelfplaySpec) -> Iterator[Finding]:
    """Answers that are longer than the model can hold, whatever is asked; or after the prompts that there are."""
    context = _context(spec.model)
    if context is None:
        return
    if isinstance(spec, CalibrateMeasureSpec):
        key, tokens = "decoding.max_tokens", spec.decoding.max_tokens
    else:
        key, tokens = "max_tokens", spec.max_tokens
    most = context - 2  # a prompt has a token, and vLLM scores by asking for one more
    if tokens > most:
        message = f"{tokens} tokens are more than the model in {spec.model.folder} can hold after a prompt, {most}"
        yield Finding(key, f"{message}: lower it")
    elif fault := prompt_too_long(spec, context, tokens):
        yield Finding(key, fault)


def _examples(spec: FinetuneSftSpec) -> Iterator[Finding]:
    """Texts that are longer than the model can hold or the spec allows."""
    context = _context(spec.model)
    if context is not None and (fault := example_too_long(spec, context)):
        yield Finding("data.path", fault)


def _context(spec: LanguageModelSpec) -> int | None:
    """The longest sequence of the model in a local folder; None where it is not known."""
    if spec.folder is None or "://" in spec.folder:
        return None
    from poise.models.examine import examine_folder

    try:
        return examine_folder(spec.folder).context
    except UserError:
        return None  # told of the folder itself


def _subject(spec: SubjectSpec) -> Iterator[Finding]:
    if spec.file is None or "://" in spec.file:
        return
    file = FilePath(spec.file).expanduser()
    if not spec.file.endswith(".safetensors"):
        cure = "convert it with safetensors.torch.save_file(state_dict, 'model.safetensors')"
        yield Finding("file", f"{spec.file} is no .safetensors file, and pickles are never read: {cure}")
    elif not file.is_file():
        yield Finding("file", f"{shown(file)} is not there", absent=True)
    elif message := _header_fault(file):
        yield Finding("file", f"{spec.file} is damaged: {message}")


def _header_fault(file: FilePath) -> str:
    """What is wrong with the header of a safetensors file; empty where it is whole."""
    with file.open("rb") as stored:
        length = int.from_bytes(stored.read(8), "little")
        if not 0 < length <= file.stat().st_size - 8:
            return "its header is longer than the file"
        try:
            header = json.loads(stored.read(length))
        except ValueError:
            return "its header is no JSON"
    return "" if isinstance(header, dict) else "its header is no JSON object"


_EXAMINED: dict[type[Section], Callable[[Any], Iterator[Finding]]] = {
    DataSpec: _images,
    JsonlText: text_findings,
    ParquetText: text_findings,
    JsonlQuestions: question_findings,
    CsvQuestions: question_findings,
    ParquetQuestions: question_findings,
    LanguageModelSpec: folder_findings,
    SubjectSpec: _subject,
    CalibrateMeasureSpec: _prompts,
    AlignSelfplaySpec: _prompts,
    FinetuneSftSpec: _examples,
    RobustEvaluateSpec: state_dict_findings,
    BoundsReportSpec: state_dict_findings,
}
