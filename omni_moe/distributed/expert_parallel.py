"""Expert parallelism: each process of a mesh dimension has some of the experts of a layer.

Tokens go to the processes of their experts and come back by two all-to-alls, those of PyTorch's
functional collectives, whose gradients are all-to-alls the other way round. Parameters are DTensors
split by experts, so that optimizers, gradient clipping and distributed checkpoints know them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from omni_moe.ops import omni_expert_rows, omni_permute, omni_unpermute

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from omni_moe.modules.mixture_of_experts import Experts


def shard_experts(experts: "Experts", mesh: "DeviceMesh") -> "Experts":
    """Splits experts over the processes of a mesh: process r of R gets those from r E / R on.

    The parameters become DTensors, split along their first dimension; their values are those of
    the mesh's first process. Each process still calls the layer with tokens of its own, as many as
    it likes, and gets their outputs, which are those of one process that has all experts. All
    processes have to call it, and its backward pass, the same number of times.

    The gradients of the experts are those of the sum of all processes' losses: whoever takes the
    mean, as DDP does for the other parameters, divides the losses by the number of processes.

    Args:
        experts: of `MixtureOfExperts.experts`; changed in place.
        mesh: of one dimension.

    Returns:
        `experts`.

    Raises:
        ValueError: the mesh has more dimensions, its size does not divide the number of experts, or
            the experts are split already.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}")
    if experts.num_experts % mesh.size():
        raise ValueError(
            f"mesh: expected a size that divides the {experts.num_experts} experts, "
            f"got {mesh.size()}"
        )
    if experts.mesh is not None:
        raise ValueError(f"experts: expected experts that are not split, got {experts.mesh}")
    for name, parameter in list(experts.named_parameters()):
        split = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        experts.register_parameter(name, nn.Parameter(split, parameter.requires_grad))
    experts.mesh = mesh
    return experts


def run_at_experts(
    hidden_states: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    slots: Tensor | None,
    *,
    mesh: "DeviceMesh",
    num_experts: int,
    run_local: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`out[t] = sum_k weight[t, k] * E_idx[t, k](hidden[t])` of experts that are split over a mesh.

    Waits for the device once, since the sizes of what is sent are the host's to know.

    Args:
        hidden_states: (T, H).
        indices: (T, K) in [-1, E).
        routing_weights: (T, K).
        slots: (T, K) places in the experts' queues, -1 for none; or None.
        mesh: of one dimension and size R.
        num_experts: E, of all processes.
        run_local: from rows (N, H) and the ids (N, 1) of their experts among those of this process
            to the experts' outputs (N, H).

    Returns:
        (T, H).
    """
    from torch.distributed._functional_collectives import (
        all_to_all_single,
        all_to_all_single_autograd,
    )

    group = mesh.get_group()
    # 1. How many rows go to and come from each expert of each process.
    row_id_map, expert_ends = omni_expert_rows(indices, num_experts, slots)
    counts = expert_ends.diff(prepend=expert_ends.new_zeros(1))
    arriving = all_to_all_single(counts, None, None, group).view(mesh.size(), -1)
    per_process = torch.stack([counts.view(mesh.size(), -1).sum(1), arriving.sum(1)])
    num_sent, num_received = per_process.tolist()

    # 2. There: rows come ordered by process, those of each by expert.
    rows = omni_permute(hidden_states, row_id_map, expert_ends, sum(num_sent))
    received = all_to_all_single_autograd(rows, num_received, num_sent, group)
    ids = torch.arange(arriving.shape[1], device=rows.device).repeat(mesh.size())
    ids = ids.repeat_interleave(arriving.flatten(), output_size=sum(num_received))
    outputs = run_local(received, ids.unsqueeze(1))

    # 3. And back.
    returned = all_to_all_single_autograd(outputs, num_sent, num_received, group)
    return omni_unpermute(returned, row_id_map, expert_ends, routing_weights)
