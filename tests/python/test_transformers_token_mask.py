"""The attention mask of models of Transformers as the token mask of their OmniMoE layers."""

import copy

import pytest
import torch
from helpers import assert_bitwise

transformers = pytest.importorskip("transformers")

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # noqa: E402
    apply_activation_checkpointing,
)
from transformers_helpers import (  # noqa: E402
    EXPERTS,
    VOCAB,
    audio_language_model,
    omni_model,
    random_ids,
    replaced_model,
    vision_language_model,
    wake_experts,
)

from omni_moe import OmniMoE, router_loss  # noqa: E402
from omni_moe.integrations.transformers import (  # noqa: E402
    ExpertLoadCallback,
    omni_moe_layers,
    replace_mlp,
)
from omni_moe.modules.recording import recording  # noqa: E402

LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
MODELS = {
    "OmniMoe": omni_model,
    "Llama": lambda **options: replaced_model("Llama", **options),
    "Mistral": lambda **options: replaced_model("Mistral", **options),
}
on_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def padded(ids, left, right):
    """The ids, their mask and their positions between so many columns of padding."""
    num_sequences, length = ids.shape
    widths = (num_sequences, left), (num_sequences, length), (num_sequences, right)
    mask = torch.cat([torch.full(w, float(i == 1)) for i, w in enumerate(widths)], 1).long()
    noise = torch.randint(3, VOCAB, mask.shape)
    noise[:, left : left + length] = ids
    return {
        "input_ids": noise,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def run(model, inputs):
    """Logits of counted tokens, loss, gradients, buffers and counts."""
    for layer in omni_moe_layers(model).values():
        layer.reset_expert_load()
    counted = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    # The first token is predicted by padding in front of it, or by nothing.
    is_target = counted & (counted.cumsum(-1) > 1)
    labels = inputs["input_ids"].masked_fill(~is_target, -100)
    outputs = model(**inputs, labels=labels)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    counts = [layer.expert_load().counts for layer in omni_moe_layers(model).values()]
    return outputs.logits[counted].detach(), outputs.loss.detach(), gradients, buffers, counts


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "router_norm"),
    [(omni_model, "batch_norm"), (omni_model, "rms_norm"), (replaced_model, "batch_norm")],
)
def test_padded_is_unpadded(make, router_norm, training, left):
    model = make(router_norm=router_norm, track_expert_load=True, **LOSSES).double()
    model.train(training)
    twin = copy.deepcopy(model)
    ids = random_ids(2, 7)
    got, want = run(model, padded(ids, left, 4 - left)), run(twin, {"input_ids": ids})
    torch.testing.assert_close(got, want)
    assert all(count.sum() == 2 * 7 * EXPERTS["num_experts_per_token"] for count in got[-1])


@on_models
def test_without_padding_the_mask_changes_nothing(make):
    model = make(track_expert_load=True).double().train()
    ids = random_ids()
    twin = copy.deepcopy(model)
    want = run(twin, {"input_ids": ids})
    got = run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_dtype_and_by_position(dtype):
    model = omni_model().train()
    inputs = padded(random_ids(2, 7), 0, 4)
    want = copy.deepcopy(model)(**inputs).logits
    ids, mask, positions = inputs.values()
    outputs = []
    with recording(list(omni_moe_layers(model).values())[:1], [outputs]):
        got = model(ids, mask.to(dtype), positions).logits
    assert_bitwise(outputs[0].token_mask, mask.bool().flatten())
    torch.testing.assert_close(got[:, :7], want[:, :7])


def test_aux_loss_of_counted_tokens():
    model = omni_model(router_norm="none", **LOSSES).double()
    ids = random_ids(2, 7)
    got = model(**padded(ids, 0, 4), output_router_logits=True)
    want = model(ids, output_router_logits=True)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)


def test_masks_of_other_forms_are_no_token_masks():
    model = replaced_model("Gemma2").train()
    ids = random_ids()
    causal = torch.zeros(2, 1, 11, 11).masked_fill(~torch.ones(11, 11).tril().bool(), -1e9)
    layers = list(omni_moe_layers(model).values())
    outputs = []
    with recording(layers[:1], [outputs]):
        model(ids, attention_mask=causal)
        model(ids, attention_mask={"full_attention": causal, "sliding_attention": causal})
        model(ids)
    assert [one.token_mask for one in outputs] == [None] * 3


def test_nothing_is_left_behind():
    """Not in the layers, and not in a second model."""
    first, second = omni_model().train(), omni_model().train()
    inputs = padded(random_ids(2, 7), 0, 4)
    masks = []
    for model, given in (
        (first, inputs),
        (second, {"input_ids": inputs["input_ids"]}),
        (first, {}),
    ):
        outputs = []
        layer = next(iter(omni_moe_layers(model).values()))
        with recording([layer], [outputs]):
            if given:
                model(**given)
            else:
                layer(torch.randn(2, 11, 32))
        masks.append(outputs[0].token_mask)
    assert masks[0] is not None and masks[1] is None and masks[2] is None


