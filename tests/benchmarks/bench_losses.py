"""Every loss of fine-tuning with the head in parts, beside autograd on the logits of the batch: memory and time.

2,048 tokens, a vocabulary of 151,936 and hidden states of width 128, fp32, forward and backward, one thread. Peak extra
memory is that of a process of its own, above its memory before the forward pass; the gradient of the head is in both.
Times are the median of alternating turns, with the range of their ratios.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from poise.finetune.losses import LOSSES, FinetuneLoss, LinearHead, fused_loss

TOKENS, VOCABULARY, WIDTH = 2048, 151_936, 128
TURNS = 5


def inputs() -> tuple[Tensor, Tensor, LinearHead]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden, labels, LinearHead(weight)


def eager(loss: FinetuneLoss, hidden: Tensor, labels: Tensor, head: LinearHead) -> None:
    loss.loss(head.logits(hidden), labels, normalizer=TOKENS).backward()  # type: ignore[no-untyped-call]
    hidden.grad = head.weight.grad = None


def fused(loss: FinetuneLoss, hidden: Tensor, labels: Tensor, head: LinearHead) -> None:
    def token_loss(logits: Tensor, chunk: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return loss.loss(logits, chunk, normalizer=TOKENS), {}

    value, _ = fused_loss(token_loss, hidden, labels, head)
    value.backward()  # type: ignore[no-untyped-call]
    hidden.grad = head.weight.grad = None


Way = Callable[[FinetuneLoss, Tensor, Tensor, LinearHead], None]


def peak_mebibytes(way: Way, loss: FinetuneLoss) -> float:
    """The peak extra memory of one forward and backward pass, in a child process that ends with it."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        arguments = inputs()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        way(loss, *arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writing, str(peak - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    kibibytes = float(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    return kibibytes / 1024


def main() -> None:
    torch.set_num_threads(1)
    logits = [torch.randn(100, VOCABULARY)]
    losses = {name: loss_class().prepare(logits) for name, loss_class in LOSSES.items()}
    memory = {name: (peak_mebibytes(eager, loss), peak_mebibytes(fused, loss)) for name, loss in losses.items()}
    arguments = inputs()
    for name, loss in losses.items():
        seconds: dict[Way, list[float]] = {eager: [], fused: []}
        for way in (eager, fused) * (TURNS + 1):
            began = time.perf_counter()
            way(loss, *arguments)
            seconds[way].append(time.perf_counter() - began)
        ratios = [part / whole for whole, part in zip(seconds[eager][1:], seconds[fused][1:], strict=True)]
        whole, part = memory[name]
        print(
            f"  {name:20} MiB {whole:6,.0f} -> {part:5,.0f} ({part / whole:.3f})",
            f"s {statistics.median(seconds[eager][1:]):5.2f} -> {statistics.median(seconds[fused][1:]):5.2f}",
            f"ratio {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
            sep="   ",
            flush=True,
        )


if __name__ == "__main__":
    main()
