"""Data sets: what ships, what is fetched, and all ways in which a file can be wrong."""

import gzip
import hashlib
import io
import os
import re
import socket
import tarfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pooch
import pytest
import torch

import ngdcore as ngd
from ngdcore.data import cifar, files, images

GIVEN = Path(os.environ.get("NGD_DATA_DIR", ""))
FULL = GIVEN / "mnist" / "train-images-idx3-ubyte.gz"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing here may reach a mirror, a cache filled before, or the caller's data."""

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(files, "cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("NGD_DATA_DIR", raising=False)


@pytest.fixture
def given(monkeypatch):
    """The caller's folder of data, for the tests that are skipped without one."""
    monkeypatch.setenv("NGD_DATA_DIR", str(GIVEN))


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
    with pytest.raises(ValueError, match="n_test=2001 rows asked for"):
        ngd.data.fashion_mnist(n_test=2001)


def test_synthetic():
    assert torch.equal(ngd.data.sphere(5, 4, seed=2), ngd.data.sphere(5, 4, seed=2))
    assert torch.allclose(ngd.data.sphere(500, 4).norm(dim=1), torch.ones(500).double())
    x = ngd.data.gaussian(4000, 5, seed=3)
    assert torch.allclose(x.T @ x / 4000, torch.eye(5).double(), atol=0.1)
    assert ngd.data.gaussian(2, 2, dtype=torch.float32).dtype == torch.float32


def test_a_linear_teacher():
    """The map, the spectrum and the noise that were asked for."""
    W = torch.arange(12.0).reshape(3, 4)
    d = ngd.data.linear_teacher(W, n_train=40_000, n_test=7, decay=2.0, noise=0.1)
    assert d.x.shape == (40_000, 4) and d.y_test.shape == (7, 3)
    found = torch.linalg.eigvalsh(d.x.T @ d.x / len(d.x)).flip(0)
    said = torch.exp(-2.0 * torch.arange(1, 5) / 4).double()
    assert torch.allclose(found, said, rtol=0.05)
    off = d.y - d.x @ W.double().T
    assert abs(float(off.std()) / 0.1 - 1) < 0.02
    again = ngd.data.linear_teacher(W, 5, 7, seed=1, dtype=torch.float32)
    assert again.y.dtype == torch.float32 and not torch.equal(again.x, d.x[:5].float())
    for bad in (dict(W=W[0]), dict(n_test=0), dict(noise=-1.0)):
        with pytest.raises(ValueError, match="must be a matrix"):
            ngd.data.linear_teacher(**{"W": W, **bad})


def test_refusals():
    for kwargs, says in (
        (dict(classes=(4,)), "classes"),
        (dict(classes=(4, 4)), "classes"),
        (dict(classes=(4, 10)), "classes"),
        (dict(norm="max"), "norm"),
        (dict(classes=4), "classes"),
        (dict(n_train=0), "n_train=0 must be an int of at least 1"),
        (dict(n_test=2.5), "n_test=2.5"),
        (dict(seed=0.5), "seed=0.5"),
        (dict(dtype=torch.int64), "dtype=torch.int64"),
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
    for name in files.SHIPPED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.gz").write_bytes(files.shipped(name).read_bytes())
    monkeypatch.setattr(files.resources, "files", lambda package: tmp_path / "wheel")
    monkeypatch.setattr(files, "CHECKOUT", folder)
    return folder


@pytest.mark.parametrize("name", files.SHIPPED)
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
    monkeypatch.setenv("NGD_DATA_DIR", str(tmp_path))
    with pytest.raises(ngd.data.DataError, match="NGD_DATA_DIR") as error:
        ngd.data.mnist(n_train=20000)
    says = str(error.value)
    assert all(mirror in says for mirror in images.MIRRORS)
    assert f"Looked in {tmp_path}, {tmp_path / 'cache'} for mnist/train-labels" in says
    assert "MNIST/raw/train-labels-idx1-ubyte" in says
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()], (
        "a failed download leaves nothing behind"
    )


def test_a_folder_that_is_none_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("NGD_DATA_DIR", str(tmp_path / "nowhere"))
    for load in (lambda: ngd.data.mnist(n_train=20000), ngd.data.cifar10):
        with pytest.raises(ngd.data.DataError, match="NGD_DATA_DIR=.* is not a folder"):
            load()
    assert ngd.data.mnist(n_train=10).x.shape == (10, 784), "what ships needs no folder"


NAME = "mnist/train-labels-idx1-ubyte"
LABELS = np.arange(20, dtype=np.uint8)
IDX = bytes([0, 0, 8, 1, 0, 0, 0, 20]) + LABELS.tobytes()


@pytest.fixture
def known(monkeypatch):
    """A small file under a name that does not ship."""
    monkeypatch.setitem(files.SHA256, NAME, hashlib.sha256(IDX).hexdigest())


@pytest.fixture
def server(monkeypatch):
    """Mirrors that give these answers in turn (bytes, or an error); and who was
    asked.
    """
    answers, asked = [], []

    def retrieve(url, known_hash, fname, path):
        asked.append(url)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        (path / fname).write_bytes(answer)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    return answers, asked


def test_download_tries_the_next_mirror(known, server):
    """The first mirror answers with something else: it is deleted, and the second is
    asked.
    """
    answers, asked = server
    answers += [gzip.compress(b"an error page"), gzip.compress(IDX)]
    assert np.array_equal(images._idx(NAME), LABELS)
    assert asked == [f"{mirror}{NAME}.gz" for mirror in images.MIRRORS]
    assert np.array_equal(images._idx(NAME), LABELS)
    assert len(asked) == 2, "the second time it comes from the cache"


def busy(status):
    error = OSError("a long text about a server")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (busy(503), "aws.com/: HTTP status 503"),
        (TimeoutError("stalled"), "aws.com/: TimeoutError: stalled"),
        (b"\n<!doctype html><p>Moved", "aws.com/: it answered with a web page"),
        (b"", "aws.com/: what it sent is empty"),
        (gzip.compress(IDX)[:-9], "aws.com/: what it sent is truncated"),
        (gzip.compress(IDX[:-1]), "aws.com/: what it sent has been altered"),
    ],
)
def test_what_a_mirror_did_is_said(known, server, tmp_path, answer, says):
    server[0].extend([answer, answer])
    with pytest.raises(ngd.data.DataError, match=re.escape(says)) as error:
        images._idx(NAME)
    assert "delete it" not in str(error.value), "it is deleted already"
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_cache_that_cannot_be_written_is_named(known, server, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ngd.data.DataError, match="cache .*mnist cannot be written"):
        images._idx(NAME)
    assert not server[1], "no mirror is asked in vain"


