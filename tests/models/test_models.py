"""Architectures against counts from the literature, closed forms and the contract of the input normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from poise.errors import UserError
from poise.models.architectures import RESIDUAL, VGG
from poise.models.build import build, build_on_meta
from poise.models.sizes import count_parameters, state_bytes
from poise.models.spec import Architecture, ModelSpec

ARCHITECTURES = get_args(Architecture)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def make(name: str, *, shape=(3, 32, 32), classes=10, seed=0, **fields) -> nn.Sequential:
    spec = ModelSpec(name=name, **fields)
    return build(spec, shape=shape, classes=classes, mean=MEAN[: shape[0]], std=STD[: shape[0]], seed=seed)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 11_173_962),
        ("preact_resnet18", 11_171_146 + 1_024),  # with the normalisation before pooling, as in He et al. 2016
        ("wrn_28_10", 36_479_194),
        ("wrn_34_10", 46_160_474),
        ("vgg16", 14_728_266),
        ("vgg19", 20_040_522),
    ],
)
def test_published_sizes(name, expected):
    assert count_parameters(build_on_meta(ModelSpec(name=name), shape=(3, 32, 32), classes=10)) == expected


def layer_sizes(spec: ModelSpec, shape: tuple[int, int, int], classes: int) -> Iterator[tuple[int, int]]:
    """In closed form: the weights and biases of each layer, and the channels of a batch normalisation beside it."""
    channels, width = shape[0], spec.base_width
    if spec.name in RESIDUAL:
        plan = RESIDUAL[spec.name]
        yield 9 * channels * width, 0 if plan.preactivated else width
        inside = width
        for stage, factor in enumerate(plan.stages):
            outside = factor * width
            for block in range(plan.blocks):
                yield 9 * inside * outside, inside if plan.preactivated else outside
                yield 9 * outside * outside, outside
                if block == 0 and (stage > 0 or inside != outside):
                    yield inside * outside, 0 if plan.preactivated else outside
                inside = outside
        yield (inside + 1) * classes, inside if plan.preactivated else 0
    elif spec.name in VGG:
        for factor in (factor for stage in VGG[spec.name] for factor in stage):
            yield (9 * channels + 1) * factor * width, factor * width
            channels = factor * width
        yield (channels + 1) * classes, 0
    else:
        features = 2 * width * (shape[1] // 4) * (shape[2] // 4)
        yield (16 * channels + 1) * width, 0
        yield (16 * width + 1) * 2 * width, 0
        yield (features + 1) * 4 * width, 0
        yield (4 * width + 1) * classes, 0


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "classes"), [((3, 32, 32), 10), ((1, 28, 28), 100), ((2, 9, 5), 2)])
@pytest.mark.parametrize(("width", "normalize"), [(None, "none"), (3, "data")])
def test_closed_form_size_is_the_size_of_the_module(name, shape, classes, width, normalize):
    spec = ModelSpec(name=name, width=width, normalize=normalize)
    sizes = list(layer_sizes(spec, shape, classes))
    norms = [channels for _, channels in sizes if channels]
    parameters = sum(weights for weights, _ in sizes) + 2 * sum(norms)
    buffers = 2 * sum(norms) + (2 * shape[0] if normalize == "data" else 0)
    model = build_on_meta(spec, shape=shape, classes=classes)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert count_parameters(model) == parameters
    assert state_bytes(model) == 4 * (parameters + buffers) + 8 * len(norms)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 5, 4)])
def test_logits_and_gradients_reach_everything(name, shape):
    model = make(name, shape=(shape[0], *shape[1:]), classes=7, width=4).eval()
    x = torch.rand(2, *shape, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    logits.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    dead = [key for key, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert dead == []


@pytest.mark.parametrize(("width", "innermost"), [(8, False), (16, True)])
def test_narrow_shortcuts_keep_channels_outermost(width, innermost):
    """oneDNN's weight gradient of a narrow strided 1x1 convolution writes past its buffer with channels innermost."""
    model = make("preact_resnet18", width=width)
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4 and parameter.shape[2:] == (3, 3)]
    assert {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights} == {innermost}
    x = torch.rand(4, 3, 32, 32)
    gradients = []
    for fast in (True, False):
        model.zero_grad()
        with torch.backends.mkldnn.flags(enabled=fast):
            model.eval()(x).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("silu", nn.SiLU), ("softplus", nn.Softplus)])
def test_activation_is_the_same_everywhere(name, activation, kind):
    model = make(name, activation=activation, width=2)
    found = {type(module) for module in model.modules() if isinstance(module, (nn.ReLU, nn.SiLU, nn.Softplus))}
    assert found == {kind}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.startswith("vgg")])  # VGG pools by max
def test_smooth_activations_make_a_smooth_network(name):
    """No ReLU hides in a forward: in float64 the network's second difference shrinks with the square of the step."""
    model = make(name, activation="silu", width=2).double().eval()
    x, direction = torch.rand(1, 3, 32, 32).double(), torch.randn(1, 3, 32, 32).double()

    def second(step: float) -> float:
        return (model(x + step * direction) - 2 * model(x) + model(x - step * direction)).abs().sum().item()

    assert second(1e-4) / second(5e-5) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "wrn_28_10", "vgg11"])
def test_normalisation_is_the_first_layer(name):
    model = make(name, width=2).eval()
    x = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(model(x), model.body((x - mean) / std))
    assert next(iter(model.children())) is model.normalize
    bare = make(name, width=2, normalize="none").eval()
    assert torch.equal(bare(x), model.body(x))


def test_statistics_move_with_the_model_and_are_saved_but_not_trained():
    model = make("cnn")
    assert {"normalize.mean", "normalize.std"} <= set(model.state_dict())
    assert not [key for key, _ in model.named_parameters() if key.startswith("normalize")]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_a_function_of_the_seed_alone(name):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one = make(name, seed=5, width=2).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    two, other = make(name, seed=5, width=2).state_dict(), make(name, seed=6, width=2).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_identity_shortcut_of_a_preactivated_block_carries_its_input():
    model = make("preact_resnet18", width=4).eval()
    block = next(module for module in model.modules() if type(module).__name__ == "PreActBlock")
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_small_cnn_learns_the_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    model = build(ModelSpec(), shape=(1, 8, 8), classes=10, mean=[x.mean().item()], std=[x.std().item()], seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(220):
        rows = slice(64 * (step % 22), 64 * (step % 22) + 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    assert (model(x[1408:]).argmax(1) == y[1408:]).float().mean() > 0.9


def test_what_cannot_be_built_is_refused_with_a_reason():
    with pytest.raises(UserError, match="too small"):
        make("vgg16", shape=(3, 3, 32))
    with pytest.raises(UserError, match="2 classes"):
        build_on_meta(ModelSpec(), shape=(1, 8, 8), classes=1)
    with pytest.raises(UserError, match="do not fit images of 3 channels"):
        build(ModelSpec(), shape=(3, 8, 8), classes=2, mean=[0.5], std=[0.5], seed=0)
    with pytest.raises(UserError, match="above 0"):
        build(ModelSpec(), shape=(1, 8, 8), classes=2, mean=[0.5], std=[0.0], seed=0)


@pytest.mark.parametrize("fields", [{"name": "resnet99"}, {"width": 0}, {"width": 10**6}, {"activation": "tanh"}])
def test_spec_refuses(fields):
    with pytest.raises(ValidationError):
        ModelSpec(**fields)
