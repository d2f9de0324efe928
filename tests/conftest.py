"""What tests of several packages need: an S3 service on loopback, one that fails, and the shared data sets."""

from __future__ import annotations

import http.client
import logging
import os
import random
import re
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fork_server import ForkServer

REPOSITORY = Path(__file__).resolve().parents[1]

# Tests start some two hundred processes that import the same modules: these are compiled once, not in each of them.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ["RAY_AUTH_MODE"] = "disabled"  # before any test imports Ray, which reads it once for the process

# A shell that starts the tests in the background ignores Ctrl-C for them, and nohup a hangup: the processes that tests
# start would inherit that and ignore the signals that tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_LONGEST = (
    "head",
    "tests/end_to_end/test_selfplay_on_ray.py",
    "tests/engine/test_sweep.py",
    "tests/engine/ray/test_sampler_pool.py",
    "tests/cluster/test_cluster.py",
    "tests/test_guides.py",
)
"""The groups of tests that take longest, in the order in which they begin."""


@pytest.hookimpl(wrapper=True)  # before xdist's own, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Group the tests for `--dist loadgroup`: those that share a Ray cluster, and any others by file.

    The groups that take longest go first, so that neither of two processes is left alone with one at the end.
    """
    groups = {item: "head" if "head" in item.fixturenames else item.location[0] for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    ranks = {group: rank for rank, group in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(groups[item], len(ranks)))
    yield


@pytest.fixture
def allow_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of the user may run in this process, and in those that the test starts."""
    monkeypatch.setenv("POISE_ALLOW_CODE", "1")


