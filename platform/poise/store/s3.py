"""A store on S3 or what speaks its protocol.

Credentials, region and endpoint are boto3's to find in the environment. The client is made at first use and never
pickled, so that no secret travels in an actor argument.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as aws
from botocore.config import Config

from poise.errors import StoreError
from poise.store.folder import staged
from poise.store.storage import Entry, Storage, check_key, explained

__all__ = ["S3Storage"]

_MISSING = {"NoSuchKey", "NotFound", "404"}
_REFUSED = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_LOST_RACE = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_BATCH = 1000  # keys that one delete request may name


class S3Storage(Storage):
    """Each object is one object of `bucket`, below `prefix` (no slash at its ends; may be empty)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".removesuffix("/")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    def read(self, key: str) -> bytes:
        return self._get(key)[0]

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        return self._put_if(key, data, IfNoneMatch="*")

    def swap(self, key: str, data: bytes, expected: bytes) -> bool:
        try:
            found, tag = self._get(key)
            return found == expected and self._put_if(key, data, IfMatch=tag)
        except FileNotFoundError:
            return False

    def append(self, key: str, data: bytes) -> None:
        try:
            before = self.read(key)
        except FileNotFoundError:
            before = b""
        self.write(key, before + data)

    def list(self, prefix: str = "") -> list[Entry]:
        if prefix:
            check_key(prefix.removesuffix("/"))
        with self._calls(prefix) as client:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._root + prefix)
            found = [item for page in pages for item in page.get("Contents", ())]
        start = len(self._root)
        return sorted(
            Entry(item["Key"][start:], item["Size"], item["LastModified"].timestamp(), item.get("ETag", "").strip('"'))
            for item in found
        )

    def folders(self) -> Sequence[str]:
        with self._calls() as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._root, Delimiter="/"
            )
            found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
        return sorted(prefix[len(self._root) :].removesuffix("/") for prefix in found)

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
            client.download_fileobj(self.bucket, self._name(key), file)

    def sweep(self, older_than_s: float) -> Sequence[str]:
        before = time.time() - older_than_s
        with self._calls() as client:
            pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self._root)
            found = [item for page in pages for item in page.get("Uploads", ())]
            stale = [item for item in found if item["Initiated"].timestamp() < before]
            for item in stale:
                client.abort_multipart_upload(Bucket=self.bucket, Key=item["Key"], UploadId=item["UploadId"])
        return sorted(item["Key"][len(self._root) :] for item in stale)

    @property
    def _root(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _name(self, key: str) -> str:
        return self._root + check_key(key)

    @cached_property
    def _client(self) -> Any:
        style = "path" if _endpoint() else "auto"  # a private endpoint seldom has a host name for each bucket
        config = Config(
            retries={"mode": "standard", "max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", "10"))},
            connect_timeout=10,
            read_timeout=60,
            s3={"addressing_style": style},
        )
        client = boto3.session.Session().client("s3", config=config)
        # boto3 stops retrying once retries have used up a quota, which a service that fails one request in three does
        # within 300 requests. Here whatever succeeds in the end refills the quota; a dead service still exhausts it.
        client.meta.events.register_first("after-call.s3", _refill_quota)
        return client

    def _get(self, key: str) -> tuple[bytes, str]:
        with self._calls(key) as client:
            answer = client.get_object(Bucket=self.bucket, Key=self._name(key))
            return answer["Body"].read(), answer["ETag"]

    def _put(self, key: str, data: bytes, **condition: str) -> None:
        with self._calls(key) as client:
            client.put_object(Bucket=self.bucket, Key=self._name(key), Body=io.BytesIO(data), **condition)

    def _put_if(self, key: str, data: bytes, **condition: str) -> bool:
        try:
            self._put(key, data, **condition)
        except _LostRaceError as error:
            # The reply of a write that succeeded may have been lost: boto3 sent it again and met its own object.
            return error.retried and self._holds(key, data)
        return True

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.read(key) == data
        except FileNotFoundError:
            return False

    @contextmanager
    def _calls(self, key: str = "") -> Iterator[Any]:
        try:
            yield self._client
        except aws.ClientError as error:
            self._refuse(error, key)
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
        except aws.BotoCoreError as error:
            raise StoreError(f"{self.url}: {error}") from error

    def _refuse(self, error: aws.ClientError, key: str) -> NoReturn:
        code, details = error.response["Error"]["Code"], error.response.get("ResponseMetadata", {})
        if code in _MISSING:
            raise FileNotFoundError(f"{self.url}/{key} does not exist") from error
        if code in _LOST_RACE:
            raise _LostRaceError(retried=details.get("RetryAttempts", 0) > 0) from error
        at = _endpoint() or "AWS"
        if code == "NoSuchBucket":
            raise StoreError(
                f"{self.url}: there is no bucket {self.bucket!r} at {at}: create it, correct the address, or set "
                "AWS_ENDPOINT_URL to the service that has it"
            ) from error
        if code in _REFUSED:
            raise StoreError(
                f"{self.url}: {at} refused access ({code}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                f"AWS_SESSION_TOKEN and the rights on bucket {self.bucket!r}"
            ) from error
        tries = details.get("RetryAttempts", 0) + 1
        raise StoreError(
            f"{self.url}: {at} failed {error.operation_name} after {tries} tries ({code}): run again when it has "
            "recovered; nothing that was committed is lost"
        ) from error


class _LostRaceError(StoreError):
    """A conditional write met another object than it expected."""

    def __init__(self, *, retried: bool) -> None:
        super().__init__("another writer was faster: run again")
        self.retried = retried


def _refill_quota(context: dict[str, Any], **_: object) -> None:
    context["retry_quota_capacity"] = 500  # what botocore gives back after a success, and the whole of its quota


def _endpoint() -> str:
    """The private endpoint in use, without what may be a password in its address; empty for AWS itself."""
    url = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}" if url.netloc else ""
