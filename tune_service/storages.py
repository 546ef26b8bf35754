"""Opens the storage that a user names: a folder, or the URL of an object store."""

from __future__ import annotations

from pathlib import Path

from trainables.bucket import Bucket, is_url
from trainables.errors import Problem
from tune_service.bucket_storage import BucketStorage
from tune_service.errors import StorageError
from tune_service.home import StudyStorage
from tune_service.storage import Storage


def open_storage(place: str) -> StudyStorage:
    """UserError for what can be neither. Neither a folder is made nor a store asked."""
    if not place.strip():  # as an unset variable leaves it
        raise StorageError(Problem("--storage", "names a folder or a URL", "nothing", "--storage FOLDER"))
    return BucketStorage(Bucket.open(place)) if is_url(place) else Storage(Path(place))
