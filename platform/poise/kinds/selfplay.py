"""The iterations of self-play: sync the weights to the sampler, draw and judge responses, learn from them.

An iteration is `inner_steps` optimizer steps on the same responses. What is drawn follows from the committed weights,
the seed and the number of the iteration, so an iteration that was cut off is begun again with the same responses; the
state is committed between iterations only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from poise.align.methods import (
    Anchor,
    Responses,
    mpo_advantage,
    nash_rs_advantage,
    pack,
    response_logits,
    selfplay_loss,
    token_logprobs,
)
from poise.align.oracles import Oracle
from poise.align.spec import Mpo
from poise.errors import PoiseError, UserError
from poise.kinds.specs.align import AlignSelfplaySpec
from poise.models.sampling import Decoding, Request, Sample, Sampler
from poise.spec.seeds import derive_seed
from poise.train.context import Context
from poise.train.task import StepOutput, TaskState, Turn

__all__ = ["Asked", "SelfPlay", "magnet_of"]

MAGNET = "magnet/"
LARGEST_GAP = 0.1
"""Mean difference (nats per token) of sampler and trainer beyond which they hold other weights; bfloat16 has 0.02."""


@dataclass(frozen=True)
class Asked:
    """A question and its listed answers, in text and in tokens (EOS included); for Nash-RS what the reference says."""

    prompt: str
    tokens: tuple[int, ...]
    answers: tuple[str, ...]
    answer_tokens: tuple[tuple[int, ...], ...]
    proposals: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """What a micro-batch learns from: N = questions * rollouts responses with what they are worth (N,), the sampler's
    log-probabilities (N, T - 1), and means to be logged."""

    batch: Responses
    advantage: Tensor
    sampled: Tensor
    metrics: dict[str, Tensor]


def magnet_of(model: nn.Module) -> TaskState:
    """The weights as they are now, as the magnet in the state of the task."""
    return {MAGNET + name: weight for name, weight in _copied(model).items()}


class SelfPlay:
    """The step of the task. All ranks make one; `sampler` is that of rank 0 and None elsewhere."""

    def __init__(
        self,
        spec: AlignSelfplaySpec,
        policy: nn.Module,
        asked: Sequence[Asked],
        oracle: Oracle,
        words: Callable[[Sample], str],
        sampler: Sampler | None,
        context: Context,
    ) -> None:
        self._spec, self._method, self._policy, self._asked = spec, spec.method, policy, asked
        self._oracle, self._words, self._sampler, self._context = oracle, words, sampler, context
        if spec.prompts % (context.world_size * spec.train.accumulate):
            raise UserError(
                f"prompts: {spec.prompts} questions cannot be shared equally by {context.world_size} workers"
            )
        self._parts: list[_Part] = []
        self._previous: Mapping[str, Tensor] = {}

    def step(self, model: nn.Module, index: int, state: TaskState, turn: Turn) -> StepOutput:
        """One micro-batch; the first of an iteration draws the responses of all."""
        iteration, inner = divmod(turn.step, self._method.inner_steps)
        part = index % self._spec.train.accumulate
        if inner == part == 0:
            with turn.timers("generate"):
                state = self._begin(iteration, state)
        return self._learn(model, self._parts[part], state, turn, fresh=inner == 0)

    def _begin(self, iteration: int, state: TaskState) -> TaskState:
        self._policy.eval()  # the sampler has no dropout, and the ratios are between what it drew from and what learns
        drawn: list[list[Sample]] = self._context.together(lambda: self._draw(iteration))
        asked = self._questions(iteration)
        share = len(asked) // self._context.world_size
        size = share // self._spec.train.accumulate
        first = self._context.rank * share
        self._parts = [
            self._judged(asked[start : start + size], drawn[start : start + size])
            for start in range(first, first + share, size)
        ]
        self._previous = _copied(self._policy) if self._method.inner_steps > 1 else {}
        if isinstance(self._method, Mpo) and iteration and iteration % self._method.period == 0:
            return magnet_of(self._policy)
        return state

    def _questions(self, iteration: int) -> list[Asked]:
        """Those of one iteration; a pass over all is a seeded permutation, whose remainder is dropped."""
        per_pass = len(self._asked) // self._spec.prompts
        turn, offset = divmod(iteration, per_pass)
        order = torch.randperm(
            len(self._asked), generator=torch.Generator().manual_seed(derive_seed(self._spec.seed, "order", turn))
        )
        first = offset * self._spec.prompts
        return [self._asked[place] for place in order[first : first + self._spec.prompts].tolist()]

    def _draw(self, iteration: int) -> list[list[Sample]]:
        """Rank 0: rollouts, and for MPO after them opponents, all of the policy as it is now."""
        sampler, seed = self._sampler, self._spec.seed
        assert sampler is not None
        if iteration:
            sampler.update_weights(self._policy.state_dict(), iteration)
        number = self._spec.rollouts + (self._method.opponents if isinstance(self._method, Mpo) else 0)
        first = derive_seed(seed, "rollouts", iteration) % 2**40
        requests = [
            Request(f"{iteration}-{place}", asked.tokens, number, first + place * number)
            for place, asked in enumerate(self._questions(iteration))
        ]
        drawn = sampler.generate(requests, Decoding(self._spec.max_tokens))
        self._context.sink.inc("poise_samples_total", number * len(requests), run=self._context.run.name)
        if stale := {sample.version for samples in drawn for sample in samples} - {iteration}:
            raise PoiseError(f"iteration {iteration} was answered by weights of version {min(stale)}")
        return drawn

    def _judged(self, asked: Sequence[Asked], drawn: Sequence[Sequence[Sample]]) -> _Part:
        rollouts = [samples[: self._spec.rollouts] for samples in drawn]
        texts = [[self._words(sample) for sample in samples] for samples in drawn]
        mine = [row[: self._spec.rollouts] for row in texts]
        if isinstance(self._method, Mpo):
            preference = self._compared(asked, mine, [row[self._spec.rollouts :] for row in texts])
            advantage = mpo_advantage(preference)
        else:
            preference = self._compared(asked, mine, [question.proposals for question in asked])
            advantage = nash_rs_advantage(preference, float(self._method.tau))
        flat = [sample for samples in rollouts for sample in samples]
        prompts = [question.tokens for question in asked for _ in range(self._spec.rollouts)]
        batch = pack(prompts, [sample.tokens for sample in flat], self._context.device)
        sampled = torch.zeros(batch.mask.shape, device=batch.mask.device)
        sampled[batch.mask] = torch.tensor([p for sample in flat for p in sample.logprobs], device=batch.mask.device)
        cut = torch.tensor([sample.finish == "length" for sample in flat]).float().mean()
        metrics = {"preference": preference.mean(), "truncated": cut.to(batch.mask.device)}
        return _Part(batch, advantage.flatten(), sampled, metrics)

    def _compared(
        self, asked: Sequence[Asked], left: Sequence[Sequence[str]], right: Sequence[Sequence[str]]
    ) -> Tensor:
        """P(left answer is preferred to right answer): (questions, left answers, right answers)."""
        rows = [
            (question.prompt, mine, theirs)
            for question, ours, others in zip(asked, left, right, strict=True)
            for mine in ours
            for theirs in others
        ]
        said = self._oracle.compare(*zip(*rows, strict=True))
        return said.float().view(len(asked), len(left[0]), len(right[0])).to(self._context.device)

    def _learn(self, model: nn.Module, part: _Part, state: TaskState, turn: Turn, *, fresh: bool) -> StepOutput:
        logits = response_logits(_called(model), part.batch)
        previous = logits.detach() if fresh else self._of(self._previous, part.batch)
        metrics = dict(part.metrics)
        if fresh:
            metrics["gap"] = self._gap(previous, part, turn)
        magnet = self._of({name.removeprefix(MAGNET): weight for name, weight in state.items()}, part.batch)
        if isinstance(self._method, Mpo):
            anchors = {
                "magnet": Anchor(float(self._method.alpha), magnet),
                "previous": Anchor(1 / float(self._method.eta), previous),
            }
        else:
            anchors = {"reference": Anchor(float(self._method.tau), magnet)}
        outcome = selfplay_loss(logits, previous, anchors, part.batch, part.advantage)
        return StepOutput(outcome.loss.mean(), metrics | outcome.metrics, state)

    @torch.no_grad()
    def _of(self, weights: Mapping[str, Tensor], batch: Responses) -> Tensor:
        """The logits of the policy with other weights."""
        return response_logits(
            lambda ids, attention: (
                functional_call(
                    self._policy, dict(weights), (), {"input_ids": ids, "attention_mask": attention, "use_cache": False}
                ).logits
            ),
            batch,
        )

    def _gap(self, previous: Tensor, part: _Part, turn: Turn) -> Tensor:
        """Mean |log p of the sampler - log p of the trainer| per token; PoiseError on all ranks when it is large."""
        difference = (token_logprobs(previous, part.batch) - part.sampled)[part.batch.mask].abs().mean()
        gap = turn.mean(difference)
        if gap > LARGEST_GAP:
            raise PoiseError(
                f"sampler and trainer differ by {gap:.3f} nats per token on the same responses: the weights that were "
                "sent are not those that answered"
            )
        return gap


def _called(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def call(ids: Tensor, attention: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        return logits

    return call


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}
