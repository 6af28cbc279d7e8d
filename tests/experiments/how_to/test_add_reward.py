"""How to add a reward: any importable function of (completion, answer, question)."""

from experiments.common.specs import parse
from tinylora_jax.data import Question
from tinylora_jax.rewards import grade_batch

MODULE = '''
from tinylora_jax.rewards import Grade, grade_hash

def brief(completion: str, answer: str, question: str) -> float:
    """The right answer, and the sooner the better."""
    return grade_hash(completion, answer).strict - 0.001 * len(completion)

def polite(completion: str, answer: str, question: str) -> Grade:
    """Trained on `strict`; `lenient` is logged beside it."""
    right = grade_hash(completion, answer)
    return Grade(strict=right.strict * ("please" in completion), lenient=right.lenient)
'''
ASKED = (Question(0, "What is 2 + 3?", "5"),) * 2
ANSWERS = ("#### 5", "If you please:\n#### 5")


def test_add_a_reward(config, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)  # as the current folder is for a command
    with config.unlocked():
        config.reward = "my_rewards:brief"  # --config.reward=my_rewards:brief
    grades = grade_batch(parse(config).reward, ANSWERS, ASKED)
    assert [grade.strict for grade in grades] == [1 - 0.006, 1 - 0.021]

    with config.unlocked():
        config.reward = "my_rewards:polite"
    grades = grade_batch(parse(config).reward, ANSWERS, ASKED)
    assert [(grade.strict, grade.lenient) for grade in grades] == [(0, 1), (1, 1)]
