"""Evaluation of language models, shared by the kinds that train them: held-out loss, and loss in a world."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from poise.data.synthetic_facts import make_world
from poise.data.text.batches import IGNORE_INDEX, text_batch
from poise.data.text.examples import (
    TextExample,
    answer_after,
    encode_examples,
    encode_prompts,
)
from poise.data.world_spec import WorldSpec
from poise.finetune.losses import cross_entropy, entropy
from poise.models.language import answer_logprobs
from poise.models.scoring import position_logits
from poise.observe.events import event
from poise.train.context import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["ReferenceDistribution", "held_out", "shared_logprobs", "warn"]

_EVALUATION_BATCH = 256


class ReferenceDistribution:
    """The true answers of a world, against which the loss of a model is exact, without sampling noise.

    `floor` is the entropy of the true answers in nats, the lowest cross entropy that a model can have.
    """

    def __init__(self, spec: WorldSpec, tokenizer: Tokenizer, stop: Collection[int]) -> None:
        """`stop`: the tokens that end a response."""
        self.world = make_world(spec)
        self._stop = stop
        questions = self.world.questions("evaluate")
        self.prompts = encode_prompts(tokenizer, [question.prompt for question in questions])
        self.answers: list[list[tuple[int, ...]]] = []  # of each question, the tokens of every possible answer
        for question in questions:
            candidates = self.world.candidates[question.id]
            pairs = [(question.prompt, answer_after(question.prompt, name)) for name in candidates]
            self.answers.append([example.completion for example in encode_examples(tokenizer, pairs)])
        self.floor = self.world.entropy("evaluate")

    def measure(self, model: nn.Module, context: Context) -> dict[str, float]:
        """Losses in nats per answer, and `outside`, the probability of all texts that are no possible answer."""
        logprobs = shared_logprobs(model, self.prompts, self.answers, self._stop, context)
        divergence = self.world.divergence("evaluate", logprobs)
        return {
            "answer_ce": divergence.cross_entropy,
            "excess": divergence.excess,
            "answer_entropy": divergence.entropy,
            "outside": divergence.outside,
        }


def shared_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    stop: Collection[int],
    context: Context,
) -> list[Tensor]:
    """`answer_logprobs` of all prompts, on every rank; each rank computes those of its shard."""
    shard = context.shard(len(prompts))
    shard_prompts = [prompts[row] for row in shard]
    shard_answers = [answers[row] for row in shard]
    return context.unshard(answer_logprobs(model, shard_prompts, shard_answers, stop=stop))


@torch.no_grad()
def held_out(model: nn.Module, examples: Sequence[TextExample], context: Context) -> dict[str, float]:
    """Cross entropy of the completions and entropy of the model at their tokens, in nats per token, over all ranks.

    {} without an example.
    """
    if not examples:
        return {}
    shard = [examples[row] for row in context.shard(len(examples))]
    training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)  # sums of cross entropy and entropy, number of tokens
    for start in range(0, len(shard), _EVALUATION_BATCH):
        batch = text_batch(shard[start : start + _EVALUATION_BATCH])
        ids = batch.ids.to(context.device)  # (B, T)
        mask = batch.mask.to(context.device)  # (B, T)
        labels = batch.labels.to(context.device)  # (B, T)
        for part in position_logits(model, ids, mask, labels != IGNORE_INDEX):
            targets = labels[part.rows, part.columns]  # (M,), with part.logits (M, V)
            ce_sum = cross_entropy(part.logits, targets, normalizer=1)
            entropy_sum = entropy(part.logits, targets, normalizer=1)
            tokens = torch.tensor(len(targets), device=targets.device)
            total += torch.stack([ce_sum, entropy_sum, tokens]).double().cpu()
    model.train(training)
    ce, entropy_total, num_tokens = torch.stack(context.gather(total)).sum(0).tolist()
    return {"ce": ce / num_tokens, "entropy": entropy_total / num_tokens}


def warn(sentences: Sequence[str], context: Context) -> None:
    """Add warnings for the user to the events of the run; every rank calls it."""
    if sentences:
        events = [event("warning", what=sentence) for sentence in sentences]
        context.on_main(lambda: context.run.append_events(events))
