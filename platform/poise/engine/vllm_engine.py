"""One vLLM engine in this process: what it serves is proved after every update, not assumed.

Invariant: a sampler answers with weights that were read back out of the engine and found equal to those it was sent,
and with no key or value of older weights. After an update that is not so, it refuses to answer.

Three traps of vLLM 0.32 on a CPU make the proof what it is. A linear layer packs its weight and drops the parameter:
checksums over parameters see nothing, so the packed layer is asked instead, with the unit vectors. A head that is tied
to the embeddings keeps its packed copy of them when weights are reloaded. And the prefix cache outlives the weights
that filled it: a prompt that was cached before the update must not be found after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import PoiseError
from poise.models.folder import check_newer, read_folder
from poise.models.sampling import Decoding, Request, Sample
from poise.spec import SamplerSpec

__all__ = ["VllmSampler"]


class VllmSampler:
    """The language model of a local folder; `poise.models.sampling.Sampler` says what it does.

    One per process, which has `poise.env.VLLM_SETTINGS` in its environment.
    """

    def __init__(self, folder: Path, spec: SamplerSpec) -> None:
        from vllm import LLM

        self._folder, self._spec = read_folder(folder), spec
        self._stop = sorted(self._folder.stop)  # read now: the folder may be gone later
        gpu = {"tensor_parallel_size": spec.gpus}
        cpu = {"dtype": "float32", "kv_cache_memory_bytes": int(spec.memory * 2**30), "enforce_eager": True}
        self._llm = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            generation_config="vllm",  # stop tokens come with each request, nothing else is taken from the folder
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs",
            **(gpu if spec.gpus else cpu),
        )
        self._doubt: PoiseError | None = None
        self._label(0)

    @property
    def version(self) -> int:
        return int(self._llm.llm_engine.get_weight_version())

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Sample]]:
        self._folder.check_room((request.prompt for request in requests), decoding.max_tokens)
        outputs = self._ask(
            [request.prompt for request in requests],
            [
                {
                    "n": request.n if decoding.temperature else 1,  # greedy: one answer is all of them
                    "seed": request.seed,
                    "temperature": decoding.temperature,
                    "top_p": decoding.top_p,
                    "max_tokens": decoding.max_tokens,
                    "logprobs": 0,
                }
                for request in requests
            ],
        )
        return [
            [_sample(request, index, output.outputs[index % len(output.outputs)]) for index in range(request.n)]
            for request, output in zip(requests, outputs, strict=True)
        ]

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        whole = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        self._folder.check_room(prompts, 0)
        self._folder.check_room(whole, 0)
        outputs = self._ask(whole, [{"max_tokens": 1, "prompt_logprobs": 0} for _ in whole])
        return [
            [told[token].logprob for told, token in zip(output.prompt_logprobs[len(prompt) :], response, strict=True)]
            for output, prompt, response in zip(outputs, prompts, responses, strict=True)
        ]

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
        if block + 1 >= self._folder.context:
            return 0  # no prompt of this model fills a block, and only whole blocks are ever cached
        (output,) = self._generate([[0] * (block + 1)], [{"max_tokens": 1}])
        return int(output.num_cached_tokens)

    def _label(self, version: int) -> None:
        self._llm.llm_engine.set_weight_version(str(version))

    def _ask(self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]) -> list[Any]:
        if self._doubt is not None:
            raise self._doubt
        return self._generate(prompts, options)

    def _generate(self, prompts: Sequence[Sequence[int]], options: Sequence[Mapping[str, Any]]) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        fixed = {"stop_token_ids": self._stop, "ignore_eos": True, "detokenize": False}
        outputs: list[Any] = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            [SamplingParams(**fixed, **chosen) for chosen in options],
            use_tqdm=False,
        )
        return outputs


def _sample(request: Request, index: int, output: Any) -> Sample:
    logprobs = tuple(told[token].logprob for told, token in zip(output.logprobs, output.token_ids, strict=True))
    version = int(output.weight_versions[-1].version)
    return Sample(request.id, index, tuple(output.token_ids), logprobs, output.finish_reason, version)


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
