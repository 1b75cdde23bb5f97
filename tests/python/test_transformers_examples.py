"""examples/train_hf.py and convert_hf.py with tiny sizes: outputs reload, generate, resume."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_bitwise, needs_gpu, on_devices

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from omni_moe.integrations.transformers import omni_moe_layers

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason=f"{EXAMPLES} is not there")

NUM_STEPS = 30
TRAINING = [
    *("--experts", "64", "--experts-per-token", "4", "--seq-len", "32", "--batch", "4"),
    *("--steps", str(NUM_STEPS), "--log-every", "5", "--eval-every", "15", "--save-every", "15"),
    *("--keep", "2", "--sample-tokens", "10"),
]
SIZES = [
    *("--layers", "2", "--hidden", "32", "--intermediate", "48", "--heads", "4"),
    *("--key-value-heads", "2", "--vocab", "300"),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Enough files that some are held out."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        lines = (f"def function_{i}_{j}(x):\n    return x + {i * j}\n" for j in range(20))
        (root / f"module_{i}.py").write_text("\n".join(lines))
    return root


def run_example(name: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def device_options(device: str) -> list[str]:
    return ["--cpu"] if device == "cpu" else ["--bf16"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("train")
    options = [*SIZES, *TRAINING, "--cpu", "--peak-tflops", "1e-3"]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        run_example("train_hf.py", *options, "--data", corpus, "--out", out)
    (out / "stdout").write_text(stdout.getvalue())
    (out / "stderr").write_text(stderr.getvalue())
    return out


@pytest.fixture(scope="module")
def dense_checkpoint(trained, tmp_path_factory) -> dict[str, Path]:
    """Small dense models beside the tokenizer of the example."""
    directories = {}
    for config_class in (LlamaConfig, Qwen3Config):
        tokenizer = AutoTokenizer.from_pretrained(trained)
        torch.manual_seed(0)
        config = config_class(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        out = tmp_path_factory.mktemp("dense")
        AutoModelForCausalLM.from_config(config).save_pretrained(out)
        tokenizer.save_pretrained(out)
        directories[config.model_type] = out
    return directories


def check_results(out: Path) -> dict:
    metrics = json.loads((out / "metrics.json").read_text())
    history = metrics["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == NUM_STEPS // 5 and losses[-1] < losses[0]
    assert metrics["tokens_per_second"] > 0
    assert metrics["num_active_parameters"] < metrics["num_parameters"]
    assert all(0 < share <= 1 for share in metrics["expert_usage"])
    for plot in ("loss.png", "expert_load.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    return metrics


def reload_and_generate(out: Path):
    """Greedily, with and without a cache; returns the model."""
    model = AutoModelForCausalLM.from_pretrained(out)
    inputs = AutoTokenizer.from_pretrained(out)("def function_1", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    options = {**inputs, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ids = model.generate(**options)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 6
    assert_bitwise(ids, model.generate(**options, use_cache=False))
    return model


# ---- train_hf.py ---------------------------------------------------------------------------------


def test_training(trained):
    metrics = check_results(trained)
    assert len(metrics["expert_usage"]) == 2
    assert metrics["sample"].startswith("class Parser:\n    def ")
    assert metrics["tflops_per_second"] > 0
    assert metrics["mfu"] == pytest.approx(metrics["tflops_per_second"] / 1e-3)
    assert "of the device's peak (MFU)" in (trained / "stdout").read_text()
    model = reload_and_generate(trained)
    assert type(model).__name__ == "OmniMoeForCausalLM" and len(omni_moe_layers(model)) == 2
    tokenizer = AutoTokenizer.from_pretrained(trained)
    text = "def f(x):\n\treturn 'ß → 2'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_log_file(trained):
    """Where no terminal is, the Trainer prints its log, and no bar at each step."""
    printed, errors = ((trained / name).read_text() for name in ("stdout", "stderr"))
    assert printed.count("'loss': ") == NUM_STEPS // 5
    assert f"{NUM_STEPS}/{NUM_STEPS}" not in printed + errors


def test_diverged_run(corpus, tmp_path, capsys):
    """All results but a sample, of which there is none."""
    options = [*SIZES, *TRAINING, "--lr", "1e9", "--expert-lr", "1e9", "--cpu"]
    run_example("train_hf.py", *options, "--data", corpus, "--out", tmp_path)
    assert "The training diverged" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["held_out_loss"] != metrics["held_out_loss"] and "sample" not in metrics
    assert metrics["tokens_per_second"] > 0
    for plot in ("loss.png", "expert_load.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


@needs_gpu
def test_training_on_a_gpu(corpus, tmp_path):
    options = [*SIZES, *TRAINING, "--bf16", "--gradient-checkpointing"]
    run_example("train_hf.py", *options, "--data", corpus, "--out", tmp_path)
    check_results(tmp_path)
    reload_and_generate(tmp_path)


def test_resuming(trained, corpus, tmp_path):
    """From the checkpoint in the middle to the same model and the same log."""
    middle = f"checkpoint-{NUM_STEPS // 2}"
    shutil.copytree(trained / middle, tmp_path / middle)
    options = [*SIZES, *TRAINING, "--cpu", "--data", corpus, "--out", tmp_path]
    run_example("train_hf.py", *options, "--resume")
    assert_same_weights(tmp_path, trained)
    logs = [
        json.loads((out / "metrics.json").read_text())["log_history"] for out in (tmp_path, trained)
    ]
    for name in ("loss", "expert_usage/0", "expert_unevenness/1"):
        got, want = ([entry[name] for entry in log if name in entry] for log in logs)
        assert got == want, name


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def keep_only(*names):
    def remove_others(checkpoint: Path) -> None:
        for file in checkpoint.iterdir():
            if file.name not in names:
                file.unlink()

    return remove_others


# What a process that was killed while it saved may leave, and what a full disk does.
UNFINISHED = {
    "nothing": keep_only(),
    "weights alone": keep_only("config.json", "model.safetensors"),
    "all but the state": lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
    "state cut off": lambda checkpoint: cut_off(checkpoint / "trainer_state.json"),
    "empty state": lambda checkpoint: (checkpoint / "trainer_state.json").write_text(""),
    "weights cut off": lambda checkpoint: cut_off(checkpoint / "model.safetensors"),
    "empty weights": lambda checkpoint: (checkpoint / "model.safetensors").write_bytes(b""),
    "no weights": lambda checkpoint: (checkpoint / "model.safetensors").unlink(),
    "optimizer cut off": lambda checkpoint: cut_off(checkpoint / "optimizer.pt"),
}


@pytest.mark.parametrize("how", UNFINISHED)
def test_unfinished_checkpoints_are_passed_over(how, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    find = runpy.run_path(str(EXAMPLES / "hf_training.py"))["checkpoint_to_resume"]
    whole, newest = f"checkpoint-{NUM_STEPS // 2}", f"checkpoint-{NUM_STEPS}"
    for name in (whole, newest):
        shutil.copytree(trained / name, tmp_path / name)
    assert find(tmp_path) == str(tmp_path / newest)
    UNFINISHED[how](tmp_path / newest)
    assert find(tmp_path) == str(tmp_path / whole)
    assert f"passing over {tmp_path / newest}, which is not whole" in capsys.readouterr().err
    UNFINISHED[how](tmp_path / whole)
    with pytest.raises(SystemExit, match=r"--resume: expected a checkpoint .* none that is whole"):
        find(tmp_path)


def test_resuming_beside_an_unfinished_checkpoint(trained, corpus, tmp_path):
    middle, newest = (f"checkpoint-{steps}" for steps in (NUM_STEPS // 2, NUM_STEPS - 1))
    shutil.copytree(trained / middle, tmp_path / middle)
    shutil.copytree(trained / middle, tmp_path / newest)
    UNFINISHED["all but the state"](tmp_path / newest)
    options = [*SIZES, *TRAINING, "--cpu", "--data", corpus, "--out", tmp_path]
    run_example("train_hf.py", *options, "--resume")
    assert_same_weights(tmp_path, trained)


def assert_same_weights(got_in: Path, wanted_in: Path) -> None:
    got, want = (load_file(out / "model.safetensors") for out in (got_in, wanted_in))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_bitwise(got[name], value, name)


def test_fewer_steps_than_between_log_entries(corpus, tmp_path):
    options = [*SIZES, *TRAINING, "--steps", "3", "--log-every", "25", "--cpu"]
    run_example("train_hf.py", *options, "--data", corpus, "--out", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["tokens_per_second"] > 0 and len(metrics["expert_usage"]) == 2


def test_nothing_to_resume(corpus, tmp_path):
    with pytest.raises(SystemExit, match=r"--resume: expected a checkpoint in .*, found none"):
        options = [*SIZES, *TRAINING, "--cpu", "--data", corpus, "--out", tmp_path]
        run_example("train_hf.py", *options, "--resume")


def test_gpu_settings_are_defaults(trained, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["train_hf.py", "--gpu", "--layers", "3"])
    args = runpy.run_path(str(EXAMPLES / "train_hf.py"))["parse_args"]()
    assert (args.layers, args.hidden, args.seq_len, args.bf16) == (3, 768, 1024, True)


# ---- convert_hf.py -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@on_devices
def test_converting(device, model_type, dense_checkpoint, corpus, tmp_path, capsys):
    options = [*TRAINING, "--layers", "0", "2", "--lr", "1e-3", *device_options(device)]
    checkpoint = dense_checkpoint[model_type]
    run_example("convert_hf.py", checkpoint, *options, "--data", corpus, "--out", tmp_path)
    before = float(capsys.readouterr().out.split("loss before training ")[1].split()[0])
    metrics = check_results(tmp_path)
    assert metrics["held_out_loss"] < before
    model = reload_and_generate(tmp_path)
    assert list(omni_moe_layers(model)) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert all(layer.down_embed.weight.any() for layer in omni_moe_layers(model).values())


def test_resuming_a_conversion(dense_checkpoint, corpus, tmp_path):
    def convert(out, *options):
        arguments = [*TRAINING, "--cpu", *options, "--data", corpus, "--out", out]
        run_example("convert_hf.py", dense_checkpoint["llama"], *arguments)

    convert(tmp_path / "whole")
    middle = f"checkpoint-{NUM_STEPS // 2}"
    shutil.copytree(tmp_path / "whole" / middle, tmp_path / "resumed" / middle)
    convert(tmp_path / "resumed", "--resume")
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "3"], r"convert_hf.py: layers: expected indices in \[0, 3\), got \[3\]"),
        (["--experts", "61"], "convert_hf.py: num_experts: expected a number"),
    ],
    ids=str,
)
def test_wrong_options(options, message, dense_checkpoint, corpus, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run_example("convert_hf.py", dense_checkpoint["llama"], *options, "--data", corpus)


def test_no_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match=r"checkpoint: expected a config.json in .*, found none"):
        run_example("convert_hf.py", tmp_path)
