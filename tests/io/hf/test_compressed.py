"""Models in the format compressed-tensors: integers unchanged, the same logits, and one error for all else."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[2]))

from compressed_files import compress, describe, pack, write  # noqa: E402

from tinylora_jax import TinyLoRA, factorize  # noqa: E402
from tinylora_jax.adapters import Full, adapt, exact, leaves_by_path, scheme_of  # noqa: E402
from tinylora_jax.adapters.targets import map_by_path  # noqa: E402
from tinylora_jax.io import load_pretrained, open_pretrained  # noqa: E402
from tinylora_jax.io.adapter import base_fingerprint  # noqa: E402
from tinylora_jax.io.hf import parse_config  # noqa: E402
from tinylora_jax.io.hf._compressed import unpack  # noqa: E402
from tinylora_jax.models import forward, logits  # noqa: E402

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 44,  # not a multiple of the eight int4 of a word
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FORMS = [(8, "pack-quantized"), (4, "pack-quantized"), (8, "int-quantized"), (8, "naive-quantized")]
TOKENS = np.random.default_rng(0).integers(5, 40, (2, 16))


def write_model(folder, family, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # transformers starts norms at one and biases at zero
        if "proj.weight" not in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["a", "b", "ab", "<eos>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folders in float32, by family."""
    root = tmp_path_factory.mktemp("plain")
    tied = {"Qwen2": {"tie_word_embeddings": True}}
    return {family: write_model(root / family, family, **tied.get(family, {})) for family in ("Qwen2", "Llama")}


def ours(params, config):
    return np.asarray(logits(config, params, forward(config, params, jnp.asarray(TOKENS, jnp.int32))[0]))


def test_packing_is_that_of_the_package():
    """The words are those of `pack_to_int32` of compressed-tensors 0.20."""
    int8 = np.array([[-128, -1, 0, 1, 127], [5, -7, 100, -100, 2]], np.int8)
    int4 = np.array([[-8, -1, 0, 1, 7, 3, -3, 2, -5, 4], [1, 2, 3, 4, 5, 6, 7, -8, -7, -6]], np.int8)
    words8 = np.array([[-2122285312, 255], [484735365, 130]], np.int32)
    words4 = np.array([[-1514170256, 195], [267242409, 33]], np.int32)
    for bits, values, words in ((8, int8, words8), (4, int4, words4)):
        np.testing.assert_array_equal(pack(values, bits), words)
        np.testing.assert_array_equal(unpack(words, bits, values.shape[1]), values)


@pytest.mark.parametrize("bits, form", FORMS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_integers_and_scales_are_the_file_s(plain, tmp_path, bits, form, dtype):
    stored = compress(plain["Qwen2"], tmp_path / "q", bits, form, dtype, shards=2)
    model = load_pretrained(str(tmp_path / "q"), jnp.bfloat16)
    assert scheme_of(model.params) == f"int{bits}"
    before, found = leaves_by_path(load_pretrained(str(plain["Qwen2"]), jnp.bfloat16).params), 0
    for path, leaf in leaves_by_path(model.params).items():
        if not (path.startswith("layers") and path.endswith("kernel")):
            np.testing.assert_array_equal(leaf, before[path])
            continue
        values, scale = stored["model." + path.removesuffix("/kernel").replace("/", ".")]
        np.testing.assert_array_equal(np.asarray(leaf.values).astype(np.int8), values.T)
        np.testing.assert_array_equal(leaf.scale, scale.astype(np.float32).T)
        assert leaf.values.dtype == f"int{bits}" and leaf.dtype == jnp.bfloat16
        assert (leaf.inputs is None) == (bits == 8) and (bits == 8 or (np.asarray(leaf.inputs) == 1).all())
        found += 1
    assert found == len(stored) == 14
    again = load_pretrained(str(tmp_path / "q"), jnp.bfloat16, quantize=f"int{bits}").params
    jax.tree.map(np.testing.assert_array_equal, again, model.params)
    shapes = open_pretrained(str(tmp_path / "q"), jnp.bfloat16).abstract.params
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), again)


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
@pytest.mark.parametrize("bits, form", FORMS[:3])
def test_logits_are_those_of_the_dequantized_copy_in_transformers(plain, tmp_path, family, bits, form):
    stored = compress(plain[family], tmp_path / "q", bits, form)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(plain[family], dtype=torch.float32)
    with torch.no_grad():
        for name, (values, scale) in stored.items():
            oracle.get_submodule(name).weight.copy_(torch.tensor(values * scale.astype(np.float32)))
        expected = oracle(torch.tensor(TOKENS)).logits.numpy()
    model = load_pretrained(str(tmp_path / "q"), jnp.float32)
    np.testing.assert_allclose(ours(model.params, model.config), expected, atol=2e-5 * np.abs(expected).max())


