"""What is wrong with the stored models that a spec names: weights of another architecture than is written down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from poise.data.spec import known_sizes
from poise.errors import UserError
from poise.kinds.check_finding import Finding
from poise.kinds.specs.bounds import BoundsReportSpec
from poise.kinds.specs.evaluation import RobustEvaluateSpec, SubjectSpec
from poise.models.plans import Shape
from poise.models.spec import LanguageModelSpec

__all__ = ["folder_findings", "state_dict_findings"]


def state_dict_findings(spec: RobustEvaluateSpec | BoundsReportSpec) -> Iterator[Finding]:
    """Local state dicts that are not of the architecture which the spec gives them.

    Where the images of a data set are not known without reading it, this is left to the run.
    """
    sizes = None if spec.data is None else known_sizes(spec.data)
    if sizes is None:
        return
    models = [("model", spec.model)] if isinstance(spec, RobustEvaluateSpec) else []
    if isinstance(spec, BoundsReportSpec):
        models = [(f"models.{index}", model) for index, model in enumerate(spec.models)]
    for key, model in models:
        if model is not None and model.source == "file" and (fault := _file_fault(model, sizes.shape, sizes.classes)):
            yield Finding(f"{key}.file", fault)


def _file_fault(spec: SubjectSpec, shape: Shape, classes: int) -> str | None:
    """What the header of a state dict has otherwise than the network, which is built without memory for its weights."""
    from poise.models.stored_weights import read_header

    file = Path(str(spec.file)).expanduser()
    if not file.is_file() or file.suffix != ".safetensors":
        return None  # told of the file itself
    try:
        header = read_header(file)
    except UserError:
        return None
    import torch

    from poise.kinds.subject import match_state_dict
    from poise.models.build import build

    channels = shape[0]
    try:
        with torch.device("meta"):
            network = build(spec, shape=shape, classes=classes, mean=(0.0,) * channels, std=(1.0,) * channels, seed=0)
        match_state_dict(spec, network.state_dict(), header)
    except UserError as error:
        return str(error)
    return None


def folder_findings(spec: LanguageModelSpec) -> Iterator[Finding]:
    """What Poise cannot do with a local folder of a language model."""
    if spec.folder is None or "://" in spec.folder:
        return
    from poise.models.examine import examine_folder
    from poise.models.shapes import check_shapes

    try:
        check_shapes(examine_folder(spec.folder))
    except UserError as error:
        yield Finding("folder", str(error), absent=not Path(spec.folder).expanduser().exists())
