"""What the kinds that train a language model share: how it is measured, and how it is left for other runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from poise.data.examples import TextExample, answer_after, encode_completion, encode_prompt
from poise.data.spec import WorldSpec
from poise.data.text import IGNORED, text_batch
from poise.data.worlds import make_world
from poise.finetune.losses import cross_entropy, entropy
from poise.models.language import answer_logprobs
from poise.models.scoring import position_logits
from poise.observe.events import event
from poise.train.context import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

__all__ = ["Truth", "held_out", "shared_logprobs", "warn"]

EVALUATED_AT_ONCE = 256


class Truth:
    """A world as a measure: the exact loss of a model against the true answers, without the noise of samples."""

    def __init__(self, spec: WorldSpec, tokenizer: Tokenizer, stop: Collection[int]) -> None:
        """`stop`: the tokens that end a response."""
        self.world, self._stop = make_world(spec), stop
        questions = self.world.questions("evaluate")
        self.prompts = [encode_prompt(tokenizer, question.prompt) for question in questions]
        self.answers = [
            [
                encode_completion(tokenizer, answer_after(question.prompt, name), question.prompt)
                for name in self.world.candidates[question.id]
            ]
            for question in questions
        ]
        self.floor = self.world.entropy("evaluate")

    def measure(self, model: nn.Module, context: Context) -> dict[str, float]:
        """Nats per answer, and the probability of anything that is no answer."""
        found = self.world.divergence(
            "evaluate", shared_logprobs(model, self.prompts, self.answers, self._stop, context)
        )
        return {
            "answer_ce": found.cross_entropy,
            "excess": found.excess,
            "answer_entropy": found.entropy,
            "outside": found.outside,
        }


def shared_logprobs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    stop: Collection[int],
    context: Context,
) -> list[Tensor]:
    """`answer_logprobs`, of which each rank computes a share of the prompts and gets the whole."""
    ranks, mine = context.world_size, slice(context.rank, None, context.world_size)
    shares = context.gather(answer_logprobs(model, prompts[mine], answers[mine], stop=stop))
    return [shares[row % ranks][row // ranks] for row in range(len(prompts))]


@torch.no_grad()
def held_out(model: nn.Module, examples: Sequence[TextExample], context: Context) -> dict[str, float]:
    """Cross entropy of the completions and entropy of the model where it answers, nats per token; {} of no example."""
    if not examples:
        return {}
    mine, training = examples[context.rank :: context.world_size], model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(mine), EVALUATED_AT_ONCE):
        batch = text_batch(mine[start : start + EVALUATED_AT_ONCE])
        ids, mask, labels = (part.to(context.device) for part in (batch.ids, batch.mask, batch.labels))
        for part in position_logits(model, ids, mask, labels != IGNORED):
            words = labels[part.rows, part.columns]
            sums = [measure(part.logits, words, normalizer=1) for measure in (cross_entropy, entropy)]
            total += torch.stack([*sums, torch.tensor(len(words), device=words.device)]).double().cpu()
    model.train(training)
    ce, spread, tokens = torch.stack(context.gather(total)).sum(0).tolist()
    return {"ce": ce / tokens, "entropy": spread / tokens}


def warn(sentences: Sequence[str], context: Context) -> None:
    """Put what a user should know of a run into its events; every rank calls it."""
    if sentences:
        events = [event("warning", what=sentence) for sentence in sentences]
        context.together(lambda: context.run.append_events(events))
