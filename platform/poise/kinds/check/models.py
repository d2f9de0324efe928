"""Checks of the stored models that a spec names: files that are missing or damaged, weights of another architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from poise.data.images.spec import known_sizes
from poise.errors import UserError
from poise.kinds.bounds_report.spec import BoundsReportSpec
from poise.kinds.check.field_error import FieldError, absolute_path_hint
from poise.kinds.common.target_model_spec import TargetModelSpec
from poise.kinds.robust_evaluate.spec import RobustEvaluateSpec
from poise.models.architectures import Shape
from poise.models.spec import LanguageModelSpec
from poise.spec.problems import Path as SpecPath

__all__ = ["folder_errors", "state_dict_errors", "target_model_errors"]


def target_model_errors(spec: TargetModelSpec) -> Iterator[FieldError]:
    """What is wrong with the local file of a state dict, apart from its architecture."""
    if spec.file is None or "://" in spec.file:
        return
    file = Path(spec.file).expanduser()
    if not spec.file.endswith(".safetensors"):
        cure = "convert it with safetensors.torch.save_file(state_dict, 'model.safetensors')"
        yield FieldError(("file",), f"{spec.file} is no .safetensors file, and pickles are never read: {cure}")
    elif not file.is_file():
        yield FieldError(("file",), f"{absolute_path_hint(file)} is not there", absent=True)
    elif message := _header_fault(file):
        yield FieldError(("file",), f"{spec.file} is damaged: {message}")


def _header_fault(file: Path) -> str:
    """What is wrong with the header of a safetensors file; empty where it is valid.

    The file begins with the length of the header, 8 bytes little endian; the header is a JSON object.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= file.stat().st_size - 8:
            return "its header is longer than the file"
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return "its header is no JSON"
    return "" if isinstance(header, dict) else "its header is no JSON object"


def state_dict_errors(spec: RobustEvaluateSpec | BoundsReportSpec) -> Iterator[FieldError]:
    """Local state dicts that do not have the architecture which the spec gives them.

    Nothing is checked where the image shape and classes of the data set are known only after reading it: the run does
    that check.
    """
    sizes = None if spec.data is None else known_sizes(spec.data)
    if sizes is None:
        return
    if isinstance(spec, RobustEvaluateSpec):
        models: list[tuple[SpecPath, TargetModelSpec | None]] = [(("model",), spec.model)]
    else:
        models = [(("models", index), model) for index, model in enumerate(spec.models)]
    for path, model in models:
        if model is not None and model.source == "file":
            mismatch = _architecture_mismatch(model, sizes.shape, sizes.classes)
            if mismatch:
                yield FieldError((*path, "file"), mismatch)


def _architecture_mismatch(spec: TargetModelSpec, shape: Shape, classes: int) -> str | None:
    """How names and shapes in the header of a state dict differ from those of the network; None where they agree.

    The network is built on the meta device, so no memory is allocated for its weights.
    """
    from poise.models.stored_weights import read_header

    file = Path(str(spec.file)).expanduser()
    if not file.is_file() or file.suffix != ".safetensors":
        return None  # reported by target_model_errors
    try:
        header = read_header(file)
    except UserError:
        return None  # likewise
    from poise.kinds.common.target_model import match_state_dict
    from poise.models.build import build_on_meta

    try:
        network = build_on_meta(spec, shape=shape, classes=classes)
        match_state_dict(spec, network.state_dict(), header)
    except UserError as error:
        return str(error)
    return None


def folder_errors(spec: LanguageModelSpec) -> Iterator[FieldError]:
    """Why Poise cannot use a local folder of a language model."""
    if spec.folder is None or "://" in spec.folder:
        return
    from poise.models.examine import examine_folder
    from poise.models.shapes import check_shapes

    try:
        check_shapes(examine_folder(spec.folder))
    except UserError as error:
        yield FieldError(("folder",), str(error), absent=not Path(spec.folder).expanduser().exists())
