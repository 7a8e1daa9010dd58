"""Adapters in trainings of several processes: all ranks have the statistics of all data, without repeated examples."""

from __future__ import annotations

import json

import forked
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, default_collate

from batchnorm.population.repeated_examples import own_examples

SETUP = """
    import json, os, sys, warnings, torch, batchnorm as bn
    from torch import nn
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def data(count=21):  # two ranks get 11 examples each, so one is repeated
        return 3 + torch.arange(5.0) * torch.randn(count, 5, generator=torch.Generator().manual_seed(1))

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def tell(model):
        found = {name: buffer.tolist() for name, buffer in model.named_buffers() if "running" in name}
        with bn.preserve_state(model):
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            bn.recalibrate(model, [data()])
            expected = {name: buffer.tolist() for name, buffer in model.named_buffers() if "running" in name}
        with open(sys.argv[1] + "/" + os.environ["RANK"], "w") as file:
            json.dump([found, expected], file)
"""
LIGHTNING = """
    from batchnorm.integrations.lightning import Recalibrate
    from lightning import LightningModule, Trainer
    from torch.utils.data import DataLoader

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
        def forward(self, x):
            return self.net(x)
        def training_step(self, batch, _):
            return self(batch).square().mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    model = Net()
    trainer = Trainer(
        strategy="ddp", accelerator="cpu", devices=2, max_epochs=1, callbacks=[Recalibrate()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data(), 4))
    tell(model.net)
    os._exit(0)
"""
TRANSFORMERS = """
    from batchnorm.integrations.transformers import BatchNormCallback
    from transformers import Trainer, TrainingArguments

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
        def forward(self, x):
            return {"loss": self.net(x).square().mean()}

    model = Net()
    arguments = TrainingArguments(
        output_dir=sys.argv[1] + "/out", use_cpu=True, max_steps=2, per_device_train_batch_size=4, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )
    rows = [{"x": row} for row in data()]
    Trainer(model, arguments, train_dataset=rows, callbacks=[BatchNormCallback(recalibrate=True)]).train()
    tell(model.net)
    os._exit(0)
"""
ACCELERATE = """
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    model, loader = accelerator.prepare(network(), DataLoader(data(), 4, shuffle=True))
    bn.recalibrate(model, loader, group="all")
    tell(model.module)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", [LIGHTNING, TRANSFORMERS, ACCELERATE], ids=["lightning", "transformers", "accelerate"]
)
def test_all_ranks_have_the_statistics_of_all_data_without_repetitions(program, tmp_path) -> None:
    ranks = forked.run_world(SETUP + program, str(tmp_path))
    assert all((tmp_path / str(rank)).exists() for rank in (0, 1)), [rank.stderr[-3000:] for rank in ranks]
    (first, expected), (second, _) = (json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    assert first == second
    for name, values in expected.items():
        # inputs of the second layer are sums of 5 terms of up to 3, whose 12 roundings are at most 12 * 15 u; a
        # variance doubles that, and is below 2: 360 u
        assert first[name] == pytest.approx(values, rel=2**-22, abs=360 * 2**-24), name


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13, 24, 25])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_first_examples_of_each_rank_are_no_repetitions(count: int, ranks: int) -> None:
    shards = pytest.importorskip("accelerate.data_loader").BatchSamplerShard
    for shuffle in (False, True):
        samplers = [DistributedSampler(range(count), ranks, rank, shuffle=shuffle) for rank in range(ranks)]
        loaders = [DataLoader(range(count), 4, sampler=sampler) for sampler in samplers]
        assert firsts(loaders, ranks) == list(range(count))
        loaders = [DataLoader(range(count), batch_sampler=BatchSampler(each, 4, drop_last=False)) for each in samplers]
        assert firsts(loaders, ranks) == list(range(count))
    for size in (1, 3, 4):
        batches = [BatchSampler(SequentialSampler(range(count)), size, drop_last=False) for _ in range(ranks)]
        loaders = [
            DataLoader(range(count), batch_sampler=shards(each, ranks, rank)) for rank, each in enumerate(batches)
        ]
        assert firsts(loaders, ranks) == list(range(count))


def firsts(loaders: list[DataLoader], ranks: int) -> list[int]:
    read = []
    for loader in loaders:
        rows = [row for batch in loader for row in batch.tolist()]
        own = own_examples(loader, ranks)
        read += rows if own is None else rows[:own]
    return sorted(read)


def test_loaders_of_other_kinds_have_no_known_repetitions() -> None:
    sampler = DistributedSampler(range(5), 2, 0)
    assert own_examples(DataLoader(range(5), 2, sampler=sampler), 2) is None  # rank 1 has the repeated one
    sampler = DistributedSampler(range(5), 2, 1)
    assert own_examples(DataLoader(range(5), 2, sampler=sampler), 2) == 2
    assert own_examples(DataLoader(range(5), 2, sampler=sampler), 3) is None
    own = DataLoader(range(5), 2, sampler=sampler, collate_fn=lambda rows: default_collate([*rows]))
    assert own_examples(own, 2) is None
    assert own_examples(DataLoader(range(5), 2, sampler=DistributedSampler(range(5), 2, 1, drop_last=True)), 2) is None
    assert own_examples([1, 2], 2) is None
    batches_as_items = DataLoader([torch.zeros(16, 3)] * 5, batch_size=None, sampler=sampler)
    assert own_examples(batches_as_items, 2) is None  # two of its three items, which have 32 examples
