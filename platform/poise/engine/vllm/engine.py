"""One vLLM engine in this process, whose weights are verified after every update.

Invariant: a sampler answers only with weights that were read back from the engine and are equal to those it was sent,
and with no cached key or value of older weights. After an update that fails this check it refuses to answer.

Three traps of vLLM 0.32 on a CPU determine the check. A linear layer packs its weight and drops the parameter, so a
checksum over parameters is empty: the packed layer is applied to the unit vectors instead. A head that is tied to the
embeddings keeps its old packed copy when weights are reloaded. The prefix cache is not cleared by a reload: a prompt
that was cached before the update must not be in the cache after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import PoiseError, UserError
from poise.inference.sampler import (
    Decoding,
    Finish,
    ProgressCallback,
    Request,
    Sample,
    no_progress,
)
from poise.models.examine import has_tokenizer
from poise.models.model_folder import check_newer, read_folder
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
"""Names of settings in vLLM's messages, and the keys of a spec that set them."""


class VllmSampler:
    """A `poise.inference.sampler.Sampler` for the language model of a local folder.

    One per process, which must have `poise.env.VLLM_SETTINGS` in its environment.
    """

    def __init__(self, folder: Path, spec: SamplerSpec) -> None:
        """UserError, with the keys of the spec, when the engine cannot serve this model with these settings."""
        from vllm import LLM

        self._folder = read_folder(folder)
        self._spec = spec
        self._stop = sorted(self._folder.stop)  # read now: the folder may be removed later
        # The longest prompt after which the engine can still sample a token.
        self._context = min(self._folder.context, (spec.max_model_len or self._folder.context + 1) - 1)
        try:
            self._llm = LLM(
                model=str(folder),
                skip_tokenizer_init=not has_tokenizer(folder),  # a tokenizer is needed for stop strings only
                generation_config="vllm",  # ignore generation_config.json: each request has its stop tokens
                enable_prefix_caching=True,
                # A prompt that is read in two steps would advance its random generator: on a CPU that is an error, on a
                # GPU the generator is set back by a fixed amount. So a prompt waits until all of it fits into a step.
                enable_chunked_prefill=False,
                max_model_len=spec.max_model_len,
                logprobs_mode="raw_logprobs",
                **_placement(spec),
            )
        except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
            raise UserError(f"{folder}: vLLM cannot serve this model: {_with_spec_keys(error, spec)}") from error
        self._failed_update: PoiseError | None = None
        self._set_version(0)

    @property
    def version(self) -> int:
        return int(self._llm.llm_engine.get_weight_version())

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, on_progress: ProgressCallback = no_progress
    ) -> list[list[Sample]]:
        self._check_context_length([request.prompt for request in requests], decoding.max_tokens)
        options = {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "max_tokens": decoding.max_tokens,
            "logprobs": 0,
            "flat_logprobs": True,
            "stop": list(decoding.stop),
            "detokenize": bool(decoding.stop),
        }
        request_options = [
            # Greedy decoding: all n samples are equal, so only one is drawn.
            {**options, "n": request.n if decoding.temperature else 1, "seed": request.seed}
            for request in requests
        ]
        samples: list[list[Sample]] = [[] for _ in requests]
        outputs = self._checked_outputs([request.prompt for request in requests], request_options)
        for count, (index, output) in enumerate(outputs, start=1):
            samples[index] = _samples(requests[index], output)
            on_progress(count)
        return samples

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        self._check_context_length(prompts, 0)
        self._check_context_length(sequences, 0)
        options = {"max_tokens": 1, "prompt_logprobs": 0, "flat_logprobs": True, "detokenize": False}
        scores: list[list[float]] = [[] for _ in sequences]
        for index, output in self._checked_outputs(sequences, [options] * len(sequences)):
            # The first token of a sequence has no log-probability, so entry t - 1 is that of token t.
            scores[index] = list(output.prompt_logprobs.logprobs[len(prompts[index]) - 1 :])
        return scores

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        check_newer(version, self.version)
        new = self._folder.validate_state_dict(weights)
        self._serve(new, version)

    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Serve version 0 again, with the initial `weights` of the folder, for another worker."""
        self._serve(self._folder.validate_state_dict(weights), 0)

    def _serve(self, new: Mapping[str, Tensor], version: int) -> None:
        """Load weights and verify them; until that has succeeded, the engine refuses to answer."""
        if self._spec.gpus > 1:
            raise PoiseError("the weights of an engine on several GPUs cannot be read back: use one GPU per engine")
        self._cached_of_probe()  # fill the cache, so that the check after the update finds a cache that was not cleared
        self._failed_update = PoiseError(f"the update of this engine to version {version} has failed before")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(new.items())})
        self._llm.apply_model(_repack)
        self._llm.reset_prefix_cache()
        self._set_version(version)
        self._verify_weights(new)
        self._failed_update = None

    def _verify_weights(self, sent: Mapping[str, Tensor]) -> None:
        """PoiseError unless the engine computes with the weights that were sent and its prefix cache is empty."""
        (mismatches,) = self._llm.apply_model(lambda model: _mismatched_weights(model, sent))
        if mismatches:
            names = ", ".join(mismatches[:3])
            raise PoiseError(
                f"version {self.version}: {len(mismatches)} weights are not served as they were sent: {names}"
            )
        if cached := self._cached_of_probe():
            raise PoiseError(
                f"version {self.version}: the prefix cache still holds {cached} tokens of the weights before"
            )

    def _cached_of_probe(self) -> int:
        """Sample one token after a prompt longer than a block of the cache; returns how many tokens were cached."""
        block = self._llm.llm_engine.vllm_config.cache_config.block_size
        if block + 1 > self._context:
            return 0  # no prompt of this model fills a block, and only whole blocks are cached
        probe = [0] * (block + 1)
        ((_, output),) = self._outputs([probe], [{"max_tokens": 1, "detokenize": False}])
        return int(output.num_cached_tokens)

    def _set_version(self, version: int) -> None:
        self._llm.llm_engine.set_weight_version(str(version))

    def _check_context_length(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """UserError for a prompt that, with `tokens` more, is too long for the model or for this engine."""
        self._folder.check_context_length(prompts, tokens)
        if self._spec.max_model_len is not None:
            self._spec.fit_sequences(max(map(len, prompts), default=0) + tokens)

    def _checked_outputs(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Any]]:
        """`_outputs`; raises the error of the last update of the weights if it failed."""
        if self._failed_update is not None:
            raise self._failed_update
        return self._outputs(prompts, options)

    def _outputs(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[int, Any]]:
        """The index and vLLM's output of each prompt, in the order in which they finish."""
        from vllm import SamplingParams, TokensPrompt

        common = {"stop_token_ids": self._stop, "ignore_eos": True}
        request_ids = self._llm.enqueue(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [SamplingParams(**common, **request_options) for request_options in options],
            use_tqdm=False,
        )
        # vLLM numbers requests consecutively. These ids are "NUMBER-RANDOM"; those of the outputs are the number alone.
        first = int(request_ids[0].partition("-")[0]) if request_ids else 0
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield int(output.request_id) - first, output


