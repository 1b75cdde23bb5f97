"""SyncBatchNorm with a token mask on two processes: the statistics of one that has all tokens."""

import copy

import pytest
import torch
import torch.distributed as dist
from test_distributed import CUDA, all_batches, join_processes, make_model, spawn
from torch import nn

from omni_moe import OmniMoE

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def run_both(rank: int, device: str, port: int) -> None:
    join_processes(rank, device, port)
    try:
        # Without a norm in front, so that one layer alone is compared.
        whole = make_model(device, router_norm="batch_norm")[0]
        shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
        batch = all_batches(device)[0].to(whole.up_embed.weight.dtype)
        counts = torch.arange(len(batch), device=device) % 3 > 0
        counts[:5] = False  # so that the processes have not as many
        mine = slice(rank * len(batch) // 2, (rank + 1) * len(batch) // 2)
        part = batch[mine].requires_grad_()

        got = shared(part, token_mask=counts[mine])
        (got[counts[mine]] ** 2).sum().backward()
        for parameter in shared.parameters():
            dist.all_reduce(parameter.grad)

        batch = batch.detach().clone().requires_grad_()
        want = whole(batch, token_mask=counts)
        (want[counts] ** 2).sum().backward()

        torch.testing.assert_close(got, want[mine])
        torch.testing.assert_close(part.grad, batch.grad[mine])
        for one, other in zip(shared.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        for one, other in zip(shared.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(one, other)
        assert isinstance(whole, OmniMoE) and type(shared.router_norm_x) is nn.SyncBatchNorm
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_two_processes_share_statistics(device):
    spawn(run_both, device)
