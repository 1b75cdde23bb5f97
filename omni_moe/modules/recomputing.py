"""Whether a forward is one that activation checkpointing repeats."""

import torch


def is_recomputing() -> bool:
    """Whether this forward is part of a backward pass: its tokens have been counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