@pytest.mark.parametrize(
    "spelled",
    [
        "mnist/train-labels-idx1-ubyte.gz",
        "mnist/train-labels-idx1-ubyte",
        "mnist/train-labels.idx1-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "train-labels.idx1-ubyte",
        "MNIST/raw/train-labels-idx1-ubyte",
        "MNIST/raw/train-labels-idx1-ubyte.gz",
    ],
)
def test_files_are_found_as_others_keep_them(known, monkeypatch, tmp_path, spelled):
    monkeypatch.setenv("NGD_DATA_DIR", str(tmp_path))
    path = tmp_path / spelled
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(IDX) if spelled.endswith(".gz") else IDX)
    assert np.array_equal(images._idx(NAME), LABELS)


def test_a_file_of_another_program_is_passed_over_and_named(
    known, monkeypatch, tmp_path
):
    """Fashion-MNIST has the same file names."""
    monkeypatch.setenv("NGD_DATA_DIR", str(tmp_path))
    other = tmp_path / "train-labels-idx1-ubyte"
    other.write_bytes(IDX[:-1] + b"!")
    with pytest.raises(ngd.data.DataError, match=f"Passed over: {other} has been alt"):
        images._idx(NAME)
    good = tmp_path / "MNIST" / "raw" / other.name
    good.parent.mkdir(parents=True)
    good.write_bytes(IDX)
    assert np.array_equal(images._idx(NAME), LABELS)


