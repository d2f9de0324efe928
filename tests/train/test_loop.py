"""The loop against a loop written by hand, and its parts one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poise.errors import PoiseError, UserError
from poise.spec import ExactNumber
from poise.spec.seeds import derive_seed
from poise.train.context import Context
from poise.train.loop import fit
from poise.train.plan import EpochPlan
from poise.train.schedule import factor
from poise.train.spec import Checkpointing, Interval
from poise.train.state import seed_rng
from poise.train.task import StepOutput


def by_hand(task, spec, accumulate: int = 1) -> nn.Module:
    """Plain PyTorch: the same draws, the same arithmetic, none of our machinery."""
    model, optimizer = task.model, torch.optim.SGD(
        task.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True
    )  # fmt: skip
    seed_rng(task.seed, 0)
    generator, state = torch.Generator(), task.state

    class StepContext:
        pass

    epochs = [[4 * epoch + batch for batch in range(4)] for epoch in range(spec.steps)]
    parts = [epoch[start : start + accumulate] for epoch in epochs for start in range(0, 4, accumulate)]
    for step in range(spec.steps):
        step_context = StepContext()
        step_context.generator = generator.manual_seed(derive_seed(task.seed, "step", step, 0))
        for index in parts[step]:
            loss, _, state = task.step(model, task.batch(index), state, step_context)
            (loss / len(parts[step])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor(spec.schedule, step, spec.steps)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loop_is_the_loop_written_by_hand_bit_by_bit(accumulate, bench, make_spec, make_task):
    never = Interval(steps=10**6)
    spec = make_spec(accumulate=accumulate, evaluate_every=never, checkpoint=Checkpointing(every=never))
    mine, theirs = make_task(), make_task()
    mine.evaluate = theirs.evaluate = None
    fit(mine, spec, Context(bench.run("mine")))
    by_hand(theirs, spec, accumulate)
    for name, value in mine.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name]), name


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 5, 8])
def test_an_epoch_is_one_pass_whatever_is_accumulated(accumulate, bench, make_spec, make_task):
    """3 epochs of 4 batches read each batch three times, in order, and every step belongs to one epoch."""
    task, read = make_task(), []
    honest = task.batch
    task.batch = lambda index: read.append(index) or honest(index)
    spec = make_spec(steps=None, epochs=3, accumulate=accumulate)
    fitted = fit(task, spec, Context(bench.run("a")))
    assert read == list(range(12))
    assert fitted.epochs == 3
    assert fitted.final_step == 3 * -(-4 // accumulate)


@pytest.mark.parametrize(("batches", "accumulate", "repeats"), [(7, 3, 1), (6, 3, 2), (3, 8, 1), (5, 2, 3), (1, 1, 1)])
def test_the_plan_by_a_slow_loop(batches, accumulate, repeats):
    plan, expected = EpochPlan(batches, accumulate, repeats), []
    for epoch in range(3):
        first = epoch * batches
        for start in range(0, batches, accumulate):
            group = list(range(first + start, first + min(start + accumulate, batches)))
            expected += [group] * repeats
    assert plan.steps * 3 == len(expected)
    assert [list(plan.of_step(step)) for step in range(len(expected))] == expected
    for group in expected:
        assert all(list(plan.with_batch(index)) == group for index in group)
    seen = [0, *(group[-1] + 1 for group in expected)]
    assert [plan.batches_before(step) for step in range(len(seen))] == seen


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

        def step(model, batch, state, step_context):
            return StepOutput(nn.functional.cross_entropy(model(batch[0]), batch[1]), {}, state)

        fit(Task(model, batch, step, cut, size), make_spec(accumulate=accumulate), Context(bench.run(f"cut-{cut}")))
        return model.weight.detach()

    assert torch.allclose(final(1, 1), final(2, 2), atol=1e-6)


def test_best_and_final_checkpoints_are_kept_and_named(bench, make_spec):
    fitted = bench.fit("a", checkpoint=Checkpointing(every=Interval(steps=1), keep=1))
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

    def step(model, batch, state, step_context):
        output = inner(model, batch, state, step_context)
        return output._replace(loss=output.loss * (float("nan") if step_context.step == 7 else 1))

    task.step = step
    with pytest.raises(PoiseError, match=r"loss is nan .* up to step 8"):
        fit(task, make_spec(), Context(bench.run("a")))
    assert bench.steps("a") == [3, 4, 6]


def test_bf16_computes_forward_passes_in_bf16_and_keeps_fp32_weights(bench, make_spec, make_task):
    task, seen = make_task(), []
    inner = task.step

    def step(model, batch, state, step_context):
        seen.append(model[0](batch[0]).dtype)
        return inner(model, batch, state, step_context)

    task.step = step
    fit(task, make_spec(precision="bf16"), Context(bench.run("a")))
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in task.model.parameters())


def test_clipping_bounds_the_gradient(bench, make_spec):
    bench.fit("a", clip_norm=ExactNumber("1e-3"))
    norms = [row["value"] for row in bench.rows("a") if row["name"] == "grad_norm"]
    assert min(norms) > 1e-3  # the norm before clipping, so clipping was at work in every window


def test_a_model_with_nothing_to_train_is_refused(bench, make_spec, make_task):
    task = make_task()
    task.model.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        fit(task, make_spec(), Context(bench.run("a")))
