"""The iterations of self-play: send the weights to the sampler, generate and score rollouts, learn from them.

An iteration is `inner_steps` optimizer steps on the same rollouts. The rollouts follow from the committed weights, the
seed and the number of the iteration. State is committed between iterations only, so an iteration that was interrupted
starts again with the same rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from poise.align.oracles import Oracle
from poise.align.selfplay import PolicyBatch
from poise.align.selfplay.checks import compute_advantage, compute_policy_loss
from poise.align.selfplay.policy_loss import Responses, collate, response_logits, token_logprobs
from poise.data.order import rank_slice
from poise.errors import PoiseError, UserError
from poise.inference.sampler import (
    Decoding,
    Request,
    Sample,
    Sampler,
)
from poise.kinds.align_selfplay.questions import GameQuestion
from poise.kinds.align_selfplay.spec import AlignSelfplaySpec
from poise.spec.seeds import derive_seed
from poise.train.context import Context
from poise.train.task import StepContext, StepOutput, TaskState

__all__ = ["RolloutBatch", "SelfPlay", "snapshot_reference"]

REFERENCE = "magnet/"
"""Prefix of the weights of the reference policy in the state of the task; "magnet" is MPO's word for it."""

MAX_LOGPROB_DIFF = 0.1
"""A mean abs(logp_sampler - logp_trainer) per token above this means stale weights; bfloat16 alone gives about 0.02."""


@dataclass(frozen=True)
class RolloutBatch:
    """The rollouts of one micro-batch: N = questions * rollouts responses, those of a question one after the other.

    Attributes:
        responses: prompts and responses as padded token ids, (N, T).
        advantage: by question and rollout, as the method computes it, (questions, rollouts).
        sampler_logprobs: of each response token, (N, T - 1); 0 outside the response.
        metrics: means to be logged.
    """

    responses: Responses
    advantage: Tensor
    sampler_logprobs: Tensor
    metrics: dict[str, Tensor]


def snapshot_reference(model: nn.Module) -> TaskState:
    """A copy of the weights as the reference policy in the state of the task."""
    return {REFERENCE + name: weight for name, weight in _copy_weights(model).items()}


