"""What self-play methods share: responses as tensors, their log-probabilities, and the loss of a batch of them.

The game is over whole responses. The log-probability of a response is the sum over its tokens, up to and including the
first EOS. Its KL is the sum of full-vocabulary KLs per token, each weighed by the ratio of the prefix before it. That
ratio is 1 when the responses are fresh, but its gradient is not 0: it contains the effect of a token on the KLs after
it. Without that effect the fixed point is not that of the regularised game once a response has two tokens.

Shapes: N responses of at most T tokens with their prompts, M response tokens in all, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "KLRegularizer",
    "PolicyLoss",
    "Responses",
    "collate",
    "response_logits",
    "selfplay_loss",
    "token_logprobs",
]


class Responses(NamedTuple):
    """Responses after their prompts, padded on the right.

    ids int64 (N, T); attention int64 (N, T), 0 on padding; mask bool (N, T - 1), True at each position whose next token
    belongs to the response.
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor


class KLRegularizer(NamedTuple):
    """A reference policy: the coefficient of KL(new policy || reference), and its logits (M, V) at the responses."""

    coefficient: float
    logits: Tensor


class PolicyLoss(NamedTuple):
    """Loss per response (N,), to be averaged, and detached metrics.

    `kl/<anchor>` is the mean divergence (nats per response), `ratio` the largest |ratio - 1|.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device) -> Responses:
    """Token ids as tensors.

    Raises ValueError for an empty prompt or response, since nothing can be learned from it, and for ids that are not
    whole numbers from 0.
    """
    if not all(map(len, prompts)) or not all(map(len, responses)):
        raise ValueError("a prompt and a response have at least one token each")
    for row in (*prompts, *responses):
        for token in row:
            if token < 0 or token != int(token):
                raise ValueError(f"token ids are whole numbers from 0, not {token}")
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    in_response = torch.zeros(ids.shape, dtype=torch.bool)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids[index, :end] = torch.tensor([*prompt, *response])
        attention[index, :end] = 1
        in_response[index, len(prompt) : end] = True
    # position t predicts token t + 1
    return Responses(ids.to(device), attention.to(device), in_response[:, 1:].to(device))


def response_logits(model: Callable[[Tensor, Tensor], Tensor], batch: Responses) -> Tensor:
    """The logits that predict the tokens of the responses, in fp32: (M, V). `model(ids, attention)` gives (N, T, V)."""
    logits = model(batch.ids, batch.attention)[:, :-1]  # (N, T - 1, V)
    return logits[batch.mask].float()


def token_logprobs(logits: Tensor, batch: Responses) -> Tensor:
    """log p of each response token at its position, 0 elsewhere: (N, T - 1), from logits (M, V)."""
    tokens = batch.ids[:, 1:][batch.mask]  # (M,)
    logprobs = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (M,)
    return _scatter(logprobs, batch)


def selfplay_loss(
    logits: Tensor, previous: Tensor, anchors: Mapping[str, KLRegularizer], batch: Responses, advantage: Tensor
) -> PolicyLoss:
    """- advantage * ratio + sum over anchors of coefficient * KL(new || anchor), per response.

    Both terms hold for any new policy, not only for the one that the responses were drawn from.

    Args:
        logits: of the policy in training, (M, V).
        previous: of the policy that the responses were drawn from, (M, V), without gradient.
        advantage: (N,), without gradient.

    Raises:
        ValueError: an advantage of another shape or with gradient, an anchor with a coefficient below 0, or with logits
            of another shape.
    """
    if advantage.shape != batch.ids.shape[:1] or advantage.requires_grad:
        expected = tuple(batch.ids.shape[:1])
        raise ValueError(f"the advantage is {expected} without gradient, not {tuple(advantage.shape)}")
    for name, anchor in anchors.items():
        if not 0 <= anchor.coefficient < math.inf or anchor.logits.shape != logits.shape:
            shapes = f"{tuple(anchor.logits.shape)} logits for {tuple(logits.shape)}"
            raise ValueError(f"anchor {name!r} has the coefficient {anchor.coefficient} and {shapes}")
    log_ratio = token_logprobs(logits, batch) - token_logprobs(previous, batch)  # (N, T - 1)
    ratio = log_ratio.sum(-1).exp()  # (N,)
    prefix_ratio = (log_ratio.cumsum(-1) - log_ratio).exp()  # (N, T - 1), of the tokens before each one
    loss = -advantage * ratio
    metrics = {"ratio": (ratio.detach() - 1).abs().max()}
    for name, anchor in anchors.items():
        token_divergence = _scatter(_divergence(logits, anchor.logits), batch)  # (N, T - 1)
        divergence = (prefix_ratio * token_divergence).sum(-1)  # (N,)
        loss = loss + anchor.coefficient * divergence
        metrics[f"kl/{name}"] = divergence.detach().mean()
    return PolicyLoss(loss, metrics)


def _divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) over the vocabulary: (M,) from logits (M, V) of both."""
    log_p = logits.log_softmax(-1)
    log_q = other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _scatter(values: Tensor, batch: Responses) -> Tensor:
    """Values of the M response tokens at their positions in (N, T - 1), 0 elsewhere."""
    zeros = torch.zeros(batch.mask.shape, dtype=values.dtype, device=values.device)
    return zeros.masked_scatter(batch.mask, values)
