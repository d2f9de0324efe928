"""Results of attacks, committed a chunk of examples at a time: a restarted run reads them and attacks only the rest.

A chunk is `artifacts/chunks/STAGE/00000.parquet` of the run (see `poise.store.chunks`), with a row per example.
Adversarial examples are stored, where the spec asks for them, in `artifacts/adversarial/STAGE/00000.safetensors`,
written before the chunk that has their SHA-256.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from poise.data.images.datasets import ImageSet, to_float
from poise.errors import IntegrityError, PoiseError, UserError
from poise.kinds.common.attack_stages import BoundStage
from poise.kinds.common.user_model import explain_backward
from poise.robust.attacks import AttackResult, attack_mode
from poise.robust.noise import Noise
from poise.spec.seeds import derive_seed
from poise.store.chunks import Chunk, ChunkFiles
from poise.store.runs import Run
from poise.train.context import Context

__all__ = ["AdversarialExamples", "ChunkEvaluator", "ChunkResult", "QueryCounter", "read_adversarial_examples"]

_CHUNKS = "artifacts/chunks/"
_ADVERSARIAL = "artifacts/adversarial/"
_SCHEMA = pa.schema({"example": pa.int64(), "correct": pa.bool_()})


@dataclass(frozen=True)
class ChunkResult:
    """The result of one stage on one chunk of n examples.

    Attributes:
        examples: their indices, int64 (n,).
        correct: bool (n,), whether the model classified the example correctly throughout the attack.
        gradients: images of which a gradient was taken.
        queries: images that went through the model, those with a gradient included.
        seconds: duration of the attack.
        sha256: of the file of adversarial examples; None where none was stored.
    """

    examples: Tensor
    correct: Tensor
    gradients: int
    queries: int
    seconds: float
    sha256: str | None = None


@dataclass(frozen=True)
class AdversarialExamples:
    """Adversarial examples of one chunk: images (n, C, H, W) float32, and the indices (n,) of the original examples."""

    stage: str
    examples: Tensor
    images: Tensor


@dataclass(frozen=True)
class ChunkEvaluator:
    """Attacks a model on chunks of images, and commits each result.

    Attributes:
        digest: SHA-256 of the weights of the model.
        seed: of the noise of all attacks.
        keep: whether adversarial examples are stored.
    """

    model: nn.Module
    digest: str
    images: ImageSet
    seed: int
    keep: bool
    context: Context

    def evaluate_chunk(self, stage: BoundStage, number: int, examples: Tensor) -> ChunkResult:
        """The result of chunk `number` of a stage, on the `examples` (n,): from the store, or attacked and committed.

        Raises:
            UserError: the stored chunk is of other weights or images, or the attack does not suit the model.
            IntegrityError: the stored chunk cannot be read.
            PoiseError: the output of the model for an example, which is named, is not finite.
            RunBusyError: another driver has taken the run over.
        """
        x = to_float(self.images.images[examples])  # (n, C, H, W)
        y = self.images.labels[examples]  # (n,)
        fingerprint = self._fingerprint(x, y, examples)
        name = f"{stage.name}/{number:05}"
        chunks = _chunk_files(self.context.run)
        stored = chunks.read(name, fingerprint)
        if stored is not None:
            return _to_result(stored)
        started = time.monotonic()
        attack_result, counter = self._attack_or_locate(stage, x, y, examples)
        seconds = round(time.monotonic() - started, 3)
        files: dict[str, bytes] = {}
        sha256 = None
        if self.keep and stage.threats and not attack_result.correct.all():
            data = _encode_adversarial(examples, attack_result)
            files[f"{_ADVERSARIAL}{name}.safetensors"] = data
            sha256 = hashlib.sha256(data).hexdigest()
        result = ChunkResult(examples, attack_result.correct, counter.gradients, counter.queries, seconds, sha256)
        chunks.commit(name, _to_chunk(result), fingerprint, self.context.check_lease, files)
        return result

    def _attack_or_locate(
        self, stage: BoundStage, x: Tensor, y: Tensor, examples: Tensor
    ) -> tuple[AttackResult, QueryCounter]:
        """Attack a chunk. If an output of the model is not finite, attack each example alone to name the faulty one."""
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

    def _attack(self, stage: BoundStage, x: Tensor, y: Tensor, examples: Tensor) -> tuple[AttackResult, QueryCounter]:
        device = self.context.device
        noise = Noise.of(self.seed, stage.name, examples, device)
        counter = QueryCounter(self.model, device)
        devices = [device] if device.type == "cuda" else []
        with attack_mode(counter), torch.random.fork_rng(devices):
            # The draws of a randomised model depend on the chunk alone, not on the rank or on restarts.
            torch.manual_seed(derive_seed(self.seed, stage.name, int(examples[0])))
            try:
                with explain_backward(self.model):
                    result = stage.attack(counter, x.to(device), y.to(device), noise)
            except ValueError as error:
                raise UserError(f"stage {stage.name}: {error}") from None
            counter.check()
        return AttackResult(result.adversarial, result.correct.cpu()), counter

    def _fingerprint(self, x: Tensor, y: Tensor, examples: Tensor) -> str:
        """SHA-256 of weights, images, labels and indices. The spec is not in it: the run belongs to one spec."""
        digest = hashlib.sha256(self.digest.encode())
        for tensor in (x, y, examples):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


class QueryCounter(nn.Module):
    """A model that counts the images that pass through it and records whether all its outputs were finite.

    It wraps the model instead of using a forward hook, because a TorchScript model takes none.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._model = model
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self.queries = 0
        self.gradients = 0

    def forward(self, x: Tensor) -> Tensor:
        self.queries += len(x)
        self.gradients += len(x) if x.requires_grad else 0
        output: Tensor = self._model(x)
        # The largest logit of each image: a logit of -inf is a masked class and allowed.
        self._finite = self._finite & output.detach().amax(1).isfinite().all()
        return output

    def check(self) -> None:
        """Check that all outputs were finite: an attack may have counted one that was not as a success.

        Raises:
            PoiseError: one was not finite.
        """
        if not bool(self._finite):
            raise PoiseError("the model's output is not finite: it has diverged, or its precision is too low")