def _placement(spec: SamplerSpec) -> dict[str, Any]:
    """The engine's arguments for its device."""
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


def _with_spec_keys(error: Exception, spec: SamplerSpec) -> str:
    """The message of vLLM without pydantic's frame, and with the keys of a spec instead of the engine's arguments."""
    text = str(error)
    if match := re.search(r"Value error, (.*?)(?: \[type=|$)", text, re.DOTALL):
        text = match[1]
    for argument, key in _KEYS.items():
        text = text.replace(argument, key)
    if not spec.gpus:
        text = text.replace("sampler.gpu_memory_utilization", "sampler.memory")
    if len(text) > _LONGEST_MESSAGE:
        text = text[:_LONGEST_MESSAGE] + " ..."
    return f"{text}\nsampler.backend: transformers serves every model that transformers opens"


def _samples(request: Request, output: Any) -> list[Sample]:
    """The n samples of a request. A greedy output has one completion, which is repeated n times."""
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
    """Pack again the weights of layers that keep both forms: reloading the weight of a tied head does not do it."""
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


def _mismatched_weights(model: Any, sent: Mapping[str, Tensor]) -> list[str]:
    """Names of weights whose value in the model differs from `sent`, or that only one of the two has.

    vLLM pads some weights with rows that no token id selects; those rows are not compared.
    """
    seen: set[str] = set()
    mismatches: list[str] = []
    for layer, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            names = _sources(f"{layer}.{key}", sent, model)
            expected = torch.cat([sent[name] for name in names]) if names else torch.empty(0)
            for served in _served(module, key, parameter, expected):
                if not names or not torch.equal(served[: len(expected)].cpu(), expected.to(served.dtype)):
                    mismatches += names or [f"{layer}.{key}"]
            seen.update(names)
    missing = [name for name in sent if name not in seen]
    return sorted({*mismatches, *missing})


def _sources(name: str, sent: Mapping[str, Tensor], model: Any) -> list[str]:
    """Names of the sent tensors that a parameter of vLLM consists of, in the order of its rows."""
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
    """Every copy of a parameter that the engine computes with: the parameter, and the packed form of its layer."""
    if key == "weight" and hasattr(module, "cpu_linear"):
        # The layer maps the unit vectors to the columns of its packed weight.
        units = torch.eye(expected.shape[-1], dtype=parameter.dtype)  # (in, in)
        yield module.cpu_linear(units, parameter, None).T  # (out, in)
    if parameter.numel():
        yield parameter