@pytest.fixture
def mylab(tmp_path: Path) -> Path:
    """A folder with the package, its metadata and the specs of docs/extend.md, as an installed package has them."""
    page = (REPOSITORY / "docs" / "extend.md").read_text()
    package = tmp_path / "mylab"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, code in re.findall(r"`mylab/(\w+\.py)`[^`].*?```python\n(.*?)```", page, flags=re.DOTALL):
        (package / name).write_text(code)
    for name, spec in re.findall(r"```yaml\n(kind: .*?\nname: (\S+)\n.*?)```", page, flags=re.DOTALL):
        (tmp_path / f"{spec}.yaml").write_text(name)
    ((group, entries),) = re.findall(r'\[project.entry-points."([\w.]+)"\]\n(.*?)```', page, flags=re.DOTALL)
    info = tmp_path / "mylab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mylab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entries.replace(chr(34), '')}")
    return tmp_path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data sets: POISE_SHARED_DATA, or ../shared/data beside the repository."""
    path = Path(os.environ.get("POISE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("no shared data: set POISE_SHARED_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts `python -m ...` with its imports done, for tests that need a process but not a new interpreter."""
    with ForkServer(tmp_path_factory.mktemp("fork")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 service in a thread of this process; nothing is set in the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def new_bucket(s3_server: str) -> Callable[[], str]:
    """Makes a bucket and returns its name."""
    import boto3

    admin = boto3.session.Session("testing", "not-a-secret", region_name="us-east-1").client(
        "s3", endpoint_url=s3_server
    )

    def make() -> str:
        name = f"poise-{uuid.uuid4().hex[:12]}"
        admin.create_bucket(Bucket=name)
        return name

    return make


@pytest.fixture(scope="session")
def s3_settings(s3_server: str) -> dict[str, str]:
    """The environment of a process that may use the S3 service."""
    return {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def s3_store(s3_settings: dict[str, str], new_bucket: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store in a bucket of its own; this process and its children may use it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_settings.items():
        monkeypatch.setenv(name, value)
    return f"s3://{new_bucket()}/tests/runs"


@pytest.fixture
def flaky_s3(s3_store: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3_store` behind a proxy that answers 503 to one request in three, to half of these after it was served."""
    draw = random.Random(0)
    with _failing_proxy(s3_server, lambda _: draw.choices(("serve", "drop", "lose"), (4, 1, 1))[0]) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield s3_store


@pytest.fixture
def dead_s3(s3_store: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`s3_store` behind a proxy that answers 503 to everything."""
    with _failing_proxy(s3_server, lambda _: "drop") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield s3_store


@pytest.fixture
def s3_behind(
    s3_store: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[str], str]], str]]:
    """Makes `s3_store` behind a proxy that asks a function, by HTTP method, what to do with each request."""
    with ExitStack() as stack:

        def make(decide: Callable[[str], str]) -> str:
            monkeypatch.setenv("AWS_ENDPOINT_URL", stack.enter_context(_failing_proxy(s3_server, decide)))
            return s3_store

        yield make


@contextmanager
def _failing_proxy(backend: str, decide: Callable[[str], str]) -> Iterator[str]:
    """A forwarding proxy; `decide(method)` says of each request what becomes of it.

    serve it; drop it; lose the answer after it was served; cut the body of the answer short; ignore its conditions;
    change the checksum that is answered.
    """
    target = urlsplit(backend).netloc
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self._body()
            with lock:
                fate = decide(self.command)
            if fate == "ignore":
                for name in ("If-Match", "If-None-Match"):
                    del self.headers[name]
            status, headers, answer = self._ask(body) if fate != "drop" else (503, [], b"")
            if fate in ("drop", "lose"):
                status, headers, answer = 503, [], b""
            self.send_response(status)
            changed = "x-amz-checksum-crc32" if fate == "change" else ""
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server", changed):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length") if self.command == "HEAD" else len(answer)
            self.send_header("Content-Length", str(length or 0))
            if fate == "change":
                self.send_header("x-amz-checksum-crc32", "AAAAAA==")
            self.end_headers()
            if fate == "cut":
                self.wfile.write(answer[: len(answer) // 2])
                self.close_connection = True
                return
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            skipped = ("transfer-encoding", "content-length", "expect")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
            connection = http.client.HTTPConnection(target, timeout=30)
            try:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            finally:
                connection.close()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


CORPUS = [
    "The cat sat on the mat. The dog sat on the cat.",
    "What is the capital of France? Paris is the capital of France.",
    "Question: who wrote the poem? Answer: the old poet of the river wrote the poem.",
] * 4


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model with the tokenizer and special tokens of a family; made once per session.

    llama: SentencePiece-like, BOS 1 before every text, EOS 2. qwen2: byte-level, no BOS; the tokenizer ends with
    <|im_end|> (2), generation_config.json with <|endoftext|> (0) alone. gpt2: byte-level, tied, 128 positions, one
    special token for everything. gemma2: SentencePiece-like, tied, BOS 2, EOS 1, and <end_of_turn> (4) ends as well.
    mistral: as llama, but its tokenizer appends EOS to every text.
    """
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            _save_family(family, made[family])
        return made[family]

    return folder


def _save_family(family: str, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = _family_tokenizer(family)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(_family_config(family, len(tokenizer), ids))
    stop = {"qwen2": [0], "gemma2": [1, 4]}.get(family, [tokenizer.eos_token_id])
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": stop}, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _family_config(family: str, vocabulary: int, ids: dict[str, int | None]) -> Any:
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    if family == "gpt2":
        return GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=1, n_positions=128, **ids)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.1}
    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config, "mistral": MistralConfig}
    tied = family == "gemma2"
    return classes[family](vocab_size=vocabulary, tie_word_embeddings=tied, pad_token_id=None, **sizes, **ids)


def _family_tokenizer(family: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {
        "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "gpt2": ["<|endoftext|>"],
        "gemma2": ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"],
    }.get(family, ["<unk>", "<s>", "</s>"])
    inner = Tokenizer(models.BPE())
    if family in ("qwen2", "gpt2"):
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if family != "gemma2" else "never")
        inner.decoder = decoders.Metaspace(prepend_scheme="always" if family != "gemma2" else "never")
        alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    if frame := {"llama": "<s> $A", "gemma2": "<bos> $A", "mistral": "<s> $A </s>"}.get(family):
        pairs = [(token, special.index(token)) for token in frame.split() if token != "$A"]
        inner.post_processor = processors.TemplateProcessing(single=frame, special_tokens=pairs)
    names = {
        "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "gpt2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    }.get(family, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)
