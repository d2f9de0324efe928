"""`kind: finetune.sft`: supervised training of a language model on prompts and completions.

text -> model -> train.loop [logits -> cross entropy or GEM over the tokens of the step] -> cross entropy and entropy
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from poise.data.spec import WorldText
from poise.data.text import IGNORED, TextBatch, TextBatches, TextData, load_text, text_batch, text_tokenizer
from poise.errors import UserError
from poise.finetune.losses import cross_entropy, entropy, gem_loss
from poise.finetune.spec import Gem, Lora, LossSpec
from poise.kinds.exported import keep_model, next_token_probabilities, probe_sequences, rehearse_export
from poise.kinds.language import Truth, held_out, warn
from poise.kinds.specs.finetune import FinetuneSftSpec
from poise.kinds.tuning import add_adapters, merge_adapters, prepare_tuning
from poise.models.language import open_language_model
from poise.models.limits import model_limits
from poise.models.special_tokens import reconcile
from poise.spec.seeds import derive_seed
from poise.train.context import Context
from poise.train.loop import Fitted, fit
from poise.train.plan import EpochPlan
from poise.train.restore import restore
from poise.train.task import StepOutput, Task, TaskState, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["run"]


class _Batch(NamedTuple):
    """A micro-batch of this rank, and what its sum over tokens is divided by."""

    text: TextBatch
    normalizer: float


def run(spec: FinetuneSftSpec, context: Context) -> None:
    """Train, then measure the model that is left on held-out examples and, in a world, against the truth."""
    new = text_tokenizer(spec.data) if spec.model.name else None
    model, tokenizer = open_language_model(spec.model, spec.store, derive_seed(spec.seed, "model"), new)
    special = reconcile(model, tokenizer)
    data = load_text(spec.data, tokenizer, spec.seed, model_limits(model))
    truth = Truth(spec.data.world, tokenizer, special.stop) if isinstance(spec.data, WorldText) else None
    batches = TextBatches(data.train, spec.batch_size, spec.seed, context.rank, context.world_size, context.device)
    warnings = [*special.notes, *prepare_tuning(model, spec.tuning)]
    warn(warnings, context)
    preview, probes = _preview(data, tokenizer), probe_sequences([(*e.prompt, *e.completion) for e in data.train[:4]])
    rehearse_export(model, tokenizer, probes, context)
    model = add_adapters(model, spec.tuning, derive_seed(spec.seed, "lora")).to(context.device)
    held_out(model, data.validation[: context.world_size], context)  # tried before it is needed
    fitted = fit(_task(spec, model, batches, data, truth, context), spec.train, context)
    selected = "best" if spec.export == "best" and restore(model, fitted.best_step, context) else "final"
    sizes = {"parameters": _numel(model), "trainable": _numel(model, trainable=True)}
    trained = next_token_probabilities(model, probes)
    model = merge_adapters(model, spec.tuning)
    measured = _measure(model, data, truth, context)
    context.together(partial(keep_model, model, tokenizer, probes, trained, context))
    told = _told(spec, fitted, selected) | sizes | {"measured": measured} | _tokens(spec, data, batches, fitted)
    told |= {"floor": truth.floor if truth else None, "preview": preview, "warnings": warnings}
    context.together(lambda: context.run.write("artifacts/summary.json", json.dumps(told, indent=1).encode()))


def _task(
    spec: FinetuneSftSpec, model: nn.Module, batches: TextBatches, data: TextData, truth: Truth | None, context: Context
) -> Task:
    return Task(
        model=model,
        batch=_batch(batches, spec.train.plan(batches.batches_per_epoch), context.world_size),
        step=_step(spec.loss),
        batches_per_epoch=batches.batches_per_epoch,
        examples_per_batch=spec.batch_size,
        seed=spec.seed,
        evaluate=partial(_measure, model, data, truth, context) if data.validation else None,
        monitor="-ce",
        unit="examples",
    )


def _batch(batches: TextBatches, plan: EpochPlan, world_size: int) -> Callable[[int], _Batch]:
    """Micro-batches whose losses, as the loop averages them, are the mean over all tokens of their optimizer step.

    The loop divides by the b batches of the step and DDP by the ranks, so a sum is divided by n / (b * ranks). Every
    rank counts the tokens of all: nothing is communicated.
    """

    def batch(index: int) -> _Batch:
        together = plan.with_batch(index)
        tokens = sum(map(batches.supervised, together))
        if not tokens:
            raise UserError(f"data: the batches {together[0]} to {together[-1]} have no token to learn")
        return _Batch(batches.batch(index), tokens / (len(together) * world_size))

    return batch


def _step(loss: LossSpec) -> Callable[[nn.Module, _Batch, TaskState, Turn], StepOutput]:
    """One step: the loss, and beside it cross entropy and the entropy of the model where it answers."""

    def step(model: nn.Module, batch: _Batch, state: TaskState, turn: Turn) -> StepOutput:
        text, n = batch
        logits = model(input_ids=text.ids, attention_mask=text.mask, use_cache=False).logits
        value = _loss(loss, logits, text.labels, n)
        with torch.no_grad():
            metrics = {
                "ce": cross_entropy(logits, text.labels, normalizer=n),
                "entropy": entropy(logits, text.labels, normalizer=n),
            }
        return StepOutput(value, metrics, state)

    return step


def _loss(spec: LossSpec, logits: Tensor, labels: Tensor, normalizer: float) -> Tensor:
    if isinstance(spec, Gem):
        return gem_loss(logits, labels, float(spec.beta), spec.variant, normalizer=normalizer)
    return cross_entropy(logits, labels, normalizer=normalizer)


def _measure(model: nn.Module, data: TextData, truth: Truth | None, context: Context) -> dict[str, float]:
    return held_out(model, data.validation, context) | (truth.measure(model, context) if truth else {})


def _told(spec: FinetuneSftSpec, fitted: Fitted, selected: str) -> dict[str, Any]:
    loss, tuning = spec.loss, spec.tuning
    return {
        "run": spec.name,
        "kind": spec.kind,
        "seed": spec.seed,
        "objective": f"gem ({loss.variant}, beta {loss.beta})" if isinstance(loss, Gem) else loss.name,
        "tuning": f"lora (rank {tuning.rank})" if isinstance(tuning, Lora) else tuning.name,
        "step": fitted.final_step,
        "best_step": fitted.best_step,
        "selected": selected,
    }


def _tokens(spec: FinetuneSftSpec, data: TextData, batches: TextBatches, fitted: Fitted) -> dict[str, Any]:
    """Counts of the training set, and of the tokens that the whole run has learned from, repeated ones too."""
    learned = sum(len(example.completion) - (not example.prompt) for example in data.train)
    whole = sum(len(example.prompt) + len(example.completion) for example in data.train)
    plan = spec.train.plan(batches.batches_per_epoch)
    seen = sum(map(batches.supervised, range(plan.batches_before(fitted.final_step))))
    return {
        "tokens": {"examples": len(data.train), "all": whole, "supervised": learned, "learned_from": seen},
        "supervised_share": learned / whole,
        "tokens_per_answer": learned / len(data.train),
    }


def _preview(data: TextData, tokenizer: Tokenizer) -> list[list[str | None]]:
    """The first training example as the model sees it: each token, and the one to be said next where it is learned."""
    batch = text_batch(data.train[:1])

    def word(token: int) -> str | None:
        return None if token == IGNORED else str(tokenizer.convert_ids_to_tokens(token))

    return [[word(at), word(after)] for at, after in zip(batch.ids[0].tolist(), batch.labels[0].tolist(), strict=True)]


def _numel(model: nn.Module, *, trainable: bool = False) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trainable)
