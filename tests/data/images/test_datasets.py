"""Every format on files that the tests write, damaged files, and the real ones where they are at hand."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from scipy.io import savemat

from poise.data.images.batches import load, load_split
from poise.data.images.choice import stratified_rows
from poise.data.images.datasets import read, read_part
from poise.data.images.spec import DataSpec, known_sizes
from poise.errors import UserError

RNG = np.random.default_rng(0)


def random_images(n: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, *shape), np.uint8)


def spec_of(name: str, folder, **fields) -> DataSpec:
    return DataSpec(name=name, root=str(folder), **fields)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, *, sep="-", gz=True, n_train=6, n_test=4):
    wanted = {}
    for stem, n in (("train", n_train), ("t10k", n_test)):
        images, labels = random_images(n, 28, 28), (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            data = idx_bytes(array)
            name = f"{stem}-{kind}{sep}idx{array.ndim}-ubyte"
            (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(data) if gz else data)
        wanted[stem] = images, labels
    return wanted


def assert_holds(found, images_nchw, labels):
    assert torch.equal(found.images, torch.from_numpy(np.ascontiguousarray(images_nchw)))
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == list(labels)


def test_digits_are_the_exact_sixteenths_of_scikit_learn_in_a_fixed_stratified_split():
    from sklearn.datasets import load_digits

    train, test, classes = read(DataSpec())
    pixels, labels = load_digits(return_X_y=True)
    assert (len(train), len(test), classes) == (1437, 360, 10)
    images = torch.cat([train.images, test.images])
    assert images.dtype == torch.float32
    rows = sorted(map(tuple, (images * 16).reshape(-1, 64).tolist()))
    assert rows == sorted(map(tuple, pixels.tolist()))
    shares = test.labels.bincount() / np.bincount(labels)
    assert shares.tolist() == pytest.approx([0.2] * 10, abs=0.01)
    assert torch.equal(read(DataSpec())[1].images, test.images)


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("sep", ["-", "."])
def test_mnist(tmp_path, gz, sep):
    wanted = write_mnist(tmp_path, sep=sep, gz=gz)
    train, test, classes = read(spec_of("mnist", tmp_path))
    assert classes == 10
    for found, (images, labels) in ((train, wanted["train"]), (test, wanted["t10k"])):
        assert_holds(found, images[:, None], labels)


@pytest.mark.parametrize(("name", "label_bytes"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_binary(tmp_path, name, label_bytes):
    files = {"cifar10": [f"data_batch_{n}.bin" for n in range(1, 6)], "cifar100": ["train.bin"]}[name]
    images, labels = (
        random_images(2 * len(files), 3, 32, 32),
        RNG.integers(0, 10, (2 * len(files), label_bytes), np.uint8),
    )
    records = np.concatenate([labels, images.reshape(len(images), -1)], axis=1)
    for number, file in enumerate(files):
        (tmp_path / file).write_bytes(records[2 * number : 2 * number + 2].tobytes())
    (tmp_path / ("test_batch.bin" if name == "cifar10" else "test.bin")).write_bytes(records[:3].tobytes())
    train, test, classes = read(spec_of(name, tmp_path))
    assert classes == {"cifar10": 10, "cifar100": 100}[name]
    assert_holds(train, images, labels[:, -1])
    assert_holds(test, images[:3], labels[:3, -1])


def test_svhn_calls_its_ten_zero(tmp_path):
    images, labels = random_images(5, 32, 32, 3), np.array([1, 10, 9, 10, 2], np.uint8)
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None]})
    train, test, classes = read(spec_of("svhn", tmp_path))
    assert classes == 10
    for found in (train, test):
        assert_holds(found, images.transpose(0, 3, 1, 2), [1, 0, 9, 0, 2])


@pytest.mark.parametrize(
    ("shape", "order"),
    [((6, 5), None), ((6, 5, 3), (0, 3, 1, 2)), ((3, 6, 5), (0, 1, 2, 3)), ((6, 5, 1), (0, 3, 1, 2))],
)
@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64])
def test_npz(tmp_path, shape, order, kind):
    images = random_images(8, *shape)
    images = images if kind is np.uint8 else (images / 255).astype(kind)
    labels = np.array([0, 1, 4, 2, 0, 1, 1, 1])
    np.savez(tmp_path / "any.npz", x_train=images, y_train=labels[:, None], x_test=images[:2], y_test=labels[:2])
    train, test, classes = read(spec_of("npz", tmp_path))
    wanted = images[:, None] if order is None else images.transpose(order)
    wanted = wanted if kind is np.uint8 else wanted.astype(np.float32)
    assert classes == 5
    assert_holds(train, wanted, labels)
    assert_holds(test, wanted[:2], labels[:2])


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("image", ["image", "img"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_image_parquet(tmp_path, write_parquet, struct, image, channels):
    images, labels = random_images(8, 6, 5, *channels), [0, 1, 2, 3, 0, 1, 2, 3]
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, labels, image=image, struct=struct)
    train, test, classes = read(spec_of("images", tmp_path))
    assert classes == 4
    for found in (train, test):
        assert_holds(found, images.transpose(0, 3, 1, 2) if channels else images[:, None], labels)


def test_parquet_shards_are_read_in_order_and_a_limit_decodes_no_more_than_it_takes(tmp_path, write_parquet):
    images, labels = random_images(9, 32, 32, 3), np.arange(9) % 3
    data = tmp_path / "data"
    options = {"struct": True, "image": "img", "label": "label"}
    write_parquet(data / "train-00000-of-00003.parquet", images[:4], labels[:4], **options)
    write_parquet(data / "train-00001-of-00003.parquet", images[4:], labels[4:], **options)
    write_parquet(data / "test-00000-of-00001.parquet", images[:2], labels[:2], **options)
    train, _, _ = read(spec_of("cifar10", tmp_path))
    assert_holds(train, images.transpose(0, 3, 1, 2), labels)
    rows = stratified_rows(labels, 6)
    broken = [{"bytes": b"never decoded", "path": None}] * 9
    for name, part in (("train-00000-of-00003", slice(0, 4)), ("train-00001-of-00003", slice(4, 9))):
        column = pq.read_table(data / f"{name}.parquet")["img"].to_pylist()
        column = [each if row in rows else broken[row] for row, each in zip(range(9)[part], column, strict=True)]
        pq.write_table(pa.table({"img": column, "label": labels[part]}), data / f"{name}.parquet")
    train, test, _ = read(spec_of("cifar10", tmp_path, limit=6))
    assert_holds(train, images[rows].transpose(0, 3, 1, 2), labels[rows])
    assert np.bincount(labels[rows]).tolist() == [2, 2, 2]
    assert len(test) == 2


def test_one_part_is_read_without_decoding_the_other(tmp_path, write_parquet):
    images = random_images(4, 8, 8)
    write_parquet(tmp_path / "test.parquet", images, [0, 1, 0, 1])
    table = pa.table({"image": [b"no image"] * 3, "label": [0, 1, 4]})
    pq.write_table(table, tmp_path / "train.parquet")
    test, classes = read_part(spec_of("images", tmp_path), "test")
    assert_holds(test, images[:, None], [0, 1, 0, 1])
    assert classes == 5  # one that only the training set has counts
    with pytest.raises(UserError, match=r"train\.parquet cannot be read: row 0"):
        read_part(spec_of("images", tmp_path), "train")


def test_the_parts_of_a_set_are_those_of_the_whole(tmp_path):
    images = random_images(12, 5, 4, 3)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=np.arange(12) % 4, x_test=images[:3], y_test=[0, 1, 2])
    for spec in (spec_of("npz", tmp_path), spec_of("npz", tmp_path, limit=8, validation=2), DataSpec(limit=50)):
        whole = load(spec, 3)
        for name in ("train", "validation", "test"):
            split = load_split(spec, 3, name)
            expected = getattr(whole, name)
            assert torch.equal(split.images.images, expected.images)
            assert torch.equal(split.images.labels, expected.labels)
            assert (split.classes, split.shape) == (whole.classes, whole.shape)


@pytest.mark.parametrize("counts", [[10] * 10, [500, 300, 150, 40, 10], [1, 999]])
def test_a_choice_has_the_shares_of_the_whole_and_nothing_else_decides_it(counts):
    labels = np.repeat(np.arange(len(counts)), counts)  # sorted by class
    total = len(labels)
    before: set[int] = set()
    for n in (1, 2, 7, total // 10, total // 2, total - 1):
        rows = stratified_rows(labels, n)
        chosen = np.bincount(labels[rows], minlength=len(counts))
        assert len(set(rows)) == n
        assert (np.diff(rows) > 0).all()
        assert np.abs(chosen - n * np.array(counts) / total).max() <= len(counts) / 2
        assert before <= set(rows) or n == 1
        before = set(rows)
    assert (stratified_rows(labels, None) == np.arange(total)).all()
    assert (stratified_rows(labels, total) == np.arange(total)).all()
    even = stratified_rows(np.repeat(np.arange(10), 100), 50)
    assert np.bincount(np.repeat(np.arange(10), 100)[even]).tolist() == [5] * 10


def test_cifar100_parquet_has_fine_labels(tmp_path, write_parquet):
    images = random_images(3, 32, 32, 3)
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}.parquet", images, [0, 99, 42], struct=True, image="img", label="fine_label")
    train, _, classes = read(spec_of("cifar100", tmp_path))
    assert (train.labels.tolist(), classes) == ([0, 99, 42], 100)


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("mnist", "train-images-idx3-ubyte.gz or .*train-images.idx3-ubyte"),
        ("cifar10", r"data_batch_1.bin, .* or train\*.parquet"),
        ("svhn", "train_32x32.mat"),
        ("npz", r"\*.npz"),
        ("images", r"train\*.parquet"),
    ],
)
def test_a_missing_file_names_what_was_looked_for(tmp_path, name, looked_for):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{folder} has no {looked_for}"):
            read(spec_of(name, folder))


def test_half_of_the_binary_batches_is_not_a_data_set(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073))
    with pytest.raises(UserError, match=r"has no data_batch_2\.bin"):
        read(spec_of("cifar10", tmp_path))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was loaded')",)


def test_a_pickle_is_never_loaded(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"binary version there \(data_batch_1.bin"):
        read(spec_of("cifar10", tmp_path))
    objects = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "x.npz", x_train=objects, y_train=[0], x_test=objects, y_test=[0])
    with pytest.raises(UserError, match=r"x.npz cannot be read: .*allow_pickle"):
        read(spec_of("npz", tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-50], "ubyte.gz cannot be read"),
        (lambda data: data[:40] + b"?" * 40 + data[80:], "ubyte.gz cannot be read"),
        (lambda data: b"", "begins with nothing"),
        (
            lambda data: gzip.compress(b"\0\0\x0d\3" + gzip.decompress(data)[4:]),
            "00000d03, not with the idx magic 00000803",
        ),
        (lambda data: gzip.compress(gzip.decompress(data)[:-1]), "4703 bytes where its header promises 4704"),
        (lambda data: gzip.compress(gzip.decompress(data) + b"?"), "4705 bytes"),
        (lambda data: gzip.compress(gzip.decompress(data)[:9]), "cannot be read"),
        (lambda data: gzip.compress(idx_bytes(random_images(5, 28, 28))), "train-images and -labels .* 5 images"),
    ],
)
def test_damaged_mnist(tmp_path, damage, message):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        read(spec_of("mnist", tmp_path))


def test_a_label_beyond_the_classes(tmp_path):
    write_mnist(tmp_path)
    labels = np.array([0, 1, 10, 3, 4, 5], np.uint8)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    with pytest.raises(UserError, match="row 2 has label 10, which is not one of 0 to 9"):
        read(spec_of("mnist", tmp_path))
    records = np.full((2, 3073), 200, np.uint8)
    for number in range(1, 6):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(records.tobytes())
    with pytest.raises(UserError, match=r"data_batch_1\.bin cannot be read: row 0 has label 200"):
        read(spec_of("cifar10", tmp_path))


def test_a_torn_binary_batch(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes(2 * 3074 - 1))
    (tmp_path / "test.bin").write_bytes(bytes(3074))
    with pytest.raises(UserError, match=r"train\.bin cannot be read: its 6147 bytes are not whole records of 3074"):
        read(spec_of("cifar100", tmp_path))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-200], lambda data: data[:100], lambda data: b"", lambda data: b"?" * len(data)]
)
@pytest.mark.parametrize("name", ["svhn", "npz", "images"])
def test_damaged_files_are_named(tmp_path, write_parquet, name, damage):
    images, labels = random_images(4, 32, 32, 3), np.array([1, 2, 3, 1])
    savemat(tmp_path / "train_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": labels}, do_compression=True)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    write_parquet(tmp_path / "train.parquet", images, labels)
    file = {"svhn": "train_32x32.mat", "npz": "set.npz", "images": "train.parquet"}[name]
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(UserError, match=f"{file} cannot be read: ."):
        read(spec_of(name, tmp_path))


def npz_of(**changes):
    images = random_images(4, 6, 6)
    return {"x_train": images, "y_train": [0, 1, 0, 1], "x_test": images, "y_test": [0, 1, 0, 1]} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz_of(y_train=[0, 1]), r"4 images, and labels of shape \(2,\)"),
        (npz_of(y_train=[0, 1, -1, 0]), "row 2 has label -1"),
        (npz_of(y_train=[0, 1, 10**9, 0]), "row 2 has label 1000000000"),
        (npz_of(y_train=[0.5, 1, 0, 1]), "labels are float64"),
        (npz_of(x_train=random_images(4, 6, 6).astype(np.float32)), "neither uint8 nor floats from 0 to 1"),
        (npz_of(x_train=np.full((4, 6, 6), np.nan)), "neither uint8 nor floats from 0 to 1"),
        (npz_of(x_train=random_images(4, 6, 6).astype(np.int64)), "neither uint8"),
        (npz_of(x_train=random_images(4, 36)), r"shape \(4, 36\)"),
        (npz_of(x_train=random_images(4, 6, 7)), r"\(1, 6, 7\) in train, \(1, 6, 6\) in test"),
        (npz_of(x_train=random_images(0, 6, 6), y_train=np.zeros(0, int)), "0 images"),
        ({"x": [1]}, "no x_train and no y_train, only"),
    ],
)
def test_npz_with_the_wrong_content(tmp_path, content, message):
    np.savez(tmp_path / "set.npz", **content)
    with pytest.raises(UserError, match=message):
        read(spec_of("npz", tmp_path))


def test_which_npz_must_be_clear(tmp_path):
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, **npz_of())
    with pytest.raises(UserError, match=r"2 npz files \(a.npz, b.npz\)"):
        read(spec_of("npz", tmp_path))


def test_parquet_with_the_wrong_content(tmp_path, write_parquet, encode):
    good = [encode(image) for image in random_images(3, 6, 6)]
    other = encode(random_images(1, 7, 6)[0])
    deep = encode(np.zeros((6, 6), np.uint16))
    cases = [
        ({"picture": good, "label": [0, 1, 0]}, "no column 'image' or 'img'"),
        ({"image": good, "class": [0, 1, 0]}, "no column 'fine_label' or 'label'"),
        ({"image": good, "label": ["a", "b", "c"]}, "holds string, not integers"),
        ({"image": [good[0], None, good[1]], "label": [0, 1, 0]}, "1 images and 0 labels are missing"),
        ({"image": [good[0], b"?", good[1]], "label": [0, 1, 0]}, "row 1 cannot be decoded: not an image"),
        ({"image": [good[0], good[1][:-40], good[1]], "label": [0, 1, 0]}, "row 1 cannot be decoded"),
        ({"image": [*good[:2], other], "label": [0, 1, 0]}, r"row 2 is an image of \(7, 6\) pixels, row 0 of \(6, 6\)"),
        ({"image": [deep] * 3, "label": [0, 1, 0]}, "do not fit 8 bits"),
        ({"image": [1, 2, 3], "label": [0, 1, 0]}, "cannot be decoded"),
    ]
    for columns, message in cases:
        pq.write_table(pa.table(columns), tmp_path / "train.parquet")
        with pytest.raises(UserError, match=f"train.parquet cannot be read: .*{message}"):
            read(spec_of("images", tmp_path))


def test_parquet_in_two_folders_is_ambiguous(tmp_path, write_parquet):
    for folder in ("a", "b"):
        write_parquet(tmp_path / folder / "train.parquet", random_images(2, 6, 6), [0, 1])
    with pytest.raises(UserError, match=r"\['a', 'b'\]: set root"):
        read(spec_of("images", tmp_path))


def test_sets_are_read_from_s3_as_from_a_folder(tmp_path, bucket, write_parquet):
    wanted = write_mnist(tmp_path)
    images = random_images(4, 6, 6)
    for part in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{part}.parquet", images, [0, 1, 2, 0])
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        bucket.upload_file(str(path), f"sets/{path.relative_to(tmp_path).as_posix()}")
    assert_holds(read(spec_of("mnist", "s3://images/sets"))[0], wanted["train"][0][:, None], wanted["train"][1])
    assert_holds(read(spec_of("images", "s3://images/sets"))[1], images[:, None], [0, 1, 2, 0])
    with pytest.raises(UserError, match=r"s3://images/none has no train_32x32\.mat"):
        read(spec_of("svhn", "s3://images/none"))


def test_known_sizes_are_those_of_the_digits():
    for fields in ({}, {"limit": 500}, {"validation": 0}, {"limit": 100, "validation": 60}):
        spec = DataSpec(**fields)
        data, sizes = load(spec, 0), known_sizes(spec)
        assert sizes == (len(data.train), len(data.validation), len(data.test), data.shape, data.classes)
    assert known_sizes(DataSpec(name="npz", root="somewhere")) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "mnist"}, "set root"),
        ({"root": "somewhere"}, "remove root"),
        ({"name": "imagenet", "root": "x"}, "Input should be 'digits'"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"pad": -1}, "greater than or equal to 0"),
        ({"pad_mode": "wrap"}, "'reflect' or 'zero'"),
        ({"limit": 1}, "greater than or equal to 2"),
        ({"validation": True}, "valid integer"),
        ({"shuffle": True}, "Extra inputs"),
    ],
)
def test_spec_refuses(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataSpec(**fields)


def test_real_mnist(shared_images):
    train, test, _ = read(spec_of("mnist", shared_images / "mnist"))
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.images.double().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)


def test_real_cifar10(shared_images):
    """The lossless pixels of 200 test images are at hand: the JPEGs must be those images."""
    train, test, _ = read(spec_of("cifar10", shared_images / "cifar10", limit=100))
    assert train.images.shape == (100, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10
    with np.load(shared_images / "cifar10" / "lossless_test_subset.npz", allow_pickle=False) as exact:
        rows = torch.from_numpy(exact["jpeg_test_row"].astype(np.int64))
        pixels, labels = torch.from_numpy(exact["x"]).permute(0, 3, 1, 2), exact["y"]
    assert test.labels[rows].tolist() == labels.tolist()
    error = (test.images[rows].double() - pixels.double()).square().mean((1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).median() > 28
