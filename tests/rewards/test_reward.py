"""Graders, the loading of rewards and the boundary around a user's function."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tinylora_jax import rewards
from tinylora_jax.rewards import Grade, RewardError, grade_batch, load_reward

USER_MODULE = """
from tinylora_jax.rewards import Grade
TABLE = {}
def length(completion, answer, question):
    return len(completion)
def half(completion, answer, question):
    return Grade(0.5, 1.0, "half")
def fail(completion, answer, question):
    raise KeyError("missing")
def nan(completion, answer, question):
    return float("nan")
def inf(completion, answer, question):
    return -float("inf")
def nothing(completion, answer, question):
    return None
def text(completion, answer, question):
    return "1.0"
def huge(completion, answer, question):
    return 10 ** 5000
def nan_grade(completion, answer, question):
    return Grade(float("nan"), 0.0)
def interrupted(completion, answer, question):
    raise KeyboardInterrupt
def leaves(completion, answer, question):
    raise SystemExit
def two_arguments(completion, answer):
    return 1.0
"""


@dataclass(frozen=True)
class Asked:
    id: int
    question: str
    answer: str


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_user_rewards.py").write_text(USER_MODULE)
    (tmp_path / "my_broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "my_leaving_rewards.py").write_text("import sys\nsys.exit()\n")
    (tmp_path / "my_interrupted_rewards.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_user_rewards"
    sys.modules.pop("my_user_rewards", None)


@pytest.mark.parametrize(
    ("name", "completion", "answer", "strict", "lenient", "found"),
    [
        ("hash", "so\n#### 72", "72", 1.0, 1.0, "72"),
        ("hash", "#### 1,000", "1000", 1.0, 1.0, "1,000"),
        ("hash", "#### 71", "72", 0.0, 0.0, "71"),
        ("hash", "the answer is 72.", "72", 0.0, 1.0, "72"),
        ("hash", "\\boxed{72}", "72", 0.0, 1.0, "72"),
        ("hash", "**#### 72**", "72", 0.0, 1.0, "72"),
        ("hash", "", "72", 0.0, 0.0, None),
        ("boxed", "\\boxed{72}", "72", 1.0, 1.0, "72"),
        ("boxed", "\\boxed{72} of 100", "72", 1.0, 1.0, "72"),
        ("boxed", "#### 72", "72", 0.0, 1.0, "72"),
        ("boxed", "\\boxed{72", "72", 0.0, 1.0, "72"),
        ("boxed", "\\boxed{71}, no, 72", "72", 0.0, 1.0, "71"),
        ("boxed", "\\boxed{x+1}", "x + 1", 1.0, 1.0, "x+1"),
        ("boxed", "none", "x + 1", 0.0, 0.0, None),
    ],
)
def test_built_in_grades(name, completion, answer, strict, lenient, found):
    assert load_reward(name)(completion, answer, "question") == Grade(strict, lenient, found)


def test_user_function_returns_a_number_or_a_grade(user_module):
    assert load_reward(f"{user_module}:length")("abc", "1", "q") == Grade(3.0, 3.0, None)
    assert load_reward(f"{user_module}:half")("abc", "1", "q") == Grade(0.5, 1.0, "half")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fail", "raised KeyError: 'missing'"),
        ("leaves", "raised SystemExit"),
        ("nan", "returned nan"),
        ("inf", "returned -inf"),
        ("nothing", "returned None"),
        ("text", "returned '1.0'"),
        ("huge", "returned an object of type int"),
        ("nan_grade", "strict=nan"),
    ],
)
def test_failing_user_function_is_one_clear_error(user_module, function, said):
    reward = load_reward(f"{user_module}:{function}")
    prompts = [Asked(41, "What?", "1")]
    with pytest.raises(RewardError, match=r"completion 0, question id 41: reward my_user_rewards:") as caught:
        grade_batch(reward, ["abc"], prompts)
    message = str(caught.value)
    assert said in message and "'What?'" in message and function in message and "; return" in message
    assert len(message) < 400


def test_cause_of_a_user_error_is_kept_and_interrupts_pass(user_module):
    with pytest.raises(RewardError) as caught:
        grade_batch(load_reward(f"{user_module}:fail"), ["a"], [Asked(0, "q", "1")])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        load_reward(f"{user_module}:interrupted")("a", "1", "q")
    assert interrupted.value.__notes__ == ["in reward my_user_rewards:interrupted"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hsah", "did you mean 'hash'"),
        ("", f"expected {', '.join((*rewards.BUILT_IN, *rewards.SHAPING))} or module:function"),
        ("my_user_rewards.py:length", "without `.py`"),
        ("./my_user_rewards:length", "without its folder"),
        ("my_user_rewards:two_arguments", "takes .completion, answer.; expected three positional arguments"),
        ("a b:c", "module:function"),
        ("no_such_module_here:f", "cannot import no_such_module_here"),
        ("my_broken_rewards:f", "ZeroDivisionError"),
        ("my_leaving_rewards:f", "cannot import my_leaving_rewards .SystemExit"),
        ("my_interrupted_rewards:f", "cannot import my_interrupted_rewards .KeyboardInterrupt"),
        ("my_user_rewards:lenght", "did you mean my_user_rewards:length"),
        ("my_user_rewards:TABLE", "not callable"),
    ],
)
def test_unknown_rewards_are_named(user_module, name, said):
    with pytest.raises(RewardError, match=said):
        load_reward(name)


@pytest.mark.parametrize("name", rewards.BUILT_IN)
def test_gold_answers_are_graded_against_themselves(name):
    golds = ["72", "1,000", "-0.5", "9 (apples)", "$3", r"5\%", "72", "1.5"]
    assert rewards.unpayable(name, golds) == ()
    others = ["5/2", "yes", "x+1", "(1,2)", "yes"]
    assert rewards.unpayable(name, golds + others) == ((8, 9, 10, 11, 12) if name == "hash" else ())
    assert set(rewards.unpayable(name, [".", "$", "}", ""])) == {0, 1, 2, 3}


def test_nothing_is_said_of_the_golds_of_a_user_s_reward(user_module):
    assert rewards.unpayable(f"{user_module}:fail", ["72", "."]) == ()


def test_batch_keeps_order_and_checks_counts():
    prompts = [Asked(i, f"{i}?", str(i)) for i in range(3)]
    grades = grade_batch(load_reward("hash"), ["#### 0", "1", "#### 9"], prompts)
    assert [(g.strict, g.lenient) for g in grades] == [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]
    assert grade_batch(load_reward("hash"), [], []) == ()
    with pytest.raises(ValueError, match="2 completions for 3 prompts"):
        grade_batch(load_reward("hash"), ["a", "b"], prompts)


def test_rewards_import_only_the_standard_library():
    """Grading must stay usable, and quick to start, in a process that has no accelerator and no algebra."""
    program = "math_worker.py"  # runs in processes of its own
    for path in Path(rewards.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                algebra = {"latex2sympy2_extended", "math_verify", "mpmath", "sympy"}
                allowed = sys.stdlib_module_names | (algebra if path.name == program else set())
                own = name.startswith("tinylora_jax.rewards") or name == "tinylora_jax.extras"  # that imports pathlib
                assert own or name.split(".")[0] in allowed
                assert not name.endswith("math_worker")
