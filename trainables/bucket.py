"""A folder of an object store, through pyarrow: S3 and what speaks like it, or Google's. Every failure in words.

Credentials, region and endpoint come from the environment, as the store's own SDK has it; never from the URL.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from trainables.errors import BucketError, Problem, UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

Item = TypeVar("Item")
Result = TypeVar("Result")

OPTIONS = {"s3": ("endpoint_override", "region", "scheme"), "gs": ("endpoint_override", "scheme")}
"""Scheme of a URL -> what may follow its `?`."""
_PLACE, _EXAMPLE = "--storage", "s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
CONNECT_S = 5.0
SILENCE_S = 6.0
"""Without a byte for so long, a request has failed. Three of them, with the waits between, make about 20 s."""
TRIES = 3
THREADS = 16
PIECE_BYTES = 8 * 1024**2
_INPUT = {
    "NO_SUCH_BUCKET": ("the bucket exists", "a bucket that was made before"),
    "HTTP status 301": ("the region is the bucket's", "AWS_REGION, or ?region= in the URL"),
    "HTTP status 40[13]|ACCESS_DENIED|ACCESS_KEY|SIGNATURE|TOKEN|CREDENTIAL|PERMISSION_DENIED|UNAUTHENTICATED": (
        "the environment's credentials may read and write the bucket",
        "credentials in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, ...)",
    ),
}
"""What a store's message shows when the user's input is wrong -> the rule, and what is right."""
_GONE = "NO_SUCH_KEY|RESOURCE_NOT_FOUND"


@dataclass(frozen=True)
class Object:
    """What a list says of an object."""

    num_bytes: int
    written_s: float
    """By the store's clock, in seconds since 1970."""


