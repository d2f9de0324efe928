"""Verdicts of attacks, committed a chunk at a time: what was attacked is in the store and is never attacked again.

A chunk is `artifacts/verdicts/STAGE/00000.parquet` of the run, a row per example. Its metadata has what it cost, and a
fingerprint of weights and images, so that no verdict is ever taken for that on something else. Points that fooled the
model are kept, if at all, in `artifacts/adversarial/STAGE/00000.safetensors`, written before the verdict that has
their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from poise.data.sets import ImageSet, unit_pixels
from poise.errors import DamagedError, PoiseError, UserError
from poise.kinds.attacks import BoundStage
from poise.kinds.user_model import explain_backward
from poise.robust.attacks import AttackResult, attack_mode
from poise.robust.noise import Noise
from poise.spec.seeds import derive_seed
from poise.store.runs import Run
from poise.train.context import Context

__all__ = ["Court", "Kept", "Verdict", "kept_examples"]

_VERDICTS, _ADVERSARIAL = "artifacts/verdicts/", "artifacts/adversarial/"
_SCHEMA = pa.schema({"example": pa.int64(), "correct": pa.bool_()})


@dataclass(frozen=True)
class Verdict:
    """Which of the examples (n,) were `correct` (n,) throughout, and what that took: images through the model
    (`queries`), those of them that a gradient was taken of, and seconds. `sha256` is that of the points kept."""

    examples: Tensor
    correct: Tensor
    gradients: int
    queries: int
    seconds: float
    sha256: str | None = None


@dataclass(frozen=True)
class Kept:
    """Adversarial examples of one chunk: images (n, C, H, W) float32 and the examples (n,) that they come from."""

    stage: str
    examples: Tensor
    images: Tensor


@dataclass(frozen=True)
class Court:
    """A model and the images that it is tried on; `digest` is that of its weights."""

    model: nn.Module
    digest: str
    images: ImageSet
    seed: int
    keep: bool
    context: Context

    def verdict(self, stage: BoundStage, number: int, examples: Tensor) -> Verdict:
        """The verdict of a chunk, from the store or, committed on the way, from an attack.

        Raises:
            UserError: the stored one is of other weights or images, or the attack does not suit the model.
            DamagedError: the stored one cannot be read.
            PoiseError: the output of the model for an example, which is named, is not finite.
            RunBusyError: another driver has taken the run over.
        """
        x, y = unit_pixels(self.images.images[examples]), self.images.labels[examples]
        fingerprint = self._fingerprint(x, y, examples)
        path = f"{stage.name}/{number:05}"
        known = _read(self.context.run, path, fingerprint)
        if known is not None:
            return known
        started = time.monotonic()
        result, meter = self._attacked(stage, x, y, examples)
        seconds = round(time.monotonic() - started, 3)
        self.context.guard()
        sha256 = self._kept(path, examples, result) if self.keep and stage.threats else None
        found = Verdict(examples, result.correct, meter.gradients, meter.queries, seconds, sha256)
        self.context.run.write(f"{_VERDICTS}{path}.parquet", _encoded(found, fingerprint))
        return found

    def _kept(self, path: str, examples: Tensor, result: AttackResult) -> str | None:
        """Write what fooled the model, exactly; its SHA-256, None where nothing did."""
        fooled = (~result.correct).nonzero().flatten()
        if not len(fooled):
            return None
        images = result.adversarial[fooled.to(result.adversarial.device)].float().cpu()
        data = save_tensors({"example": examples[fooled], "image": images.contiguous()})
        self.context.run.write(f"{_ADVERSARIAL}{path}.safetensors", data)
        return hashlib.sha256(data).hexdigest()

    def _attacked(self, stage: BoundStage, x: Tensor, y: Tensor, examples: Tensor) -> tuple[AttackResult, Meter]:
        """Attack a chunk; if the model's output is not finite, each example alone, to name the one at fault."""
        try:
            return self._attack(stage, x, y, examples)
        except UserError:
            raise
        except PoiseError as error:
            for row, example in enumerate(examples.tolist()):
                alone = slice(row, row + 1)
                try:
                    self._attack(stage, x[alone], y[alone], examples[alone])
                except PoiseError as fault:
                    raise PoiseError(f"stage {stage.name}: example {example}: {fault}") from fault
            first, last = int(examples[0]), int(examples[-1])
            raise PoiseError(f"stage {stage.name}, examples {first} to {last} together: {error}") from error

    def _attack(self, stage: BoundStage, x: Tensor, y: Tensor, examples: Tensor) -> tuple[AttackResult, Meter]:
        device = self.context.device
        noise = Noise.of(self.seed, stage.name, examples, device)
        meter = Meter(self.model, device)
        devices = [device] if device.type == "cuda" else []
        with attack_mode(meter), torch.random.fork_rng(devices):
            # what a randomised model draws is the chunk's own, on any rank and after any kill
            torch.manual_seed(derive_seed(self.seed, stage.name, int(examples[0])))
            try:
                with explain_backward(self.model):
                    result = stage.attack(meter, x.to(device), y.to(device), noise)
            except ValueError as error:
                raise UserError(f"stage {stage.name}: {error}") from None
            meter.check()
        return AttackResult(result.adversarial, result.correct.cpu()), meter

    def _fingerprint(self, x: Tensor, y: Tensor, examples: Tensor) -> str:
        """Of all that decides a verdict, the spec aside: that is the run's own."""
        digest = hashlib.sha256(self.digest.encode())
        for tensor in (x, y, examples):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


