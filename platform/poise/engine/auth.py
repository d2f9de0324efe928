"""Ray's token: whoever has it may run code on a cluster.

It is made before any cluster is started, in a file that only its owner reads. Ray itself makes one with the
permissions of any other file, and `ray start` makes none: without a token it starts a cluster that asks for nothing.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from poise.errors import UserError

__all__ = ["MISSING", "ensure_token", "private_folder", "read_token", "refuses_token", "token_file"]

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
MISSING = (
    "it asks for a token, and the one here is missing or another one: copy ~/.ray/auth_token of the machine that "
    "started it to this one, or set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token"
)
_ANSWER_WITHIN_S = 5
_LONGEST_TMPDIR = 30  # of the 107 bytes that the path of a socket may have, Ray's own part takes 76
_ASKS_FOR_TOKEN = "/ray.rpc.NodeInfoGcsService/GetClusterId"


def token_file() -> Path:
    """Where Ray looks for the token of this user."""
    named = os.environ.get(TOKEN_PATH)
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def read_token() -> str | None:
    """The token that Ray uses here: of RAY_AUTH_TOKEN, or of the file; None without one."""
    try:
        return os.environ.get(TOKEN) or token_file().read_text().strip() or None
    except (OSError, ValueError):
        return None


def ensure_token() -> None:
    """Make a token for this user unless there is one, and let Ray ask for it.

    The file has mode 0600, also one that was made with another. Nothing happens with RAY_AUTH_MODE=disabled. Raises
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
    """Where Ray keeps its files: RAY_TMPDIR, or a folder that no other user enters. /tmp/ray is open to everybody.

    Raises UserError when that folder cannot be made, or is another user's.
    """
    if named := os.environ.get("RAY_TMPDIR"):
        return Path(named)
    place = tempfile.gettempdir()
    folder = Path(place if len(place) <= _LONGEST_TMPDIR else "/tmp", f"poise-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_own = stat.S_ISDIR(folder.lstat().st_mode) and folder.lstat().st_uid == os.getuid()
        if is_own:
            folder.chmod(0o700)
    except OSError:
        is_own = False
    if not is_own:
        raise UserError(f"{folder} is not a folder of this user alone; set RAY_TMPDIR to one with a short path")
    return folder


def refuses_token(address: str) -> bool:
    """Whether the cluster at HOST:PORT answers, and wants another token than the one here.

    Ray itself asks again for 20 s before it gives up, and then says that nobody answers. One request of its protocol
    tells at once; whatever else comes of it is left to Ray.
    """
    import grpc

    token = read_token() if os.environ.get(MODE, "").lower() == "token" else None
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_ASKS_FOR_TOKEN)(b"", timeout=_ANSWER_WITHIN_S, metadata=metadata)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False


def _write_privately(file: Path, text: str) -> None:
    """Write `file` with mode 0600, whole or not at all: another process may look at any moment."""
    temporary = file.with_name(f".{file.name}-{os.getpid()}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(text)
    temporary.replace(file)
