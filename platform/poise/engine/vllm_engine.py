"""One vLLM engine in this process: what it serves is proved after every update, not assumed.

Invariant: a sampler answers with weights that were read back out of the engine and found equal to those it was sent,
and with no key or value of older weights. After an update that is not so, it refuses to answer.

Three traps of vLLM 0.32 on a CPU make the proof what it is. A linear layer packs its weight and drops the parameter:
checksums over parameters see nothing, so the packed layer is asked instead, with the unit vectors. A head that is tied
to the embeddings keeps its packed copy of them when weights are reloaded. And the prefix cache outlives the weights
that filled it: a prompt that was cached before the update must not be found after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import PoiseError, UserError
from poise.models.examine import has_tokenizer
from poise.models.folder import check_newer, read_folder
from poise.models.sampling import Decoding, Finish, ProgressCallback, Request, Sample, no_progress
from poise.spec import SamplerSpec

__all__ = ["VllmSampler"]


_LONGEST_MESSAGE = 1500

_KEYS = {
    "gpu_memory_utilization": "sampler.gpu_memory_utilization",
    "max_model_len": "sampler.max_model_len",
    "tensor_parallel_size": "sampler.gpus",
    "tensor parallel size": "sampler.gpus",
    "--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE": "sampler.memory",
}
"""What messages of vLLM call a setting, and what a spec calls it."""


class VllmSampler:
    """The language model of a local folder; `poise.models.sampling.Sampler` says what it does.

    One per process, which has `poise.env.VLLM_SETTINGS` in its environment.
    """

    def __init__(self, folder: Path, spec: SamplerSpec) -> None:
        """UserError, in the words of the spec, when the engine cannot serve this model with these settings."""
        from vllm import LLM

        self._folder, self._spec = read_folder(folder), spec
        self._stop = sorted(self._folder.stop)  # read now: the folder may be gone later
        # The longest sequence, from which a further token is asked.
        self._context = min(self._folder.context, (spec.max_model_len or self._folder.context + 1) - 1)
        try:
            self._llm = LLM(
                model=str(folder),
                skip_tokenizer_init=not has_tokenizer(folder),  # it is needed for stop strings only
                generation_config="vllm",  # stop tokens come with each request, nothing else is taken from the folder
                enable_prefix_caching=True,
                # A prompt that is read in two steps would move its generator: on a CPU that is an error, on a GPU the
                # generator is set back by a fixed amount. So a prompt waits until the whole of it fits into a step.
                enable_chunked_prefill=False,
                max_model_len=spec.max_model_len,
                logprobs_mode="raw_logprobs",
                **_placement(spec),
            )
        except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
            raise UserError(f"{folder}: vLLM cannot serve this model: {_in_words_of_the_spec(error, spec)}") from error
        self._doubt: PoiseError | None = None
        self._label(0)

    @property
    def version(self) -> int:
        return int(self._llm.llm_engine.get_weight_version())

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, on_progress: ProgressCallback = no_progress
    ) -> list[list[Sample]]:
        self._check_room([request.prompt for request in requests], decoding.max_tokens)
        options = {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_tokens,
            "logprobs": 0,
            "flat_logprobs": True,
            "stop": list(decoding.stop),
            "detokenize": bool(decoding.stop),
        }
        chosen = [
            # Greedy: one answer is all of them.
            {**options, "n": request.n if decoding.temperature else 1, "seed": request.seed}
            for request in requests
        ]
        answers: list[list[Sample]] = [[] for _ in requests]
        finished = self._finished([request.prompt for request in requests], chosen)
        for count, (place, output) in enumerate(finished, start=1):
            answers[place] = _samples(requests[place], output)
            on_progress(count)
        return answers

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        self._check_room(prompts, 0)
        self._check_room(sequences, 0)
        options = {"max_tokens": 1, "prompt_logprobs": 0, "flat_logprobs": True, "detokenize": False}
        scores: list[list[float]] = [[] for _ in sequences]
        for place, output in self._finished(sequences, [options] * len(sequences)):
            # The first token of a prompt has no log-probability.
            scores[place] = list(output.prompt_logprobs.logprobs[len(prompts[place]) - 1 :])
        return scores

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        check_newer(version, self.version)
        new = self._folder.checked(weights)
        self._serve(new, version)

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Serve version 0 again, the `weights` that the folder had: somebody else begins to ask."""
        self._serve(self._folder.checked(weights), 0)

    def _serve(self, new: Mapping[str, Tensor], version: int) -> None:
        if self._spec.gpus > 1:
            raise PoiseError("the weights of an engine on several GPUs cannot be read back: use one GPU per engine")
        self._cached_of_probe()  # from now on the cache holds something old
        self._doubt = PoiseError(f"the update of this engine to version {version} has failed before")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(new.items())})
        self._llm.apply_model(_repack)
        self._llm.reset_prefix_cache()
        self._label(version)
        self._prove(new)
        self._doubt = None

    def _prove(self, sent: Mapping[str, Tensor]) -> None:
        """PoiseError unless the engine computes with what was sent and remembers nothing from before."""
        (wrong,) = self._llm.apply_model(lambda model: _unlike(model, sent))
        if wrong:
            raise PoiseError(
                f"version {self.version}: {len(wrong)} weights are not served as they were sent: {', '.join(wrong[:3])}"
            )
        if cached := self._cached_of_probe():
            raise PoiseError(
                f"version {self.version}: the prefix cache still holds {cached} tokens of the weights before"
            )

    def _cached_of_probe(self) -> int:
        """Ask for one token after a prompt longer than a block of the cache: how much of it was in the cache."""
        block = self._llm.llm_engine.vllm_config.cache_config.block_size
        if block + 1 > self._context:
            return 0  # no prompt of this model fills a block, and only whole blocks are ever cached
        probe = [0] * (block + 1)
        ((_, output),) = self._outputs([probe], [{"max_tokens": 1, "detokenize": False}])
        return int(output.num_cached_tokens)

    def _label(self, version: int) -> None:
        self._llm.llm_engine.set_weight_version(str(version))

    def _check_room(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """UserError for a prompt after which `tokens` more do not fit into the model, or into this engine."""
        self._folder.check_room(prompts, tokens)
        if self._spec.max_model_len is not None:
            self._spec.fit_sequences(max(map(len, prompts), default=0) + tokens)

    def _finished(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Any]]:
        """`_outputs`, unless the last update of the weights has failed."""
        if self._doubt is not None:
            raise self._doubt
        return self._outputs(prompts, options)

    def _outputs(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Any]]:
        """The place and vLLM's output of each prompt, as soon as it is answered."""
        from vllm import SamplingParams, TokensPrompt

        fixed = {"stop_token_ids": self._stop, "ignore_eos": True}
        names = self._llm.enqueue(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [SamplingParams(**fixed, **chosen) for chosen in options],
            use_tqdm=False,
        )
        # Requests are numbered on; a name is the number, and behind a dash random characters that outputs do not have.
        first = int(names[0].partition("-")[0]) if names else 0
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield int(output.request_id) - first, output