class Meter(nn.Module):
    """A model that counts what passes through it, and sees whether all that came out was finite.

    No forward hook, which a TorchScript model does not take.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._model, self._finite = model, torch.ones((), dtype=torch.bool, device=device)
        self.queries = self.gradients = 0

    def forward(self, x: Tensor) -> Tensor:
        self.queries += len(x)
        self.gradients += len(x) if x.requires_grad else 0
        output: Tensor = self._model(x)
        self._finite = self._finite & output.detach().amax(1).isfinite().all()  # -inf masks a class
        return output

    def check(self) -> None:
        """PoiseError if something was not finite: an attack may have taken it for a success."""
        if not bool(self._finite):
            raise PoiseError("the model's output is not finite: it has diverged, or its precision is too low")


def kept_examples(run: Run) -> Iterator[Kept]:
    """What a run has kept, chunk by chunk, in order. DamagedError for what is not what the verdict vouches for."""
    for path in run.files(_ADVERSARIAL):
        place = path.removeprefix(_ADVERSARIAL).removesuffix(".safetensors")
        data = run.read(path)
        if _told(run, place).get("sha256") != hashlib.sha256(data).hexdigest():
            raise DamagedError(f"{run.url}/{path} is not what was committed: its SHA-256 differs")
        tensors = load_tensors(data)
        yield Kept(place.partition("/")[0], tensors["example"], tensors["image"])


def _encoded(found: Verdict, fingerprint: str) -> bytes:
    told = {key: getattr(found, key) for key in ("gradients", "queries", "seconds", "sha256")}
    columns = {"example": found.examples.numpy(), "correct": found.correct.numpy()}
    table = pa.table(columns, schema=_SCHEMA.with_metadata({"poise": json.dumps({"fingerprint": fingerprint, **told})}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _read(run: Run, place: str, fingerprint: str) -> Verdict | None:
    try:
        table = _table(run, place)
    except FileNotFoundError:
        return None
    told = json.loads(table.schema.metadata[b"poise"])
    if told.pop("fingerprint") != fingerprint:
        raise UserError(
            f"{run.url}/{_VERDICTS}{place}.parquet is the verdict on other weights or images than there are now: "
            "choose another name for the run"
        )
    examples, correct = (torch.tensor(table[name].to_pylist()) for name in ("example", "correct"))
    return Verdict(examples, correct, **told)


def _told(run: Run, place: str) -> dict[str, object]:
    told: dict[str, object] = json.loads(_table(run, place).schema.metadata[b"poise"])
    return told


def _table(run: Run, place: str) -> pa.Table:
    path = f"{_VERDICTS}{place}.parquet"
    data = run.read(path)
    try:
        table = pq.read_table(pa.BufferReader(data))
        json.loads(table.schema.metadata[b"poise"])
        return table.select(_SCHEMA.names)
    except (pa.ArrowException, KeyError, TypeError, OSError, ValueError) as error:
        raise DamagedError(f"{run.url}/{path} is damaged ({error}): remove that one file and run again") from error
