"""Router logits, losses and their coefficients as Transformers' mixtures of experts have them."""

import copy
import pickle

import pytest
import torch
from helpers import assert_bitwise, on_devices

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.modeling_outputs import (  # noqa: E402
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402
from transformers_helpers import (  # noqa: E402
    EXPERTS,
    SIZES,
    dense_model,
    omni_config,
    omni_model,
    random_ids,
    vision_language_model,
)

from omni_moe import load_balancing_loss, router_loss, router_z_loss  # noqa: E402
from omni_moe.integrations.transformers import omni_moe_layers, replace_mlp  # noqa: E402
from omni_moe.modules.recording import recorded_router_outputs  # noqa: E402

E, K = EXPERTS["num_experts"], EXPERTS["num_experts_per_token"]
KINDS = ["replaced", "scratch"]
LOSSES = {"router_norm": "none", "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def make_model(kind, **options):
    if kind == "scratch":
        return omni_model(**options)
    return replace_mlp(dense_model(), **EXPERTS, **options)


def layer_losses(model, ids):
    """The load balancing loss and the z-loss of each layer."""
    with recorded_router_outputs(list(omni_moe_layers(model).values())) as recorded:
        model(ids)
    return [
        (load_balancing_loss(x, y, indices), router_z_loss(x, y))
        for ((x, y, indices, *_),) in recorded
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@on_devices
def test_router_logits_and_losses(device, kind, training):
    model = make_model(kind, **LOSSES).to(device).train(training)
    ids = random_ids(device=device)
    task = copy.deepcopy(model).eval()(ids, labels=ids).loss
    out = model(ids, labels=ids, output_router_logits=True)
    assert type(out) is MoeCausalLMOutputWithPast
    losses = layer_losses(model, ids)
    torch.testing.assert_close(out.aux_loss, sum(balance for balance, _ in losses))
    added = sum(0.5 * balance + 0.1 * z for balance, z in losses)
    torch.testing.assert_close(out.loss, task + added)
    assert len(out.router_logits) == 3
    for logits, (balance, _) in zip(out.router_logits, losses, strict=True):
        assert logits.shape == (ids.numel(), E) and logits.dtype == torch.float32
        # Transformers' function does not divide by K.
        torch.testing.assert_close(load_balancing_loss_func((logits,), E, K), K * balance)

    without = model(ids, output_router_logits=True)
    assert without.loss is None
    assert_bitwise(without.aux_loss, out.aux_loss)
    assert_bitwise(without.logits, out.logits)
    for by_tuple, wanted in zip(
        model(ids, labels=ids, output_router_logits=True, return_dict=False)[:2],
        (out.loss, out.aux_loss),
        strict=True,
    ):
        assert_bitwise(by_tuple, wanted)
    if training:
        assert_bitwise(out.loss, model(ids, labels=ids).loss)  # once, asked for or not
        out.aux_loss.backward()
        for layer in omni_moe_layers(model).values():
            assert layer.router_gate_x.weight.grad.any()
    for layer in omni_moe_layers(model).values():
        assert not layer._recorders


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_alone(kind):
    model = make_model(kind)
    ids = random_ids()
    out = model.base_model(ids, output_router_logits=True)
    assert type(out) is MoeModelOutputWithPast
    want = model(ids, output_router_logits=True).router_logits
    for got, wanted in zip(out.router_logits, want, strict=True):
        assert_bitwise(got, wanted)
    plain = model.base_model(ids)
    assert "router_logits" not in plain
    assert_bitwise(plain.last_hidden_state, out.last_hidden_state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_asks(kind, tmp_path):
    model = make_model(kind, **LOSSES)
    ids = random_ids()
    assert model(ids).get("aux_loss") is None
    model.config.output_router_logits = True
    out = model(ids, labels=ids)
    assert out.aux_loss > 2.5
    assert model.base_model(ids).router_logits is not None
    assert "aux_loss" not in model(ids, output_router_logits=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_bitwise(loaded(ids, labels=ids).loss, out.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_the_coefficient_of_the_config(kind, tmp_path):
    """Trainers set it after the model has been built; it is saved with the model."""
    model = make_model(kind, **(LOSSES | {"router_z_loss_coef": 0.0})).train()
    ids = random_ids()
    task = copy.deepcopy(model).eval()(ids, labels=ids).loss
    balances = [balance for balance, _ in layer_losses(model, ids)]
    for coefficient in (0.5, 2.0, 0.0, 0.5):
        model.config.router_aux_loss_coef = coefficient
        for asked in (True, False):
            loss = model(ids, labels=ids, output_router_logits=asked).loss
            torch.testing.assert_close(loss, task + coefficient * sum(balances))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
        assert_bitwise(loaded(ids, labels=ids).loss, loss)


def test_two_calls_of_replace_mlp():
    """Each layer keeps its own coefficient until somebody sets one. Missing experts score -inf."""
    model = replace_mlp(dense_model(), **EXPERTS, layers=[2], **LOSSES)
    replace_mlp(model, num_experts=16, num_experts_per_token=2, layers=[0], router_norm="none")
    model.train()
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok) == (E, K)
    ids = random_ids()
    out = model(ids, labels=ids, output_router_logits=True)
    small, large = out.router_logits
    assert small.shape == large.shape == (22, E)
    assert small[:, 16:].isneginf().all() and small[:, :16].isfinite().all()
    (_, _), (balance, z) = layer_losses(model, ids)
    task = model.eval()(ids, labels=ids).loss
    torch.testing.assert_close(out.loss, task + 0.5 * balance + 0.1 * z)
    assert load_balancing_loss_func(out.router_logits, E, K).isfinite()
    config.router_aux_loss_coef = 0.25
    changed = model.train()(ids, labels=ids).loss
    torch.testing.assert_close(changed, task + 0.25 * out.aux_loss + 0.1 * z)


@pytest.mark.parametrize("kind", KINDS)
def test_other_heads(kind, tmp_path):
    make_model(kind, **LOSSES).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    ids, labels = random_ids(), torch.tensor([0, 2])
    plain = model(ids, labels=labels)
    out = model(ids, labels=labels, output_router_logits=True)
    assert isinstance(out, type(plain))
    torch.testing.assert_close(
        out.loss, plain.loss + sum(0.5 * b + 0.1 * z for b, z in layer_losses(model, ids))
    )
    assert len(out.router_logits) == 3 and out.aux_loss > 2.5
    # DDP and FSDP take outputs apart and put them together again.
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(out)
    assert_bitwise(again.aux_loss, out.aux_loss)


def test_a_vision_language_model():
    model = replace_mlp(vision_language_model(), **EXPERTS, **LOSSES).train()
    ids = random_ids()
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert len(out.router_logits) == 3
    torch.testing.assert_close(out.loss, model(input_ids=ids, labels=ids).loss)
    decoder = model.base_model.eval()(input_ids=ids, output_router_logits=True)
    assert len(decoder.router_logits) == 3
    assert model.config.get_text_config().num_experts == E


def test_experts_of_the_base():
    """A base with experts of its own keeps its router logits and its loss to itself."""
    config = transformers.Qwen2MoeConfig(
        **{name: size for name, size in SIZES.items() if name != "head_dim"},
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        mlp_only_layers=[1],
        router_aux_loss_coef=0.01,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    ids = random_ids()
    want = model(ids, labels=ids, output_router_logits=True)
    replace_mlp(model, **EXPERTS, layers=[1], **LOSSES)
    got = model(ids, labels=ids, output_router_logits=True)
    assert model.config.num_experts == 4 and len(got.router_logits) == len(want.router_logits) == 2
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    torch.testing.assert_close(got.loss, want.loss + router_loss(model))


def test_adapters():
    """PEFT calls the forward of the model itself."""
    peft = pytest.importorskip("peft")
    model = make_model("replaced", **LOSSES).train()
    ids = random_ids()
    want = model(ids, labels=ids, output_router_logits=True)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "router_gate_x"])
    got = peft.get_peft_model(model, lora)(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    torch.testing.assert_close(got.loss, want.loss)


def test_copies_of_layers_in_adapters():
    """Of two adapters and the layer under them, the one that runs answers."""
    peft = pytest.importorskip("peft")
    model = make_model("replaced", **LOSSES).train()
    ids = random_ids()
    want = model(ids, labels=ids, output_router_logits=True)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"])
    adapted = peft.get_peft_model(model, lora)
    adapted.add_adapter("other", lora)
    with adapted.disable_adapter():
        without = adapted(ids, labels=ids, output_router_logits=True)
    model.config.router_aux_loss_coef = 0.25
    for got in (without, adapted(ids, labels=ids, output_router_logits=True)):
        assert len(got.router_logits) == 3
        torch.testing.assert_close(got.aux_loss, want.aux_loss)
    torch.testing.assert_close(without.loss, want.loss)
    torch.testing.assert_close(got.loss, want.loss - 0.25 * want.aux_loss)


def test_a_forward_without_a_loss_needs_none():
    """Under reentrant checkpointing there is no loss to add, and nothing asks for one."""
    model = make_model("scratch", **LOSSES).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert model(random_ids(), use_cache=False).loss is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    model = make_model("scratch", **LOSSES).train()
    ids = random_ids()
    want = model(ids, output_router_logits=True, use_cache=False).aux_loss
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        with pytest.raises(RuntimeError, match="use use_reentrant=False"):
            model(ids, output_router_logits=True, use_cache=False)
        return
    out = model(ids, labels=ids, output_router_logits=True, use_cache=False)
    torch.testing.assert_close(out.aux_loss, want)
    out.loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind):
    torch._dynamo.reset()
    model = make_model(kind, **LOSSES).train()
    ids = random_ids()
    arguments = {"labels": ids, "output_router_logits": True, "use_cache": False}
    want = model(ids, **arguments)
    got = torch.compile(model, backend="aot_eager")(ids, **arguments)
    for name in ("loss", "aux_loss"):
        torch.testing.assert_close(got[name], want[name])
    got.loss.backward()


def test_a_z_loss_that_is_left_out():
    model = make_model("replaced", **LOSSES).train()
    with pytest.warns(UserWarning, match="router_z_loss_coef: router_logits are asked of a model"):
        model.base_model(random_ids(), output_router_logits=True)


def test_copies_of_the_decoder():
    model = make_model("replaced")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.base_model) is type(model.base_model)
        assert type(copied.base_model).__name__ == "OmniMoeLlamaModel"
    assert omni_config().output_router_logits is False


def test_custom_code_is_saved():
    """What registers itself stands in the config, and nothing else."""
    config = omni_config()
    assert "AutoModelForCausalLM" in config.auto_map
    assert "auto_map" not in config.to_dict()
    config.auto_map["AutoModelForCausalLM"] = "modeling.Own"
    assert config.to_dict()["auto_map"] == {"AutoModelForCausalLM": "modeling.Own"}


# ---- initialisation around a replaced model ------------------------------------------------------


def filled_model():
    model = replace_mlp(dense_model(), **EXPERTS)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(3)
    return model


class Around(transformers.LlamaPreTrainedModel):
    def __init__(self, inner):
        super().__init__(inner.config)
        self.inner = inner
        self.head = torch.nn.Linear(4, 4)
        self.post_init()


@pytest.mark.parametrize(
    "initialise",
    [lambda m: m.init_weights(), lambda m: m.post_init(), Around, lambda m: Around(m.base_model)],
    ids=["init_weights", "post_init", "a model around it", "around the decoder"],
)
@pytest.mark.parametrize("copied", [False, True])
def test_weights_stay(initialise, copied):
    model = filled_model()
    model = copy.deepcopy(model) if copied else model
    initialise(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            assert (tensor == 3).all(), name


def test_missing_weights_are_still_drawn(tmp_path):
    """Of a checkpoint that lacks some, which the mark of initialised weights must not hide."""
    model = filled_model()
    state = {name: t for name, t in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    first, second = list(omni_moe_layers(loaded).values())[:2]
    assert (first.up_embed.weight == 3).all() and (first.router_norm_x.running_mean == 3).all()
    assert 0 < second.up_embed.weight.std() < 0.1
    assert (second.router_norm_x.running_mean == 0).all()
