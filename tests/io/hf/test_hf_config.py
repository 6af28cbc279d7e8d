import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.models.config import ModelConfig, Rope
from tinylora_jax.models.rope import frequencies

CLASSES = {
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "llama": transformers.LlamaConfig,
}

# As published; between them they use the fields that real checkpoints of the families have.
QWEN25_MATH = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 4096,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    **QWEN25_MATH,
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
}
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2 = {
    **{name: value for name, value in LLAMA32.items() if name != "head_dim"},
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
}


def _same_sizes(ours: ModelConfig, theirs: transformers.PretrainedConfig) -> None:
    head_dim = getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours == ModelConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        intermediate_size=theirs.intermediate_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=theirs.rms_norm_eps,
        rope=ours.rope,
        tie_embeddings=theirs.tie_word_embeddings,
        qkv_bias=theirs.model_type == "qwen2" or theirs.attention_bias,
        o_bias=theirs.model_type != "qwen2" and theirs.attention_bias,
        qk_norm=theirs.model_type == "qwen3",
        max_positions=theirs.max_position_embeddings,
    )


def _same_rope(ours: ModelConfig, theirs: transformers.PretrainedConfig) -> None:
    # The rotary embedding of all three families is the same code in transformers.
    oracle = LlamaRotaryEmbedding(theirs)
    inverse, factor = frequencies(ours.rope, ours.head_dim)
    np.testing.assert_allclose(inverse, oracle.inv_freq.numpy(), rtol=2e-6)
    assert factor == pytest.approx(oracle.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("family", CLASSES)
def test_defaults_are_those_of_transformers(family):
    theirs = CLASSES[family]()
    ours = parse_config({"model_type": family})
    _same_sizes(ours, theirs)
    assert ours.rope == Rope(theta=10_000.0)


@pytest.mark.parametrize("config", [QWEN25_MATH, QWEN3, LLAMA32, SMOLLM2], ids=["qwen2.5", "qwen3", "llama", "smollm2"])
def test_published_configs_agree_with_transformers(config):
    theirs = CLASSES[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})
    for form in (config, theirs.to_dict()):  # as published, and as transformers 5 writes it again
        ours = parse_config(form)
        _same_sizes(ours, theirs)
        _same_rope(ours, theirs)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES = [
    {"type": "linear", "factor": 2.5},
    {"rope_type": "default"},
    YARN,
    {**YARN, "type": "yarn", "beta_fast": 16, "beta_slow": 2, "truncate": True},
    {**YARN, "attention_factor": 1.25, "beta_fast": None},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    {**YARN, "factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "-".join(map(str, rope.values())))
@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_rope_scalings_agree_with_transformers(rope, style):
    theta = {"rope_theta": 50_000.0}
    config = {"rope_scaling": rope, **theta} if style == "rope_scaling" else {"rope_parameters": rope | theta}
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 65_536}
    # transformers fills the dict that it is given
    theirs = transformers.LlamaConfig(**sizes, **{k: dict(v) if isinstance(v, dict) else v for k, v in config.items()})
    ours = parse_config({"model_type": "llama", **sizes, **config})
    assert ours.rope.theta == 50_000.0
    _same_rope(ours, theirs)


REFUSED = [
    ("model_type", {"model_type": "mistral"}),
    ("model_type", {"model_type": None}),
    ("model_type", {"model_type": ["llama"]}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("mlp_bias", {"model_type": "qwen2", "mlp_bias": True}),
    ("mlp_bias", {"model_type": "qwen3", "mlp_bias": True}),
    ("use_sliding_window", {"use_sliding_window": True}),
    ("use_mrope", {"use_mrope": True}),
    ("layer_types", {"layer_types": ["full_attention"] * 31 + ["sliding_attention"]}),
    ("layer_types", {"layer_types": ["full_attention"]}),
    ("quantization_config", {"quantization_config": {"quant_method": "awq", "bits": 4}}),
    ("quantize='int8'", {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}),
    ("quantization_config", {"quantization_config": "gptq"}),
    ("pretraining_tp", {"pretraining_tp": 2}),
    ("rope_interleaved", {"rope_interleaved": True}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("auto_map", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
    ("logit_softcap", {"logit_softcap": 30.0}),
    ("original_max_position_embeddings", {"original_max_position_embeddings": 4096}),
    ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("longrope", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}),
    ("mrope_section", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}),
    ("truncate", {"rope_scaling": {**YARN, "truncate": False}}),
    ("factor", {"rope_scaling": {"type": "linear"}}),
    ("factor", {"rope_scaling": {"type": "linear", "factor": "2"}}),
    ("low_freq_factor", {"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}),
    ("beta_fast", {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 32}}),
    ("full_attention", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    ("rope_theta", {"rope_theta": -1.0}),
    ("rope_theta", {"rope_theta": float("nan")}),
    ("rope_scaling", {"rope_scaling": "linear"}),
    ("hidden_size", {"hidden_size": 0}),
    ("hidden_size", {"hidden_size": 4096.0}),
    ("hidden_size", {"hidden_size": True}),
    ("num_hidden_layers", {"num_hidden_layers": 10**9}),
    ("num_key_value_heads", {"num_key_value_heads": 5}),
    ("head_dim", {"head_dim": 63}),
    ("tie_word_embeddings", {"tie_word_embeddings": "yes"}),
    ("rms_norm_eps", {"rms_norm_eps": None}),
]


@pytest.mark.parametrize("name, change", REFUSED, ids=lambda value: str(value)[:40])
def test_refuses_by_name(name, change):
    with pytest.raises(ValueError, match=name):
        parse_config({"model_type": "llama", **change})


def test_names_all_problems_at_once():
    bad = {
        "hidden_act": "gelu",
        "mlp_bias": 1,
        "novelty": 1,
        "hidden_size": -1,
        "rope_scaling": {"type": "dynamic"},
    }
    with pytest.raises(ValueError) as error:
        parse_config({"model_type": "llama", **bad})
    assert all(name in str(error.value) for name in ("hidden_act", "mlp_bias", "novelty", "hidden_size", "dynamic"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_bias_is_on_all_four_projections(family):
    config = parse_config({"model_type": family, "attention_bias": True})
    assert config.qkv_bias and config.o_bias


def test_qwen2_has_biases_on_q_k_v_only():
    config = parse_config({"model_type": "qwen2"})
    assert config.qkv_bias and not config.o_bias
    with pytest.raises(ValueError, match="attention_bias"):
        parse_config({"model_type": "qwen2", "attention_bias": False})


def test_null_head_dim_is_derived_except_for_qwen3():
    assert parse_config({"model_type": "llama", "head_dim": None}).head_dim == 128
    assert parse_config({"model_type": "qwen2", "head_dim": 64}).head_dim == 64
    with pytest.raises(ValueError, match="head_dim"):
        parse_config({"model_type": "qwen3", "head_dim": None})


def test_null_sets_nothing():
    assert parse_config({"model_type": "llama", "novelty": None}) == parse_config({"model_type": "llama"})