def test_factors_and_the_fingerprint_are_of_the_dequantized_weight(plain, tmp_path):
    compress(plain["Llama"], tmp_path / "q", 8)
    params = load_pretrained(str(tmp_path / "q"), jnp.float32).params
    spec = TinyLoRA(u=2, n_tie=4)
    dequantized = map_by_path(lambda _, leaf: exact(leaf), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        *(factorize(tree, spec, "exact").leaves for tree in (params, dequantized)),
    )
    found, plainly = base_fingerprint(params), base_fingerprint(dequantized)
    assert found["quantize"] == "int8" and "quantize" not in plainly
    for path, row in plainly["weights"].items():
        np.testing.assert_allclose(found["weights"][path], row, atol=1e-6 * row[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_package_agrees(plain, tmp_path, bits):
    """Its own quantization, folder and dequantized weights; `pip install compressed-tensors`."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = transformers.AutoModelForCausalLM.from_pretrained(plain["Llama"], dtype=torch.bfloat16)
    given = describe(bits) | {"quantization_status": "frozen"}
    known = {name: value for name, value in given.items() if name in QuantizationConfig.model_fields}
    apply_quantization_config(model, QuantizationConfig(**known))
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            largest = module.weight.detach().abs().amax(dim=1, keepdim=True)
            module.weight_scale.data.copy_(largest / (2 ** (bits - 1) - 0.5))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "q")
    compressor.update_config(str(tmp_path / "q"))
    for file in plain["Llama"].glob("tokenizer*"):
        (tmp_path / "q" / file.name).write_bytes(file.read_bytes())
    assert "model.layers.0.mlp.up_proj.weight_packed" in load_file(tmp_path / "q" / "model.safetensors")
    found = load_pretrained(str(tmp_path / "q"), jnp.bfloat16).params
    compressor.decompress_model(model)
    for path, leaf in leaves_by_path(found).items():
        if path.startswith("layers") and path.endswith("kernel"):
            theirs = model.get_submodule("model." + path.removesuffix("/kernel").replace("/", ".")).weight
            rounded = np.asarray(exact(leaf)).astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(rounded.T, theirs.detach().float().numpy())


def test_another_storage_is_refused_when_asked_for(plain, tmp_path):
    compress(plain["Llama"], tmp_path / "q", 8)
    with pytest.raises(ValueError, match="are quantized in int8, but quantize='int4' is requested; omit it to use"):
        open_pretrained(str(tmp_path / "q"), quantize="int4")


def test_weights_that_are_trained_cannot_be_quantized(plain, tmp_path):
    compress(plain["Llama"], tmp_path / "q", 8)
    with pytest.raises(ValueError, match="trains the weights, but they are quantized in int8; load the original"):
        adapt(load_pretrained(str(tmp_path / "q")).params, Full())


def test_int4_needs_an_even_number_of_inputs(tmp_path):
    compress(write_model(tmp_path / "odd", "Llama", intermediate_size=45), tmp_path / "q", 4)
    with pytest.raises(ValueError, match="int4 needs an even number of inputs.*got 45; load the original model"):
        open_pretrained(str(tmp_path / "q"))


GROUP = ("config_groups", "group_0")
ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
REFUSED = {
    "another method": (("quant_method",), "gptq", "weights quantized by 'gptq'"),
    "groups": ((*GROUP, "weights"), describe(8, strategy="group", group_size=128), "strategy='group', group_size=128"),
    "one scale": ((*GROUP, "weights"), describe(8, strategy="tensor"), "strategy='tensor'"),
    "blocks": ((*GROUP, "weights"), describe(8, strategy="block", block_structure=[128, 128]), "block_structure"),
    "no strategy": ((*GROUP, "weights"), describe(8, strategy=None), "strategy=None"),
    "zero points": ((*GROUP, "weights"), describe(4, symmetric=False), "symmetric=False is not supported"),
    "fp8": ((*GROUP, "weights"), describe(8, type="float"), "type='float' is not supported"),
    "six bits": ((*GROUP, "weights"), describe(6), "num_bits=6 is not supported; expected 8 or 4"),
    "a list of bits": ((*GROUP, "weights"), describe([8]), r"num_bits=\[8\]"),
    "order": ((*GROUP, "weights"), describe(8, actorder="group"), "actorder='group' is not supported"),
    "dynamic": ((*GROUP, "weights"), describe(8, dynamic=True), "dynamic=True"),
    "a new field": ((*GROUP, "weights"), describe(8, outliers=3), "outliers=3 is not a known field"),
    "no scheme": ((*GROUP, "weights"), None, "weights: expected an object, got None"),
    "activations": ((*GROUP, "input_activations"), ACTIVATIONS, "input_activations=.* is not supported"),
    "outputs": ((*GROUP, "output_activations"), ACTIVATIONS, "output_activations=.* is not supported"),
    "other targets": ((*GROUP, "targets"), ["re:.*q_proj"], "targets=.* is not supported"),
    "a part's format": ((*GROUP, "format"), "int-quantized", "format='int-quantized' is not supported"),
    "no group": (("config_groups",), {}, "config_groups=.*expected one group"),
    "two groups": (("config_groups",), {"a": {}, "b": {}}, "config_groups=.*expected one group"),
    "a preset": (("config_groups",), {"W8A16": ["Linear"]}, "config_groups=.*expected one group"),
    "a cache": (("kv_cache_scheme",), ACTIVATIONS, "kv_cache_scheme=.* is not supported"),
    "sparsity": (("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config=.* is not supported"),
    "rotations": (("transform_config",), {"config_groups": {"u": {}}}, "transform_config=.* is not supported"),
    "marlin": (("format",), "marlin-24", "format='marlin-24' is not supported; expected one of pack-quantized"),
    "dense": (("format",), "dense", "format='dense' is not supported"),
    "the head": (("ignore",), [], r"ignore=\[\]: expected \['lm_head'\]"),
    "a part in 16 bit": (("ignore",), ["lm_head", "model.layers.0.mlp.up_proj"], "ignore=.*only the blocks"),
    "a pattern": (("ignore",), ["re:(a+)+lm_head"], "ignore=.*only the blocks"),
    "not compressed yet": (("quantization_status",), "initialized", "quantization_status='initialized'"),
    "what is new": (("lookup_table",), [1], "lookup_table=.* is not a known field"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_map_exactly_is_refused_by_name(case):
    path, value, message = REFUSED[case]
    config = describe(8)
    place = config
    for key in path[:-1]:
        place = place[key]
    whole = path[-1] == "weights" and value is not None
    place[path[-1]] = value["config_groups"]["group_0"]["weights"] if whole else value
    with pytest.raises(ValueError, match=message) as error:
        parse_config({"model_type": "llama", "quantization_config": config})
    assert "load the original model, and set quantize='int8'" in str(error.value)


def test_int4_is_only_read_packed():
    with pytest.raises(ValueError, match="format='int-quantized' with 4 bits is not supported; expected 'pack-quant"):
        parse_config({"model_type": "llama", "quantization_config": describe(4, "int-quantized")})


@pytest.mark.parametrize("ignored", [["lm_head"], ["re:.*lm_head"], ["re:.*lm_head.*", "lm_head"], ["re:^lm_head$"]])
@pytest.mark.parametrize(
    "scheme", [{}, {"actorder": "static"}, {"strategy": None, "group_size": -1}, {"group_size": -1, "actorder": False}]
)
def test_other_spellings_of_the_same_are_read(ignored, scheme):
    config = describe(8, **scheme) | {"ignore": ignored, "sparsity_config": {"format": "dense"}}
    config["quantization_status"] = "frozen"
    parse_config({"model_type": "llama", "quantization_config": config})


UP = "model.layers.1.mlp.up_proj.weight"


def without(name):
    return lambda tensors: tensors.pop(UP + name)


def changed(name, edit):
    def change(tensors):
        tensors[UP + name] = edit(tensors[UP + name])

    return change


def with_scale(value):
    return changed("_scale", lambda s: np.where(np.arange(len(s))[:, None] == 5, np.asarray(value, s.dtype), s))


DAMAGED = {
    "too few words": (changed("_packed", lambda x: x[:, :-1].copy()), r"up_proj.weight_packed: expected the shape"),
    "other words": (changed("_packed", lambda x: x.astype(np.int64)), "weight_packed: expected I32, got I64"),
    "no words": (without("_packed"), r"up_proj.weight_packed: missing, expected \(44, 8\)"),
    "no scale": (without("_scale"), r"up_proj.weight_scale: missing, expected \(44, 1\)"),
    "no shape": (without("_shape"), r"up_proj.weight_shape: missing"),
    "scales of groups": (
        changed("_scale", lambda x: np.tile(x, (1, 2))),
        r"weight_scale: expected the shape \(44, 1\)",
    ),
    "scales in float64": (
        changed("_scale", lambda x: x.astype(np.float64)),
        "weight_scale: expected F16 or .*, got F64",
    ),
    "a scale of zero": (with_scale(0), "1 scales are not positive and finite, such as 0.0 in row 5"),
    "a negative scale": (with_scale(-1), "such as -1.0 in row 5"),
    "a scale of NaN": (with_scale(np.nan), "such as nan in row 5"),
    "an infinite scale": (with_scale(np.inf), "such as inf in row 5"),
    "another shape": (
        changed("_shape", lambda x: x[::-1].copy()),
        r"weight_shape: expected \[44, 32\] .*got \[32, 44\]",
    ),
    "zero points": (
        lambda t: t.update({UP + "_zero_point": np.zeros((44, 1), np.int8)}),
        "weight_zero_point: unexpected",
    ),
    "an order": (lambda t: t.update({UP + "_g_idx": np.zeros(32, np.int32)}), "weight_g_idx: unexpected"),
    "a head": (
        lambda t: t.update({"lm_head.weight_scale": np.ones((40, 1), np.float32)}),
        "lm_head.weight_scale: unexp",
    ),
    "an embedding in int8": (
        lambda t: t.update({"model.embed_tokens.weight": np.ones((40, 32), np.int8)}),
        "model.embed_tokens.weight: expected floating-point numbers, got I8",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_error_before_integers_are_read(plain, tmp_path, monkeypatch, case):
    compress(plain["Llama"], tmp_path / "q", 8)
    damage, message = DAMAGED[case]
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    damage(tensors)
    write(tmp_path / "q", tensors)
    monkeypatch.setattr("tinylora_jax.io.hf._compressed.unpack", lambda *_: pytest.fail("integers were read"))
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(str(tmp_path / "q"))
    assert re.match(re.escape(str(tmp_path / "q")), str(error.value))


def test_weights_that_are_not_integers_are_refused(plain, tmp_path):
    compress(plain["Llama"], tmp_path / "q", 8, "int-quantized")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    write(tmp_path / "q", tensors | {UP: tensors[UP].astype(np.float32)})
    with pytest.raises(ValueError, match="up_proj.weight: expected I8, got F32"):
        load_pretrained(str(tmp_path / "q"))


def test_integers_without_a_description_are_refused(plain, tmp_path):
    compress(plain["Llama"], tmp_path / "q", 8)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has dtype I32, .*without a supported quantization_config"):
        load_pretrained(str(tmp_path / "q"))
