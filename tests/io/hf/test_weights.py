import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.io.hf._hub import fetch_folder, open_tensors, read_json, stop_ids
from tinylora_jax.io.hf._weights import LazyTensor, build_tree, parameter_names, reading_tree

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
}


def _model(family: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    prefix, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **extra)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    for parameter in model.parameters():  # transformers starts norms at one and biases at zero
        torch.nn.init.normal_(parameter)
    return model.to(dtype)


def _load(folder, dtype=jnp.float32):
    config = parse_config(read_json(folder / "config.json"))
    with open_tensors(folder) as tensors:
        return config, build_tree(config, tensors, dtype)


def _write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    _model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((saved / file).read_bytes())
    return tmp_path


@pytest.mark.parametrize("shard", ["1GB", "8KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_holds_the_numbers_of_transformers(family, dtype, shard, tmp_path):
    model = _model(family, getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "8KB")
    config, tree = _load(tmp_path, jnp.dtype(dtype))
    state = dict(model.state_dict())
    if config.tie_embeddings:
        del state["lm_head.weight"]
    names = parameter_names(config)
    assert set(names) == set(state)
    assert len(jax.tree.leaves(tree)) == len(names)
    for name, (path, shape) in names.items():
        leaf = tree
        for key in path:
            leaf = leaf[key]
        expected = state[name].float().numpy()
        assert leaf.shape == shape and leaf.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(
            np.asarray(leaf, np.float32), expected.T if path[-1] == "kernel" else expected, err_msg=name
        )


def test_dtype_is_converted_with_rounding_to_nearest(saved):
    _, exact = _load(saved)
    _, rounded = _load(saved, jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), exact, rounded)


def test_all_mismatches_are_named_at_once(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((3, 5), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        _load(folder)
    message = str(error.value)
    assert "model.norm.weight: missing, expected (32,)" in message
    assert "model.layers.1.mlp.up_proj.weight: missing, expected (40, 32)" in message
    assert "model.layers.0.self_attn.k_proj.weight: expected (16, 32), got (3, 5)" in message
    assert "model.layers.0.self_attn.q_proj.bias: unexpected" in message
    assert "inv_freq" not in message


def test_nothing_is_read_before_all_shapes_are_checked():
    config = parse_config({"model_type": "llama", **SIZES})

    def read() -> np.ndarray:
        raise AssertionError("read too early")

    tensors = {name: LazyTensor((1,), read) for name in parameter_names(config)}
    with pytest.raises(ValueError, match="21 of the wrong shape"):
        build_tree(config, tensors, jnp.float32)


def test_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    _model("qwen2-tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "lm_head" not in _load(tmp_path)[1]
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        _load(tmp_path)


def test_integer_tensors_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight has dtype I8"):
        _load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 0.5, 0.999, 1.001])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int(keep * len(raw)) if isinstance(keep, float) else keep
    path.write_bytes(raw[:size] if size <= len(raw) else raw + b"more")
    with pytest.raises(ValueError, match=r"model\.safetensors.*expected.*got.*download it again"):
        _load(folder)


def test_corrupt_safetensors_header(folder):
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:12] = b"\xff[[["
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="header does not parse"):
        _load(folder)


def test_a_header_that_is_too_long_is_not_read(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)  # a hole: it takes no room
    with pytest.raises(ValueError, match="the header has 1073741824 bytes, expected at most 16777216"):
        _load(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_too_long_is_not_read(folder, file):
    if file != "config.json":
        (folder / "model.safetensors").unlink()
        (folder / file).touch()
    os.truncate(folder / file, 2**40)
    with pytest.raises(ValueError, match=f"{file}: expected a JSON file of at most 16777216 bytes, got 1099511627776"):
        _load(folder)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "x.bin", "", 3])
def test_index_may_not_leave_the_folder(folder, file):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    _write_index(folder, {"model.norm.weight": file})
    with pytest.raises(ValueError, match="in the same folder for model.norm.weight"):
        _load(folder)


def test_index_names_an_absent_file(folder):
    (folder / "model.safetensors").unlink()
    _write_index(folder, {"a": "gone.safetensors"})
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        _load(folder)


def test_index_places_a_tensor_where_it_is_not(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    _write_index(folder, {"absent": "part.safetensors"})
    with pytest.raises(ValueError, match="places absent in part.safetensors"):
        _load(folder)


def test_pickles_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle, which is never loaded"):
        _load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\ufeff"])
def test_damaged_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object"):
        read_json(tmp_path / "config.json")


def test_missing_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")


def test_fetch_names_the_id_and_suggests_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("tinylora_jax.io.hf._hub.snapshot_download", _offline)
    with pytest.raises(FileNotFoundError, match="nobody/nothing.*local folder"):
        fetch_folder("nobody/nothing")


def _offline(*_args, **_options):
    raise ConnectionError("Name or service not known")


@pytest.mark.parametrize("source", ["/no/such/folder", "./here", "a/b/c", "a/..", ""])
def test_what_is_no_hub_id_is_not_asked_for(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a model"):
        fetch_folder(source)


def test_fetch_takes_only_data_files(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        "tinylora_jax.io.hf._hub.snapshot_download",
        lambda source, **options: asked.update(options, source=source) or str(tmp_path),
    )
    assert fetch_folder("someone/model") == tmp_path
    assert asked["source"] == "someone/model"
    assert not any("bin" in pattern or pattern.endswith((".py", ".pt", "*")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("value, expected", [(2, (2,)), ([3, 4], (3, 4)), (None, ())])
def test_stop_ids(tmp_path, value, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert stop_ids(tmp_path) == expected


def test_malformed_stop_ids(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id"):
        stop_ids(tmp_path)


def test_reading_stops_where_it_is_left():
    config = parse_config({"model_type": "llama", **SIZES, "num_hidden_layers": 40})
    reads = []

    def lazy(shape):
        return LazyTensor(shape, lambda: reads.append(shape) or time.sleep(0.02) or np.zeros(shape, np.float32))

    names = parameter_names(config)
    tensors = {name: lazy(shape[::-1] if path[-1] == "kernel" else shape) for name, (path, shape) in names.items()}
    with pytest.raises(KeyboardInterrupt), reading_tree(config, tensors, jnp.float32) as reading:
        reading.check()
        raise KeyboardInterrupt
    assert len(reads) < len(names) // 2