def test_altered_file_in_data_dir_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("NGD_DATA_DIR", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    (tmp_path / f"{NAME}.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab"))
    with pytest.raises(ngd.data.DataError, match="altered.*delete it and fetch it"):
        ngd.data.mnist(n_train=20000)


@pytest.mark.skipif(
    not FULL.is_file(),
    reason="full MNIST is not here; set NGD_DATA_DIR to a folder with mnist/*-ubyte.gz",
)
def test_full_files_begin_with_the_rows_that_ship(given):
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


# --- Forster --------------------------------------------------------------------------


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


@pytest.mark.parametrize(("n", "d"), [(5, 5), (12, 10), (400, 30)])
def test_forster_in_single_precision(n, d):
    """The tolerance that is not asked for must be within reach of the dtype."""
    x = ngd.data.gaussian(n, d, dtype=torch.float32)
    z, a = ngd.data.forster(x)
    assert z.dtype == a.dtype == torch.float32
    assert torch.allclose(z.T @ z, n / d * torch.eye(d), atol=1e-5 * n / d)
    exact, _ = ngd.data.forster(x.double())
    assert torch.allclose(z.double(), exact, atol=1e-7)
    with pytest.raises(ValueError, match=f"rank {d - 1}"):
        ngd.data.forster(x[:, :-1] @ ngd.data.gaussian(d - 1, d, dtype=torch.float32))


def test_a_seed_means_the_same_numbers_wherever_they_go():
    """Whatever the default device and dtype, and whatever was drawn before."""
    makers = (
        lambda **kw: ngd.data.sphere(6, 4, seed=3, **kw),
        lambda **kw: ngd.data.gaussian(6, 4, seed=3, **kw),
        lambda **kw: ngd.data.mnist(n_train=9, n_test=5, seed=3, **kw).x,
        lambda **kw: ngd.data.mnist((4, 9), n_train=9, n_test=5, seed=3, **kw).y,
    )
    for make in makers:
        plain = make()
        with torch.device("meta"):  # a device where nothing can be drawn
            assert make().device.type == "meta", "torch's default device is kept"
            assert torch.equal(make(device="cpu"), plain)
        assert torch.equal(make(dtype=torch.float32), plain.float())


def test_forster_refuses():
    for x, says in (
        (ngd.data.gaussian(6, 4).reshape(2, 3, 4), r"\(n, d\), not .* \(2, 3, 4\)"),
        (torch.arange(6).reshape(3, 2), "float matrix"),
        (ngd.data.gaussian(6, 2) * torch.nan, "NaN"),
    ):
        with pytest.raises(ValueError, match=says):
            ngd.data.forster(x)
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


# --- CIFAR-10 -------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch, tmp_path):
    """A CIFAR-10 of 60 and 30 made-up images in every form that is read, and the arrays
    themselves.
    """
    rng, folder, arrays = np.random.default_rng(0), tmp_path / "given", {}
    (folder / "cifar10").mkdir(parents=True)
    for split, n, file in (("train", 60, "train5000"), ("test", 30, "test2000")):
        raw = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        labels = np.concatenate([np.arange(10), rng.integers(0, 10, n - 10)])
        labels = labels.astype(np.uint8)
        arrays[split] = raw, labels
        strip = folder / "cifar10" / file
        plt.imsave(f"{strip}.png", raw.reshape(-1, 32, 3))
        np.savez_compressed(f"{strip}_labels.npz", y=labels, index=np.arange(n))
        hashed = sha256(raw.tobytes() + labels.tobytes())
        monkeypatch.setitem(files.SHA256, f"cifar10/{file}", hashed)
    archive(folder / cifar.ARCHIVE, arrays)
    hashed = sha256((folder / cifar.ARCHIVE).read_bytes())
    monkeypatch.setitem(files.SHA256, cifar.ARCHIVE, hashed)
    monkeypatch.setenv("NGD_DATA_DIR", str(folder))
    return folder, arrays


