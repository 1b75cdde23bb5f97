"""TRL's trainers on checkpoints of both kinds: they load them, and train on the routers' losses."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from transformers import PreTrainedTokenizerFast  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402
from transformers_helpers import (  # noqa: E402
    EXPERTS,
    VOCAB,
    dense_model,
    omni_model,
    vision_language_model,
)

from omni_moe.integrations.transformers import omni_moe_layers, replace_mlp  # noqa: E402

KINDS = ["replaced", "scratch"]
LOSSES = {"router_norm": "none", "router_aux_loss_coef": 10.0}
TEXT = " ".join(f"w{i:02}" for i in range(3, 20))
PAIR = {"prompt": "w04 w05 ", "chosen": "w06 w07", "rejected": "w08 w09"}


@pytest.fixture
def tokenizer():
    # Of two digits each: no special token is the beginning of another word.
    words = {f"w{i:02}": i for i in range(VOCAB)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w03"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "w00", "bos_token": "w01", "eos_token": "w02", "unk_token": "w03"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    def save(kind, **options):
        replaced = kind == "replaced"
        model = (
            replace_mlp(dense_model(), **EXPERTS, **options) if replaced else omni_model(**options)
        )
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def train(name, model, rows, out, **options):
    """One step that changes nothing."""
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 0.0,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    config = getattr(trl, f"{name}Config")(str(out), **(arguments | options))
    rewards = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list([rows] * 4),
        **(rewards if name == "GRPO" else {}),
    )
    trainer.train()
    return trainer, trainer.state.log_history[0]


@pytest.mark.parametrize("kind", KINDS)
def test_reference_model_and_rewards(kind, checkpoint, tmp_path):
    """Trainers load a model, and a second one, from where it was saved."""
    path = checkpoint(kind)
    trainer, logs = train("DPO", path, PAIR, tmp_path)
    assert type(trainer.ref_model) is type(trainer.accelerator.unwrap_model(trainer.model))
    assert len(omni_moe_layers(trainer.ref_model)) == 3
    assert logs["loss"] > 0 and "aux_loss" not in logs
    trainer, logs = train("Reward", path, PAIR, tmp_path)
    assert len(omni_moe_layers(trainer.model)) == 3 and logs["loss"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_router_loss_of_rollouts(kind, checkpoint, tmp_path):
    options = {"num_generations": 2, "max_completion_length": 4}
    path = checkpoint(kind, **LOSSES)
    trainer, logs = train("GRPO", path, {"prompt": "w04 w05 "}, tmp_path, **options)
    assert len(omni_moe_layers(trainer.model)) == 3
    # Of the policy, whose advantages sum to 0, nothing remains.
    assert logs["loss"] == pytest.approx(10 * logs["aux_loss"], rel=1e-3)


@pytest.mark.parametrize("coefficient", [None, 0.5, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_router_loss_of_fine_tuning(kind, coefficient, checkpoint, tmp_path):
    """Transformers' loss of the router logits, with the config's coefficient or the trainer's."""
    options = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    trainer, logs = train("SFT", checkpoint(kind, **LOSSES), {"text": TEXT}, tmp_path, **options)
    model = trainer.accelerator.unwrap_model(trainer.model).train()
    ids = torch.tensor([[*range(3, 20), 2]] * 2)  # with the end of the text
    task = model.eval()(ids, labels=ids, output_router_logits=False).loss.item()
    out = model.train()(ids, labels=ids, output_router_logits=True)
    coefficient = 10.0 if coefficient is None else coefficient
    if coefficient:
        num_experts, top_k = EXPERTS["num_experts"], EXPERTS["num_experts_per_token"]
        aux_loss = load_balancing_loss_func(out.router_logits, num_experts, top_k).item()
        assert logs["aux_loss"] == pytest.approx(aux_loss, rel=1e-5)
        assert logs["loss"] == pytest.approx(task + coefficient * aux_loss, rel=1e-5)
    else:
        assert "aux_loss" not in logs
        assert logs["loss"] == pytest.approx(task, rel=1e-5)
    # And the model's own loss is of the same coefficient.
    own = task + coefficient * out.aux_loss.item()
    assert out.loss.item() == pytest.approx(own, rel=1e-5)
    assert model(ids, labels=ids).loss.item() == pytest.approx(own, rel=1e-5)


def test_router_loss_of_preferences(checkpoint, tmp_path):
    _, logs = train("DPO", checkpoint("replaced", **LOSSES), PAIR, tmp_path)
    want = 10 * logs["aux_loss"] + 0.6931
    assert logs["aux_loss"] > 3 and logs["loss"] == pytest.approx(want, rel=1e-3)


def test_adapters(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    path = checkpoint("replaced", **LOSSES)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model = peft.get_peft_model(model, lora)
    trainer, logs = train("SFT", model, {"text": TEXT}, tmp_path, learning_rate=1e-2)
    assert logs["loss"] > 10 * logs["aux_loss"] > 30
    for name, parameter in trainer.model.named_parameters():
        if "router_gate_x.lora_B" in name:
            assert parameter.any(), f"{name} has not learnt"


def test_the_auto_class_of_a_vision_language_model(tmp_path):
    from trl.trainer.utils import create_model_from_path

    replace_mlp(vision_language_model(), **EXPERTS).save_pretrained(tmp_path)
    model = create_model_from_path(str(tmp_path))
    assert type(model).__name__ == "OmniMoeQwen2_5_VLForConditionalGeneration"
    assert len(omni_moe_layers(model)) == 3
