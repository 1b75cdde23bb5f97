"""TopKRouter equals the routers of Transformers, from their state dicts."""

import pytest
import torch
from helpers import assert_bitwise, assert_close, on_devices

from omni_moe.modules import TopKRouter

D, E, K, T = 24, 16, 4, 37


def mixtral():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

    config = MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
    return MixtralTopKRouter(config), {"norm_topk_prob": True}


def qwen3_moe(norm_topk_prob):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

    config = Qwen3MoeConfig(
        hidden_size=D, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm_topk_prob
    )
    return Qwen3MoeTopKRouter(config), {"norm_topk_prob": norm_topk_prob}


def deepseek_v3(n_group, topk_group):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Config,
        DeepseekV3TopkRouter,
    )

    config = DeepseekV3Config(
        hidden_size=D,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    return DeepseekV3TopkRouter(config), {
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": n_group,
        "topk_group": topk_group,
        "score_correction": True,
        "router_dtype": torch.float32,
    }


def deepseek_v4():
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = module.DeepseekV4Config(
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, routed_scaling_factor=1.5
    )
    return module.DeepseekV4TopKRouter(config), {
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "score_correction": True,
    }


def gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter

    config = GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
    return GptOssTopKRouter(config), {"norm_topk_prob": True, "bias": True}


PEERS = {
    "mixtral": mixtral,
    "qwen3_moe": lambda: qwen3_moe(False),
    "qwen3_moe-norm": lambda: qwen3_moe(True),
    "deepseek_v3": lambda: deepseek_v3(8, 3),
    "deepseek_v3-one_group": lambda: deepseek_v3(1, 1),
    "deepseek_v4": deepseek_v4,
    "gpt_oss": gpt_oss,
}


@pytest.mark.parametrize("peer", PEERS)
@on_devices
def test_equals_the_router_of_transformers(device, peer):
    """From its state dict: choice, weights, and gradients of tokens and gate."""
    pytest.importorskip("transformers")
    theirs, options = PEERS[peer]()
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.normal_(std=0.1 if tensor.shape == (E,) else 1)
    ours = TopKRouter(D, E, K, **options)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(device), theirs.to(device)

    x, grad = torch.randn(T, D).to(device), torch.randn(T, K).to(device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    output = ours(leaves[0])
    _, their_weights, their_indices = theirs(leaves[1])
    order = output.indices.argsort(-1)
    their_order = their_indices.argsort(-1)
    assert_bitwise(output.indices.gather(1, order).long(), their_indices.gather(1, their_order))

    # Both are fp32 with errors of exp; logits are about 15 at most.
    def compare(got, want, name, **options):
        assert_close(got, want.double(), name, accumulation_factor=2 * 8 * 20, **options)

    weights = output.weights.gather(1, order)
    their_weights = their_weights.gather(1, their_order)
    compare(weights, their_weights, "weights")
    (weights * grad).sum().backward()
    (their_weights * grad).sum().backward()
    compare(leaves[0].grad, leaves[1].grad, "gradient of the tokens", num_terms=E, terms=20)
    compare(ours.weight.grad, theirs.weight.grad, "gradient of the gate", num_terms=T, terms=20)
    if ours.bias is not None:
        compare(ours.bias.grad, theirs.bias.grad, "gradient of the bias", num_terms=T, terms=20)