def test_a_forward_that_fails_leaves_nothing_behind():
    model = omni_model().train()
    model.gradient_checkpointing_enable()
    checkpoint = model.model.layers[0]._gradient_checkpointing_func
    with pytest.raises(IndexError):
        model(torch.full((2, 5), 10**6), attention_mask=torch.ones(2, 5))
    assert model.model.layers[0]._gradient_checkpointing_func is checkpoint
    assert next(iter(omni_moe_layers(model).values()))._model_mask is None


# ---- gradient checkpointing ----------------------------------------------------------------------


def gradients_of_two_forwards(model, batches):
    """Both before the one backward pass."""
    loss = sum(model(**batch, labels=batch["input_ids"], use_cache=False).loss for batch in batches)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients


@pytest.mark.parametrize("use_reentrant", [False, True])
@on_models
def test_gradient_checkpointing(make, use_reentrant):
    """Each repeated forward has the mask that it had, whatever came in between."""
    model = make().double().train()
    batches = [padded(random_ids(2, 7), 0, 4), padded(random_ids(2, 7), 4, 0)]
    twin = copy.deepcopy(model)
    want = gradients_of_two_forwards(twin, batches)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    got = gradients_of_two_forwards(model, batches)
    torch.testing.assert_close(got, want)


def test_checkpointing_by_others():
    """As FSDP and accelerate do it, around blocks: the mask of the last forward."""
    model = replaced_model().double().train()
    batch = padded(random_ids(2, 7), 0, 4)
    want = gradients_of_two_forwards(copy.deepcopy(model), [batch])
    block = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block))
    got = gradients_of_two_forwards(model, [batch])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [omni_model, replaced_model])
def test_compiled(make, checkpointing):
    """In one graph, and with gradient checkpointing in it."""
    torch._dynamo.reset()
    model = make().double().train()
    batch = padded(random_ids(2, 7), 0, 4)
    want = gradients_of_two_forwards(copy.deepcopy(model), [batch])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = gradients_of_two_forwards(compiled, [batch])
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@on_models
def test_generation_of_padded_prompts(make, use_cache):
    model = make(track_expert_load=True).double().eval()
    ids = random_ids(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options["use_cache"] = use_cache
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    layer = next(iter(omni_moe_layers(model).values()))
    counts = layer.expert_load().counts
    layer.reset_expert_load()
    batch = padded(ids, 3, 0)
    got = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    assert_bitwise(got[:, 3:], want)
    assert_bitwise(layer.expert_load().counts, counts)


def test_a_mask_that_is_longer_than_the_input():
    """Its last columns are the input's: the others are in the cache."""
    model = omni_model()
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5] = mask[1, 7] = 0
    outputs = []
    with recording(list(omni_moe_layers(model).values())[:1], [outputs]), torch.no_grad():
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
    assert_bitwise(outputs[0].token_mask, mask[:, :4].bool().flatten())
    assert_bitwise(outputs[1].token_mask, mask[:, 4:].bool().flatten())


# ---- others --------------------------------------------------------------------------------------


def test_adapters():
    """LoRA on the gates and norms that are saved: called, and still blind to padding."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules="all-linear", modules_to_save=["router_norm_x", "router_norm_y"]
    )
    model = peft.get_peft_model(replaced_model(track_expert_load=True), config).double().train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    twin = copy.deepcopy(model)
    ids = random_ids(2, 7)
    got, want = run(model, padded(ids, 0, 4)), run(twin, {"input_ids": ids})
    torch.testing.assert_close(got, want)
    moved = [name for name in got[3] if "modules_to_save" in name and "running_mean" in name]
    assert moved and all(got[3][name].any() for name in moved)


@pytest.mark.parametrize("make", [vision_language_model, audio_language_model])
def test_language_models_inside_of_others(make):
    model = wake_experts(replace_mlp(make(), **EXPERTS)).train()
    inputs = padded(random_ids(2, 7), 0, 4)
    outputs = []
    with recording(list(omni_moe_layers(model).values())[:1], [outputs]):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert_bitwise(outputs[0].token_mask, inputs["attention_mask"].bool().flatten())


def test_callback_counts_no_padding(tmp_path):
    model = omni_model()
    row = {"input_ids": list(range(3, 11)), "attention_mask": [1] * 5 + [0] * 3}
    row["labels"] = [*row["input_ids"][:5], -100, -100, -100]
    callback = ExpertLoadCallback()
    counts = []
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=[row] * 4,
        data_collator=transformers.default_data_collator,
    )

    class Probe(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            sums = [meter.sums(torch.device("cpu")) for meter in callback._meters]
            counts.extend(chosen.sum().item() for chosen, _ in sums)
            counts.extend(entropy[1].item() for _, entropy in sums)

    trainer.add_callback(callback)
    trainer.add_callback(Probe())
    trainer.train()
    num_layers, tokens = len(omni_moe_layers(model)), 4 * 5
    assert (
        counts == [tokens * EXPERTS["num_experts_per_token"]] * num_layers + [tokens] * num_layers
    )


def test_router_loss_is_that_of_counted_tokens():
    model = omni_model(router_norm="none", **LOSSES).double().train()
    ids = random_ids(2, 7)
    model(**padded(ids, 0, 4))
    got = router_loss(model)
    model(ids)
    torch.testing.assert_close(got, router_loss(model))
    assert all(isinstance(layer, OmniMoE) for layer in omni_moe_layers(model).values())
