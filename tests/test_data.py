"""Data sets: what ships, what is fetched, and every way in which a file can be wrong."""

import gzip
import hashlib
import io
import os
import socket
import tarfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pooch
import pytest
import torch

import ngdcore as ngd
from ngdcore import data

FULL = Path(os.environ.get("NGD_DATA_DIR", "")) / "mnist" / "train-images-idx3-ubyte.gz"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing here may reach a mirror, or a cache filled before."""
    monkeypatch.setattr(data, "_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no network in tests")),
    )


def test_first_rows_in_file_order():
    d = ngd.data.mnist(classes=(4, 9), n_train=50, n_test=20, norm=None)
    assert (
        d.x.shape == (50, 784)
        and d.y.shape == (50, 1)
        and d.x_test.shape == (20, 784)
        and d.x.dtype == torch.float64
    )
    assert d.labels[:6].tolist() == [4, 9, 4, 9, 4, 9] and set(d.labels.tolist()) == {
        4,
        9,
    }
    assert torch.equal(d.y[:, 0], torch.where(d.labels == 4, 1.0, -1.0).double())
    assert d.x.min() == 0 and d.x.max() == 1
    more = ngd.data.mnist(classes=(4, 9), n_train=60, n_test=20, norm=None)
    assert torch.equal(more.x[:50], d.x)


def test_one_hot_and_norms():
    d = ngd.data.mnist(n_train=30, n_test=10, norm="sqrt_d")
    assert (
        d.y.shape == (30, 10)
        and torch.equal(d.y.argmax(1), d.labels)
        and torch.equal(d.y.sum(1), torch.ones(30).double())
    )
    assert torch.allclose(d.x.norm(dim=1), torch.tensor(28.0).double())
    raw = ngd.data.mnist(n_train=30, n_test=10, norm=None)
    d = ngd.data.mnist(n_train=30, n_test=10, norm=None, standardize=True)
    assert abs(float(d.x.mean())) < 1e-12 and float(
        d.x.std(correction=0)
    ) == pytest.approx(1)
    assert torch.allclose(
        d.x_test, (raw.x_test - raw.x.mean()) / raw.x.std(correction=0)
    )
    d = ngd.data.mnist(
        classes=(0, 1), n_train=30, n_test=10, standardize=True, dtype=torch.float32
    )
    assert d.x.dtype == torch.float32 and torch.allclose(
        d.x.norm(dim=1), torch.tensor(1.0)
    )


def test_random_rows_are_seeded():
    a, b, c = (
        ngd.data.mnist(classes=(3, 8), n_train=40, n_test=10, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, c.x)
    assert len(torch.unique(a.x, dim=0)) == 40


def test_fashion_rows_are_disjoint():
    d = ngd.data.fashion_mnist(classes=(5, 7), n_train=1500, n_test=300, norm=None)
    assert set(d.labels.tolist()) == {5, 7} and d.y.shape == (1500, 1)
    both = torch.cat([d.x, d.x_test])
    assert (
        len(torch.unique(both, dim=0)) > 1790
    )  # the file itself holds a few equal images
    with pytest.raises(ValueError, match="2001 rows asked for"):
        ngd.data.fashion_mnist(n_test=2001)


def test_synthetic():
    assert torch.equal(ngd.data.sphere(5, 4, seed=2), ngd.data.sphere(5, 4, seed=2))
    assert torch.allclose(ngd.data.sphere(500, 4).norm(dim=1), torch.ones(500).double())
    x = ngd.data.gaussian(4000, 5, seed=3)
    assert torch.allclose(x.T @ x / 4000, torch.eye(5).double(), atol=0.1)
    assert ngd.data.gaussian(2, 2, dtype=torch.float32).dtype == torch.float32


def test_refusals():
    for kwargs, says in (
        (dict(classes=(4,)), "classes"),
        (dict(classes=(4, 4)), "classes"),
        (dict(classes=(4, 10)), "classes"),
        (dict(norm="max"), "norm"),
        (dict(n_train=0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            ngd.data.mnist(**kwargs)
    for make in (lambda: ngd.data.sphere(0, 3), lambda: ngd.data.gaussian(3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            make()


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """A copy of the shipped files that a test may damage."""
    folder = tmp_path / "data"
    for name in data._SHIPPED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.gz").write_bytes(
            next(p for p in data._places(name) if p.is_file()).read_bytes()
        )
    monkeypatch.setattr(data, "_places", lambda name: [folder / f"{name}.gz"])
    return folder


@pytest.mark.parametrize("name", data._SHIPPED)
def test_truncated_altered_missing(shipped, name):
    load = ngd.data.mnist if name.startswith("mnist") else ngd.data.fashion_mnist
    path = shipped / f"{name}.gz"
    whole = path.read_bytes()
    load(n_train=10, n_test=10)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ngd.data.DataError, match=f"{name}.gz is truncated"):
        load(n_train=10, n_test=10)
    path.write_bytes(b"not gzip at all")
    with pytest.raises(ngd.data.DataError, match="truncated or no gzip"):
        load(n_train=10, n_test=10)
    raw = bytearray(gzip.decompress(whole))
    raw[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(ngd.data.DataError, match="altered"):
        load(n_train=10, n_test=10)
    path.unlink()
    with pytest.raises(ngd.data.DataError, match="install ngdcore again"):
        load(n_train=10, n_test=10)
    path.write_bytes(
        gzip.compress(gzip.decompress(whole), 1)
    )  # compressed otherwise, the same bytes
    load(n_train=10, n_test=10)


def test_missing_everywhere_names_the_remedies(monkeypatch, tmp_path):
    monkeypatch.delenv("NGD_DATA_DIR", raising=False)
    with pytest.raises(ngd.data.DataError, match="NGD_DATA_DIR") as error:
        ngd.data.mnist(n_train=20000)
    assert all(mirror in str(error.value) for mirror in data._MIRRORS)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()], (
        "a failed download leaves nothing behind"
    )


def test_download_tries_the_next_mirror(monkeypatch, tmp_path):
    """The first mirror answers with something else: it is deleted, and the second is
    asked.
    """
    good, asked, name = (
        np.arange(20, dtype=np.uint8),
        [],
        "mnist/train-labels-idx1-ubyte",
    )
    raw = bytes([0, 0, 8, 1, 0, 0, 0, 20]) + good.tobytes()

    def retrieve(url, known_hash, fname, path):
        asked.append(url)
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes(
            gzip.compress(raw if len(asked) > 1 else b"an error page")
        )

    monkeypatch.delenv("NGD_DATA_DIR", raising=False)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setitem(data._SHA256, name, hashlib.sha256(raw).hexdigest())
    assert np.array_equal(data._load(name), good)
    assert asked == [f"{mirror}{name}.gz" for mirror in data._MIRRORS]
    assert np.array_equal(data._load(name), good)
    assert len(asked) == 2, "the second time it comes from the cache"


def test_altered_file_in_data_dir_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("NGD_DATA_DIR", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab")
    )
    with pytest.raises(ngd.data.DataError, match="altered"):
        ngd.data.mnist(n_train=20000)


@pytest.mark.skipif(
    not FULL.is_file(),
    reason="full MNIST is not here; set NGD_DATA_DIR to a folder with mnist/*-ubyte.gz",
)
def test_full_files_begin_with_the_rows_that_ship():
    whole = ngd.data.mnist(n_train=20000, n_test=6000, norm=None)
    head = ngd.data.mnist(n_train=10240, n_test=5000, norm=None)
    assert torch.equal(whole.x[:10240], head.x) and torch.equal(
        whole.x_test[:5000], head.x_test
    )
    assert (
        whole.source == "MNIST, all rows"
        and head.source == "MNIST, first rows that ship"
    )
    assert ngd.data.mnist(n_train=60000, n_test=10000).x.shape == (60000, 784)


# ----------------------------------------------------------------------------------------------- Forster


@pytest.mark.parametrize(("n", "d"), [(5, 5), (12, 10), (50, 10), (40, 3)])
def test_forster_transform(n, d):
    x = ngd.data.gaussian(n, d) * torch.logspace(-2, 2, d, dtype=torch.float64)
    z, a = ngd.data.forster(x)
    assert torch.allclose(z.norm(dim=1), torch.ones(n).double())
    assert torch.allclose(z.T @ z, n / d * torch.eye(d).double(), atol=1e-8)
    image = x @ a
    assert torch.allclose(image / image.norm(dim=1, keepdim=True), z, atol=1e-7)
    leverage = torch.linalg.qr(z)[0].square().sum(1)
    assert torch.allclose(leverage, torch.full((n,), d / n).double(), atol=1e-8)
    scatter = (a @ a.T).inverse()  # Tyler's fixed point, up to scale
    weights = (x * torch.linalg.solve(scatter, x.T).T).sum(1)
    again = d / n * (x.T / weights) @ x
    assert torch.allclose(again / again.trace(), scatter / scatter.trace(), atol=1e-7)


def test_forster_refuses():
    with pytest.raises(ValueError, match="n >= d"):
        ngd.data.forster(ngd.data.gaussian(3, 4))
    with pytest.raises(ValueError, match="rank 2"):
        ngd.data.forster(ngd.data.gaussian(6, 2) @ ngd.data.gaussian(2, 4, seed=1))
    with pytest.raises(ValueError, match="zero"):
        ngd.data.forster(
            torch.cat([ngd.data.gaussian(6, 2), torch.zeros(1, 2).double()])
        )
    line = ngd.data.gaussian(12, 3)
    line[:6] = line[0] * torch.arange(1, 7)[:, None]
    with pytest.raises(
        RuntimeError, match="6 of 12 rows lie .* dimension 1, and fewer than 4"
    ):
        ngd.data.forster(line)
    with pytest.raises(RuntimeError, match="max_iter"):
        ngd.data.forster(ngd.data.gaussian(12, 10), max_iter=2)


# ---------------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def little(monkeypatch, tmp_path):
    """A CIFAR-10 of 60 and 30 made-up images in every form that is read, and the arrays
    themselves.
    """
    rng, folder = np.random.default_rng(0), tmp_path / "given"
    (folder / "cifar10").mkdir(parents=True)
    whole, arrays = {}, {}
    for split, n, file in (("train", 60, "train5000"), ("test", 30, "test2000")):
        images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        labels = np.concatenate([np.arange(10), rng.integers(0, 10, n - 10)]).astype(
            np.uint8
        )
        arrays[split] = images, labels
        plt.imsave(folder / "cifar10" / f"{file}.png", images.reshape(-1, 32, 3))
        np.savez_compressed(
            folder / "cifar10" / f"{file}_labels.npz", y=labels, index=np.arange(n)
        )
        monkeypatch.setitem(
            data._SHA256, f"cifar10/{file}", sha256(images.tobytes() + labels.tobytes())
        )
        whole[split] = np.concatenate(
            [labels[:, None], images.transpose(0, 3, 1, 2).reshape(n, -1)], 1
        ).tobytes()
    batch, parts = (
        len(whole["train"]) // 5,
        {"test_batch.bin": whole["test"], "readme.html": b"no data"},
    )
    parts |= {
        f"data_batch_{k}.bin": whole["train"][(k - 1) * batch : k * batch]
        for k in (3, 1, 2, 5, 4)
    }
    with tarfile.open(folder / data._CIFAR, "w:gz") as tar:
        for name, raw in parts.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    monkeypatch.setitem(
        data._SHA256, data._CIFAR, sha256((folder / data._CIFAR).read_bytes())
    )
    monkeypatch.setenv("NGD_DATA_DIR", str(folder))
    return folder, arrays


def sha256(raw):
    return hashlib.sha256(raw).hexdigest()


def few():
    return ngd.data.cifar10(n_train=60, n_test=30, norm=None)


def test_cifar_is_the_same_from_strips_and_from_the_archive(little):
    folder, arrays = little
    strips = few()
    (folder / "cifar10").rename(folder / "elsewhere")
    archive = few()
    for d in (strips, archive):
        for x, labels, (images, y) in zip(
            (d.x, d.x_test), (d.labels, d.labels_test), arrays.values()
        ):
            assert torch.equal(
                x.reshape(images.shape), torch.from_numpy(images).double() / 255
            )
            assert labels.tolist() == y.tolist()
        assert (
            d.source
            == "CIFAR-10, first 200 of each class and CIFAR-10, first 500 of each class"
        )
    with pytest.raises(
        ValueError, match="61 rows asked for, but the train rows hold 60"
    ):
        ngd.data.cifar10(n_train=61, n_test=30)


def test_cifar_first_rows_of_each_class_come_from_the_archive_too(little, monkeypatch):
    """Two of each class, here: a request that they fill must not depend on which file
    is at hand.
    """
    monkeypatch.setitem(
        data._SOURCES, ("cifar10", "train"), [("some", "cifar10/head0020", slice(None))]
    )
    images, labels = little[1]["train"]
    rows = sorted(i for c in range(10) for i in np.flatnonzero(labels == c)[:2])
    monkeypatch.setitem(
        data._SHA256,
        "cifar10/head0020",
        sha256(images[rows].tobytes() + labels[rows].tobytes()),
    )
    d = ngd.data.cifar10(n_train=len(rows), n_test=5, norm=None)
    assert torch.equal(
        d.x, torch.from_numpy(images[rows].reshape(len(rows), -1)).double() / 255
    )


@pytest.mark.parametrize(
    "name",
    ["train5000.png", "test2000.png", "train5000_labels.npz", "test2000_labels.npz"],
)
def test_cifar_strip_truncated_missing_or_pickled(little, name):
    path = little[0] / "cifar10" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ngd.data.DataError, match="truncated|altered"):
        few()
    if name.endswith("npz"):
        np.savez(path, y=np.array([{"an": "object"}], dtype=object))
        with pytest.raises(ngd.data.DataError, match="allow_pickle"):
            few()
        np.savez(path, y=np.zeros(60 if "train" in name else 30, dtype=np.uint8))
        with pytest.raises(ngd.data.DataError, match="altered"):
            few()
        path.unlink()
        with pytest.raises(ngd.data.DataError, match="missing"):
            few()


def test_cifar_archive_altered_is_an_error(little):
    folder, _ = little
    (folder / "cifar10").rename(folder / "elsewhere")
    with open(folder / data._CIFAR, "ab") as file:
        file.write(b"!")
    with pytest.raises(ngd.data.DataError, match=f"{data._CIFAR} has been altered"):
        few()


def test_cifar_missing_everywhere_names_the_remedies(monkeypatch, tmp_path):
    monkeypatch.setenv("NGD_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ngd.data.DataError, match="NGD_DATA_DIR.*www.cs.toronto.edu"):
        few()
    with pytest.raises(ngd.data.DataError, match="at hand.*NGD_DATA_DIR"):
        ngd.data.cifar10(download=False)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], (
        "a failed download leaves nothing behind"
    )


def test_cifar_download(little, monkeypatch, tmp_path):
    good = (little[0] / data._CIFAR).read_bytes()
    monkeypatch.delenv("NGD_DATA_DIR")
    for answer in (b"an error page", good):

        def retrieve(url, known_hash, fname, path, answer=answer):
            path.mkdir(parents=True, exist_ok=True)
            (path / fname).write_bytes(answer)

        monkeypatch.setattr(pooch, "retrieve", retrieve)
        if answer is good:
            assert few().x.shape == (60, 3072)
        else:
            with pytest.raises(ngd.data.DataError, match="altered"):
                few()
            assert not (tmp_path / "cache" / data._CIFAR).exists()
    monkeypatch.delattr(pooch, "retrieve")
    assert few().x.shape == (60, 3072), "the second time it comes from the cache"


@pytest.mark.skipif(
    not FULL.parents[1].joinpath("cifar10", "train5000.png").is_file(),
    reason="CIFAR-10 is not here; set NGD_DATA_DIR to a folder with cifar10/*.png",
)
def test_cifar_real_rows():
    d = ngd.data.cifar10(n_train=5000, n_test=2000, norm="sqrt_d", standardize=True)
    assert d.labels[:6].tolist() == [6, 9, 9, 4, 1, 1] and d.labels_test[
        :6
    ].tolist() == [3, 8, 8, 0, 6, 6]
    assert (
        d.labels.bincount().tolist() == [500] * 10
        and d.labels_test.bincount().tolist() == [200] * 10
    )
    assert torch.allclose(d.x.norm(dim=1), torch.tensor(3072.0).double().sqrt())
