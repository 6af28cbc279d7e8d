"""The command that exports, on the tiny run."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import TinyLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import evaluate, export
from tinylora_jax.adapters import merge
from tinylora_jax.io._pretrained import load_pretrained
from tinylora_jax.io._trained import open_adapter
from tinylora_jax.io.hf._safetensors import open_safetensors


@pytest.fixture(scope="module")
def adapter(finished):
    return finished.workdir / "adapter"


@pytest.fixture(scope="module")
def peft(adapter, tmp_path_factory, model_folder):
    """The run's adapter as PEFT's TinyLoRA."""
    folder = tmp_path_factory.mktemp("exported") / "peft"
    export.export(adapter, "peft-tinylora", folder, str(model_folder))
    return folder


def test_a_trained_adapter_is_written(adapter, processes, model_folder, tmp_path):
    output = tmp_path / "lora"
    flags = (f"--adapter={adapter}", "--to=peft-lora", f"--output={output}", f"--model={model_folder}")
    result = processes.run("export", *flags, config=False)
    assert result.code == 0, result.err
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and len(config["target_modules"]) == 14
    again = processes.run("export", *flags, config=False)
    assert again.code == 1 and "is not empty" in again.err and "Traceback" not in again.err


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(adapter, processes, model_folder, tmp_path):
    flags = (f"--adapter={adapter}", "--to=merged", f"--output={tmp_path / 'a' / 'b'}", f"--model={model_folder}")
    result = processes.run("export", *flags, config=False, file_kib=40)
    assert result.code == 1 and "Traceback" not in result.err, result.err
    assert "model.safetensors: File too large; free space" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["adapter", "peft"])
def test_merged_weights_are_those_of_the_adapter(form, request, model_folder, adapter, tmp_path):
    export.export(request.getfixturevalue(form), "merged", tmp_path / "merged", str(model_folder))
    base = load_pretrained(str(model_folder), jnp.float32)
    trained = open_adapter(adapter)
    expected = merge(base.params, trained.factors(base.params, "auto"), trained.v)
    found = load_pretrained(str(tmp_path / "merged"), jnp.float32)
    tolerance = 0 if form == "adapter" else 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), found.params, expected)
    assert found.stop_tokens == base.stop_tokens and found.config == base.config
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    kernel = theirs.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(kernel.T, found.params["layers"][1]["self_attn"]["q_proj"]["kernel"])
    text = "What is 3 + 12?"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text)["input_ids"] == base.tokenizer(text)["input_ids"]


def test_a_peft_folder_is_evaluated_as_the_adapter_is(adapter, peft, config):
    results = [evaluate.run(config, folder) for folder in (adapter, peft, None)]
    answers = [[row["completion"] for row in rows] for _, rows in results]
    assert answers[0] == answers[1] != answers[2]


def test_a_peft_folder_goes_out_in_any_form(peft, model_folder, tmp_path):
    for to in ("peft-tinylora", "peft-lora"):
        export.export(peft, to, tmp_path / to, str(model_folder))
    files = [folder / "adapter_model.safetensors" for folder in (peft, tmp_path / "peft-tinylora")]
    with open_safetensors(files[0]) as first, open_safetensors(files[1]) as second:
        assert set(first) == set(second)
        for name, tensor in first.items():
            np.testing.assert_array_equal(tensor.read(), second[name].read(), err_msg=name)
    config = json.loads((tmp_path / "peft-lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2


@pytest.fixture(scope="module")
def theirs(model_folder, tmp_path_factory):
    """A TinyLoRA folder that PEFT itself saved, with P of its own."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, TinyLoraConfig(r=2, u=3, weight_tying=0.6, target_modules=targets))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "tinylora_v" in name:
            parameter.data.normal_()
    folder = tmp_path_factory.mktemp("saved") / "theirs"
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_peft_folder_becomes_one_of_ours(theirs, adapter, config, model_folder, processes, tmp_path):
    ours = tmp_path / "ours"
    result = processes.run("export", f"--adapter={theirs}", "--to=tinylora", f"--output={ours}", config=False)
    assert result.code == 0, result.err
    assert {path.name for path in ours.iterdir()} == {"adapter.json", "vector.bin", "factors.safetensors"}
    directions = (
        4 * 2 * (32 + 48 + 1) + 3 * 150
    )  # of a module whose weight gives PEFT's back less well, if there is one
    assert (ours / "factors.safetensors").stat().st_size < 14 * (3 * 4 * 4 + 150) + directions, "else P alone"
    answers = [[row["completion"] for row in evaluate.run(config, folder)[1]] for folder in (theirs, ours, None)]
    assert answers[0] == answers[1] != answers[2]
    tensors = {}
    for source in (theirs, ours):
        export.export(source, "merged", tmp_path / f"merged-{source.name}")
        tensors[source] = load_pretrained(str(tmp_path / f"merged-{source.name}"), jnp.float32).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), *tensors.values())
    for to in ("tinylora", "peft-tinylora", "peft-lora"):
        export.export(ours, to, tmp_path / to)
    for name in ("vector.bin", "factors.safetensors"):
        assert (tmp_path / "tinylora" / name).read_bytes() == (ours / name).read_bytes()


