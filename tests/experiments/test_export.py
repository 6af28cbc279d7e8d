"""The command that exports, on the tiny run."""

import json

import pytest


@pytest.mark.parametrize("to, kind", [("peft-tinylora", "TINYLORA"), ("peft-lora", "LORA")])
def test_a_trained_adapter_is_written(finished, processes, model_folder, tmp_path, to, kind):
    adapter, output = finished.workdir / "adapter", tmp_path / "peft"
    flags = (f"--adapter={adapter}", f"--to={to}", f"--output={output}")
    result = processes.run("export", *flags, f"--model={model_folder}", config=False)
    assert result.code == 0, result.err
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["peft_type"] == kind and len(config["target_modules"]) == 14
    again = processes.run("export", *flags, config=False)
    assert again.code == 1 and "is not empty" in again.err and "Traceback" not in again.err


def test_the_wrong_base_is_one_message(finished, processes, other_model_folder, tmp_path):
    flags = (f"--adapter={finished.workdir / 'adapter'}", "--to=peft-lora", f"--output={tmp_path / 'peft'}")
    result = processes.run("export", *flags, f"--model={other_model_folder}", config=False)
    assert result.code == 1 and "from which this base model differs" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "peft").exists()
