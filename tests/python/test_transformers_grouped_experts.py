"""The experts implementation "omni_moe_grouped" and the layer's own modules, against the sparse
blocks of Transformers with their weights.
"""

import copy

import pytest
import torch
from helpers import assert_close, on_devices
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import DeepseekV3Config, MixtralConfig, NemotronHConfig, Qwen3MoeConfig  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock  # noqa: E402
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402
from transformers_helpers import SIZES, random_ids  # noqa: E402

import omni_moe.integrations.transformers  # noqa: E402, F401  (registers the implementation)
from omni_moe.modules import MixtureOfExperts  # noqa: E402

H, I, E, K = 32, 24, 8, 2  # noqa: E741


def small(config_class, **options):
    return config_class(**{**SIZES, "hidden_size": H, "num_experts_per_tok": K, **options})


def mixtral_config(**options):
    return small(MixtralConfig, intermediate_size=I, num_local_experts=E, **options)


def qwen3_config(**options):
    return small(Qwen3MoeConfig, moe_intermediate_size=I, num_experts=E, **options)


def deepseek_config(**options):
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    return small(
        DeepseekV3Config, moe_intermediate_size=I, n_routed_experts=E, n_shared_experts=2,
        n_group=4, topk_group=2, first_k_dense_replace=1, qk_nope_head_dim=8,
        num_key_value_heads=4, head_dim=4, **{**sizes, **options},
    )  # fmt: skip


# The block of each family, and the options that make our layer of it.
BLOCKS = {
    "mixtral": (
        lambda: MixtralSparseMoeBlock(mixtral_config()),
        {"router_options": {"norm_topk_prob": True}},
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeSparseMoeBlock(qwen3_config(norm_topk_prob=False)),
        {"router_options": {}},
    ),
    "deepseek_v3": (
        lambda: DeepseekV3MoE(deepseek_config()),
        {
            "shared_intermediate_size": 2 * I,
            "router_options": {
                "scoring_func": "sigmoid",
                "norm_topk_prob": True,
                "routed_scaling_factor": deepseek_config().routed_scaling_factor,
                "n_group": 4,
                "topk_group": 2,
                "score_correction": True,
                "router_dtype": torch.float32,
            },
        },
    ),
}
CONFIGS = {
    "mixtral": mixtral_config,
    "qwen3_moe": qwen3_config,
    "deepseek_v3": deepseek_config,
}
on_families = pytest.mark.parametrize("family", BLOCKS)


def drawn(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=1.0 if "gate.weight" in name else 0.3)
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=0.1)
    return module


def set_implementation(module: nn.Module, name: str) -> nn.Module:
    for part in module.modules():
        if hasattr(part, "config"):
            part.config = copy.deepcopy(part.config)
            part.config._experts_implementation = name
    return module


def with_gradients(module, x):
    x = x.detach().requires_grad_()
    output = module(x)
    output = output[0] if isinstance(output, tuple) else output
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(output.square().sum(), [x, *parameters.values()])
    return [output.detach(), *grads], ["output", "input", *parameters]


def assert_same(got, want, names):
    for name, ours, theirs in zip(names, got, want, strict=True):
        scale = theirs.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(
            ours, theirs.to(ours.device), rtol=1e-4, atol=1e-5 * scale,
            msg=lambda text, n=name: f"{n}: {text}",
        )  # fmt: skip


# ---- blocks --------------------------------------------------------------------------------------


@on_families
@on_devices
def test_blocks_run_our_experts(device, family):
    stock = set_implementation(drawn(BLOCKS[family][0]()), "eager")
    ours = set_implementation(copy.deepcopy(stock), "omni_moe_grouped").to(device)
    x = torch.randn(2, 9, H)
    want, names = with_gradients(stock, x)
    got, _ = with_gradients(ours, x.to(device))
    assert_same(got, want, names)


