"""Every method but TinyLoRA through the same commands: trained, resumed, saved, evaluated."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import grpo, sft
from experiments.common.closing import run_block
from experiments.common.preemption import Stopped
from experiments.evaluate import run as evaluate_run
from tinylora_jax.adapters import LoRA, LoRAPolicy, Target
from tinylora_jax.io._pretrained import load_pretrained
from tinylora_jax.io._saving import open_trained
from tinylora_jax.io.adapter._file import AdapterError
from tinylora_jax.io.peft._lora import is_lora, read_lora, save_lora
from tinylora_jax.io.peft._tinylora import PeftError
from tinylora_jax.models import forward, logits

# The tiny model has 2 layers of width 32, and maps with 32 + 16 + 16 + 32 + 48 + 48 + 32 outputs; its LoRA has rank 3.
NUM_PARAMS = {"lora_xs": 14 * 4, "lora": None, "full": None, "lora, A frozen": 3 * 2 * 224}
NUM_PARAMS |= {"steering": 2 * 32, "bias": 2 * 224, "norm": 5 * 32}


def configured(config, method):
    config.method, config.lora.rank, config.max_steps = method.split(",")[0], 3, 3
    config.lora.freeze_a = "frozen" in method
    config.optimizer.learning_rate = {"full": 1e-3, "lora": 1e-2}.get(config.method, 5e-2)
    return config


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("steering", "norm")]  # offsets, as `bias`


@pytest.fixture(scope="module", params=["lora_xs", "lora", "full", "lora, A frozen", "bias", *SLOW])
def trained(request, make_config, stop, tmp_path_factory):
    config = configured(make_config(), request.param)
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, config, workdir, grpo.run(config, workdir, stop)


def test_what_is_saved_is_what_was_trained(trained):
    method, config, workdir, summary = trained
    opened = open_trained(workdir / "adapter")
    count = sum(x.size for x in jax.tree.leaves(opened.v))
    assert summary["params"] == count == (NUM_PARAMS[method] or count) and count > 8
    base = load_pretrained(config.model, "float32")
    policy, start = opened.policy(base.params, "auto"), opened.policy(base.params, "auto").init()
    run = jax.jit(lambda params: forward(base.config, params, jnp.arange(12).reshape(2, 6))[0])
    assert np.abs(run(policy(opened.v)) - run(base.params)).max() > 1e-4
    assert jax.tree.structure(start) == jax.tree.structure(opened.v)
    result, _ = evaluate_run(config, workdir / "adapter")
    assert all(result[name] == summary["eval_after"][name] for name in ("strict", "lenient", "mean_tokens"))


def test_an_interrupted_run_continues_to_the_same_bits(trained, stop, tmp_path):
    _, config, workdir, whole = trained

    with pytest.raises(Stopped):
        grpo.run(config, tmp_path / "parts", type(stop)(4))
    again = grpo.run(config, tmp_path / "parts", stop)
    assert again["eval_after"] == whole["eval_after"]
    ours, theirs = (open_trained(path / "adapter").v for path in (tmp_path / "parts", workdir))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_another_base_model_is_refused(trained, other_model_folder):
    method, _, workdir, _ = trained
    if method == "full":
        pytest.skip("a model folder needs no base model's weights")
    opened, other = open_trained(workdir / "adapter"), load_pretrained(str(other_model_folder), "float32")
    with pytest.raises(AdapterError):
        opened.policy(other.params, "auto")


def test_checkpoints_may_be_rare(config, stop, tmp_path):
    config = configured(config, "lora")
    config.checkpoint_every, config.max_steps = 2, 5
    grpo.run(config, tmp_path / "run", stop)
    steps = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()}
    assert steps == {4, 5}


@pytest.mark.parametrize("method", ["full", "lora, A frozen", "bias", *SLOW])
def test_sft_trains_them_too(config, stop, tmp_path, method):
    config = configured(config, method)
    config.max_new_tokens, config.reward = 24, "hash"
    sft.run(config, tmp_path / "run", stop)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def lora_folder(model_folder, tmp_path_factory):
    """A LoRA adapter of the tiny model with both matrices filled, its folder and v."""
    model = load_pretrained(str(model_folder), "float32")
    policy = LoRAPolicy(model.params, LoRA(rank=3, alpha=5.0))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    v = jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), policy.init())
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    save_lora(folder, policy.spec, v, str(model_folder))
    return folder, model, policy, v


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT uses a name that is deprecated
def test_peft_loads_it_with_equal_logits(lora_folder, model_folder):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, model, policy, v = lora_folder
    tokens = np.arange(1, 13).reshape(2, 6) % 90
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    run = lambda params: logits(model.config, params, forward(model.config, params, jnp.asarray(tokens, jnp.int32))[0])
    np.testing.assert_allclose(run(policy(v)), expected, atol=1e-4)
    assert np.abs(run(model.params) - expected).max() > 1e-2


def test_a_folder_comes_back(lora_folder):
    folder, model, policy, v = lora_folder
    assert is_lora(folder)
    read = read_lora(folder)
    jax.tree.map(np.testing.assert_array_equal, read.v, v)
    assert (read.spec.rank, read.spec.alpha) == (3, 5.0)
    again = read.policy(model.params)
    jax.tree.map(np.testing.assert_array_equal, again.merged(read.v), policy.merged(v))


def spoil_config(**fields):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def spoil_tensors(change):
    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_config(r=0), "r=0, expected an integer from 1"),
        (spoil_config(r=True), "r=True, expected an integer"),
        (spoil_config(r=4), "expected rank 4 on axis"),
        (spoil_config(lora_alpha="x"), "lora_alpha='x', expected a number"),
        (spoil_config(use_dora=True), "use_dora set; only plain LoRA"),
        (spoil_config(bias="all"), "bias set; only plain LoRA"),
        (spoil_config(base_model_name_or_path=3), "expected a name or null"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing"),
        (spoil_tensors(lambda t: {n: x for n, x in t.items() if n != FIRST}), "no pair of lora_A and lora_B"),
        (spoil_tensors(lambda t: t | {FIRST: np.full_like(t[FIRST], np.nan)}), "not finite"),
        (spoil_tensors(lambda t: t | {"lm_head.weight": t[FIRST]}), "contains lm_head.weight, expected only LoRA"),
    ],
)
def test_damaged_folders(lora_folder, tmp_path, spoil, message):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in lora_folder[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder)
    with pytest.raises(PeftError, match=message):
        read_lora(folder)


def test_a_lora_of_other_shapes(lora_folder):
    folder, model, _, _ = lora_folder
    smaller = {**model.params, "layers": {0: model.params["layers"][0]}} if 0 in model.params["layers"] else None
    if smaller is None:
        smaller = {**model.params, "layers": {"0": model.params["layers"]["0"]}}
    with pytest.raises(PeftError, match="the base model has no such weight"):
        read_lora(folder).policy(smaller)


def test_only_linear_maps_of_blocks_are_written(model_folder, tmp_path):
    model = load_pretrained(str(model_folder), "float32")
    spec = LoRA(rank=1, targets=(Target("lm_head/kernel"),))
    with pytest.raises(PeftError, match="not one of the linear maps"):
        save_lora(tmp_path / "adapter", spec, LoRAPolicy(model.params, spec).init(), "base")


def test_a_method_that_means_nothing(config, stop, tmp_path):
    config.method = "lorax"
    with pytest.raises(ValueError, match="config.method='lorax': expected 'tinylora' or 'lora_xs' or 'lora' or 'full'"):
        grpo.run(config, tmp_path / "run", stop)


def test_the_ending_names_no_command_that_refuses_the_adapter(trained):
    method, _, workdir, summary = trained
    text = run_block(summary, workdir, ["--config=demo"], None)
    alone = method.split(",")[0] in ("lora", "full")
    for command in ("experiments.generate", "experiments.export"):
        assert (command in text) != alone
    assert "experiments.report" in text or "experiments.evaluate" in text


def test_a_steering_vector_is_refused_in_the_middle_of_a_layer(config, stop, tmp_path):
    """Else it would be a bias: each layer has seven maps, of which one gives the output of the layer."""
    config.method, config.targets = "steering", "layers/1/.*/kernel"
    with pytest.raises(ValueError, match="layers/1/mlp/gate_proj/kernel is not the output of a layer"):
        grpo.run(config, tmp_path / "run", stop, dry_run=True)
    config.targets = "layers/1/.*down_proj/kernel"
    grpo.run(config, tmp_path / "run", stop, dry_run=True)
