"""`kind: finetune.sft`: supervised training of a language model on prompts and completions.

text -> model -> train.loop [hidden states -> head and loss, some tokens at a time] -> cross entropy and entropy
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from poise.data.text.batches import (
    IGNORE_INDEX,
    TextBatch,
    TextBatches,
    TextData,
    load_text,
    text_batch,
    text_tokenizer,
)
from poise.errors import UserError
from poise.finetune.losses import FinetuneLoss, cross_entropy, entropy, fused_loss
from poise.finetune.losses.base import compute_loss, prepare_loss
from poise.finetune.neftune import EmbeddingNoise
from poise.kinds.common.export import (
    export_model,
    next_token_probabilities,
    probe_sequences,
    rehearse_export,
)
from poise.kinds.common.extra_metrics import measure_texts
from poise.kinds.common.language_evaluation import ReferenceDistribution, held_out, warn
from poise.kinds.finetune_sft.result import FinetuneSftResult, TokenCounts
from poise.kinds.finetune_sft.spec import FinetuneSftSpec
from poise.models.heads import HiddenStates, linear_head
from poise.models.language import open_language_model
from poise.models.limits import model_limits
from poise.models.scoring import position_logits
from poise.models.sizes import count_parameters
from poise.models.special_tokens import reconcile
from poise.spec.seeds import derive_seed
from poise.store.result import write_result
from poise.train.context import Context
from poise.train.loop import FitResult, fit
from poise.train.plan import EpochPlan
from poise.train.restore import restore
from poise.train.task import StepContext, StepOutput, Task, TaskState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["run"]


class _Batch(NamedTuple):
    """A micro-batch of this rank, and the number by which the loss divides its sum over tokens."""

    text: TextBatch
    normalizer: float


_PREPARED_FROM = 100
"""The number of examples that a loss is prepared from."""

_Step = Callable[[nn.Module, _Batch, TaskState, StepContext], StepOutput]


def run(spec: FinetuneSftSpec, context: Context) -> None:
    """Train, then measure the exported weights on held-out examples and, in a world, against the true answers."""
    # Model and data.
    new_tokenizer = text_tokenizer(spec.data) if spec.model.name else None
    model, tokenizer = open_language_model(spec.model, spec.store, derive_seed(spec.seed, "model"), new_tokenizer)
    special = reconcile(model, tokenizer)
    data = load_text(spec.data, tokenizer, spec.seed, model_limits(model))
    world = spec.data.known_world
    reference = None if world is None else ReferenceDistribution(world, tokenizer, special.stop)
    batches = TextBatches(data.train, spec.batch_size, spec.seed, context.rank, context.world_size, context.device)
    warnings = [*special.notes, *spec.tuning.prepare(model)]
    warn(warnings, context)

    # What the end of the run will need is tried before the first step: the export and the evaluation.
    preview = _preview(data, tokenizer)
    probes = probe_sequences([(*example.prompt, *example.completion) for example in data.train[:4]])
    rehearse_export(model, tokenizer, probes, context)
    model = spec.tuning.add_adapters(model, derive_seed(spec.seed, "lora")).to(context.device)
    held_out(model, data.validation[: context.world_size], context)
    loss = prepare_loss(spec.loss, _initial_logits(model, data, context))
    step = _step(spec, loss, model, probes)

    # Training.
    fitted = fit(_task(spec, model, step, batches, data, reference, context), spec.train, context)
    selected = "best" if spec.export == "best" and restore(model, fitted.best_step, context) else "final"

    # Evaluation, export and result.
    parameters = count_parameters(model)
    trainable = count_parameters(model, trainable=True)
    probabilities = next_token_probabilities(model, probes)
    model = spec.tuning.merge_adapters(model)
    measured = _measure(spec, model, data, reference, context)
    context.on_main(partial(export_model, model, tokenizer, probes, probabilities, context))
    tokens = _count_tokens(spec, data, batches, fitted)
    result = FinetuneSftResult(
        run=spec.name,
        seed=spec.seed,
        warnings=warnings,
        objective=spec.describe_loss(loss),
        tuning=spec.tuning.describe(),
        step=fitted.final_step,
        best_step=fitted.best_step,
        selected=selected,
        parameters=parameters,
        trainable=trainable,
        measured=measured,
        floor=reference.floor if reference else None,
        tokens=tokens,
        supervised_share=tokens.supervised / tokens.all,
        tokens_per_answer=tokens.supervised / tokens.examples,
        preview=preview,
    )
    context.on_main(lambda: write_result(context.run, result))


def _task(
    spec: FinetuneSftSpec,
    model: nn.Module,
    step: _Step,
    batches: TextBatches,
    data: TextData,
    reference: ReferenceDistribution | None,
    context: Context,
) -> Task:
    return Task(
        model=model,
        batch=_normalized_batches(batches, spec.train.plan(batches.batches_per_epoch), context.world_size),
        step=step,
        batches_per_epoch=batches.batches_per_epoch,
        examples_per_batch=spec.batch_size,
        seed=spec.seed,
        evaluate=partial(_measure, spec, model, data, reference, context) if data.validation else None,
        monitor="-ce",
        unit="examples",
    )


def _normalized_batches(batches: TextBatches, plan: EpochPlan, world_size: int) -> Callable[[int], _Batch]:
    """Micro-batches whose losses, as the loop averages them, are the mean over all tokens of their optimizer step.

    The loop divides by the b micro-batches of the step and DDP by the number of ranks. With n supervised tokens in the
    step, the sum over tokens is therefore divided by n / (b * ranks). Every rank counts the tokens of all ranks, so no
    communication is needed.
    """

    def batch(index: int) -> _Batch:
        step_batches = plan.with_batch(index)  # the micro-batches of the optimizer step that `index` belongs to
        tokens = sum(map(batches.supervised, step_batches))
        if not tokens:
            raise UserError(f"data: the batches {step_batches[0]} to {step_batches[-1]} have no token to learn")
        return _Batch(batches.batch(index), tokens / (len(step_batches) * world_size))

    return batch


@torch.no_grad()
def _initial_logits(model: nn.Module, data: TextData, context: Context) -> Iterator[Tensor]:
    """What `FinetuneLoss.prepare` gets. The model is the one before training also where the run is started again."""
    batch = text_batch((data.validation or data.train)[:_PREPARED_FROM])
    mask = batch.mask.to(context.device)
    model.eval()
    for part in position_logits(model, batch.ids.to(context.device), mask, mask.bool()):
        yield part.logits


def _step(spec: FinetuneSftSpec, loss: FinetuneLoss, model: nn.Module, probes: Sequence[Sequence[int]]) -> _Step:
    """The step function. The head and the loss take a part of the tokens at a time, where both allow it."""
    states = HiddenStates(model)
    head = linear_head(model, probes, states) if loss.per_token else None
    noise = None
    if spec.neftune_alpha is not None:
        noise = EmbeddingNoise(model.get_input_embeddings(), float(spec.neftune_alpha))  # type: ignore[operator]

    def step(model: nn.Module, batch: _Batch, state: TaskState, step_context: StepContext) -> StepOutput:
        text = batch.text
        inputs = {"input_ids": text.ids, "attention_mask": text.mask, "use_cache": False}
        token_loss = partial(_loss_and_metrics, loss, batch.normalizer)
        with noise.drawn(step_context.generator, text.mask) if noise else nullcontext():
            if head is None:
                logits = model(**inputs).logits  # (B, T, V)
                value, metrics = token_loss(logits, text.labels)
            else:
                hidden = states(model, **inputs)  # (B, T, d)
                value, metrics = fused_loss(token_loss, hidden, text.labels, head)
        return StepOutput(value, metrics, state)

    return step


def _loss_and_metrics(
    loss: FinetuneLoss, normalizer: float, logits: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and as metrics cross entropy, the entropy of the model at supervised tokens, and those of the loss."""
    value, further_metrics = compute_loss(loss, logits, labels, normalizer)
    with torch.no_grad():
        metrics = {
            "ce": cross_entropy(logits, labels, normalizer=normalizer),
            "entropy": entropy(logits, labels, normalizer=normalizer),
        }
    return value, metrics | further_metrics