def archive(path, arrays):
    """The same images as the authors pack them, in five batches out of order."""
    whole = {}
    for split, (raw, labels) in arrays.items():
        planes = raw.transpose(0, 3, 1, 2).reshape(len(raw), -1)
        whole[split] = np.concatenate([labels[:, None], planes], 1).tobytes()
    parts = {"test_batch.bin": whole["test"], "readme.html": b"no data"}
    batch = len(whole["train"]) // 5
    for k in (3, 1, 2, 5, 4):
        rows = whole["train"][(k - 1) * batch : k * batch]
        parts[f"data_batch_{k}.bin"] = rows
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in parts.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))


def sha256(raw):
    return hashlib.sha256(raw).hexdigest()


def few():
    return ngd.data.cifar10(n_train=60, n_test=30, norm=None)


def test_cifar_is_the_same_from_strips_and_from_the_archive(little):
    folder, arrays = little
    strips = few()
    (folder / "cifar10").rename(folder / "elsewhere")
    packed = few()
    for d in (strips, packed):
        for x, labels, (raw, y) in zip(
            (d.x, d.x_test), (d.labels, d.labels_test), arrays.values()
        ):
            assert torch.equal(
                x.reshape(raw.shape), torch.from_numpy(raw).double() / 255
            )
            assert labels.tolist() == y.tolist()
        assert (
            d.source
            == "CIFAR-10, first 200 of each class and CIFAR-10, first 500 of each class"
        )
    with pytest.raises(
        ValueError, match="n_train=61 rows asked for, but the train rows hold 60"
    ):
        ngd.data.cifar10(n_train=61, n_test=30)


def test_cifar_first_rows_of_each_class_come_from_the_archive_too(little, monkeypatch):
    """Two of each class, here: a request that they fill must not depend on which file
    is at hand.
    """
    train = [("some", "cifar10/head", 2)]
    monkeypatch.setattr(cifar, "SOURCES", (train, cifar.SOURCES[1]))
    images, labels = little[1]["train"]
    rows = sorted(i for c in range(10) for i in np.flatnonzero(labels == c)[:2])
    monkeypatch.setitem(
        files.SHA256,
        "cifar10/head",
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
    with open(folder / cifar.ARCHIVE, "ab") as file:
        file.write(b"!")
    with pytest.raises(ngd.data.DataError, match=f"{cifar.ARCHIVE} has been altered"):
        few()


def test_cifar_missing_everywhere_names_the_remedies(monkeypatch, tmp_path):
    monkeypatch.setenv("NGD_DATA_DIR", str(tmp_path))
    with pytest.raises(ngd.data.DataError, match="NGD_DATA_DIR.*www.cs.toronto.edu"):
        few()
    with pytest.raises(ngd.data.DataError, match="NGD_DATA_DIR.*train5000.png") as e:
        ngd.data.cifar10(download=False)
    assert "Mirrors" not in str(e.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()], (
        "a failed download leaves nothing behind"
    )


def test_cifar_download(little, server, monkeypatch, tmp_path):
    good = (little[0] / cifar.ARCHIVE).read_bytes()
    monkeypatch.delenv("NGD_DATA_DIR")
    server[0].append(b"an error page")
    with pytest.raises(ngd.data.DataError, match="altered"):
        few()
    assert not (tmp_path / "cache" / cifar.ARCHIVE).exists()
    server[0].append(good)
    assert few().x.shape == (60, 3072)
    assert few().x.shape == (60, 3072), "the second time it comes from the cache"
    assert len(server[1]) == 2


@pytest.mark.skipif(
    not (GIVEN / "cifar10" / "train5000.png").is_file(),
    reason="CIFAR-10 is not here; set NGD_DATA_DIR to a folder with cifar10/*.png",
)
def test_cifar_real_rows(given):
    d = ngd.data.cifar10(n_train=5000, n_test=2000, norm="sqrt_d", standardize=True)
    assert d.labels[:6].tolist() == [6, 9, 9, 4, 1, 1] and d.labels_test[
        :6
    ].tolist() == [3, 8, 8, 0, 6, 6]
    assert (
        d.labels.bincount().tolist() == [500] * 10
        and d.labels_test.bincount().tolist() == [200] * 10
    )
    assert torch.allclose(d.x.norm(dim=1), torch.tensor(3072.0).double().sqrt())