def test_an_export_to_peft_comes_back_as_the_same_few_numbers(adapter, model_folder, tmp_path):
    export.export(adapter, "peft-tinylora", tmp_path / "peft", str(model_folder))
    export.export(tmp_path / "peft", "tinylora", tmp_path / "back", str(model_folder))
    assert (tmp_path / "back" / "vector.bin").read_bytes() == (adapter / "vector.bin").read_bytes()
    described = lambda folder: json.loads((folder / "adapter.json").read_text())
    ours, back = described(adapter), described(tmp_path / "back")
    assert all(back[name] == ours[name] for name in ("spec", "shape", "factors"))
    by_path = lambda description: sorted(description["leaves"], key=lambda leaf: leaf["path"])
    assert by_path(back) == by_path(ours)
    export.export(tmp_path / "back", "peft-lora", tmp_path / "lora", str(model_folder))  # so it can be read
    assert (tmp_path / "back" / "factors.safetensors").exists() == (adapter / "factors.safetensors").exists()


def test_our_own_folder_is_written_anew(adapter, model_folder, tmp_path, capsys):
    export.export(adapter, "tinylora", tmp_path / "same", str(model_folder))
    assert (tmp_path / "same" / "vector.bin").read_bytes() == (adapter / "vector.bin").read_bytes()
    about = lambda folder: json.loads((folder / "adapter.json").read_text())["about"]
    assert about(tmp_path / "same") == about(adapter) and about(adapter)["config"]["template"] == "arithmetic"
    assert open_adapter(adapter).template == "arithmetic"
    export.export(adapter, "tinylora", tmp_path / "short", str(model_folder), "bfloat16")
    assert (tmp_path / "short" / "vector.bin").stat().st_size * 2 == (adapter / "vector.bin").stat().st_size
    assert "rounding to bfloat16 changes the vector by" in capsys.readouterr().err


def test_a_dtype_that_a_form_does_not_have_is_refused(adapter, model_folder, tmp_path):
    for form in ("peft-lora", "peft-tinylora"):
        with pytest.raises(ValueError, match=f"--dtype=bfloat16: {form} is always float32"):
            export.export(adapter, form, tmp_path / "out", str(model_folder), "bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_what_bfloat16_loses_is_told(adapter, model_folder, tmp_path, capsys):
    export.export(adapter, "merged", tmp_path / "merged", str(model_folder), "bfloat16")
    assert "warning: rounding to bfloat16 has an error of" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype.itemsize == 2


def nameless(adapter, place):
    folder = shutil.copytree(adapter, place / "nameless")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    return folder


REFUSED = {
    "another base": lambda x: (x.adapter, x.place / "out", x.other, "but this base model differs"),
    "another base of PEFT's": lambda x: (
        x.peft,
        x.place / "out",
        x.other,
        "singular directions differ from this model's",
    ),
    "no adapter": lambda x: (x.place / "none", x.place / "out", x.model, "none/adapter.json is missing"),
    "a model for an adapter": lambda x: (x.model, x.place / "out", x.model, "adapter.json is missing"),
    "no model": lambda x: (x.adapter, x.place / "out", "/no/such/model", "is not a model"),
    "no name": lambda x: (
        nameless(x.peft, x.place),
        x.place / "out",
        None,
        "name its base model; set --model",
    ),
    "into the adapter": lambda x: (x.adapter, x.adapter / "out", x.model, "is inside the adapter's folder"),
    "onto the adapter": lambda x: (
        x.adapter,
        x.adapter / "." / "x" / "..",
        x.model,
        "is inside the adapter's folder",
    ),
    "below a file": lambda x: (x.adapter, x.adapter / "vector.bin" / "x", x.model, "is inside the adapter's folder"),
    "below nothing": lambda x: (x.adapter, x.place / "link" / "out", x.model, "cannot create a folder in"),
    "onto the model": lambda x: (x.adapter, x.model, x.model, "is not empty"),
}


@pytest.mark.parametrize("to", ["merged", "peft-lora", "tinylora"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_one_error(case, to, adapter, peft, model_folder, other_model_folder, tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    models = {"model": model_folder, "other": other_model_folder}
    source, output, model, expected = REFUSED[case](
        SimpleNamespace(adapter=adapter, peft=peft, place=tmp_path, **models)
    )
    before = sorted(adapter.parent.rglob("*")), sorted(model_folder.rglob("*"))
    with pytest.raises((ValueError, OSError), match=expected):
        export.export(source, to, output, model and str(model))
    assert (sorted(adapter.parent.rglob("*")), sorted(model_folder.rglob("*"))) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"link", "nameless"}


@pytest.mark.parametrize("to", ["merged", "peft-tinylora"])
def test_the_next_command_asks_in_the_template_of_the_training(to, tmp_path):
    (_, command), *_ = export.next_commands(to, tmp_path, "arithmetic")
    assert command[-1] == "--template=arithmetic" and str(tmp_path) in command[-2]
    assert not any(word.startswith("--template") for word in export.next_commands(to, tmp_path, None)[0][1])
