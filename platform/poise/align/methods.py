"""Self-play as it acts on a language model: what a sampled response is worth, and the loss of a batch of responses.

The game is over whole responses. Their log-probability is the sum over their tokens, the first EOS included and nothing
after it; their KL is the sum of full-vocabulary KLs per token, each weighed by the ratio of the prefix before it. That
ratio is 1 when the responses are fresh, yet its gradient is not 0: it carries the effect that a token has on the KLs
after it, without which the fixed point is not that of the regularised game as soon as a response has two tokens.

Shapes: P prompts, G rollouts per prompt, K opponents or proposals per prompt, N responses of at most T tokens with
their prompts, M response tokens in all, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Anchor",
    "Outcome",
    "Responses",
    "mpo_advantage",
    "nash_rs_advantage",
    "pack",
    "response_logits",
    "selfplay_loss",
    "token_logprobs",
]


class Responses(NamedTuple):
    """Responses after their prompts, padded on the right: ids int64 (N, T); attention int64 (N, T), 0 on padding;
    mask bool (N, T - 1), True at each position whose next token belongs to the response."""

    ids: Tensor
    attention: Tensor
    mask: Tensor


class Anchor(NamedTuple):
    """A policy that the new one is held to: the coefficient of KL(new || it), and its logits (M, V) at the response."""

    coefficient: float
    logits: Tensor


class Outcome(NamedTuple):
    """Loss per response (N,), to be averaged, and detached numbers: `kl/<anchor>`, the mean divergence (nats per
    response), and `ratio`, the largest |ratio - 1|."""

    loss: Tensor
    metrics: dict[str, Tensor]


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device) -> Responses:
    """Token ids as tensors. Raises ValueError for an empty prompt or response: nothing would be learnt from it; and for
    ids that are no whole numbers from 0."""
    if not all(map(len, prompts)) or not all(map(len, responses)):
        raise ValueError("a prompt and a response have at least one token each")
    if odd := [token for row in (*prompts, *responses) for token in row if token < 0 or token != int(token)]:
        raise ValueError(f"token ids are whole numbers from 0, not {odd[0]}")
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    attention, response = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for row, (before, after) in enumerate(zip(prompts, responses, strict=True)):
        end = len(before) + len(after)
        ids[row, :end] = torch.tensor([*before, *after])
        attention[row, :end] = 1
        response[row, len(before) : end] = True
    return Responses(ids.to(device), attention.to(device), response[:, 1:].to(device))


def response_logits(model: Callable[[Tensor, Tensor], Tensor], batch: Responses) -> Tensor:
    """The logits that predict the tokens of the responses, in fp32: (M, V). `model(ids, attention)` gives (N, T, V)."""
    return model(batch.ids, batch.attention)[:, :-1][batch.mask].float()


def token_logprobs(logits: Tensor, batch: Responses) -> Tensor:
    """log p of each response token at its place, 0 elsewhere: (N, T - 1), from logits (M, V)."""
    chosen = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:][batch.mask].unsqueeze(-1)).squeeze(-1)
    return _placed(chosen, batch)


def mpo_advantage(preference: Tensor) -> Tensor:
    """Mean preference over the opponents, less that of the prompt's other rollouts: (P, G) from (P, G, K), G >= 2.

    preference[p, g, k] = P(rollout g is preferred to opponent k), the opponents drawn from the current policy: against
    those of the magnet the method circles (2410.16714; Ahmadian et al., 2024, for the leave-one-out baseline).
    """
    _check_preference(preference)
    reward = preference.mean(-1)
    others = preference.shape[1] - 1
    return reward - (reward.sum(1, keepdim=True) - reward) / others


def nash_rs_advantage(preference: Tensor, tau: float) -> Tensor:
    """Mean preference over what rejection accepts of the proposals, less a baseline: (P, G) from (P, G, K), G >= 2.

    preference[p, g, k] = P(rollout g is preferred to proposal k), the proposals drawn from the reference. Rejection
    keeps proposal k with probability exp(-g_k / tau), g_k the mean preference for the policy's responses over it; here
    every proposal has that weight, normalised, which costs nothing more and cannot starve (2503.10990 v1, whose public
    code inverts the acceptance). For each rollout, weights and baseline come from the other G - 1.
    """
    _check_preference(preference)
    if not 0 < tau < math.inf:
        raise ValueError(f"tau is a number above 0, not {tau}")
    others = preference.shape[1] - 1
    loss = (preference.sum(1, keepdim=True) - preference) / others  # (P, G, K): g_k without rollout g
    weights = (-loss / tau).softmax(-1)
    rewards = torch.einsum("pgk,phk->pgh", weights, preference)  # of rollout h under the weights of rollout g
    own = rewards.diagonal(dim1=1, dim2=2)
    return own - (rewards.sum(2) - own) / others


def selfplay_loss(
    logits: Tensor, previous: Tensor, anchors: Mapping[str, Anchor], batch: Responses, advantage: Tensor
) -> Outcome:
    """- advantage * ratio + sum over anchors of coefficient * KL(new || anchor), per response; both for any new policy.

    Args:
        logits: of the policy that is trained, (M, V).
        previous: of the policy that the responses were drawn from, (M, V), without gradient.
        advantage: (N,), without gradient.

    Raises:
        ValueError: an advantage of another shape or with gradient, an anchor with a coefficient below 0, or logits of
            other positions.
    """
    if advantage.shape != batch.ids.shape[:1] or advantage.requires_grad:
        expected = tuple(batch.ids.shape[:1])
        raise ValueError(f"the advantage is {expected} without gradient, not {tuple(advantage.shape)}")
    for name, anchor in anchors.items():
        if not 0 <= anchor.coefficient < math.inf or anchor.logits.shape != logits.shape:
            shapes = f"{tuple(anchor.logits.shape)} logits for {tuple(logits.shape)}"
            raise ValueError(f"anchor {name!r} has the coefficient {anchor.coefficient} and {shapes}")
    log_ratio = token_logprobs(logits, batch) - token_logprobs(previous, batch)
    ratio = log_ratio.sum(-1).exp()
    prefix = (log_ratio.cumsum(-1) - log_ratio).exp()
    loss, metrics = -advantage * ratio, {"ratio": (ratio.detach() - 1).abs().max()}
    for name, anchor in anchors.items():
        divergence = (prefix * _placed(_divergence(logits, anchor.logits), batch)).sum(-1)
        loss = loss + anchor.coefficient * divergence
        metrics[f"kl/{name}"] = divergence.detach().mean()
    return Outcome(loss, metrics)


def _check_preference(preference: Tensor) -> None:
    if preference.ndim != 3 or preference.shape[1] < 2 or not preference.shape[2]:
        raise ValueError(f"needs preferences (P, G, K) with G >= 2 and K >= 1, not {tuple(preference.shape)}")


def _divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) over the vocabulary: (M,) from logits (M, V) of both."""
    mine, theirs = logits.log_softmax(-1), other.log_softmax(-1)
    return (mine.exp() * (mine - theirs)).sum(-1)


def _placed(values: Tensor, batch: Responses) -> Tensor:
    """Values of the M response tokens at their places in (N, T - 1), 0 elsewhere."""
    return torch.zeros(batch.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(batch.mask, values)
