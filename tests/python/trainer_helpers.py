"""Trainers of small models, and models with what they train on."""

from transformers import Trainer, TrainingArguments
from transformers_helpers import EXPERTS, dense_model, omni_model

from omni_moe.integrations.transformers import replace_mlp

NUM_STEPS = 8
LOSSES = {"router_norm": "none", "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def make_trainer(model, examples, out, device="cpu", **options) -> Trainer:
    arguments = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **(arguments | options)),
        train_dataset=examples,
        eval_dataset=examples[:4],
    )


def tracked_models() -> dict:
    return {
        "replaced": replace_mlp(dense_model(), **EXPERTS, layers=[0, 2], track_expert_load=True),
        "scratch": omni_model(track_expert_load=True),
    }


def balanced_model(kind, **options):
    options = LOSSES | options
    scratch = kind == "scratch"
    return omni_model(**options) if scratch else replace_mlp(dense_model(), **EXPERTS, **options)
