"""How to add a dataset: a file of JSON lines, or questions made in Python."""

import json

from experiments.common.specs import parse
from tinylora_jax.data import Question, encode_prompts, get_template, load_questions, make_pipeline

SQUARES = [{"problem": f"What is {n} · {n}?", "solution": f"{n} · {n} = {n * n}\n#### {n * n}"} for n in range(8)]


def test_add_a_file(config, tmp_path):
    path = tmp_path / "squares.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SQUARES))
    with config.unlocked():
        data = config.train_data  # --config.train_data.source=squares.jsonl, and so on
        data.source, data.question_column, data.answer_column = str(path), "problem", "solution"
    questions = load_questions(parse(config).train_data)
    worked = lambda n: f"{n} · {n} = {n * n}\n#### {n * n}"
    assert questions == tuple(Question(n, f"What is {n} · {n}?", str(n * n), worked(n)) for n in range(8))


class Words:
    """Stands for a tokenizer without a chat template."""

    chat_template = None

    def encode(self, text, **_):
        return [len(word) for word in text.split()]

    def apply_chat_template(self, conversation, **_):
        raise NotImplementedError


def test_add_questions_made_in_python():
    questions = [Question(n, f"What is {n} · {n}?", str(n * n)) for n in range(8)]  # the id keys the sampling noise
    prompts = encode_prompts(questions, get_template("plain"), Words(), 16)
    batch = next(make_pipeline(prompts, 4, seed=0, epochs=1))
    assert len(batch) == 4 and all(int(prompt.answer) == prompt.id**2 for prompt in batch)
