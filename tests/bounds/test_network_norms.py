"""Traced networks: folds against Jacobians, residual paths by hand, the product of norms as a Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from poise.bounds.activations import activation_of
from poise.bounds.complexity import spectral_product
from poise.bounds.operators import Block, network_norms, operator_norms
from poise.models.build import build
from poise.models.spec import ModelSpec

ARCHITECTURES = ["cnn", "preact_resnet18", "resnet18", "wrn_28_10", "vgg11"]


def trained_like(name: str, **options: object) -> nn.Module:
    """A narrow network whose batch statistics, gains of either sign and biases are what no initialisation gives."""
    spec = ModelSpec.model_validate({"name": name, "width": 2, **options})
    model = build(spec, shape=(2, 8, 8), classes=3, mean=(0.4, 0.6), std=(0.2, 0.5), seed=1)
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.running_mean, -1, 1), (module.running_var, 0.5, 2)):
                values.uniform_(low, high, generator=generator)
            nn.init.uniform_(module.weight, -1.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    return model.eval()


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """d logits / d x of one example, as a matrix."""
    rows = torch.autograd.functional.jacobian(lambda v: model(v.unsqueeze(0))[0], x)
    return rows.flatten(1)


@pytest.mark.parametrize(
    ("name", "activation"),
    [*((name, "relu") for name in ARCHITECTURES), ("cnn", "silu"), ("preact_resnet18", "softplus")],
)
def test_the_product_of_the_norms_is_a_lipschitz_constant(name, activation):
    model = trained_like(name, activation=activation)
    network = network_norms(model, (2, 8, 8))
    product = 10 ** spectral_product(network)
    double = model.double()
    points = torch.rand(10, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    steepest = max(torch.linalg.matrix_norm(jacobian(double, x), ord=2).item() for x in points)
    assert 0 < steepest <= product
    assert network.homogeneous == (activation == "relu")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_record_per_affine_layer_with_all_its_kernels(name):
    model = trained_like(name)
    layers = operator_norms(model, (2, 8, 8))
    kernels = [m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sorted(layer.parameters for layer in layers) == sorted(kernels)
    assert len({layer.name for layer in layers}) == len(kernels)
    assert all(0 < layer.sigma_lo <= layer.sigma_hi <= layer.frobenius * (1 + 1e-12) for layer in layers[-1:])
    assert all(0 < layer.sigma_lo <= layer.sigma_hi for layer in layers)


def test_the_norms_of_a_chain_without_activations_enclose_its_jacobian():
    """Conv and BN in a row are one linear map; the fold is right if its norm is that of the Jacobian."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Flatten()).double()
    model[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(model[1].weight, -2, 2)
    (layer,) = operator_norms(model, (2, 5, 5))
    matrix = jacobian(model.eval(), torch.rand(2, 5, 5, dtype=torch.float64))
    assert layer.sigma_lo == pytest.approx(torch.linalg.matrix_norm(matrix, ord=2).item(), rel=1e-8)
    assert layer.frobenius == pytest.approx(torch.linalg.matrix_norm(matrix).item(), rel=1e-12)
    assert layer.l1 == pytest.approx(matrix.abs().sum().item(), rel=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_normalisation_before_a_relu_goes_into_the_next_layer(groups):
    """The rewritten network, ReLU(sign(s) x + t / |s|) and then W |s|, computes the same function to 1e-12."""
    norm, conv = nn.BatchNorm2d(4).double().eval(), nn.Conv2d(4, 6, 3, groups=groups, bias=False).double()
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    norm.running_var.uniform_(0.5, 2)
    norm.running_mean.uniform_(-1, 1)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().view(1, 4, 1, 1)
    shift = norm.bias.view(1, 4, 1, 1) - norm.running_mean.view(1, 4, 1, 1) * scale
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    moved = nn.Conv2d(4, 6, 3, groups=groups, bias=False).double()
    moved.weight.data = conv.weight * scale.abs().view(groups, 1, -1, 1, 1).expand(-1, 6 // groups, -1, -1, -1).reshape(
        6, -1, 1, 1
    )
    assert torch.allclose(moved((scale.sign() * x + shift / scale.abs()).relu()), conv(norm(x).relu()), atol=1e-12)
    (rewritten,) = operator_norms(nn.Sequential(moved), (4, 6, 6))
    (traced,) = operator_norms(nn.Sequential(norm, nn.ReLU(), conv), (4, 6, 6))
    values = [(n.sigma_lo, n.sigma_hi, n.frobenius, n.l21, n.l1) for n in (rewritten, traced)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_normalisation_that_no_layer_can_take_is_a_fixed_map():
    norm = nn.BatchNorm2d(2).eval()
    norm.weight.data = torch.tensor([0.5, -3.0])
    softplus = network_norms(nn.Sequential(norm, nn.Softplus(), nn.Conv2d(2, 2, 1)), (2, 3, 3))
    assert softplus.path == (pytest.approx(3 / math.sqrt(1 + 1e-5)), 0)
    last = network_norms(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), norm), (2, 3, 3))
    assert last.path == (0, pytest.approx(3 / math.sqrt(1 + 1e-5)))


def test_the_paths_of_residual_networks():
    pre, post = (
        network_norms(trained_like("preact_resnet18"), (2, 8, 8)),
        network_norms(trained_like("resnet18"), (2, 8, 8)),
    )
    for network in (pre, post):
        assert network.path[:2] == (pytest.approx(1 / 0.2), 0)  # input normalisation, stem
        blocks = [unit for unit in network.path if isinstance(unit, Block)]
        assert len(blocks) == 8
        assert [len(block.main) for block in blocks] == [2] * 8
        assert [len(block.shortcut) for block in blocks] == [0, 0, 1, 0, 1, 0, 1, 0]
        names = {network.layers[i].name.rpartition(".")[2] for block in blocks for i in block.main}
        assert names == {"conv1", "conv2"}
        assert network.path[-1] == len(network.layers) - 1
        assert torch.equal(network.shift.flatten().float(), torch.tensor([0.4, 0.6]))
    assert pre.width == 2 * 8 * 8


def test_a_residual_block_counts_as_the_sum_of_its_arms():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.d(torch.relu(self.c(torch.relu(self.b(x)))) + x)

    network = network_norms(Residual(), (4,))
    a, b, c, d = (layer.sigma_hi for layer in network.layers)
    assert network.path == (0, Block((1, 2), ()), 3)
    assert spectral_product(network) == pytest.approx(math.log10(a * (b * c + 1) * d))


def test_a_normalisation_goes_to_its_own_layer_when_others_are_evaluated_in_between():
    class Arms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.norm(a) + b

    model = Arms().eval()
    model.norm.weight.data.fill_(5)
    a, b = operator_norms(model, (2, 3, 3))
    kernels = (conv.weight.detach().double().flatten(1) for conv in (model.a, model.b))
    sides = [torch.linalg.matrix_norm(kernel, ord=2).item() for kernel in kernels]
    assert (a.sigma_hi, b.sigma_hi) == pytest.approx((5 * sides[0] / (1 + 1e-5) ** 0.5, sides[1]), rel=1e-9)


def test_pooling_has_its_lipschitz_constants():
    def ready(pool: nn.Module) -> tuple:
        side = math.prod(pool(torch.zeros(1, 2, 8, 8)).shape)
        return network_norms(nn.Sequential(pool, nn.Flatten(), nn.Linear(side, 2)), (2, 8, 8)).path

    assert ready(nn.MaxPool2d(2)) == (0,)
    assert ready(nn.MaxPool2d(3, stride=2, padding=1)) == (2.0, 0)
    assert ready(nn.AvgPool2d(4)) == (pytest.approx(1 / 4), 0)
    assert ready(nn.AdaptiveAvgPool2d(1)) == (pytest.approx(1 / 8), 0)
    assert ready(nn.AdaptiveAvgPool2d(2)) == (pytest.approx(1 / 4), 0)
    overlapping = nn.Sequential(nn.AvgPool2d(3, stride=2), nn.Flatten()).double()
    steepest = torch.linalg.matrix_norm(jacobian(overlapping, torch.rand(2, 8, 8).double()), ord=2).item()
    assert ready(nn.AvgPool2d(3, stride=2)) == (pytest.approx(2 / 3), 0)
    assert 1 / 3 < steepest <= 2 / 3


class FunctionalNet(nn.Module):
    """The same network as `MODULAR`, written with functions, methods and a rescaled input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 3, 4, padding="same"), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        x = F.leaky_relu(self.conv(x), 0.2)
        x = F.max_pool2d(x, 2)
        x = F.dropout(F.avg_pool2d(x, kernel_size=2), training=self.training).relu()
        x = self.fc(x.view(x.size(0), -1))
        x += 1.0
        return x.tanh()


MODULAR = nn.Sequential(
    nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(2, 3, 4), nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ReLU(),
    nn.Flatten(), nn.Linear(12, 3), nn.Tanh(),
)  # fmt: skip


def test_a_network_of_functions_and_methods_is_read_as_one_of_modules():
    model = FunctionalNet().double().eval()
    network = network_norms(model, (2, 8, 8))
    assert network.path == (2.0, 0, pytest.approx(0.5), 1)
    assert network.shift == 0.5  # 2 x - 1 = 2 (x - 1/2)
    assert (network.homogeneous, network.fixes_zero) == (False, True)
    MODULAR[1].load_state_dict(model.conv.state_dict())
    MODULAR[7].load_state_dict(model.fc.state_dict())
    padded = jacobian(
        nn.Sequential(MODULAR[:2], nn.Flatten()).double(), torch.rand(2, 8, 8, dtype=torch.float64)
    )  # (3 * 8 * 8, 2 * 8 * 8)
    conv, fc = network.layers
    assert conv.sigma_hi == pytest.approx(torch.linalg.matrix_norm(padded, ord=2).item(), rel=1e-10)
    assert conv.l1 == pytest.approx(padded.abs().sum().item(), rel=1e-10)
    assert conv.parameters == model.conv.weight.numel()
    assert fc.sigma_hi == pytest.approx(torch.linalg.matrix_norm(model.fc.weight, ord=2).item(), rel=1e-10)


class _Rescaled(nn.Module):
    def __init__(self, rescale: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.rescale, self.fc = rescale, nn.Linear(3, 2)
        self.register_buffer("mean", torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64))
        self.register_buffer("std", torch.tensor([0.5, 0.2, 0.25], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rescale(x, self.mean, self.std))


@pytest.mark.parametrize(
    ("rescale", "scale", "shift"),
    [
        (lambda x, mean, std: (x - mean) / std, 5.0, [0.5, 0.25, 1.0]),
        (lambda x, mean, std: x.sub(mean).div(std), 5.0, [0.5, 0.25, 1.0]),
        (lambda x, mean, std: x / std - mean, 5.0, [0.25, 0.05, 0.25]),
        (lambda x, mean, std: 1 - 2 * x, 2.0, 0.5),
        (lambda x, mean, std: -(x + 0.5) * 3, 3.0, -0.5),
        (lambda x, mean, std: torch.mul(x, 255).add(-10), 255.0, 10 / 255),
    ],
)
def test_constants_on_the_input_are_its_scale_and_shift(rescale, scale, shift):
    network = network_norms(_Rescaled(rescale), (3,))
    assert network.path == (pytest.approx(scale), 0)
    torch.testing.assert_close(network.shift, torch.tensor(shift, dtype=torch.float64))
    zero_at = network.shift.expand(1, 3)
    model = _Rescaled(rescale)
    assert rescale(zero_at, model.mean, model.std).abs().max() < 1e-12


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.LeakyReLU(-1.5), nn.PReLU(init=2.0), nn.Tanh(), nn.Tanhshrink(),
    nn.Softshrink(), nn.Softsign(), nn.ELU(), nn.ELU(1.7), nn.CELU(2.0), nn.SELU(), nn.SiLU(), nn.Mish(), nn.GELU(),
    nn.GELU("tanh"), nn.Hardswish(), nn.Hardtanh(), nn.Hardtanh(0.5, 1.5), nn.Softplus(2.0), nn.LogSigmoid(),
    nn.Sigmoid(), nn.Hardsigmoid(),
]  # fmt: skip


@pytest.mark.parametrize("module", ACTIVATIONS, ids=repr)
def test_activations_have_their_slope_homogeneity_and_value_at_zero(module):
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    module = module.double()
    with torch.no_grad():
        y = module(x)
        slope = ((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().max().item()
        homogeneous = torch.allclose(module(3 * x), 3 * y, rtol=1e-12, atol=1e-12)
        at_zero = module(torch.zeros(1, dtype=torch.float64)).item()
    known = activation_of(module)
    assert slope * (1 - 1e-9) <= known.lipschitz <= slope * (1 + 1e-3)
    assert (known.homogeneous, known.fixes_zero) == (homogeneous, at_zero == 0)
    network = network_norms(nn.Sequential(nn.Linear(3, 3), module.float(), nn.Linear(3, 2)), (3,))
    assert (network.homogeneous, network.fixes_zero) == (known.homogeneous, known.fixes_zero)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.GroupNorm(1, 4, affine=False), nn.LayerNorm([4, 3, 3]),
                                  nn.InstanceNorm2d(4)], ids=repr)  # fmt: skip
def test_normalisations_of_one_example_have_their_lipschitz_constant(norm):
    norm = norm.double()
    norm.eps = 0.01
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, -2, 2)
    gain = 1.0 if norm.weight is None else norm.weight.abs().max().item()
    network = network_norms(nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.Flatten(), nn.Linear(36, 2)), (2, 3, 3))
    assert network.path == (0, pytest.approx(gain / 0.1), 1)
    assert not network.homogeneous
    flat = torch.full((4, 3, 3), 0.3, dtype=torch.float64)
    steepest = torch.linalg.matrix_norm(
        jacobian(nn.Sequential(norm, nn.Flatten()), flat), ord=2
    ).item()  # groups that are constant are the steepest
    assert 0.6 * gain / 0.1 < steepest <= gain / 0.1 * (1 + 1e-12)


def test_the_mean_over_a_map_is_the_adaptive_pooling():
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(-2, -1))

    network = network_norms(nn.Sequential(Mean(), nn.Linear(2, 2)), (2, 8, 8))
    assert network.path == (pytest.approx(1 / 8), 0)


def test_the_model_is_left_as_it_was():
    model = trained_like("preact_resnet18").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    operator_norms(model, (2, 8, 8))
    after = model.state_dict()
    assert model.training
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


class _Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, dim=1)


class _Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x + x)


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class _MixesExamples(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(1, -1)


class _ChannelMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class _Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


class _Joined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], 1)


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x}


class _ByKeyword(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(2, other=torch.neg(input=torch.mean(input=x, dim=1)))


class _WithGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = 2 * torch.ones(2, requires_grad=True)  # as legacy weight_norm leaves it: no copy can be made

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain[:, None, None]


class _Times(nn.Module):
    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return x * self.constant


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (_Attention(), "softmax"),
        (_Product(), "division by a feature map"),
        (_Branch(), "cannot be traced"),
        (nn.Hardshrink(), "Hardshrink"),
        (_MixesExamples(), "mixes examples"),
        (_ChannelMean(), "a mean over anything but height and width"),
        (_Halved(), "getitem"),
        (_Joined(), "cat"),
        (_Pair(), "something else than one tensor"),
        (_ByKeyword(), "a mean over anything but"),
        (_WithGraph(), "cannot be copied"),
        (_Times(0.0), "a product with 0"),
        (nn.Conv2d(2, 2, 4, padding="same", dilation=2), "even kernel and a dilation"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.ConvTranspose2d(2, 2, 3), "ConvTranspose2d"),
        (nn.AvgPool2d(2, padding=1), "AvgPool2d with padding"),
        (nn.AdaptiveAvgPool2d(3), "unequal"),
        (nn.BatchNorm2d(2, track_running_stats=False), "running statistics"),
        (nn.Linear(8, 8), "Linear on maps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_known_is_refused_by_name(module, what):
    with pytest.raises(ValueError, match=what):
        operator_norms(nn.Sequential(nn.Conv2d(2, 2, 1), module), (2, 8, 8))