def _measure(
    spec: FinetuneSftSpec,
    model: nn.Module,
    data: TextData,
    reference: ReferenceDistribution | None,
    context: Context,
) -> dict[str, float]:
    """Metrics on held-out examples, those of the user's code included, and, in a world, against its true answers."""
    metrics = held_out(model, data.validation, context)
    metrics |= measure_texts(spec.extra_metrics, model, data.validation, context)
    if reference is None:
        return metrics
    return metrics | reference.measure(model, context)


def _count_tokens(spec: FinetuneSftSpec, data: TextData, batches: TextBatches, fitted: FitResult) -> TokenCounts:
    """Token counts of the training set, and of all batches of the run, where repeated tokens count each time."""
    # Without a prompt, the first token of the completion has nothing before it and is not predicted.
    supervised = sum(len(example.completion) - (not example.prompt) for example in data.train)
    total = sum(len(example.prompt) + len(example.completion) for example in data.train)
    plan = spec.train.plan(batches.batches_per_epoch)
    learned_from = sum(map(batches.supervised, range(plan.batches_before(fitted.final_step))))
    return TokenCounts(examples=len(data.train), all=total, supervised=supervised, learned_from=learned_from)


def _preview(data: TextData, tokenizer: Tokenizer) -> list[tuple[str | None, str | None]]:
    """The first training example as the model sees it: each token, with its label where it is supervised."""
    batch = text_batch(data.train[:1])

    def token_text(token: int) -> str | None:
        return None if token == IGNORE_INDEX else str(tokenizer.convert_ids_to_tokens(token))

    ids = batch.ids[0].tolist()
    labels = batch.labels[0].tolist()
    return [(token_text(token), token_text(label)) for token, label in zip(ids, labels, strict=True)]
