"""Ray's authentication token. Whoever has it may run code on a cluster.

Poise writes the token before it starts a cluster, in a file that only its owner can read. Ray itself writes one with
default permissions, and `ray start` writes none: without a token it starts a cluster without authentication.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from poise.errors import UserError

__all__ = ["MISSING", "ensure_token", "private_folder", "read_token", "refuses_token", "token_file"]

MODE = "RAY_AUTH_MODE"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
MISSING = (
    "it asks for a token, and the one here is missing or another one: copy ~/.ray/auth_token of the machine that "
    "started it to this one, or set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token"
)
"""End of the message about a cluster that refuses the token of this machine."""

_ANSWER_WITHIN_S = 5
_LONGEST_TMPDIR = 30  # of the 107 bytes that the path of a socket may have, Ray's own part takes 76
_AUTHENTICATED_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"


def token_file() -> Path:
    """The file in which Ray looks for the token of this user."""
    configured = os.environ.get(TOKEN_PATH)
    return Path(configured) if configured else Path.home() / ".ray" / "auth_token"


def read_token() -> str | None:
    """The token that Ray uses in this process: RAY_AUTH_TOKEN, or the content of the file; None if there is neither."""
    try:
        return os.environ.get(TOKEN) or token_file().read_text().strip() or None
    except (OSError, ValueError):
        return None


def ensure_token() -> None:
    """Write a token for this user unless there is one, and turn on Ray's authentication in this process.

    The file gets mode 0600, also one that exists with another mode. Does nothing if RAY_AUTH_MODE=disabled. Raises
    UserError when the file cannot be written.
    """
    if os.environ.setdefault(MODE, "token") != "token" or os.environ.get(TOKEN):
        return
    file = token_file()
    try:
        if read_token() is None:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_privately(file, secrets.token_hex(32))
        elif file.stat().st_mode & 0o077 and file.stat().st_uid == os.getuid():
            file.chmod(0o600)
    except OSError as error:
        raise UserError(
            f"{file}: Ray's token cannot be kept there ({error.strerror}); set {TOKEN_PATH} to a file that can be "
            f"written, or {MODE}=disabled on a machine and a network that you trust"
        ) from None


def private_folder() -> Path:
    """The folder for Ray's files: RAY_TMPDIR, or one that no other user can enter. Ray's default, /tmp/ray, is public.

    Raises UserError when that folder cannot be made, or belongs to another user.
    """
    if configured := os.environ.get("RAY_TMPDIR"):
        return Path(configured)
    parent = tempfile.gettempdir()
    if len(parent) > _LONGEST_TMPDIR:
        parent = "/tmp"
    folder = Path(parent, f"poise-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # lstat: another user may have put a symbolic link there.
        is_private = stat.S_ISDIR(folder.lstat().st_mode) and folder.lstat().st_uid == os.getuid()
        if is_private:
            folder.chmod(0o700)
    except OSError:
        is_private = False
    if not is_private:
        raise UserError(f"{folder} is not a folder of this user alone; set RAY_TMPDIR to one with a short path")
    return folder


def refuses_token(address: str) -> bool:
    """Whether the cluster at HOST:PORT (`address`) answers and refuses the token of this process.

    Ray itself retries for 20 s and then reports that nothing answers. One request of its protocol shows a refusal at
    once. False for every other outcome, which Ray reports itself.
    """
    import grpc

    token = read_token() if os.environ.get(MODE, "").lower() == "token" else None
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_AUTHENTICATED_METHOD)(b"", timeout=_ANSWER_WITHIN_S, metadata=metadata)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _write_privately(file: Path, text: str) -> None:
    """Write `file` with mode 0600 and atomically: another process may read it at any moment."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(text)
    temporary.replace(file)
