"""Files of data: where they may lie, whether they are what they should be, and how they
are fetched.
"""

import gzip
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryFile
from textwrap import shorten
from typing import TypeVar

from ..extras import load

__all__ = ["DataError"]

Read = TypeVar("Read")
CHECKOUT = Path(__file__).parents[2] / "data"


class DataError(RuntimeError):
    """A data file is missing, truncated or altered, and no other source has it; the
    message names file and remedy.
    """


class Fault(Exception):
    """What is wrong with one file, in words that follow its name."""


# Of the uncompressed bytes; of images and labels one after the other; of an archive as
# it is.
SHA256 = {
    "mnist/train-first10240-images-idx3-ubyte": (
        "0bddcb4db9473979ba722ea7679e2935e7decc129a6be9181eaf0c0fe5babbb7"
    ),
    "mnist/train-first10240-labels-idx1-ubyte": (
        "4673cc729421426f5d7da3f845f324bf4547c8100ea8b14576ff78449fe223ca"
    ),
    "mnist/t10k-first5000-images-idx3-ubyte": (
        "118ae22e5d4e94bb7f7335211629ca4da103e2b74481bd772edf32b2aff5970f"
    ),
    "mnist/t10k-first5000-labels-idx1-ubyte": (
        "24f8aa7197fa0ee1ceb43e0809492febb35d3bdb1d1c31379ca14bd851f82ba7"
    ),
    "mnist/train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "mnist/train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "mnist/t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "mnist/t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
    "fashion-mnist/t10k-images-idx3-ubyte": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "fashion-mnist/t10k-labels-idx1-ubyte": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
    "cifar10/train5000": (
        "002a1dd991bc6394a8ee4eeafc261090244ac2d20a5a7e07459fa373c619531c"
    ),
    "cifar10/test2000": (
        "06baf16b384385cd0f50366c98204489db54dd3a0cd51a5611155f675b2a8eb4"
    ),
    "cifar-10-binary.tar.gz": (
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    ),
}
SHIPPED = [name for name in SHA256 if "first" in name or name.startswith("fashion")]


def check(raw: bytes, name: str) -> None:
    """Raise a `Fault` unless these are the bytes known by this name."""
    if not raw:
        raise Fault("is empty")
    if hashlib.sha256(raw).hexdigest() != SHA256[name]:
        raise Fault("has been altered (SHA-256 of its bytes differs)")


def shipped(name: str) -> Path:
    """Where a file that ships lies: in the wheel, or beside the package in a
    checkout.
    """
    homes = (resources.files("ngdcore") / "_data", CHECKOUT)
    for path in (home / f"{name}.gz" for home in homes):
        if path.is_file():
            return path
    raise DataError(
        f"{name}.gz ships with ngdcore but is missing from this installation;"
        " install ngdcore again"
    )


def homes() -> Iterator[Path]:
    """The folders that are searched: the reader's own, then the cache."""
    if folder := os.environ.get("NGD_DATA_DIR"):
        if not Path(folder).is_dir():
            raise DataError(
                f"NGD_DATA_DIR={folder} is not a folder; correct or unset it"
            )
        yield Path(folder)
    yield cache()


def cache() -> Path:
    return Path(_pooch().os_cache("ngdcore"))


def _pooch():
    """The module pooch, silent where all is well."""
    # In a notebook without widgets it warns about its progress bar.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pooch = load("pooch", "data that do not ship, and their cache,")
    pooch.get_logger().setLevel("WARNING")
    return pooch


def obtain(
    spellings: Sequence[str],
    read: Callable[[Path], Read],
    mirrors: Sequence[str],
    also: Sequence[str] = (),
) -> Read:
    """What ``read`` makes of the first good file that is found under a spelling in a
    home, or else is fetched, by the first spelling, from a mirror.

    A bad file is an error under the first spelling, which is ours; under the others,
    which other programs use too, it is passed over, and named if nothing is found. So
    is what the caller has ``also`` looked for.
    """
    passed = []
    for home in homes():
        for path in (home / spelling for spelling in spellings):
            if not path.is_file():
                continue
            try:
                return read(path)
            except Fault as fault:
                if path == home / spellings[0]:
                    raise faulty(path, fault) from fault
                passed.append(f"{path} {fault}")
    found, failures = _download(spellings[0], read, mirrors)
    if found is not None:
        return found
    raise DataError(
        f"{spellings[0]} is needed and was found nowhere; put it into a folder that"
        f" NGD_DATA_DIR names, or into {cache()}. Looked in {_listed(homes())} for"
        f" {_listed([*spellings, *also])}."
        + (f" Passed over: {'; '.join(passed)}." if passed else "")
        + (f" Mirrors tried: {'; '.join(failures)}" if failures else "")
    )


def faulty(path: Path, fault: Fault) -> DataError:
    return DataError(f"{path} {fault}; delete it and fetch it again")


def _listed(things) -> str:
    return ", ".join(map(str, things))


def _download(file, read, mirrors) -> tuple[object, list[str]]:
    """Fetch a file into the cache and read it; what ``read`` refuses is deleted again.
    Returns what was read, or None, and what went wrong at each mirror.
    """
    target, failures = cache() / file, []
    if mirrors:
        _ready(target.parent, file)
    for mirror in mirrors:
        try:
            _pooch().retrieve(
                f"{mirror}{file}",
                known_hash=None,
                fname=target.name,
                path=target.parent,
            )
            return read(target), failures
        except Fault as fault:
            page = target.read_bytes()[:200].lstrip().startswith(b"<")
            what = "it answered with a web page" if page else f"what it sent {fault}"
            failures.append(f"{mirror}: {what}")
            target.unlink()
        # Whatever the network or the server does, the next mirror may have the file.
        except Exception as error:
            failures.append(f"{mirror}: {_reason(error)}")
    return None, failures


def _ready(folder: Path, file: str) -> None:
    """Make sure that the cache can be written, before the network is asked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"{file} must be fetched, but the cache {folder} cannot be written"
            f" ({error.strerror}); make it writable, or put the file into a folder"
            " that NGD_DATA_DIR names"
        ) from error


def _reason(error: Exception) -> str:
    """An error of the network in a few words: the server's status where it answered."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"HTTP status {status}"
    return shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")


def unzipped(path: Path) -> bytes:
    """The bytes of a file that may be gzipped."""
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise Fault(f"is truncated or no gzip file ({error})") from error
