"""Inputs and runs of the router's logits: both gates and their BatchNorm."""

import torch
from batch_norm_helpers import EPS, MOMENTUM, random_grads

from omni_moe.ops import omni_router_logits


def make_inputs(num_tokens, hidden_size, num_rows, num_cols, device, dtype):
    """Hidden states and gates, and gradients of both outputs."""
    scale = hidden_size**-0.5
    inputs = [
        torch.randn(num_tokens, hidden_size),
        torch.randn(num_rows, hidden_size) * scale,
        torch.randn(num_cols, hidden_size) * scale,
    ]
    grads = random_grads(num_tokens, num_rows, num_cols, device, dtype)
    return [tensor.to(device, dtype) for tensor in inputs], grads


def apply(inputs, buffers, training=True):
    return omni_router_logits(*inputs, buffers.args(), training, MOMENTUM, EPS)


def run(function, inputs, grads, buffers, training=True):
    """Outputs, then gradients of hidden states and gates. Updates `buffers`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    logits = function(*leaves, buffers.args(), training, MOMENTUM, EPS)
    return [*(out.detach() for out in logits), *torch.autograd.grad(logits, leaves, grads)]


def run_op(inputs, grads, buffers, training=True):
    return run(omni_router_logits, inputs, grads, buffers, training)
