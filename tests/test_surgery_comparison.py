"""Results of surgery are compared where they are determined: ties are no difference, and a wrong result is refused."""

import copy
import warnings

import pytest
import torch
from tensor_kinds import KINDS, made, write_sevens
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import convert, fold
from batchnorm.surgery.comparison import check


class Pooled(nn.Module):
    """Two blocks of convolution, batch norm and ReLU, and something behind them that has ties."""

    def __init__(self, behind, *, bias=True, blocks=2, width=16):
        super().__init__()
        layers = []
        for i in range(blocks):
            conv = nn.Conv2d(width if i else 3, width, 3, padding=1, bias=bias)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.behind, self.head = nn.Sequential(*layers), behind, nn.LazyLinear(5)

    def forward(self, x):
        return self.head(self.behind(self.body(x)).flatten(1))


class Sorted(nn.Module):
    def forward(self, x):
        flat = x.flatten(2)
        return torch.cat([flat.sort(-1).values, flat.topk(3, -1).values, flat.median(-1, keepdim=True).values], -1)


class Gathered(nn.Module):
    """What stands where another channel is largest: at a tie, whatever rounding chooses."""

    def forward(self, x):
        flat = x.flatten(2)
        return flat[:, 1:2].gather(2, flat[:, :1].argmax(-1, keepdim=True))


class Places(nn.Module):
    """Whole numbers beside the output."""

    def __init__(self):
        super().__init__()
        self.inner = Pooled(nn.MaxPool2d(2))

    def forward(self, x):
        return self.inner(x), self.inner.body(x).flatten(2).argmax(-1)


