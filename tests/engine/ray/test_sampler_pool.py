"""The pool with a real vLLM engine, and with two of transformers, through updates and kills.

One file, so that everything that needs an engine shares one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from poise import env
from poise.errors import PoiseError, UserError
from poise.inference.sampler import Decoding, Request
from poise.inference.transformers_sampler import TransformersSampler
from poise.spec import SamplerSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BOS = 1
MEMORY = 0.1
"""GiB for the key-value cache: 160 blocks of 128 tokens, so that hundreds of samples must give way to each other."""

GREEDY, FREE = Decoding(200, 0), Decoding(24)


@pytest.fixture(scope="module")
def ray_here():
    """A cluster in this process."""
    import ray

    with env.defaults(env.RAY_DEFAULTS):  # engines are as important as other processes
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of 260,000 parameters, told that it may read 1,024 tokens."""
    path = tmp_path_factory.mktemp("stories")
    shutil.copytree(shared_data / "lm" / "stories260K-hf-hd32", path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return path


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def restarts() -> list[str]:
    return []


@pytest.fixture(scope="module")
def engine(ray_here, folder, restarts):
    """A pool of one vLLM engine, the only one of this file but for the one that replaces it."""
    from poise.engine.ray.sampler_pool import SamplerPool

    with SamplerPool(SamplerSpec(memory=MEMORY), folder, on_restart=restarts.append) as pool:
        yield pool


@pytest.fixture(scope="module")
def pair(ray_here, folder, restarts):
    """A pool of two engines of transformers."""
    from poise.engine.ray.sampler_pool import SamplerPool

    spec = SamplerSpec(backend="transformers", engines=2)
    with SamplerPool(spec, folder, max_restarts=1, on_restart=restarts.append) as pool:
        yield pool


def requests(count=6, n=3):
    return [Request(f"q{i}", (BOS, *range(300, 300 + i)), n, 50 * i) for i in range(count)]


def tokens_of(answers):
    return [[sample.tokens for sample in answer] for answer in answers]


def ends_of(answers):
    return [[(sample.tokens, sample.finish) for sample in answer] for answer in answers]


def scaled(model, factor):
    return {name: value * factor for name, value in model.state_dict().items()}


def with_weights(model, weights):
    import copy

    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    return other


@torch.no_grad()
def forward_logprobs(model, prompt, tokens):
    """What a trainer computes, in plain torch."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    return [logits[len(prompt) + place - 1, token].item() for place, token in enumerate(tokens)]


def assert_served(pool, model, version):
    """Log-probabilities of samples and scores are those of `model`, also after a prompt of 200 tokens."""
    long = Request("long", (BOS, *(300 + i % 200 for i in range(199))), 2, 7)
    for decoding in (FREE, Decoding(24, 0)):
        asked = [*requests(3), long]
        for request, answer in zip(asked, pool.generate(asked, decoding), strict=True):
            for sample in answer:
                expected = pytest.approx(forward_logprobs(model, request.prompt, sample.tokens), abs=1e-4)
                assert sample.version == version
                assert list(sample.logprobs) == expected
                assert pool.score([request.prompt], [sample.tokens])[0] == expected


def inside(pool, ray, action, engine=0):
    """Do something to an engine that only a defect would do."""
    return ray.get(pool._engines[engine].__ray_call__.remote(action))


def test_two_hundred_greedy_tokens_are_those_of_transformers(engine, model, folder):
    asked = [Request("story", (BOS,), 2, 0)]
    expected = model.generate(torch.tensor([[BOS]]), max_new_tokens=200, do_sample=False, eos_token_id=None)
    ours = TransformersSampler(folder).generate(asked, GREEDY)
    theirs = engine.generate(asked, GREEDY)
    assert tokens_of(ours) == tokens_of(theirs) == [[tuple(expected[0, 1:].tolist())] * 2]


def test_a_seed_gives_the_same_samples_alone_and_among_others(engine):
    whole = engine.generate(requests(), FREE)
    assert engine.generate(requests(), FREE) == whole
    for request, answer in zip(requests(), whole, strict=True):
        assert tokens_of(engine.generate([request], FREE)) == tokens_of([answer])
        last = Request(request.id, request.prompt, 1, request.seed + 2)
        assert engine.generate([last], FREE)[0][0].tokens == answer[2].tokens
    assert len({sample.tokens for answer in whole for sample in answer}) == 18
    assert all((sample.finish == "stop") == (sample.tokens[-1] in (1, 2)) for answer in whole for sample in answer)


def prompt_of(length, start=0):
    return BOS, *(3 + (start + 13 * i) % 500 for i in range(length - 1))


def test_prompts_of_any_length_and_hundreds_of_samples(engine):
    """As many as do not fit into one step, nor into the cache; each is what it is when its request comes alone."""
    sizes = [(5, 1), (60, 64), (700, 64), (5, 64), (60, 1), (700, 1), (60, 20), (90, 64), (700, 20)]
    asked = [Request(f"{i}", prompt_of(length, i), n, 100 * i) for i, (length, n) in enumerate(sizes)]
    decoding = Decoding(80)
    together = engine.generate(asked, decoding)
    assert [len(answer) for answer in together] == [n for _, n in sizes]
    for place in (0, 2, 4, 5, 7):
        assert tokens_of(engine.generate([asked[place]], decoding)) == tokens_of([together[place]])
    assert tokens_of(engine.generate(asked[::-1], decoding)) == tokens_of(together[::-1])
    assert len({sample.tokens for sample in together[2]}) == 64


def test_long_prompts_are_continued_as_transformers_does(engine, folder):
    asked = [Request(f"{length}", prompt_of(length), 1, 0) for length in (5, 60, 700)]
    assert tokens_of(engine.generate(asked, Decoding(40, 0))) == tokens_of(
        TransformersSampler(folder).generate(asked, Decoding(40, 0))
    )


def test_both_samplers_end_a_response_with_the_token_that_completes_a_stop_string(engine, folder):
    decoding = Decoding(100, 0, stop=("play with her toys", "."))
    asked = [
        Request(f"{len(prompt)}", prompt, 1, 0) for prompt in [(BOS,), prompt_of(5), prompt_of(60), prompt_of(700)]
    ]
    theirs = engine.generate(asked, decoding)
    assert ends_of(theirs) == ends_of(TransformersSampler(folder).generate(asked, decoding))
    assert "stop_string" in {sample.finish for answer in theirs for sample in answer}
    shortest = engine.generate(asked[:1], Decoding(100, 0, stop=(",",)))[0][0]
    assert AutoTokenizer.from_pretrained(folder).decode(list(shortest.tokens)) == "Once upon a time,"


def test_progress_is_told_while_an_engine_works(engine, monkeypatch):
    seen = []
    monkeypatch.setattr("poise.engine.ray.sampler_pool._PROGRESS_EVERY_S", 0.1)
    engine.generate([Request(f"{i}", prompt_of(60, i), 8, 10 * i) for i in range(64)], Decoding(80), seen.append)
    assert seen == sorted(seen)
    assert any(0 < count < 64 for count in seen)


def test_an_error_inside_an_engine_ends_the_run_with_its_own_words(engine, ray_here, restarts):
    def fails(*arguments, **keywords):
        raise RuntimeError("CPU Generator does not use offset")

    def break_it(actor):
        actor.sampler._llm.enqueue = fails

    def mend_it(actor):
        del actor.sampler._llm.enqueue
        actor._failure = None

    died = len(restarts)
    inside(engine, ray_here, break_it)
    try:
        for _ in range(2):  # what is left in it is nobody's business
            with pytest.raises(
                PoiseError, match=r"failed: RuntimeError: CPU Generator does not use offset \(.*test_sampler_pool"
            ):
                engine.generate(requests(1), FREE)
    finally:
        inside(engine, ray_here, mend_it)
    assert restarts[died:] == []
    engine.generate(requests(1), FREE)


def test_what_is_served_is_what_a_trainer_computes_before_and_after_an_update(engine, model):
    assert_served(engine, model, engine.version)
    for factor in (0.9, 1.1):
        version = engine.version + 1
        engine.update_weights(scaled(model, factor), version)
        assert_served(engine, with_weights(model, scaled(model, factor)), version)
    engine.update_weights(scaled(model, 1.0), engine.version + 1)


def test_other_names_are_refused_before_anything_is_changed(engine, model):
    before, version = engine.generate(requests(), FREE), engine.version
    weights = model.state_dict()
    del weights["model.norm.weight"]
    with pytest.raises(PoiseError, match=r"model\.norm\.weight is missing"):
        engine.update_weights(weights, version + 1)
    with pytest.raises(PoiseError, match="version 0 came to a sampler"):
        engine.update_weights(model.state_dict(), 0)
    assert engine.generate(requests(), FREE) == before


def test_an_engine_with_other_weights_than_the_pool_is_caught(engine, ray_here):
    inside(engine, ray_here, lambda actor: actor.sampler._set_version(10**6))
    with pytest.raises(PoiseError, match=rf"weights of version 1000000, not {engine.version}"):
        engine.generate(requests(1), FREE)
    version = engine.version
    inside(engine, ray_here, lambda actor: actor.sampler._set_version(version))
    engine.generate(requests(1), FREE)


def no_reset(actor):
    actor.sampler._llm.reset_prefix_cache = lambda: True


def no_reload(actor):
    actor.sampler._llm.collective_rpc = lambda *arguments, **keywords: None


def half_a_reload(actor):
    whole = actor.sampler._llm.collective_rpc

    def partial(method, kwargs):
        return whole(method, kwargs={"weights_iterator": iter(list(kwargs["weights_iterator"])[:-3])})

    actor.sampler._llm.collective_rpc = partial


def no_repacking(actor):
    import poise.engine.vllm.engine as module

    actor.kept = module._repack
    module._repack = lambda model: None


def mend(actor):
    import poise.engine.vllm.engine as module

    module._repack = getattr(actor, "kept", module._repack)
    for name in ("reset_prefix_cache", "collective_rpc"):
        vars(actor.sampler._llm).pop(name, None)


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        (no_reset, "the prefix cache still holds 128 tokens"),
        (no_reload, r"47 weights are not served as they were sent: model\.embed_tokens\.weight"),
        (half_a_reload, r"4 weights are not served as they were sent: model\.layers\.4\.self_attn\.k_proj"),
        (no_repacking, r"1 weights are not served as they were sent: model\.embed_tokens\.weight"),
    ],
)
def test_an_update_that_is_not_whole_is_caught_and_the_engine_answers_no_more(defect, message, engine, ray_here, model):
    version = engine.version + 1
    inside(engine, ray_here, defect)
    try:
        with pytest.raises(PoiseError, match=message):
            engine.update_weights(scaled(model, 1.05), version)
        with pytest.raises(PoiseError, match=rf"the update of this engine to version {version} has failed"):
            engine.generate(requests(1), FREE)
    finally:
        inside(engine, ray_here, mend)
    engine.update_weights(scaled(model, 1.0), version + 1)
    assert_served(engine, model, version + 1)


def kill_soon(pool, ray, engine=0, after=0.0):
    pid = inside(pool, ray, lambda actor: os.getpid(), engine)
    timer = threading.Timer(after, os.kill, (pid, signal.SIGKILL))
    timer.start()
    return timer


def test_a_killed_engine_is_replaced_has_the_new_weights_and_gives_the_same_samples(engine, ray_here, model, restarts):
    engine.update_weights(scaled(model, 1.02), engine.version + 1)
    many, decoding = requests(8, 8), Decoding(100)
    whole = engine.generate(many, decoding)
    died = len(restarts)
    kill_soon(engine, ray_here, after=0.2)
    again = engine.generate(many, decoding)
    assert restarts[died:] == ["engine 0 of the sampler died"]
    assert tokens_of(again) == tokens_of(whole)
    assert_served(engine, with_weights(model, scaled(model, 1.02)), engine.version)


# The next tests open further engines in the process of the pool's. Closing one would break the others, so none is
# closed before the process ends, and no test after them asks the engine of the pool.


def test_models_of_four_families_answer_as_they_do_in_transformers(engine, ray_here, family_folder):
    """Llama, Qwen 2, GPT-2 and Gemma 2 have other special tokens, tied heads and attention."""
    folders = [family_folder(family) for family in ("llama", "qwen2", "gpt2", "gemma2")]
    asked = [
        Request(f"{length}-{start}", tuple(5 + (start + 7 * i) % 80 for i in range(length)), 1, 0)
        for length in (5, 60)
        for start in (0, 11, 23)
    ]
    decodings = [Decoding(32, 0), Decoding(32, 0, stop=("e", "at"))]

    def answer(actor):
        from poise.engine.vllm.engine import VllmSampler

        samplers = [VllmSampler(folder, SamplerSpec(memory=0.02, max_model_len=100)) for folder in folders]
        vars(actor).setdefault("opened", []).extend(samplers)
        return [[ends_of(sampler.generate(asked, decoding)) for decoding in decodings] for sampler in samplers]

    samplers = map(TransformersSampler, folders)
    ours = [[ends_of(sampler.generate(asked, decoding)) for decoding in decodings] for sampler in samplers]
    assert inside(engine, ray_here, answer) == ours
    finishes = {finish for answers in ours for decoded in answers for ((_, finish),) in decoded}
    assert finishes == {"stop", "stop_string", "length"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": 0.001}, r"or decreasing `sampler\.max_model_len`"),
        ({"max_model_len": 5000}, r"User-specified sampler\.max_model_len \(5000\) is greater"),
        ({"memory": 10**6}, r"Decrease sampler\.memory"),
    ],
)
def test_settings_that_an_engine_refuses_are_called_as_in_a_spec(settings, message, engine, ray_here, folder):
    def open_another(actor):
        from poise.engine.vllm.engine import VllmSampler

        try:
            VllmSampler(folder, SamplerSpec(**settings))
        except UserError as error:
            return str(error)

    told = inside(engine, ray_here, open_another)
    assert re.search(message, told)
    assert not re.search("gpu_memory|[^.]max_model_len|KVCACHE|pydantic", told)


def test_an_engine_holds_what_the_run_needs_of_a_long_context(engine, ray_here, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131_072}))

    def ask(actor):
        from poise.engine.vllm.engine import VllmSampler

        sampler = VllmSampler(tmp_path, SamplerSpec(memory=0.02).fit_sequences(724))
        vars(actor).setdefault("opened", []).append(sampler)
        with pytest.raises(
            UserError, match=r"sampler\.max_model_len: 725 tokens are too few .* up to 725; set it to 726"
        ):
            sampler.generate([Request("", prompt_of(701), 1, 0)], FREE)
        return sampler.generate([Request("", prompt_of(700), 1, 0)], FREE), sampler.score([prompt_of(700)], [(5,) * 24])

    (((sample,),), (scores,)) = inside(engine, ray_here, ask)
    assert (sample.num_tokens, len(scores)) == (24, 24)


@pytest.mark.parametrize("longest", [20, 129, 200])
def test_an_engine_for_short_sequences_can_be_updated(longest, engine, ray_here, folder, model):
    """One that holds less than a block of the cache, as much, and more."""
    weights = scaled(model, 0.9)

    def ask(actor):
        from poise.engine.vllm.engine import VllmSampler

        sampler = VllmSampler(folder, SamplerSpec(memory=0.02).fit_sequences(longest))
        vars(actor).setdefault("opened", []).append(sampler)
        sampler.update_weights(weights, 1)
        return sampler.score([prompt_of(longest - 4)], [(5,) * 4])

    (score,) = inside(engine, ray_here, ask)
    assert score == pytest.approx(
        forward_logprobs(with_weights(model, weights), prompt_of(longest - 4), (5,) * 4), abs=1e-4
    )


def test_two_engines_answer_as_one_does(pair, folder, model, ray_here):
    alone = TransformersSampler(folder)
    assert tokens_of(pair.generate(requests(7), FREE)) == tokens_of(alone.generate(requests(7), FREE))
    assert tokens_of(pair.generate(requests(1), FREE)) == tokens_of(alone.generate(requests(1), FREE))
    assert pair.generate([], FREE) == pair.score([], []) == []
    assert_served(pair, model, 0)
    pair.update_weights(scaled(model, 0.9), 5)
    assert_served(pair, with_weights(model, scaled(model, 0.9)), 5)
    with pytest.raises(UserError, match="do not fit"):
        pair.generate(requests(3), Decoding(1024))


def test_engines_die_only_so_often(pair, ray_here):
    kill_soon(pair, ray_here, engine=1).join()
    whole = pair.generate(requests(), FREE)
    assert {sample.version for answer in whole for sample in answer} == {5}
    kill_soon(pair, ray_here, engine=0).join()
    with pytest.raises(PoiseError, match="engine 0 of the sampler died, and no more may be started"):
        pair.generate(requests(), FREE)


def test_engines_outlive_the_worker_that_asked_them_and_begin_again(folder, model, ray_here, monkeypatch):
    """A worker that is killed ends nothing in order: its pool is left as it is, and another is opened."""
    from poise.engine.ray.coordinator import start_coordinator
    from poise.engine.ray.sampler_pool import SamplerPool

    coordinator, spec, died = start_coordinator(), SamplerSpec(backend="transformers"), []
    first = SamplerPool(spec, folder, owner=coordinator, on_restart=died.append).__enter__()
    fresh, pid = first.generate(requests(), FREE), inside(first, ray_here, lambda actor: os.getpid())
    first.update_weights(scaled(model, 0.9), 3)
    second = SamplerPool(spec, folder, owner=coordinator, on_restart=died.append).__enter__()
    assert second.generate(requests(), FREE) == fresh
    assert inside(second, ray_here, lambda actor: os.getpid()) == pid
    assert died == []
    second._engines[0].__ray_call__.remote(lambda actor: time.sleep(600))  # what its worker still waited for
    monkeypatch.setattr("poise.engine.ray.sampler_pool._FREE_WITHIN_S", 1)
    third = SamplerPool(spec, folder, owner=coordinator, on_restart=died.append).__enter__()
    assert third.generate(requests(), FREE) == fresh
    assert inside(third, ray_here, lambda actor: os.getpid()) != pid
    assert died == []
    kill_soon(third, ray_here).join()
    with SamplerPool(spec, folder, owner=coordinator, on_restart=died.append) as fourth:
        assert fourth.generate(requests(), FREE) == fresh
        assert died == ["engine 0 of the sampler died"]
    assert ray_here.get(coordinator.engine.remote(0, lambda: "another", False)) == ("another", False)  # ended in order
