"""Recognizes secrets, which are refused in specs and removed from what Poise prints and records.

The schema of the chart has the same patterns for its `environment`. A value is recognized first by its form: a password
in a URL, a private key, a token of a well-known service. The name of a variable is matched as a whole or by its last
words only: TOKENIZERS_PARALLELISM contains TOKEN and is no secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["find_secrets", "is_secret", "is_secret_variable", "redact"]

_IN_URL = re.compile(
    r"(?<=://)[^\s/@:'\"]+:(?!\d{1,5}/)[^\s@'\"]+(?=@)"  # user:password, not host:port; a password may have a slash
    r"|(?<=://)[^\s/@:'\"]{16,}(?=@)"  # a user name that is long enough for a token
    r"|(?<=[?&])(?:X-Amz-(?:Signature|Credential|Security-Token)|sig|api_key|access_token|token|password)=[^&\s'\"]+"
)
"""Credentials in a URL."""

_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:gh[opusr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|hf_[A-Za-z0-9]{20,}|sk-(?=[\w-]*\d)[\w-]{20,}|nvapi-[\w-]{20,}"  # Hugging Face, OpenAI and others, NVIDIA
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|ya29\.[\w.-]{20,}"  # AWS, Google
    r"|xox[abprs]-[\w-]{10,}|dckr_pat_[\w-]{20,}|npm_\w{30,}|pypi-Ag\w{20,}"  # Slack, Docker, npm, PyPI
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"  # JSON Web Tokens
)

_NAMES = re.compile(
    r"(?:ANTHROPIC|AWS_ACCESS|AWS_SECRET|AZURE_STORAGE|COHERE|COMET|GEMINI|GOOGLE|GROQ|HF|MISTRAL|NGC|OPENAI|SSH|WANDB)"
    r"_KEY|AWS_ACCESS_KEY_ID|AWS_SECRET_ACCESS_KEY|SSH_PRIVATE_KEY"
    r"|(?:HF|HUGGINGFACE|HUGGING_FACE_HUB|NEPTUNE|RAY_AUTH)_TOKEN"
    r"|(?:HF|REDISCLI)_AUTH|MYSQL_PWD|PGPASS(?:WORD)?|(?:DATABASE|DB|MONGO|MONGODB|POSTGRES|REDIS)_UR[IL]"
    r"|AZURE_STORAGE_(?:CONNECTION_STRING|SAS_TOKEN)|SLACK_WEBHOOK(?:_URL)?"
)
"""Names of variables that have a secret value of any form."""

_CERTAIN = re.compile(
    r"(?:^|_)(?:PASSWORD|PASSWD|PASSPHRASE|PASS|SECRET|SECRETS|CREDENTIAL|CREDENTIALS|PAT"
    r"|(?:API|ACCESS|SECRET|PRIVATE|SIGNING|ENCRYPTION|ACCOUNT)_?KEY"
    r"|(?:API|AUTH|ACCESS|BEARER|REFRESH|SESSION|BOT)_?TOKEN)$"
)
"""Last words of names of secrets, unless the value is the path of a file with the secret."""

_POSSIBLE = re.compile(r"(?:^|_)(?:KEY|TOKEN|AUTH|PWD|PW|SAS|DSN)$")
"""Last words of names of secrets if the value looks random: PAD_TOKEN=<pad> and SORT_KEY=name are no secrets."""

_RANDOM = re.compile(r"(?=[^\s]*\d)(?=[^\s]*[A-Za-z])[A-Za-z0-9+/=_.:~-]{16,}")


def is_secret(value: str) -> bool:
    """Whether a value is or contains a secret, by its form alone."""
    return bool(_IN_URL.search(value) or _SHAPES.search(value))


def is_secret_variable(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret, by its name and its value."""
    name = re.sub(r"[^A-Z0-9]+", "_", name.upper())
    if not value.strip():
        return False
    if is_secret(value) or _NAMES.fullmatch(name):
        return True
    if value.startswith(("/", "~", ".")):  # the path of a file with the secret
        return False
    return bool(_CERTAIN.search(name) or (_POSSIBLE.search(name) and _RANDOM.fullmatch(value)))


def redact(text: str) -> str:
    """The text with every secret that is recognized by its form replaced by `***`."""
    return _SHAPES.sub("***", _IN_URL.sub("***", text))


def find_secrets(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all values in nested mappings and lists that are secrets by their form."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from find_secrets(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from find_secrets(value, (*path, index))
    elif isinstance(tree, str) and is_secret(tree):
        yield path