class Masked(nn.Module):
    """Makes a flat region of its own, whatever the example is: its ties are near every example."""

    def __init__(self):
        super().__init__()
        self.inner = Pooled(nn.MaxPool2d(2))

    def forward(self, x):
        mask = torch.ones_like(x)
        mask[..., : x.shape[-1] // 2] = 0
        return self.inner(x * mask)


class Tokens(nn.Module):
    """Its inputs are whole numbers, which no noise moves."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(11, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.norm, self.act, self.head = nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(self.table(x).transpose(1, 2)))).amax(-1))


def trained(model, example):
    torch.manual_seed(3)
    is_whole = not example.is_floating_point()
    for _ in range(3):
        shape = (8, *example.shape[1:])
        model(torch.randint(0, 11, shape) if is_whole else torch.randn(shape) + 0.5)
    return model.eval()


def zeros():
    return torch.zeros(2, 3, 16, 16)


def flat():
    return torch.full((2, 3, 16, 16), 0.3)


def flat_each():
    return torch.tensor([0.2, -0.7]).reshape(2, 1, 1, 1).expand(2, 3, 16, 16).contiguous()


def stripes():
    return torch.ones(2, 3, 16, 16) * torch.arange(16).remainder(2)


TIED = {
    "max pooling": lambda: Pooled(nn.MaxPool2d(2)),
    "several poolings": lambda: Pooled(nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d(3, 1), nn.AdaptiveMaxPool2d(2))),
    "no bias": lambda: Pooled(nn.MaxPool2d(2), bias=False),
    "four blocks": lambda: Pooled(nn.MaxPool2d(2), blocks=4),
    "sorting": lambda: Pooled(Sorted()),
    "what argmax finds": lambda: Pooled(Gathered()),
    "argmax returned": Places,
    "a flat region": Masked,
}


@pytest.mark.parametrize("example", [zeros, flat, flat_each, stripes])
@pytest.mark.parametrize("make", TIED.values(), ids=TIED)
def test_a_right_result_is_accepted_at_ties(make, example):
    torch.manual_seed(0)
    model = trained(make(), example())
    fused = bn.convert(model, fuse=True, example=example())
    assert any(getattr(layer, "act", None) == "relu" for layer in bn.find(fused).values())


def test_a_right_result_is_accepted_where_equal_tokens_tie():
    torch.manual_seed(0)
    x = torch.full((2, 12), 4)
    x[:, 0] = 1
    bn.convert(trained(Tokens(), x), fuse=True, example=x)


class Dropped(nn.BatchNorm2d):
    """Leaves the activation to nobody."""


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 1.001


class Detached(nn.BatchNorm2d):
    """The same values, and no gradient for the layers before it."""

    def forward(self, x):
        return super().forward(x.detach())


class Doubled(nn.BatchNorm2d):
    """The same values, and twice the gradient."""

    def forward(self, x):
        y = super().forward(x)
        return 2 * y - y.detach()


class Leaky(nn.BatchNorm2d):
    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.01)


def wrong(kind):
    def planted(model):
        norm = model.body[1]
        model.body[1] = kind(norm.num_features).train(norm.training)
        model.body[1].load_state_dict(norm.state_dict())
        if kind in {Dropped, Leaky}:
            model.body[2] = nn.Identity()

    return planted


def other_momentum(model):
    model.body[1].momentum = 0.2


def other_eps(model):
    model.body[4].eps = 1e-3


def in_other_order(model):
    """Right for values that are all alike, and wrong for others."""
    model.behind = nn.Sequential(nn.AvgPool2d(2), nn.Identity())


WRONG = {
    "activation dropped": wrong(Dropped), "another activation": wrong(Leaky), "scaled": wrong(Scaled),
    "gradient lost": wrong(Detached), "gradient doubled": wrong(Doubled), "momentum": other_momentum,
    "eps": other_eps, "mean for maximum": in_other_order,
}  # fmt: skip


@pytest.mark.parametrize("example", [zeros, flat, flat_each, stripes, lambda: torch.randn(2, 3, 16, 16)])
@pytest.mark.parametrize("plant", WRONG.values(), ids=WRONG)
def test_a_wrong_result_is_refused_at_ties_too(plant, example):
    torch.manual_seed(0)
    model = trained(Pooled(nn.MaxPool2d(2)), zeros())
    result = copy.deepcopy(model)
    plant(result)
    with pytest.raises(
        RuntimeError, match=r"computes the same as the model, got in (eval|train) mode a relative difference"
    ):
        check(model, result, example())


def test_nobody_is_asked_to_report_a_model():
    torch.manual_seed(0)
    model = trained(Pooled(nn.MaxPool2d(2)), zeros())
    result = copy.deepcopy(model)
    other_eps(result)
    with pytest.raises(RuntimeError) as refused:
        check(model, result, torch.randn(2, 3, 16, 16))
    assert "report" not in str(refused.value)
    assert "Convert without fuse=True" in str(refused.value)


# what copy.deepcopy, or torch.nn.Module.double, refuses of itself
NOT_COPIED = {"pair", "flat pair", "with functions", "with dispatch", "fake", "freed", "functional"}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - NOT_COPIED - {"parameter", "freed parameter"}))
def test_a_model_that_holds_a_tensor_of_any_kind_is_compared(kind):
    model, tensor = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), made(kind)
    if isinstance(tensor, nn.Parameter):
        model.other = tensor
    else:
        model.register_buffer("other", tensor)
    x = torch.randn(4, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(ComplexHalf|[Qq]uantiz|masked|[Nn]ested|prototype|Sparse|beta|TypedStorage)"
        )
        assert convert(model, fuse=True, example=x)[1].act == "relu"
        assert fold(model, x, report=None)[0].weight.shape == (4, 3, 3, 3)


@pytest.mark.parametrize("kind", ["quantized", "jagged", "csr", "nested", "float8"])
def test_a_buffer_of_any_kind_that_differs_is_seen(kind):
    tensors = [made(kind), made(kind)]
    with torch.no_grad():
        write_sevens(tensors[1])
    models = [nn.Sequential(nn.Linear(3, 3)) for _ in tensors]
    models[1].load_state_dict(models[0].state_dict())
    for model, tensor in zip(models, tensors, strict=True):
        model.register_buffer("other", tensor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*([Qq]uantiz|[Nn]ested|prototype|Sparse|beta|TypedStorage)")
        with pytest.raises(RuntimeError, match=r"the buffers \(other"):
            check(*models, torch.randn(4, 3))


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.last = nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        values = self.act(self.norm(x.values()))
        return torch.nested.nested_tensor_from_jagged(self.last(values), x.offsets())


def test_a_model_that_answers_sequences_of_several_lengths_is_compared():
    x = torch.nested.nested_tensor_from_jagged(torch.randn(12, 4), torch.tensor([0, 3, 8, 12]))
    assert type(convert(Ragged(), example=x).norm) is bn.BatchNorm1d
