"""Experts split over processes: outputs and gradients of one process that has all of them.

On 2 and 4 CPU processes over gloo, and on two GPUs where there are two.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from test_distributed import CUDA, spawn_port
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from omni_moe.distributed import shard_experts
from omni_moe.modules import MixtureOfExperts

H, I, E, K = 16, 24, 8, 2  # noqa: E741
TOLERANCE = {"cpu": 1e-12, "cuda": 2e-5}  # fp64 and, which CUDA kernels are for, fp32

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

# Options of the layer, and how the tokens of a process choose.
CASES = {
    "plain": ({}, None),
    "bias": ({"bias": True, "gated": False}, None),
    "capacity": ({"capacity_factor": 0.7}, None),
    "one_process_has_all": ({"shared_intermediate_size": 8}, 0),
}


def make_layer(device: str, **options) -> MixtureOfExperts:
    torch.manual_seed(0)
    layer = MixtureOfExperts(H, I, E, K, **options)
    return layer.to(device, torch.float64 if device == "cpu" else torch.float32)


def tokens_of(rank: int, device: str) -> torch.Tensor:
    """Process 1 has none."""
    torch.manual_seed(10 + rank)
    x = torch.randn(0 if rank == 1 else 11 + 3 * rank, H, dtype=torch.float64)
    return x.to(device, torch.float64 if device == "cpu" else torch.float32)


def choice_of(x: torch.Tensor, expert: int | None) -> torch.Tensor | None:
    """The same experts for every token, or None: as the router has it."""
    return (
        None
        if expert is None
        else torch.tensor([expert, expert + 1]).repeat(len(x), 1).to(x.device)
    )


def run(layer, x, choice):
    x = x.clone().requires_grad_()
    output, _ = layer(x, replay_indices=choice_of(x, choice))
    output.square().sum().backward()
    return output.detach(), x.grad


def start(rank: int, world_size: int, device: str, port: int):
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"tcp://localhost:{port}",
        rank=rank,
        world_size=world_size,
    )
    return init_device_mesh(device, (world_size,))


def compare(rank: int, world_size: int, device: str, port: int) -> None:
    mesh = start(rank, world_size, device, port)
    try:
        for name, (options, choice) in CASES.items():
            alone = make_layer(device, **options)
            split = copy.deepcopy(alone)
            if rank > 0:  # the values are those of the first process
                for parameter in split.experts.parameters():
                    parameter.data.zero_()
            assert shard_experts(split.experts, mesh) is split.experts
            want = [run(alone, tokens_of(r, device), choice) for r in range(world_size)]
            got = run(split, tokens_of(rank, device), choice)
            for ours, theirs in zip(got, want[rank], strict=True):
                assert (ours - theirs).abs().sum() <= TOLERANCE[device] * (1 + theirs.abs().sum())
            for (key, p), q in zip(split.named_parameters(), alone.parameters(), strict=True):
                if not key.startswith("experts."):
                    continue
                assert isinstance(p.grad, DTensor) and p.to_local().shape[0] == E // world_size
                error = (p.grad.full_tensor() - q.grad).abs().max()
                assert error <= TOLERANCE[device] * (1 + q.grad.abs().max()), f"{name} {key}"
            again = copy.deepcopy(split)
            assert torch.equal(run(again, tokens_of(rank, device), choice)[0], got[0])
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads abort some runs while the interpreter shuts down


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_processes_compute_like_one(device, world_size):
    if device == "cuda" and torch.cuda.device_count() < world_size:
        pytest.skip(f"fewer than {world_size} GPUs")
    mp.spawn(compare, args=(world_size, device, spawn_port()), nprocs=world_size)


def train_and_save(rank: int, world_size: int, folder: str, port: int) -> None:
    mesh = start(rank, world_size, "cpu", port)
    try:
        layer = make_layer("cpu")
        shard_experts(layer.experts, mesh)
        optimizer = torch.optim.SGD(layer.experts.parameters(), lr=100)
        run(layer, tokens_of(rank, "cpu"), None)
        norm = torch.nn.utils.clip_grad_norm_(layer.experts.parameters(), 1e-3)
        assert norm.full_tensor() > 1e-3
        optimizer.step()
        dcp.save({"layer": layer.state_dict()}, checkpoint_id=folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*torch.distributed is")
def test_checkpoints_are_for_any_number_of_processes(tmp_path):
    """A step with clipped gradients on two processes, loaded by one, is that step on one."""
    mp.spawn(train_and_save, args=(2, str(tmp_path), spawn_port()), nprocs=2)
    want = make_layer("cpu")
    for rank in range(2):
        run(want, tokens_of(rank, "cpu"), None)
    torch.nn.utils.clip_grad_norm_(want.experts.parameters(), 1e-3)
    torch.optim.SGD(want.experts.parameters(), lr=100).step()
    loaded = make_layer("cpu")
    state = {"layer": loaded.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    for key, value in want.experts.state_dict().items():
        torch.testing.assert_close(state["layer"][f"experts.{key}"], value)
        assert not torch.equal(value, make_layer("cpu").experts.state_dict()[key])


def refuse(rank: int, world_size: int, port: int) -> None:
    mesh = start(rank, world_size, "cpu", port)
    try:
        with pytest.raises(
            ValueError, match="mesh: expected a size that divides the 9 experts, got 2"
        ):
            shard_experts(MixtureOfExperts(H, I, 9, K).experts, mesh)
        square = init_device_mesh("cpu", (2, 1))
        experts = make_layer("cpu").experts
        with pytest.raises(ValueError, match="mesh: expected one dimension, got 2"):
            shard_experts(experts, square)
        shard_experts(experts, mesh)
        with pytest.raises(ValueError, match="experts: expected experts that are not split"):
            shard_experts(experts, mesh)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)


def test_wrong_meshes():
    mp.spawn(refuse, args=(2, spawn_port()), nprocs=2)