def is_url(place: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", place) is not None


class Bucket:
    """A folder in a bucket. An object is whole or absent, and what was written is what is read next, in lists too."""

    def __init__(self, filesystem: FileSystem, root: str, url: str) -> None:
        self._filesystem, self._root, self.url = filesystem, root, url

    @staticmethod
    def open(url: str) -> Bucket:
        """Asks nothing of the store yet. UserError for a URL that cannot be one."""
        scheme, root, options = parsed(url)
        return Bucket(filesystem(scheme, **options), root, url)

    @property
    def where(self) -> str:
        """The URL for people."""
        return self.url.partition("?")[0]

    def at(self, name: str) -> Bucket:
        """A folder in this one."""
        place, mark, query = self.url.partition("?")
        return Bucket(self._filesystem, self._path(name), f"{place.rstrip('/')}/{name}{mark}{query}")

    def check(self) -> None:
        """BucketError unless the bucket is there and answers."""
        with self._in_words():
            found = self._filesystem.get_file_info(self._root.partition("/")[0])
        if found.type.name == "NotFound":
            raise self._refusal("NO_SUCH_BUCKET", f"no bucket {self._root.partition('/')[0]}")

    def check_writable(self) -> None:
        """Writes, reads and deletes a small object. BucketError when that does not go."""
        self.check()
        name, data = f".probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
        self.put(name, data)
        read = self.get(name)
        self.delete(name)
        if read != data:
            problem = Problem(self.where, "what is written is what is read next", "something else", "another store")
            raise BucketError(problem, is_away=False)

    # Lists

    def objects(self, under: str = "") -> dict[str, Object]:
        """Name -> what the list says, of all objects in here."""
        found = self._infos(under, recursive=True)
        return {self._name(info): Object(info.size, (info.mtime_ns or 0) / 1e9) for info in found if info.is_file}

    def folders(self) -> list[str]:
        """Names of the folders in here."""
        found = self._infos("", recursive=False)
        return sorted(self._name(info) for info in found if info.type.name == "Directory")

    def names(self) -> list[str]:
        """Names of the folders and objects in here, not of what lies in the folders."""
        return sorted(self._name(info) for info in self._infos("", recursive=False))

    def _infos(self, under: str, recursive: bool) -> list[FileInfo]:
        from pyarrow.fs import FileSelector

        selector = FileSelector(self._path(under), recursive=recursive, allow_not_found=True)
        with self._in_words():
            return list(self._filesystem.get_file_info(selector))

    # Objects

    def get(self, name: str, begin: int = 0) -> bytes:
        """FileNotFoundError when there is none of this name."""
        with self._in_words(reads=True), self._filesystem.open_input_file(self._path(name)) as file:
            if begin >= file.size():
                return b""
            file.seek(begin)
            return bytes(file.read())

    def put(self, name: str, data: bytes) -> None:
        with self._in_words(), self._filesystem.open_output_stream(self._path(name), compression=None) as file:
            file.write(data)

    def get_file(self, name: str, to: Path) -> None:
        """FileNotFoundError when there is none of this name."""
        to.parent.mkdir(parents=True, exist_ok=True)
        with (
            self._in_words(reads=True),
            self._filesystem.open_input_stream(self._path(name), compression=None) as source,
            to.open("wb") as target,
        ):
            while piece := source.read(PIECE_BYTES):
                target.write(piece)

    def put_file(self, name: str, path: Path) -> None:
        """A file that changes meanwhile, or a kill, may leave a part: what is to be whole has a manifest after it."""
        with (
            self._in_words(),
            path.open("rb") as source,
            self._filesystem.open_output_stream(self._path(name), compression=None) as to,
        ):
            while piece := source.read(PIECE_BYTES):
                to.write(piece)

    def delete(self, name: str) -> None:
        """Nothing when there is none."""
        try:
            with self._in_words():
                self._filesystem.delete_file(self._path(name))
        except FileNotFoundError:
            return

    def delete_all(self, under: str = "") -> None:
        """Everything in here."""
        try:
            with self._in_words():
                self._filesystem.delete_dir(self._path(under))
        except FileNotFoundError:
            return

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _name(self, info: FileInfo) -> str:
        return str(info.path)[len(self._root) + 1 :]

    # Failures

    @contextmanager
    def _in_words(self, reads: bool = False) -> Iterator[None]:
        """`reads`: an object, which may go between the two requests of one read; pyarrow tells that as it comes."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if reads and re.search(_GONE, str(error)):
                raise FileNotFoundError(str(error)) from error
            if error.errno is not None:  # of this machine's disk: pyarrow's has none
                raise
            raise self._failure(str(error)) from error

    def _failure(self, found: str) -> BucketError:
        told = re.sub(r"\s*\(Request ID: [^)]*\)|^When .*?: (?=AWS Error)", "", found)[:300]
        for words in _INPUT:
            if re.search(words, found):
                return self._refusal(words, told)
        rule, expected = "the store answers", "a store that can be reached; AWS_ENDPOINT_URL where it is not Amazon's"
        return BucketError(Problem(self.where, rule, told, expected), is_away=True)

    def _refusal(self, words: str, found: str) -> BucketError:
        rule, expected = _INPUT[words]
        return BucketError(Problem(self.where, rule, found, expected), is_away=False)


def at_once(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results of many requests that wait for the store together."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items))


def parsed(url: str) -> tuple[str, str, dict[str, str]]:
    """(scheme, bucket and folder, options) of a URL. UserError for one that cannot be, with no secret in it."""
    if "@" in url:
        rule = "credentials stand in the environment, never in a URL, which is kept and shown"
        raise UserError(Problem(_PLACE, rule, "something before an @", _EXAMPLE))
    parts = urlsplit(url)
    scheme = "gs" if parts.scheme == "gcs" else parts.scheme
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    _check(scheme, parts.netloc, options)
    return scheme, f"{parts.netloc}/{parts.path.strip('/')}".rstrip("/"), options


def _check(scheme: str, bucket: str, options: Mapping[str, str]) -> None:
    if scheme not in OPTIONS:
        raise UserError(Problem(_PLACE, "a storage is a folder or an object store", f"{scheme}://", _EXAMPLE))
    if not re.fullmatch(r"[a-z0-9A-Z][\w.-]+", bucket):
        raise UserError(Problem(_PLACE, "a URL names its bucket", repr(bucket), _EXAMPLE))
    if options.get("scheme", "https") not in ("http", "https"):
        raise UserError(Problem(_PLACE, "scheme is one of two", options["scheme"], "?scheme=http or ?scheme=https"))
    unknown = sorted(options.keys() - set(OPTIONS[scheme]))
    if unknown:  # their values are not shown: one may be a secret
        rule = f"after the ? of {scheme}:// come {', '.join(OPTIONS[scheme])}"
        raise UserError(Problem(_PLACE, rule, ", ".join(unknown), "the rest in the environment"))


@lru_cache(maxsize=8)
def filesystem(kind: str, /, **options: Any) -> FileSystem:
    """pyarrow's, with bounded waits. It does not read AWS_ENDPOINT_URL by itself."""
    from pyarrow import fs

    if kind == "gs":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=TRIES * SILENCE_S), **options)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https"):
            raise UserError(Problem("AWS_ENDPOINT_URL", "is a URL", endpoint, "http://HOST:PORT or https://HOST"))
        options = {"endpoint_override": parts.netloc, "scheme": parts.scheme} | options
    options["allow_delayed_open"] = True  # so that a small object is one request
    return fs.S3FileSystem(
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        **options,
    )


def put_tree(bucket: Bucket, folder: Path, names: Sequence[str]) -> None:
    at_once(lambda name: bucket.put_file(name, folder / name), names)


def get_tree(bucket: Bucket, names: Iterable[str], to: Path) -> None:
    at_once(lambda name: bucket.get_file(name, to / name), names)