def read_adversarial_examples(run: Run) -> Iterator[AdversarialExamples]:
    """The stored adversarial examples of a run, chunk by chunk, in order.

    Raises:
        IntegrityError: a file differs from the SHA-256 in its chunk, or the chunk cannot be read.
    """
    chunks = _chunk_files(run)
    for path in run.files(_ADVERSARIAL):
        name = path.removeprefix(_ADVERSARIAL).removesuffix(".safetensors")
        data = run.read(path)
        if chunks.read_committed(name).facts["sha256"] != hashlib.sha256(data).hexdigest():
            raise IntegrityError(f"{run.url}/{path} is not what was committed: its SHA-256 differs")
        tensors = load_tensors(data)
        stage = name.partition("/")[0]
        yield AdversarialExamples(stage, tensors["example"], tensors["image"])


def _encode_adversarial(examples: Tensor, result: AttackResult) -> bytes:
    """A safetensors file of the points that fooled the model, exactly, and of the indices of their examples."""
    fooled = (~result.correct).nonzero().flatten()
    images = result.adversarial[fooled.to(result.adversarial.device)].float().cpu()
    data: bytes = save_tensors({"example": examples[fooled], "image": images.contiguous()})
    return data


def _chunk_files(run: Run) -> ChunkFiles:
    return ChunkFiles(run, _CHUNKS, _SCHEMA, inputs="weights or images")


def _to_chunk(result: ChunkResult) -> Chunk:
    """Examples and correctness as columns, everything else as facts."""
    columns = {"example": result.examples.numpy(), "correct": result.correct.numpy()}
    facts = {
        "gradients": result.gradients,
        "queries": result.queries,
        "seconds": result.seconds,
        "sha256": result.sha256,
    }
    return Chunk(pa.table(columns), facts)


def _to_result(chunk: Chunk) -> ChunkResult:
    """The result from which `_to_chunk` made the chunk."""
    examples = torch.tensor(chunk.table["example"].to_pylist())
    correct = torch.tensor(chunk.table["correct"].to_pylist())
    return ChunkResult(examples, correct, **chunk.facts)
