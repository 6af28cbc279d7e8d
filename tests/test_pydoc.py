"""`pydoc` answers what a user asks: what a function takes, what it gives, and what there is."""

import inspect
import pydoc

import pytest

import tinylora_jax
from tinylora_jax import data, models, rewards, rl, rollout, training
from tinylora_jax.io import _pretrained as pretrained
from tinylora_jax.io.adapter import _file as adapter_file
from tinylora_jax.io.peft import _export as peft_export
from tinylora_jax.io.peft import _tinylora as peft

FRONT_DOORS = [
    *(getattr(tinylora_jax, name) for name in tinylora_jax.__all__),
    *(data.load_questions, data.encode_prompts, data.make_pipeline, data.DataSpec, data.Question),
    *(models.forward, models.logits, models.init_params, models.ModelConfig),
    *(rewards.load_reward, rewards.grade_batch, rewards.Grade),
    *(rollout.generate, rollout.stream, rollout.Sampling, rollout.Completions),
    *(training.Update, training.score, training.group_advantages, training.init_state),
    *(rl.rollout, rl.grade, rl.plan, rl.Learner, rl.Learner.update, rl.Rollout, rl.step_key),
    *(training.GRPO, training.Optimizer, training.Plan, training.Batch),
    *(adapter_file.save_adapter, adapter_file.load_adapter, adapter_file.read_adapter),
    *(peft_export.export_tinylora, peft_export.export_lora, peft.import_tinylora, pretrained.load_pretrained),
]


@pytest.mark.parametrize("thing", FRONT_DOORS, ids=lambda thing: thing.__name__)
def test_every_argument_is_explained(thing):
    text = inspect.getdoc(thing)
    names = [name for name in inspect.signature(thing).parameters if name not in ("about", "self")]
    missing = [name for name in names if f"\n  {name}: " not in text]
    assert not missing, text
    if inspect.isfunction(thing) and thing.__annotations__["return"] != "None":
        assert "Returns:" in text or "Yields:" in text, text


def test_the_package_says_where_to_begin():
    text = pydoc.render_doc("tinylora_jax", renderer=pydoc.plaintext)
    for name in tinylora_jax.__all__:
        assert name in text
    for line in ("factors = factorize(params, TinyLoRA(", "v = init(factors)", "io.load_pretrained"):
        assert line in text
    assert "factors: factors computed from these weights by `factorize`." in text  # of `apply` and `merge`, in full