class SelfPlay:
    """Self-play as the task of the training loop. Every rank has one; `sampler` is None on all ranks but rank 0."""

    def __init__(
        self,
        spec: AlignSelfplaySpec,
        policy: nn.Module,
        questions: Sequence[GameQuestion],
        oracle: Oracle,
        decode: Callable[[Sample], str],
        sampler: Sampler | None,
        context: Context,
    ) -> None:
        """`decode` gives the text of a response that the oracle judges.

        Raises:
            UserError: the questions of an iteration cannot be shared equally by ranks and micro-batches.
        """
        if spec.prompts % (context.world_size * spec.train.accumulate):
            raise UserError(
                f"prompts: {spec.prompts} questions cannot be shared equally by {context.world_size} workers"
            )
        self._spec = spec
        self._method = spec.method
        self._policy = policy
        self._questions = questions
        self._oracle = oracle
        self._decode = decode
        self._sampler = sampler
        self._context = context
        self.micro_batches: list[RolloutBatch] = []
        self._previous_weights: Mapping[str, Tensor] = {}

    def step(self, model: nn.Module, index: int, state: TaskState, step_context: StepContext) -> StepOutput:
        """The loss of one micro-batch; the first one of an iteration generates the rollouts of all."""
        iteration, inner_step = divmod(step_context.step, self._method.inner_steps)
        micro_batch = index % self._spec.train.accumulate
        if inner_step == 0 and micro_batch == 0:
            with step_context.timers("generate"):
                state = self.start_iteration(iteration, state)
        rollouts = self.micro_batches[micro_batch]
        return self._policy_loss(model, rollouts, state, step_context, is_first_inner_step=inner_step == 0)

    def start_iteration(self, iteration: int, state: TaskState) -> TaskState:
        """Generate and score the rollouts of an iteration into `micro_batches`; the state, with the reference updated.

        Every rank keeps the micro-batches of its own share of the questions. All ranks call it.
        """
        # The sampler has no dropout, and ratios are taken between what it generated with and what is trained.
        self._policy.eval()
        samples: list[list[Sample]] = self._context.on_main(partial(self._generate_rollouts, iteration))
        questions = self._iteration_questions(iteration)
        share = rank_slice(len(questions), self._context.rank, self._context.world_size)
        size = (share.stop - share.start) // self._spec.train.accumulate
        self.micro_batches = [
            self._score_rollouts(questions[start : start + size], samples[start : start + size])
            for start in range(share.start, share.stop, size)
        ]
        # With one inner step the previous policy is the one that is trained, so no copy is needed.
        self._previous_weights = _copy_weights(self._policy) if self._method.inner_steps > 1 else {}
        if self._method.replaces_reference(iteration):
            return snapshot_reference(self._policy)
        return state

    def _iteration_questions(self, iteration: int) -> list[GameQuestion]:
        """The questions of one iteration. An epoch over all is a seeded permutation, whose remainder is dropped."""
        iterations_per_epoch = len(self._questions) // self._spec.prompts
        epoch, offset = divmod(iteration, iterations_per_epoch)
        generator = torch.Generator().manual_seed(derive_seed(self._spec.seed, "order", epoch))
        order = torch.randperm(len(self._questions), generator=generator)
        first = offset * self._spec.prompts
        return [self._questions[index] for index in order[first : first + self._spec.prompts].tolist()]

    def _generate_rollouts(self, iteration: int) -> list[list[Sample]]:
        """On rank 0: the rollouts of each question, and after them its opponents, all of the current policy.

        Raises:
            PoiseError: the sampler answered with weights of another iteration.
        """
        sampler = self._sampler
        assert sampler is not None
        if iteration:
            sampler.update_weights(self._policy.state_dict(), iteration)
        number = self._spec.rollouts + self._method.num_opponents
        # Each request takes `number` seeds in a row, so no two responses of an iteration share one.
        first_seed = derive_seed(self._spec.seed, "rollouts", iteration) % 2**40
        requests = [
            Request(f"{iteration}-{index}", question.tokens, number, first_seed + index * number)
            for index, question in enumerate(self._iteration_questions(iteration))
        ]
        samples = sampler.generate(requests, Decoding(self._spec.max_tokens))
        self._context.sink.inc("poise_samples_total", number * len(requests), run=self._context.run.name)
        versions = {sample.version for row in samples for sample in row}
        stale = versions - {iteration}
        if stale:
            raise PoiseError(f"iteration {iteration} was answered by weights of version {min(stale)}")
        return samples

    def _score_rollouts(self, questions: Sequence[GameQuestion], samples: Sequence[Sequence[Sample]]) -> RolloutBatch:
        """The rollouts of Q questions with their advantages; `samples` holds rollouts, then opponents, of each."""
        number = self._spec.rollouts
        device = self._context.device
        rollout_texts: list[list[str]] = []
        other_texts: list[list[str]] = []
        for question, row in zip(questions, samples, strict=True):
            texts = [self._decode(sample) for sample in row]
            rollout_texts.append(texts[:number])
            others = [*texts[number:], *question.proposals]
            other_texts.append(others or texts)  # a method without opponents and proposals compares rollouts
        preference = self._preference(questions, rollout_texts, other_texts)  # (Q, rollouts, others)
        advantage = compute_advantage(self._method, preference)  # (Q, rollouts)
        rollouts = [sample for row in samples for sample in row[:number]]
        prompts = [question.tokens for question in questions for _ in range(number)]
        responses = collate(prompts, [sample.tokens for sample in rollouts], device)
        logprobs = [logprob for sample in rollouts for logprob in sample.logprobs]
        sampler_logprobs = torch.zeros(responses.mask.shape, device=device)  # (N, T - 1)
        sampler_logprobs[responses.mask] = torch.tensor(logprobs, device=device)
        truncated = torch.tensor([sample.finish == "length" for sample in rollouts]).float().mean()
        metrics = {"preference": preference.mean(), "truncated": truncated.to(device)}
        return RolloutBatch(responses, advantage, sampler_logprobs, metrics)

    def _preference(
        self,
        questions: Sequence[GameQuestion],
        answers: Sequence[Sequence[str]],
        others: Sequence[Sequence[str]],
    ) -> Tensor:
        """P(answer is preferred to other): (questions, answers, others) on the device. One call of the oracle."""
        prompts: list[str] = []
        left: list[str] = []
        right: list[str] = []
        for question, question_answers, question_others in zip(questions, answers, others, strict=True):
            for answer in question_answers:
                for other in question_others:
                    prompts.append(question.prompt)
                    left.append(answer)
                    right.append(other)
        preference = self._oracle.compare(prompts, left, right).float()
        shape = (len(questions), len(answers[0]), len(others[0]))
        return preference.view(shape).to(self._context.device)

    def _policy_loss(
        self,
        model: nn.Module,
        rollouts: RolloutBatch,
        state: TaskState,
        step_context: StepContext,
        *,
        is_first_inner_step: bool,
    ) -> StepOutput:
        """The loss of the method on one micro-batch."""
        responses = rollouts.responses
        logits = response_logits(_forward(model), responses)  # (M, V), M response tokens
        metrics = dict(rollouts.metrics)
        if is_first_inner_step:  # the weights are still those that the rollouts were drawn from
            previous = logits.detach()
            metrics["gap"] = self._check_logprob_diff(previous, rollouts, step_context)
        else:
            previous = self._logits_of(self._previous_weights, responses)
        reference_weights = {name.removeprefix(REFERENCE): weight for name, weight in state.items()}
        reference = self._logits_of(reference_weights, responses)
        batch = PolicyBatch(responses, rollouts.advantage, logits, previous, reference)
        output = compute_policy_loss(self._method, batch)
        return StepOutput(output.loss.mean(), metrics | output.metrics, state)

    @torch.no_grad()
    def _logits_of(self, weights: Mapping[str, Tensor], responses: Responses) -> Tensor:
        """The logits (M, V) of the policy with other weights."""

        def forward(ids: Tensor, attention: Tensor) -> Tensor:
            inputs = {"input_ids": ids, "attention_mask": attention, "use_cache": False}
            logits: Tensor = functional_call(self._policy, dict(weights), (), inputs).logits
            return logits

        return response_logits(forward, responses)

    def _check_logprob_diff(self, logits: Tensor, rollouts: RolloutBatch, step_context: StepContext) -> Tensor:
        """Mean abs(logp_sampler - logp_trainer) per response token, over all ranks.

        Raises:
            PoiseError: it exceeds MAX_LOGPROB_DIFF; on all ranks.
        """
        responses = rollouts.responses
        trainer_logprobs = token_logprobs(logits, responses)  # (N, T - 1)
        difference = (trainer_logprobs - rollouts.sampler_logprobs)[responses.mask].abs().mean()
        logprob_diff = step_context.mean(difference)
        if logprob_diff > MAX_LOGPROB_DIFF:
            raise PoiseError(
                f"sampler and trainer differ by {logprob_diff:.3f} nats per token on the same responses: the weights "
                "that were sent are not those that answered"
            )
        return logprob_diff


def _forward(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as a function of ids (N, T) and attention (N, T), which returns logits (N, T, V)."""

    def forward(ids: Tensor, attention: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        return logits

    return forward


def _copy_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}