@on_families
@on_devices
def test_our_layer_takes_the_weights_of_the_block(device, family):
    make, options = BLOCKS[family]
    stock = set_implementation(drawn(make()), "eager")
    ours = MixtureOfExperts(H, I, E, K, **options)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 9, H)
    want, names = with_gradients(stock, x)
    got, ours_names = with_gradients(ours.to(device), x.to(device))
    by_name = dict(zip(ours_names, got, strict=True))
    assert_same([by_name[name] for name in names], want, names)


@on_families
@on_devices
def test_models(device, family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval().to(device)
    ids = random_ids(device=device)
    model.set_experts_implementation("eager")
    want = model(ids, labels=ids)
    want.loss.backward()
    want_grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.set_experts_implementation("omni_moe_grouped")
    assert model.config._experts_implementation == "omni_moe_grouped"
    got = model(ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits)
    got.loss.backward()
    for parameter, grad in zip(model.parameters(), want_grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


# ---- kinds of experts ----------------------------------------------------------------------------


def experts_of(kind, **options):
    """Experts without a gate, or with a gate of the model's own, biases and transposed weights."""
    if kind == "nemotron_h":
        config = NemotronHConfig(
            **SIZES, layers_block_type=["full_attention", "moe"], n_routed_experts=E,
            num_experts_per_tok=K, moe_intermediate_size=I, moe_shared_expert_intermediate_size=24,
            **options,
        )  # fmt: skip
        return drawn(NemotronHExperts(config))
    config = transformers.GptOssConfig(
        **{**SIZES, "intermediate_size": I}, num_local_experts=E, num_experts_per_tok=K
    )
    return drawn(GptOssExperts(config))


def choice(num_tokens):
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(num_tokens)])
    return ids, torch.rand(num_tokens, K)


@pytest.mark.parametrize("kind", ["nemotron_h", "gpt_oss"])
@on_devices
def test_other_experts(device, kind):
    stock = set_implementation(experts_of(kind), "eager")
    ours = set_implementation(copy.deepcopy(stock), "omni_moe_grouped").to(device)
    ids, weights = choice(9)
    x = torch.randn(9, H)
    want, names = with_gradients(lambda_module(stock, ids, weights), x)
    got, _ = with_gradients(lambda_module(ours, ids.to(device), weights.to(device)), x.to(device))
    assert_same(got, want, names)


def lambda_module(experts, ids, weights):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts

        def forward(self, x):
            return self.experts(x, ids, weights)

    return Called()


@on_devices
def test_sentinels_contribute_nothing(device):
    experts = set_implementation(drawn(BLOCKS["mixtral"][0]()).experts, "omni_moe_grouped")
    experts = experts.to(device)
    ids, weights = (tensor.to(device) for tensor in choice(9))
    x = torch.randn(9, H, device=device)
    want = experts(x, ids, weights.where(torch.arange(K, device=device) > 0, 0))
    ids[:, 0] = E + 1000
    weights[:, 0] = torch.nan
    torch.testing.assert_close(experts(x, ids, weights), want)


@on_devices
def test_half_precision(device):
    """Weights in fp32 beside experts in bf16, as DeepSeek-V3's router gives them."""
    exact = set_implementation(drawn(BLOCKS["mixtral"][0]()).experts, "eager").to(torch.bfloat16)
    ours = set_implementation(copy.deepcopy(exact), "omni_moe_grouped").to(device)
    ids, weights = choice(9)
    x = torch.randn(9, H).bfloat16()
    got = ours(x.to(device), ids.to(device), weights.to(device))
    assert got.dtype == torch.bfloat16
    want = exact.double()(x.double(), ids, weights.double())
    assert_close(got, want, num_terms=H, intermediate_roundings=4)


def test_experts_with_a_norm_are_refused():
    experts = set_implementation(drawn(BLOCKS["mixtral"][0]()).experts, "omni_moe_grouped")
    experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match="MixtralExperts to have no norm after each expert"):
        experts(torch.randn(9, H), *choice(9))
