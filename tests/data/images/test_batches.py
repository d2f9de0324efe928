"""The training stream: pure in (seed, step), the same for any number of ranks, augmented as a slow loop would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.data.images.augmentation import Draws, crop_and_flip, draw
from poise.data.images.batches import Batches, load
from poise.data.images.choice import stratified_rows
from poise.data.images.datasets import to_float
from poise.data.images.spec import DataSpec
from poise.errors import UserError
from poise.spec.seeds import derive_seed


def make(n=50, *, batch_size=12, seed=3, **options) -> Batches:
    """n images, each a different constant plus a gradient, whose label is its row."""
    pixels = torch.arange(n).view(n, 1, 1, 1) + torch.arange(2 * 5 * 4).view(1, 2, 5, 4)
    return Batches(pixels.to(torch.uint8), torch.arange(n), batch_size=batch_size, seed=seed, **options)


def test_every_epoch_is_another_permutation_without_its_remainder():
    batches = make()
    assert batches.steps_per_epoch == 4
    epochs = []
    for epoch in range(3):
        rows = torch.cat([batches.batch(4 * epoch + step)[1] for step in range(4)])
        assert len(rows) == len(rows.unique()) == 48
        epochs.append(rows.tolist())
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({tuple(sorted(rows)) for rows in epochs}) > 1  # another remainder is dropped each time


def test_a_batch_that_divides_the_set_drops_nothing():
    batches = make(48)
    assert torch.cat([batches.batch(step)[1] for step in range(4)]).sort().values.tolist() == list(range(48))


def test_images_go_with_their_labels_and_are_scaled_exactly():
    batches = make()
    x, y = batches.batch(7)
    assert x.dtype == torch.float32
    assert torch.equal(x, batches.images[y].float() / 255)
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("mode", ["reflect", "zero"])
def test_any_step_can_be_read_at_any_time(mode):
    options = {"pad": 2, "pad_mode": mode, "flip": True}
    sequential = [make(**options).batch(step) for step in range(10)]
    forward = make(**options)
    for step, (x, y) in enumerate(sequential):
        assert torch.equal(forward.batch(step)[0], x)
        assert torch.equal(make(**options).batch(step)[1], y)
    for step in (9, 0, 5, 5, 2):
        x, y = forward.batch(step)
        assert torch.equal(x, sequential[step][0])
        assert torch.equal(y, sequential[step][1])


def test_the_stream_neither_reads_nor_moves_the_global_random_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make(pad=2, flip=True).batch(3)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(make(pad=2, flip=True).batch(3)[0], first)


def test_the_seed_changes_the_order_and_the_augmentation():
    assert not torch.equal(make(seed=1).batch(0)[1], make(seed=2).batch(0)[1])
    one, two = (make(1, batch_size=1, pad=3, flip=True, seed=seed) for seed in (1, 2))
    assert any(not torch.equal(one.batch(step)[0], two.batch(step)[0]) for step in range(5))


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
@pytest.mark.parametrize("resident", [True, False])
def test_ranks_together_see_what_one_worker_sees(world_size, resident):
    options = {"pad": 2, "flip": True}
    alone = make(**options)
    ranks = [make(rank=rank, world_size=world_size, resident=resident, **options) for rank in range(world_size)]
    for step in (0, 3, 4, 11):
        shares = [rank.batch(step) for rank in ranks]
        assert {len(y) for _, y in shares} == {12 // world_size}
        assert torch.equal(torch.cat([x for x, _ in shares]), alone.batch(step)[0])
        assert torch.equal(torch.cat([y for _, y in shares]), alone.batch(step)[1])


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(4, 7), st.integers(4, 7)),
    pad=st.integers(0, 3),
    flip=st.booleans(),
    mode=st.sampled_from(["reflect", "zero"]),
    seed=st.integers(0, 2**32),
)
def test_crop_and_flip_against_numpy_one_image_at_a_time(shape, pad, flip, mode, seed):
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    draws = draw(shape[0], pad=pad, flip=flip, seed=seed)
    fast = crop_and_flip(images, draws, pad=pad, mode=mode)
    kind = {"reflect": "reflect", "zero": "constant"}[mode]
    for image, top, left, mirrored, out in zip(images.numpy(), *draws, fast.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode=kind)
        crop = padded[:, top : top + shape[2], left : left + shape[3]]
        np.testing.assert_array_equal(out, crop[:, :, ::-1] if mirrored else crop)


def test_draws_are_uniform_over_every_offset_and_both_sides():
    draws = draw(20_000, pad=2, flip=True, seed=0)
    for offsets in (draws.top, draws.left):
        assert offsets.bincount().tolist() == pytest.approx([4_000] * 5, rel=0.1)
    assert draws.flip.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(draws.top, draws.left)
    assert not draw(100, pad=2, flip=False, seed=0).flip.any()


def test_no_shift_and_no_mirror_is_the_image_itself():
    images = torch.rand(3, 2, 6, 6)
    middle = torch.full((3,), 2)
    still = Draws(middle, middle, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(crop_and_flip(images, still, pad=2, mode="zero"), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 11}, "batch_size: 12 is more than the 11"),
        ({"world_size": 5}, "cannot be shared equally by 5"),
        ({"pad": 4}, "data.pad"),
    ],
)
def test_impossible_streams_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_validation_is_disjoint_reproducible_and_drawn_by_the_seed(tmp_path):
    images = np.arange(200, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    labels = np.arange(200) % 7
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images[:9], y_test=labels[:9])
    spec = DataSpec(name="npz", root=str(tmp_path), validation=30, batch_size=10)
    one, same, other = load(spec, 1), load(spec, 1), load(spec, 2)
    held_out, kept = (set(split.images[:, 0, 0, 0].tolist()) for split in (one.validation, one.train))
    assert (len(held_out), len(kept), len(one.test)) == (30, 170, 9)
    assert held_out | kept == set(range(200))
    assert torch.equal(one.validation.images, same.validation.images)
    assert not torch.equal(one.validation.images, other.validation.images)
    for split in (one.train, one.validation):
        assert torch.equal(split.labels, split.images[:, 0, 0, 0].long() % 7)
    assert (one.classes, one.shape) == (7, (1, 4, 4))


def test_limit_comes_before_validation_and_mean_and_std_are_those_of_train(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 5, 4, 3), np.uint8), np.arange(60) % 2
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = load(DataSpec(name="npz", root=str(tmp_path), limit=40, validation=10), 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 60)
    used = {image.tobytes() for image in (*data.train.images.numpy(), *data.validation.images.numpy())}
    rows = stratified_rows(labels, 40)
    assert used == {image.tobytes() for image in images[rows].transpose(0, 3, 1, 2)}
    assert np.bincount(labels[rows]).tolist() == [20, 20]
    pixels = data.train.images.numpy() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_a_constant_channel_has_std_one(tmp_path):
    images = np.full((20, 4, 4), 0.25, np.float32)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=np.arange(20) % 2, x_test=images[:2], y_test=[0, 1])
    data = load(DataSpec(name="npz", root=str(tmp_path)), 0)
    assert (data.mean, data.std) == ((0.25,), (1.0,))


def test_holding_everything_out_is_refused():
    with pytest.raises(UserError, match="leaves none to train on"):
        load(DataSpec(validation=1437), 0)


def test_derived_seeds_are_63_bit_and_depend_on_every_part():
    seeds = [derive_seed(0), derive_seed(1), derive_seed(0, 1), derive_seed(0, "1"), derive_seed(0, "a", 1)]
    seeds += [derive_seed(0, "augment", step) for step in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "augment", 7) == derive_seed(0, "augment", 7)
    ones = sum(bin(seed).count("1") for seed in seeds) / len(seeds)
    assert ones == pytest.approx(31.5, abs=0.6)
