"""Layers split over processes."""

from omni_moe.distributed.expert_parallel import shard_experts

__all__ = ["shard_experts"]
