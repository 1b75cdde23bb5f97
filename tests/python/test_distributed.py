"""DDP, FSDP2 and SyncBatchNorm on two processes: the weights of one that sees the whole batch.

On two CPU processes over gloo, and on two GPUs where there are two.
"""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import NO_GPU
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from omni_moe import OmniMoE, OmniMoEConfig, router_loss

WORLD_SIZE = 2
TOLERANCE = {"cpu": 1e-12, "cuda": 1e-5}  # fp64 and, which CUDA kernels are for, fp32
LOSSES = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.05}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
needs_two_gpus = pytest.mark.skipif(
    bool(NO_GPU) or torch.cuda.device_count() < 2, reason=NO_GPU or "one GPU"
)
CUDA = pytest.param("cuda", marks=needs_two_gpus)


def make_model(device: str = "cpu", **options) -> nn.Module:
    torch.manual_seed(0)
    config = OmniMoEConfig(
        hidden_size=16,
        intermediate_size=24,
        num_experts=36,
        num_experts_per_token=4,
        # Of BatchNorm the statistics would be those of each process's own tokens.
        **({"router_norm": "none", "initializer_range": 0.3} | options),
    )
    model = nn.Sequential(OmniMoE(config), nn.LayerNorm(16), OmniMoE(config))
    return model.to(device, torch.float64 if device == "cpu" else torch.float32)


def train(model: nn.Module, batches: torch.Tensor, num_parts: int = 1) -> None:
    """Each step on the mean of the losses of `num_parts` parts of the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        for part in batch.chunk(num_parts):
            loss = (model(part) - part).square().mean() + router_loss(model)
            (loss / num_parts).backward()
        optimizer.step()


def all_batches(device: str = "cpu") -> torch.Tensor:
    torch.manual_seed(1)
    batches = torch.randn(3, 2 * 19, 16, dtype=torch.float64)
    return batches.to(device, torch.float64 if device == "cpu" else torch.float32)


def join_processes(rank: int, device: str, port: int) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"tcp://localhost:{port}",
        rank=rank,
        world_size=WORLD_SIZE,
    )


def parallelise(model: nn.Module, kind: str, device: str) -> nn.Module:
    if kind == "sync_batchnorm":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if not kind.startswith("fsdp2"):
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh(device, (WORLD_SIZE,))
    for layer in model:
        if kind == "fsdp2_of_modules" and isinstance(layer, OmniMoE):
            for module in layer.children():
                if list(module.parameters()):
                    fully_shard(module, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_in_parallel(rank: int, kind: str, device: str, options: dict, port: int) -> None:
    join_processes(rank, device, port)
    try:
        model = make_model(device, **options)
        alone = copy.deepcopy(model)
        # Each process balances its own tokens.
        train(alone, all_batches(device), num_parts=WORLD_SIZE if options == LOSSES else 1)

        parallel = parallelise(model, kind, device)
        train(parallel, all_batches(device).chunk(WORLD_SIZE, dim=1)[rank])

        want = dict(alone.named_parameters()) | dict(alone.named_buffers())
        got = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, value in got.items():
            whole = value.full_tensor() if kind.startswith("fsdp2") else value
            error = (whole - want[name]).abs().max().item()
            assert error < TOLERANCE[device], f"{name}: off by {error}"
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # FSDP2 over gloo leaves a thread behind that aborts some runs while the interpreter shuts down.
    os._exit(0)


def spawn_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def spawn(function, *args) -> None:
    mp.spawn(function, args=(*args, spawn_port()), nprocs=WORLD_SIZE)


@pytest.mark.parametrize("options", [{}, LOSSES], ids=["plain", "router_losses"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2_of_modules"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_two_processes_train_like_one(device, kind, options):
    spawn(train_in_parallel, kind, device, options)


@needs_two_gpus
def test_sync_batch_norm_has_the_statistics_of_one_process():
    """On GPUs only, where torch has SyncBatchNorm."""
    spawn(train_in_parallel, "sync_batchnorm", "cuda", {"router_norm": "batch_norm"})


def train_with_batch_norm(rank: int, kind: str, port: int) -> None:
    """BatchNorm with each process's own statistics, and load counters."""
    join_processes(rank, "cpu", port)
    try:
        options = {"router_norm": "batch_norm", "track_expert_load": True}
        model = make_model("cpu", **options)
        parallel = parallelise(model, kind, "cpu")
        batches = all_batches()
        train(parallel, batches.chunk(WORLD_SIZE, dim=1)[rank])
        for name, parameter in model.named_parameters():
            whole = parameter.full_tensor() if kind == "fsdp2" else parameter.detach()
            others = [torch.empty_like(whole) for _ in range(WORLD_SIZE)]
            dist.all_gather(others, whole)
            assert torch.equal(*others), name
        if kind == "fsdp2" or rank == 0:  # DDP hands rank 0's counters to the others
            for layer in (model[0], model[2]):
                assert layer.expert_load().counts.sum() == batches.shape[0] * 19 * 4
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_batch_norm_and_counters(kind):
    spawn(train_with_batch_norm, kind)


@pytest.mark.parametrize("options", [{}, LOSSES], ids=["plain", "router_losses"])
def test_the_training_above_changes_every_weight(options):
    before, after = make_model(**options), make_model(**options)
    train(after, all_batches())
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), name
