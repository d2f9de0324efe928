"""Secrets: kept out of specs, and never repeated by a message that refuses them."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from poise.cli import cli
from poise.errors import StoreError, UserError
from poise.secrets import find_secrets, is_secret, is_secret_variable, redact

REPOSITORY = Path(__file__).parents[2]

BASE = """\
kind: robust.train
name: digits
model: {name: cnn}
data: {name: digits, batch_size: 64}
threats: {linf: {eps: 8/255}}
objective: {name: at}
train: {epochs: 2}
"""

HIDDEN = {
    "AWS_SECRET_ACCESS_KEY": "/x",
    "aws_access_key_id": "x",
    "WANDB_KEY": "0123",
    "WANDB_API_KEY": "x",
    "HF_AUTH": "x",
    "HF_TOKEN": "x",
    "DATABASE_URL": "postgres://db",
    "PGPASS": "x",
    "PGPASSWORD": "x",
    "GITHUB_PAT": "x",
    "OPENAI_KEY": "x",
    "MY_DB_PASSWORD": "hunter2",
    "SMTP_PASS": "x",
    "SERVICE-API-KEY": "x",
    "APIKEY": "x",
    "CI_JOB_TOKEN": "64charsofhex0123456789abcdef",
    "SENTRY_DSN": "aGVsbG8gd29ybGQ5aGVsbG8",
    "ANYTHING": "ghp_" + "a1" * 18,
    "MODEL": "hf_" + "aB3" * 11,
    "PROXY": "http://me:mine@proxy:3128",
    "REMOTE": "https://0123456789abcdef0123@git.example.org/x",
    "PEM": "-----BEGIN RSA PRIVATE KEY-----\nMIIE",
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.c2lnbmF0dXJl",
    "LINK": "https://b.s3.amazonaws.com/x?X-Amz-Signature=0123456789abcdef",
}
OPEN = {
    "TOKENIZERS_PARALLELISM": "false",
    "MAX_TOKENS": "4096",
    "PAD_TOKEN": "<pad>",
    "EOS_TOKEN": "</s>",
    "SORT_KEY": "name",
    "KEY_PREFIX": "runs/2026-11-30-a1b2c3",
    "RAY_AUTH_MODE": "token",
    "AWS_SHARED_CREDENTIALS_FILE": "/etc/aws/credentials",
    "GOOGLE_APPLICATION_CREDENTIALS": "/var/run/key.json",
    "WANDB_API_KEY": "",
    "GIT_COMMIT": "d3ad7a2d3ad7a2d3ad7a2d3ad7a2d3ad7a2d3ad7",
    "OMP_NUM_THREADS": "4",
    "GLOO_SOCKET_IFNAME": "eth0",
    "HF_HOME": "/shared/hf",
    "ENDPOINT": "http://127.0.0.1:8000/v1/models@main",
    "REPOSITORY": "ssh://git@example.org/x",
    "PASSES": "3",
    "SECRETARY": "anna",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_variable_that_holds_a_secret_is_refused_and_not_repeated(name, write):
    assert is_secret_variable(name, HIDDEN[name])
    tree = {**yaml.safe_load(BASE), "workers": {"environment": {name: HIDDEN[name]}}}
    outcome = CliRunner().invoke(cli, ["check", str(write(yaml.safe_dump(tree)))])
    assert isinstance(outcome.exception, UserError), outcome.output
    message = str(outcome.exception)
    assert name in message
    assert "environment" in message
    assert len(HIDDEN[name]) < 6 or HIDDEN[name] not in message


@pytest.mark.parametrize("name", OPEN)
def test_a_variable_whose_name_only_sounds_like_one_passes(name, write):
    assert not is_secret_variable(name, OPEN[name])
    tree = {**yaml.safe_load(BASE), "workers": {"environment": {name: OPEN[name]}}}
    outcome = CliRunner().invoke(cli, ["check", str(write(yaml.safe_dump(tree)))])
    assert outcome.exit_code == 0, outcome.exception


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "store=s3://key:hunter2@bucket/x"],
        ["--set", "store=s3://AKIAABCDEFGHIJKLMNOP:hunter2/slash+and" + "x" * 60 + "@bucket/x"],
        ["--set", "data.root=https://me:hunter2@host/cifar"],
        ["--set", "data.name=ftp://me:hunter2@host/cifar"],
        ["--set", "workers.environment=DB_PASSWORD=hunter2"],
        ["--set", "workers.environment.DB_PASSWORD=hunter2"],
        ["--set", "workers.environment.DB_PASSWORD=[hunter2"],
        ["--set", "s3://key:hunter2@bucket/x"],
        ["--profile", "https://me:hunter2@host"],
    ],
)
def test_a_secret_in_another_place_is_not_repeated(arguments, write):
    outcome = CliRunner().invoke(cli, ["check", str(write(BASE)), *arguments])
    assert isinstance(outcome.exception, UserError), outcome.output
    assert "hunter2" not in str(outcome.exception)
    assert "hunter2" not in outcome.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "list", "s3://key:hunter2@bucket/x"],
        ["runs", "show", "s3://key:hunter2@bucket/x/run"],
        ["status", "job", "--address", "http://me:hunter2@127.0.0.1:9"],
    ],
)
def test_an_address_on_the_command_line_is_not_repeated(arguments):
    outcome = CliRunner().invoke(cli, arguments)
    assert isinstance(outcome.exception, UserError), outcome.exc_info
    assert "hunter2" not in str(outcome.exception)


def test_every_message_is_cleaned_and_keeps_the_rest():
    error = pickle.loads(pickle.dumps(StoreError("https://me:hunter2@host:9000/b: Connection refused")))
    assert str(error) == "https://***@host:9000/b: Connection refused"
    assert redact("see http://127.0.0.1:8265/jobs and a@b.org") == "see http://127.0.0.1:8265/jobs and a@b.org"


def test_secrets_are_found_wherever_they_lie_in_a_spec():
    tree = {"a": [{"b": "fine"}, {"b": "s3://k:v@bucket"}], "c": {"d": "hf_" + "x1" * 15}}
    assert list(find_secrets(tree)) == [("a", 1, "b"), ("c", "d")]


def test_values_of_real_specs_are_no_secrets():
    words = re.findall(r"\S+", " ".join(path.read_text() for path in REPOSITORY.glob("jobs/**/*.yaml")))
    assert len(words) > 500
    assert not [word for word in words if is_secret(word)]
