"""A small Conformer-like encoder on padded sequences, with and without a mask for batch norm.

    python examples/padded_encoder.py [--steps 400] [--seeds 5]

Each sequence has one of eight patterns at a random place in noise of mean 3; lengths are so uneven that 44 % of a batch
is padding. Both arms mask the attention, the convolutions and the mean over positions; only batch norm differs:
torch.nn's layer counts the zeros of the padding, ours gets ``mask=``. The script prints, for each arm:

- mean and standard deviation of the valid positions behind the first layer in train mode, before gamma and beta learn;
- accuracy on padded test batches, and on the same sequences one by one, with the standard error over seeds;
- the largest difference between the outputs of a sequence in a padded batch and alone;
- the time of a training step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn

import batchnorm as bn

CLASSES, CHANNELS, LONGEST, WIDTH = 8, 8, 96, 32
ARMS = {"padding counted (torch.nn)": nn.BatchNorm1d, "mask= (this package)": bn.BatchNorm1d}


def sequences(count: int, generator: torch.Generator, patterns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Padded sequences (N, C, L), their lengths and their classes."""
    lengths = (12 + 100 * torch.rand(count, generator=generator) ** 1.32).long().clamp_max(LONGEST)
    classes = torch.randint(CLASSES, (count,), generator=generator)
    x = 3 + torch.randn(count, CHANNELS, LONGEST, generator=generator)
    size = patterns.shape[2]
    for i, (length, label) in enumerate(zip(lengths.tolist(), classes.tolist(), strict=True)):
        at = int(torch.randint(length - size + 1, (), generator=generator))
        x[i, :, at : at + size] += patterns[label]
    return torch.where(valid_positions(lengths, LONGEST).unsqueeze(1), x, 0), lengths, classes


def valid_positions(lengths: Tensor, size: int) -> Tensor:
    """Which positions (N, L) are no padding."""
    return torch.arange(size) < lengths.unsqueeze(1)


class Block(nn.Module):
    """Self-attention, then the convolution module of a Conformer, whose depthwise convolution precedes batch norm."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.norm, self.before = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.wide, self.narrow = nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH)
        self.batch_norm = kind(WIDTH)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(N, L, width) and (N, L) to (N, L, width)."""
        a = self.norm(x)
        x = x + self.attention(a, a, a, key_padding_mask=~valid, need_weights=False)[0]
        h = nn.functional.glu(self.wide(self.before(x).transpose(1, 2)), dim=1)
        h = self.depthwise(torch.where(valid.unsqueeze(1), h, 0))
        return x + self.narrow(nn.functional.silu(normalized(self.batch_norm, h, valid))).transpose(1, 2)


class Encoder(nn.Module):
    """A strided convolution with batch norm, two blocks, the mean over valid positions, and a linear layer."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.first = nn.Conv1d(CHANNELS, WIDTH, 5, stride=2, padding=2)
        self.batch_norm = kind(WIDTH)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(2))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(N, C, L) and (N,) to (N, classes)."""
        h = self.first(x)
        valid = valid_positions((lengths + 1) // 2, h.shape[2])
        h = torch.relu(normalized(self.batch_norm, h, valid)).transpose(1, 2)
        for block in self.blocks:
            h = block(h, valid)
        weights = valid.unsqueeze(2) / valid.sum(1).reshape(-1, 1, 1)
        return self.last((h * weights).sum(1))


def normalized(layer: nn.Module, h: Tensor, valid: Tensor) -> Tensor:
    """The layer's result, with the mask if the layer knows masks."""
    return layer(h, mask=valid) if isinstance(layer, bn.BatchNorm1d) else layer(h)


def first_layer(model: Encoder, x: Tensor, lengths: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the valid positions behind the first batch norm layer."""
    h = model.first(x)
    valid = valid_positions((lengths + 1) // 2, h.shape[2])
    rows = normalized(model.batch_norm, h, valid).transpose(1, 2)[valid]
    return rows.mean().item(), rows.std(0, correction=0).mean().item()


class Arm:
    """One encoder in training."""

    def __init__(self, kind: type, seed: int) -> None:
        torch.manual_seed(seed)  # the same first weights in both arms
        self.model = Encoder(kind)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.durations: list[float] = []

    def step(self, x: Tensor, lengths: Tensor, classes: Tensor) -> None:
        """One step of training, and its duration."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x, lengths), classes).backward()
        self.optimizer.step()
        self.durations.append(time.perf_counter() - begin)

    @torch.no_grad()
    def results(self, x: Tensor, lengths: Tensor, classes: Tensor) -> dict[str, float]:
        """What it does with test sequences, in padded batches of 32 and one by one."""
        self.model.eval()
        padded = torch.cat([self.model(*batch) for batch in zip(x.split(32), lengths.split(32), strict=True)])
        alone = [self.model(x[i : i + 1, :, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())]
        return {
            "accuracy, padded": (padded.argmax(1) == classes).double().mean().item(),
            "accuracy, alone": (torch.cat(alone).argmax(1) == classes).double().mean().item(),
            "largest difference": (padded - torch.cat(alone)).abs().max().item(),
            "ms per step": 1000 * statistics.median(self.durations),
        }


def trained(seed: int, steps: int) -> list[dict[str, float]]:
    """Both arms with one seed, on the same batches, in turn."""
    generator = torch.Generator().manual_seed(1000 + seed)
    patterns = 0.8 * torch.randn(CLASSES, CHANNELS, 7, generator=generator)
    arms = [Arm(kind, seed) for kind in ARMS.values()]
    x, lengths, _ = sequences(256, generator, patterns)
    padding = 1 - lengths.sum().item() / x.shape[0] / LONGEST
    first = [first_layer(copy.deepcopy(arm.model), x, lengths) for arm in arms]
    for _ in range(steps):
        batch = sequences(32, generator, patterns)
        for arm in arms:
            arm.step(*batch)
    test = sequences(1024, generator, patterns)
    return [
        {"padding": padding, "mean": mean, "sd": sd} | arm.results(*test)
        for arm, (mean, sd) in zip(arms, first, strict=True)
    ]


def main() -> None:
    """Train both arms, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    runs = [trained(seed, arguments.steps) for seed in range(arguments.seeds)]
    print(f"{'':20}" + "".join(f"{arm:>28}" for arm in (*ARMS, "paired difference")))
    for name in runs[0][0]:
        counted, masked = torch.tensor([[arm[name] for arm in run] for run in runs], dtype=torch.float64).T
        print(f"{name:20}" + "".join(f"{with_error(values):>28}" for values in (counted, masked, masked - counted)))


def with_error(values: Tensor) -> str:
    """The mean over seeds with its standard error."""
    return f"{values.mean():.4g} +- {values.std() / len(values) ** 0.5:.1g}"


if __name__ == "__main__":
    main()
