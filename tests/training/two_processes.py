"""One of two processes that train together; the test starts it twice: rank, folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import optkit
from optkit.errors import UsageError

RECIPES = {
    "int8-qat": {"recipe": 1, "passes": [{"quantize-aware": {"freeze_ranges": 0.5, "freeze_layers": 0.5}}]},
    "distil": {
        "recipe": 1,
        "passes": [
            {"distil": {}},
            {"prune-structured": {}},
            {"prune-weights": {"sparsity": 0.5, "end": 0.5, "every": 1}},
        ],
    },
}
STEPS = 6


def sharded(module):
    """Each linear layer on its own, and the rest together."""
    for part in (module.a, module.b, module.c) if not hasattr(module, "optkit") else ():
        fully_shard(part)
    return fully_shard(module)


WRAPPERS = {"whole": DistributedDataParallel, "sharded": sharded}


class Net(nn.Module):
    """Without a batch norm, whose statistics each process has of its own part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def batches():
    """The whole batch of each step."""
    random = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x = torch.randn(8, 8, generator=random)
        yield x, (x[:, 0] > 0).long()


def train(recipe, wrap, part):
    """Train on ``part`` of each batch; gives the session and the optimizer's parameters."""
    torch.manual_seed(0)
    module = Net().train()
    example = next(batches())[0]
    session = optkit.training(module, RECIPES[recipe], example=example, steps=STEPS)
    called = wrap(module)
    optimizer = torch.optim.SGD(session.parameters(), lr=0.1)
    for x, y in batches():
        x, y = x[part], y[part]
        outputs = called(x)
        session.loss(F.cross_entropy(outputs, y), (x,), outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    return session


def refused() -> list[str]:
    """What says no to sharding."""
    found = []
    for options in (
        {"distil": {"teacher": "average"}},
        {"prune-weights": {"sparsity": 0.5, "rewind": 0.1, "rounds": 1}},
    ):
        module = Net()
        session = optkit.training(
            module, {"recipe": 1, "passes": [options]}, example=next(batches())[0], steps=STEPS
        )
        fully_shard(module)
        try:
            session.parameters()
        except UsageError as error:
            found.append(str(error))
    fit = optkit.Fit(checkpoint=Path("checkpoint.pt"))
    loader = [(x, y) for x, y in batches()]
    try:
        optkit.finetune(Net(), RECIPES["int8-qat"], loader, F.cross_entropy, fit=fit, wrap=fully_shard)
    except UsageError as error:
        found.append(str(error))
    return found


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for recipe in RECIPES:
        for name, wrap in WRAPPERS.items():
            session = train(recipe, wrap, slice(4 * rank, 4 * rank + 4))
            if name == "sharded":
                assert session.parameters()[0].to_local().shape[0] < session.parameters()[0].shape[0]
            trained = session.finish()
            torch.save(trained.module.state_dict(), folder / f"{recipe}-{name}-{rank}.pt")
            # What comes out is a module like any other.
            assert not any(type(m).__name__.startswith("FSDP") for m in trained.module.modules())
            assert trained.export().graph.num_nodes() > 0
    (folder / f"refused-{rank}.txt").write_text("\n".join(refused()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
