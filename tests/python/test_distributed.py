"""DDP and FSDP2 on two CPU processes: the weights of one process that sees the whole batch."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from omni_moe import OmniMoE, OmniMoEConfig

WORLD_SIZE = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = OmniMoEConfig(
        hidden_size=16,
        intermediate_size=24,
        num_experts=36,
        num_experts_per_token=4,
        router_norm="none",  # whose statistics would be those of each process's own tokens
        initializer_range=0.3,
    )
    return nn.Sequential(OmniMoE(config), nn.LayerNorm(16), OmniMoE(config)).double()


def train(model: nn.Module, batches: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        (model(batch) - batch).square().mean().backward()
        optimizer.step()


def all_batches() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 2 * 19, 16, dtype=torch.float64)


def train_in_parallel(rank: int, kind: str, port: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD_SIZE)
    try:
        model = make_model()
        alone = copy.deepcopy(model)
        train(alone, all_batches())

        if kind == "ddp":
            parallel = DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD_SIZE,))
            for layer in model:
                fully_shard(layer, mesh=mesh)
            parallel = fully_shard(model, mesh=mesh)
        train(parallel, all_batches().chunk(WORLD_SIZE, dim=1)[rank])

        want = dict(alone.named_parameters())
        for name, parameter in model.named_parameters():
            whole = parameter.full_tensor() if kind == "fsdp2" else parameter
            error = (whole - want[name]).abs().max().item()
            assert error < 1e-12, f"{name}: off by {error}"
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # FSDP2 over gloo leaves a thread behind that aborts some runs while the interpreter shuts down.
    os._exit(0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(kind):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(train_in_parallel, args=(kind, port), nprocs=WORLD_SIZE)


def test_the_training_above_changes_every_weight():
    before, after = make_model(), make_model()
    train(after, all_batches())
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), name
