"""A store on S3 or on a service with the same protocol.

boto3 reads credentials, region and endpoint from the environment. The client is made at first use and never pickled, so
that no credentials are sent in the arguments of an actor.
"""

from __future__ import annotations

import io
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from botocore import exceptions as aws
from botocore.config import Config
from s3transfer.exceptions import RetriesExceededError

from poise import env
from poise.errors import StoreError, UserError
from poise.store.folder import staged
from poise.store.s3_retries import RetryPolicy
from poise.store.storage import RESERVED, Entry, Storage, check_key, explained

__all__ = ["S3Storage"]

_MISSING = {"NoSuchKey", "NotFound", "404"}
_REFUSED = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_LOST_RACE = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_BATCH = 1000  # the most keys that one delete request may have
_CUT_SHORT = (aws.IncompleteReadError, aws.ReadTimeoutError, aws.ResponseStreamingError)

T = TypeVar("T")


class S3Storage(Storage):
    """Each object is one object of `bucket`, below `prefix` (no slash at its ends; may be empty)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".removesuffix("/")
        self._has_conditional_writes = False  # not known before `check_exclusion`

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_client", "_policy")}

    def read(self, key: str) -> bytes:
        return self._get(key)[0]

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        return self._put_if(key, data, IfNoneMatch="*")

    def compare_and_swap(self, key: str, data: bytes, expected: bytes) -> bool:
        try:
            current, tag = self._get(key)
            return current == expected and self._put_if(key, data, IfMatch=tag)
        except FileNotFoundError:
            return False

    def append(self, key: str, data: bytes) -> bool:
        check_key(key)
        return False

    def list(self, prefix: str = "") -> list[Entry]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        with self._calls(prefix) as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._root + prefix)
            items = [item for page in pages for item in page.get("Contents", ())]
        start = len(self._root)
        entries = []
        for item in items:
            key = item["Key"][start:]
            if f"/{RESERVED}" not in f"/{key}":
                etag = item.get("ETag", "").strip('"')
                entries.append(Entry(key, item["Size"], item["LastModified"].timestamp(), etag))
        return sorted(entries)

    def folders(self) -> Sequence[str]:
        with self._calls() as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._root, Delimiter="/"
            )
            prefixes = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        return sorted(prefix[len(self._root) :].removesuffix("/") for prefix in prefixes)

    def delete(self, keys: Sequence[str]) -> None:
        names = [{"Key": self._name(key)} for key in keys]
        for start in range(0, len(names), _BATCH):
            batch = {"Objects": names[start : start + _BATCH], "Quiet": True}
            with self._calls() as client:
                failed = client.delete_objects(Bucket=self.bucket, Delete=batch).get("Errors")
            if failed:
                raise StoreError(f"{self.url}: {failed[0]['Key']} was not deleted: {failed[0]['Message']}")

    def move(self, key: str, to: str) -> None:
        source = {"Bucket": self.bucket, "Key": self._name(key)}
        with self._calls(key) as client:
            client.copy(source, self.bucket, self._name(to))
        self.delete([key])

    def upload(self, path: Path, key: str) -> None:
        with path.open("rb") as file, self._calls(key) as client:
            client.upload_fileobj(file, self.bucket, self._name(key))

    def download(self, key: str, path: Path) -> None:
        with explained(str(path)), staged(path) as file, self._calls(key) as client:

            def fill() -> None:
                file.seek(0)  # an attempt that failed may have written a part
                file.truncate()
                try:
                    # Not download_file, which draws the name of a temporary file from the global random state.
                    client.download_fileobj(self.bucket, self._name(key), file)
                except RetriesExceededError as error:
                    raise _CutShortError(str(error.last_exception)) from error

            self._retry_cut_short(fill)

    def check_exclusion(self) -> None:
        if self._has_conditional_writes:
            return
        name = f"{self._root}{RESERVED}probe"
        wrong_tag = '"00000000000000000000000000000000"'
        honours_none_match = True
        if self._probe(name, IfNoneMatch="*"):
            # The object did not exist and does now, so a second write with this condition must fail.
            honours_none_match = not self._probe(name, IfNoneMatch="*")
        self._has_conditional_writes = honours_none_match and not self._probe(name, IfMatch=wrong_tag)
        if not self._has_conditional_writes:
            raise StoreError(
                f"{self.url}: {_endpoint() or 'AWS'} ignores conditional writes (If-None-Match, If-Match), so that two "
                "drivers could write one run at the same time: use one that honours them, or keep runs in a folder"
            )

    def sweep(self, older_than_s: float, prefix: str = "") -> Sequence[str]:
        before = time.time() - older_than_s
        with self._calls() as client:
            pages = client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._root + prefix
            )
            uploads = [item for page in pages for item in page.get("Uploads", ())]
            stale = [item for item in uploads if item["Initiated"].timestamp() < before]
            for item in stale:
                client.abort_multipart_upload(Bucket=self.bucket, Key=item["Key"], UploadId=item["UploadId"])
        return sorted(item["Key"][len(self._root) :] for item in stale)

    @property
    def _root(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _name(self, key: str) -> str:
        return self._root + check_key(key)

    @cached_property
    def _policy(self) -> RetryPolicy:
        patience_s = _number(env.STORE_PATIENCE_S, env.STORE_PATIENCE_DEFAULT_S)
        return RetryPolicy(_endpoint() or "S3", int(_number("AWS_MAX_ATTEMPTS", 10)), patience_s)

    @cached_property
    def _client(self) -> Any:
        _check_endpoint()
        config = Config(
            retries={"mode": "standard", "total_max_attempts": 1},  # `RetryPolicy` retries instead
            connect_timeout=10,
            read_timeout=60,
            s3={"addressing_style": "path" if _endpoint() else "auto"},  # a private endpoint has no host per bucket
            response_checksum_validation="when_required",  # the store verifies SHA-256 itself
        )
        policy = self._policy
        try:
            client = boto3.session.Session().client("s3", config=config)
        except ValueError as error:
            raise UserError(f"{self.url}: the settings of boto3 are malformed: {error}") from None
        policy.register(client)
        return client

    def _get(self, key: str) -> tuple[bytes, str]:
        """The bytes of an object and its ETag."""

        def get() -> tuple[bytes, str]:
            response = client.get_object(Bucket=self.bucket, Key=self._name(key))
            try:
                return response["Body"].read(), response["ETag"]
            except _CUT_SHORT as error:
                raise _CutShortError(str(error)) from error

        with self._calls(key) as client:
            return self._retry_cut_short(get)

    def _retry_cut_short(self, read: Callable[[], T]) -> T:
        """The value of `read`, which is repeated by the retry policy while the body of a response ends early."""
        started = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return read()
            except _CutShortError as error:
                pause = self._policy.pause(attempt, started, error)
                if pause is None:
                    raise StoreError(
                        f"{self.url}: an answer of {_endpoint() or 'AWS'} ended early {attempt} times ({error}): run "
                        "again when it has recovered; nothing that was committed is lost"
                    ) from error
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _probe(self, name: str, **condition: str) -> bool:
        """Whether a conditional write succeeded."""
        with self._calls(name) as client:
            try:
                client.put_object(Bucket=self.bucket, Key=name, Body=uuid.uuid4().hex.encode(), **condition)
            except aws.ClientError as error:
                if error.response["Error"]["Code"] in _LOST_RACE:
                    return False
                raise
        return True

    def _put(self, key: str, data: bytes, **condition: str) -> None:
        with self._calls(key) as client:
            client.put_object(Bucket=self.bucket, Key=self._name(key), Body=io.BytesIO(data), **condition)

    def _put_if(self, key: str, data: bytes, **condition: str) -> bool:
        """Write an object on a condition; returns whether it was written."""
        try:
            self._put(key, data, **condition)
        except _LostRaceError as error:
            # The response to a successful write may have been lost: then the retry failed because of its own object.
            return error.retried and self._contains(key, data)
        return True

    def _contains(self, key: str, data: bytes) -> bool:
        """Whether an object exists and has these bytes."""
        try:
            return self.read(key) == data
        except FileNotFoundError:
            return False

    @contextmanager
    def _calls(self, key: str = "") -> Iterator[Any]:
        """Yield the client, and turn its errors into those of `Storage`; `key` is named in the message."""
        try:
            yield self._client
        except aws.ClientError as error:
            self._raise(error, key)
        except (aws.NoCredentialsError, aws.PartialCredentialsError) as error:
            raise StoreError(
                f"{self.url}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), or run "
                "under a role that may use the bucket"
            ) from error
        except (aws.ConnectionError, aws.HTTPClientError) as error:
            raise StoreError(
                f"{self.url}: {_endpoint() or 'AWS'} cannot be reached ({type(error).__name__}): check the network and "
                "AWS_ENDPOINT_URL, then run again; nothing that was committed is lost"
            ) from error
        except (aws.BotoCoreError, Boto3Error) as error:
            raise StoreError(f"{self.url}: {error}") from error

    def _raise(self, error: aws.ClientError, key: str) -> NoReturn:
        """Raise the error of `Storage` for an error response of the service."""
        code = error.response["Error"]["Code"]
        details = error.response.get("ResponseMetadata", {})
        if code in _MISSING:
            raise FileNotFoundError(f"{self.url}/{key} does not exist") from error
        if code in _LOST_RACE:
            raise _LostRaceError(retried=details.get("RetryAttempts", 0) > 0) from error
        service = _endpoint() or "AWS"
        if code == "NoSuchBucket":
            raise StoreError(
                f"{self.url}: there is no bucket {self.bucket!r} at {service}: create it, correct the address, or set "
                "AWS_ENDPOINT_URL to the service that has it"
            ) from error
        if code in _REFUSED:
            raise StoreError(
                f"{self.url}: {service} refused access ({code}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                f"AWS_SESSION_TOKEN and the rights on bucket {self.bucket!r}"
            ) from error
        tries = details.get("RetryAttempts", 0) + 1
        raise StoreError(
            f"{self.url}: {service} failed {error.operation_name} after {tries} tries ({code}): run again when it has "
            "recovered; nothing that was committed is lost"
        ) from error


class _LostRaceError(StoreError):
    """The condition of a conditional write was not met. `retried`: the request was sent more than once."""

    def __init__(self, *, retried: bool) -> None:
        super().__init__("another writer was faster: run again")
        self.retried = retried


class _CutShortError(Exception):
    """The body of a response was incomplete."""


def _check_endpoint() -> None:
    """UserError for an endpoint that cannot be parsed. The message does not contain it: it may have a password."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        value = os.environ.get(name)
        if not value:
            continue
        try:
            url = urlsplit(value)
            is_valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            is_valid = False
        if not is_valid:
            raise UserError(f"{name} is not the address of a service: write https://host or http://host:port")


def _number(name: str, default: float) -> float:
    """A positive number from an environment variable; UserError if it is none."""
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise UserError(f"{name} is {text[:40]!r}: write a positive number, such as {default:g}")
    return value


def _endpoint() -> str:
    """The private endpoint in use, without user and password in its address; empty for AWS itself."""
    url = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}" if url.netloc else ""
