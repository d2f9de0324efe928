"""The loop against a loop written by hand, and its parts one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poise.errors import PoiseError, UserError
from poise.spec import Real
from poise.spec.seeds import derive_seed
from poise.train.context import Context
from poise.train.loop import fit
from poise.train.schedule import factor
from poise.train.spec import Checkpointing, Every
from poise.train.state import seed_rng
from poise.train.task import StepOutput


def by_hand(task, spec, accumulate: int = 1) -> nn.Module:
    """Plain PyTorch: the same draws, the same arithmetic, none of our machinery."""
    model, optimizer = task.model, torch.optim.SGD(
        task.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True
    )  # fmt: skip
    seed_rng(task.seed, 0)
    generator, state = torch.Generator(), task.state

    class Turn:
        pass

    for step in range(spec.steps):
        turn = Turn()
        turn.generator = generator.manual_seed(derive_seed(task.seed, "step", step, 0))
        for part in range(accumulate):
            loss, _, state = task.step(model, task.batch(step * accumulate + part), state, turn)
            (loss / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor(spec.schedule, step, spec.steps)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loop_is_the_loop_written_by_hand_bit_by_bit(accumulate, bench, make_spec, make_task):
    never = Every(steps=10**6)
    spec = make_spec(accumulate=accumulate, evaluate_every=never, checkpoint=Checkpointing(every=never))
    mine, theirs = make_task(), make_task()
    mine.evaluate = theirs.evaluate = None
    fit(mine, spec, Context(bench.run("mine")))
    by_hand(theirs, spec, accumulate)
    for name, value in mine.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name]), name


def test_accumulated_batches_give_the_gradient_of_their_union(bench, make_spec):
    """Without batch norm and noise, two batches of 8 are one of 16."""
    x, y = torch.randn(16, 5), torch.randint(3, (16,))

    def final(cut: int, accumulate: int) -> torch.Tensor:
        from poise.train.task import Task

        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        size = 16 // cut

        def batch(index):
            part = slice((index % cut) * size, (index % cut + 1) * size)
            return x[part], y[part]

        def step(model, batch, state, turn):
            return StepOutput(nn.functional.cross_entropy(model(batch[0]), batch[1]), {}, state)

        fit(Task(model, batch, step, cut, size), make_spec(accumulate=accumulate), Context(bench.run(f"cut-{cut}")))
        return model.weight.detach()

    assert torch.allclose(final(1, 1), final(2, 2), atol=1e-6)


def test_best_and_final_checkpoints_are_kept_and_named(bench, make_spec):
    fitted = bench.fit("a", checkpoint=Checkpointing(every=Every(steps=1), keep=1))
    scores = {row["step"]: row["value"] for row in bench.rows("a") if row["name"] == "score"}
    assert fitted.final_step == 12
    assert fitted.best_step == max(scores, key=scores.__getitem__)
    assert bench.steps("a") == sorted({fitted.best_step, 12})


def test_rows_cover_every_step_once(bench):
    bench.fit("a")
    steps = [row["step"] for row in bench.rows("a") if row["name"] == "loss"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 12
    assert {row["name"] for row in bench.rows("a")} == {"loss", "noise", "lr", "sum_lr", "grad_norm", "score"}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_committed(bench, make_spec, make_task):
    task = make_task()
    inner = task.step

    def step(model, batch, state, turn):
        output = inner(model, batch, state, turn)
        return output._replace(loss=output.loss * (float("nan") if turn.step == 7 else 1))

    task.step = step
    with pytest.raises(PoiseError, match=r"loss is nan .* up to step 8"):
        fit(task, make_spec(), Context(bench.run("a")))
    assert bench.steps("a") == [3, 4, 6]


def test_bf16_computes_forward_passes_in_bf16_and_keeps_fp32_weights(bench, make_spec, make_task):
    task, seen = make_task(), []
    inner = task.step

    def step(model, batch, state, turn):
        seen.append(model[0](batch[0]).dtype)
        return inner(model, batch, state, turn)

    task.step = step
    fit(task, make_spec(precision="bf16"), Context(bench.run("a")))
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in task.model.parameters())


def test_clipping_bounds_the_gradient(bench, make_spec):
    bench.fit("a", clip_norm=Real("1e-3"))
    norms = [row["value"] for row in bench.rows("a") if row["name"] == "grad_norm"]
    assert min(norms) > 1e-3  # the norm before clipping, so clipping was at work in every window


def test_a_model_with_nothing_to_train_is_refused(bench, make_spec, make_task):
    task = make_task()
    task.model.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        fit(task, make_spec(), Context(bench.run("a")))