def _placement(spec: SamplerSpec) -> dict[str, Any]:
    """Arguments of the engine for the device that it runs on."""
    if spec.gpus:
        return {
            "dtype": spec.dtype,
            "tensor_parallel_size": spec.gpus,
            "gpu_memory_utilization": float(spec.gpu_memory_utilization),
        }
    return {
        "dtype": "float32" if spec.dtype == "auto" else spec.dtype,
        "kv_cache_memory_bytes": int(spec.memory * 2**30),
        "enforce_eager": True,
    }


def _in_words_of_the_spec(error: Exception, spec: SamplerSpec) -> str:
    """What vLLM says, without the frame of pydantic and with the keys of a spec for the arguments of the engine."""
    text = str(error)
    if match := re.search(r"Value error, (.*?)(?: \[type=|$)", text, re.DOTALL):
        text = match[1]
    for theirs, ours in _KEYS.items():
        text = text.replace(theirs, ours)
    if not spec.gpus:
        text = text.replace("sampler.gpu_memory_utilization", "sampler.memory")
    if len(text) > _LONGEST_MESSAGE:
        text = text[:_LONGEST_MESSAGE] + " ..."
    return f"{text}\nsampler.backend: transformers serves every model that transformers opens"


def _samples(request: Request, output: Any) -> list[Sample]:
    """The samples of a request; a greedy output has one completion, which is all of them."""
    version = int(output.outputs[0].weight_versions[-1].version)
    samples = []
    for index in range(request.n):
        completion = output.outputs[index % len(output.outputs)]
        finish: Finish = completion.finish_reason
        if isinstance(completion.stop_reason, str):
            finish = "stop_string"
        tokens = completion.token_ids
        logprobs = completion.logprobs.logprobs[: len(tokens)]
        samples.append(Sample(request.id, index, tokens, logprobs, finish, version))
    return samples


def _repack(model: Any) -> None:
    """Pack anew what is kept packed and unpacked: reloading a tied head's weight does not."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


def _unlike(model: Any, sent: Mapping[str, Tensor]) -> list[str]:
    """The names of what was sent that a model of vLLM does not compute with value by value, and of what it has beside.

    Some of what it has is padded with rows that no token reaches.
    """
    seen: set[str] = set()
    wrong: list[str] = []
    for layer, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            names = _sources(f"{layer}.{key}", sent, model)
            expected = torch.cat([sent[name] for name in names]) if names else torch.empty(0)
            for served in _served(module, key, parameter, expected):
                if not names or not torch.equal(served[: len(expected)].cpu(), expected.to(served.dtype)):
                    wrong += names or [f"{layer}.{key}"]
            seen.update(names)
    return sorted({*wrong, *(name for name in sent if name not in seen)})


def _sources(name: str, sent: Mapping[str, Tensor], model: Any) -> list[str]:
    """Which of the sent tensors make up a parameter of vLLM, in the order of its rows."""
    if name in sent:
        return [name]
    if name == "lm_head.weight" and model.config.tie_word_embeddings:
        return [other for other in sent if other.endswith("embed_tokens.weight")]
    for fused, parts in model.packed_modules_mapping.items():
        if f".{fused}." in name:
            split = [name.replace(f".{fused}.", f".{part}.") for part in parts]
            return split if all(part in sent for part in split) else []
    return []


def _served(module: Any, key: str, parameter: Tensor, expected: Tensor) -> Iterator[Tensor]:
    """Every copy of a parameter that the engine computes with: as it is held, and as a packed layer applies it."""
    if key == "weight" and hasattr(module, "cpu_linear"):
        units = torch.eye(expected.shape[-1], dtype=parameter.dtype)
        yield module.cpu_linear(units, parameter, None).T
    if parameter.numel():
        yield parameter
