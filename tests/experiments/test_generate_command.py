"""The command that answers: what it prints is what `generate` draws, and bad input is one message."""

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import TinyLoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from experiments import generate as command
from experiments.common.prompting import short_names
from experiments.common.terminal import Blocks, TextStream
from tinylora_jax.adapters import Policy, TinyLoRA, factorize, init
from tinylora_jax.data import Prompt, get_template, pad_prompts, render
from tinylora_jax.io._pretrained import load_pretrained
from tinylora_jax.io.adapter._file import AdapterError, read_adapter, save_adapter
from tinylora_jax.io.peft._tinylora import import_tinylora
from tinylora_jax.rollout import Sampling, generate

SPEC = TinyLoRA(u=2, n_tie=4)
PROMPTS = ["What is 3 + 4?", "What is 20 + 15?"]
NEW = 12
OPTIONS = ["--temperature=0.9", "--samples=2"]


# PEFT uses a name that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def write_peft(
    folder, model_folder, modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
):
    """A folder that PEFT itself saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(model, TinyLoraConfig(r=2, u=3, weight_tying=0.6, target_modules=list(modules)))
    for name, parameter in model.named_parameters():
        if "tinylora_v" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def peft(model_folder, tmp_path_factory):
    return write_peft(tmp_path_factory.mktemp("theirs") / "peft", model_folder)


def write_adapter(folder, model_folder, scale, spec=SPEC, **about):
    factors = factorize(load_pretrained(str(model_folder), jnp.float32).params, spec)
    v = scale * jnp.asarray(np.random.default_rng(0).standard_normal(init(factors).shape), jnp.float32)
    save_adapter(folder, factors, v, str(model_folder), "float32", **about)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(model_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(root / name / "adapter", model_folder, scale) for name, scale in (("one", 1), ("two", -2))]


@pytest.fixture(scope="module")
def answering(adapters):
    return command.load(None, [command.BASE, *adapters], jnp.float32)


def flags(**changes):
    values = {"model": None, "adapter": [], "prompt": PROMPTS, "template": None, "max_new_tokens": NEW}
    values |= {"temperature": 0.0, "samples": 1, "seed": 0, "dtype": "float32", "allow_download": False}
    values |= {"json": False, "quantize": None, "mesh": "0,1,0"}
    return SimpleNamespace(**values | changes)


def expected(answering, sampling, samples):
    """The texts that `generate` gives for each adapter alone, by label."""
    base, texts = answering.base, {}
    rows = [render(get_template("plain"), prompt, base.tokenizer) for prompt in PROMPTS]
    arrays = pad_prompts([Prompt(place, tuple(row), "", "") for place, row in enumerate(rows)])
    for name, v in zip(answering.names, answering.vectors, strict=True):
        drawn = generate(
            base.config,
            answering.policy(jnp.asarray(v)),
            *map(jnp.asarray, arrays),
            jax.random.key(0),
            sampling,
            samples,
        )
        for place, (row, length) in enumerate(zip(drawn.tokens, drawn.lengths, strict=True)):
            text = base.tokenizer.decode(np.asarray(row)[:length], skip_special_tokens=True)
            texts[f"{place // samples + 1} {name} #{place % samples + 1}"] = text
    return texts


def answers(printed, samples=True):
    """The answers by label, from lines of `--json`."""
    rows = [json.loads(line) for line in printed.splitlines()]
    label = lambda row: f"{PROMPTS.index(row['prompt']) + 1} {row['adapter']}"
    number = lambda row: f" #{row['sample'] + 1}" if samples else ""
    return {label(row) + number(row): row["answer"] for row in rows}


@pytest.mark.slow
def test_the_command_prints_what_each_adapter_draws_alone(processes, adapters, answering):
    given = [f"--adapter={name}" for name in [command.BASE, *adapters]]
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.generate", *given, f"--max_new_tokens={NEW}", "--json", *OPTIONS],
        input="\n".join([PROMPTS[0], "", PROMPTS[1]]),
        env=processes.env,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found = answers(ran.stdout)
    assert found == expected(answering, Sampling(NEW, 0.9, stop_tokens=answering.base.stop_tokens), 2)
    assert len(found) == 12 and len(set(found.values())) > 4, "the adapters must answer differently"
    assert "tokens in" in ran.stderr and "loading" in ran.stderr


class Writes(io.StringIO):
    """Remembers the pieces; may be interrupted at one of them."""

    def __init__(self, interrupt_at=None):
        super().__init__()
        self.pieces, self.interrupt_at = [], interrupt_at

    def write(self, text):
        self.pieces.append(text)
        if len(self.pieces) == self.interrupt_at:
            raise KeyboardInterrupt
        return super().write(text)


@pytest.fixture(scope="module")
def base(model_folder):
    return command.load(str(model_folder), [], jnp.float32)


def test_one_answer_streams_and_an_interruption_ends_its_line(base):
    encoded = command.encode(base, PROMPTS[:1], NEW)
    arguments = (base, encoded, Sampling(NEW, 1.0), jax.random.key(0))
    out = Writes()
    command.answer(*arguments, Blocks(out, [None], base.names))
    assert len(out.pieces) >= NEW // 4 + 1, "a piece for every few tokens and the end"
    assert out.getvalue().endswith("\n") and "│" not in out.getvalue()
    stopped = Writes(interrupt_at=2)
    with pytest.raises(KeyboardInterrupt):
        command.answer(*arguments, Blocks(stopped, [None], base.names))
    assert stopped.getvalue() == out.pieces[0] + "\n"


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A token for every byte."""
    core = Tokenizer(models.BPE({letter: place for place, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("text", ["añb", "日本語 🙂!", "a\ufffdb", "plain ."])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_text_streams_by_whole_characters(byte_tokenizer, text, step):
    tokens = byte_tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    stream = TextStream(byte_tokenizer)
    pieces = [stream.push(tokens[at : at + step]) for at in range(0, len(tokens), step)]
    assert "".join(pieces) == text
    assert text.startswith(TextStream(byte_tokenizer).push(tokens[:-1])), "half a character at the end is left out"


def test_a_completion_cannot_drive_the_terminal(byte_tokenizer):
    tokens = byte_tokenizer.encode("\x1b[2J\r\x07ok\n\tno\x9b")
    assert TextStream(byte_tokenizer).push(tokens) == "\\x1b[2J\\x0d\\x07ok\n\tno\\x9b"


def test_blocks_come_in_the_order_of_the_prompts():
    out = io.StringIO()
    blocks = Blocks(out, ["first?", "second?"], ["base", "mine"])
    for row, text in ((2, "c"), (3, "d"), (0, "a\n"), (1, "b\nB")):
        blocks.write(row, text)
    blocks.end(2)
    blocks.end(3)
    assert out.getvalue() == "", "the second prompt waits for the first"
    blocks.end(0)
    blocks.close()
    blocks.close()
    wide = lambda text: text.ljust(37)
    assert out.getvalue().splitlines() == [
        "1  first?",
        f"  {wide('base')} │ mine",
        f"  {wide('a')} │ b",
        f"  {wide('')} │ B",
        "",
        "2  second?",
        f"  {wide('base')} │ mine",
        f"  {wide('c')} │ d",
        "",
    ]


def test_many_adapters_and_samples_stay_within_the_terminal():
    out = io.StringIO()
    blocks = Blocks(out, ["why? " * 40], ["base", "one", "two", "three"], samples=2)
    for row in range(8):
        blocks.write(row, f"answer {row} " * 30)
    blocks.close()
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "three #2" in out.getvalue()


def test_names_are_what_differs():
    short = short_names
    assert short(["/r/a/adapter", "base", "/r/b/adapter"]) == ("a", "base", "b")
    assert short(["/r/a", "/r/a/b"]) == ("/r/a", "b")
    assert short(["/r/a/x", "/q/a/x"]) == ("r", "q")
    assert short(["/r/adapter"]) == ("adapter",) and short(["base"]) == ("base",)


@pytest.fixture(scope="module")
def other_spec(model_folder, tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("other") / "spec", model_folder, 1, TinyLoRA(u=1, n_tie=7))


def alone(answering, policy, v, template="plain"):
    """The greedy answers of one adapter to all prompts, on factors of its own."""
    base = answering.base
    rows = [render(get_template(template), prompt, base.tokenizer) for prompt in PROMPTS]
    arrays = pad_prompts([Prompt(place, tuple(row), "", "") for place, row in enumerate(rows)])
    sampling = Sampling(NEW, 0.0, stop_tokens=base.stop_tokens)
    drawn = generate(base.config, policy(jnp.asarray(v)), *map(jnp.asarray, arrays), jax.random.key(0), sampling, 1)
    return [
        base.tokenizer.decode(np.asarray(row)[:length], skip_special_tokens=True)
        for row, length in zip(drawn.tokens, drawn.lengths, strict=True)
    ]


@pytest.mark.slow
def test_a_peft_folder_answers_alone_and_beside_ours(adapters, other_spec, peft, answering, capsys):
    params = answering.base.params
    factors, v = import_tinylora(Path(peft), params)
    theirs = alone(answering, Policy(params, factors), v)
    single = command.load(None, [peft], jnp.float32)
    assert single.policy.factors.num_params == v.size, "its own factors, as they are in the file"
    assert alone(answering, single.policy, single.vectors[0]) == theirs
    capsys.readouterr()
    command.run(flags(adapter=[command.BASE, adapters[0], peft, other_spec], json=True))
    found = answers(capsys.readouterr().out, samples=False)
    spec, own, _ = read_adapter(Path(other_spec))
    expected = {
        "base": alone(answering, answering.policy, answering.vectors[0]),
        adapters[0]: alone(answering, answering.policy, answering.vectors[1]),
        peft: theirs,
        other_spec: alone(answering, Policy(params, factorize(params, spec)), own),
    }
    shown = short_names(expected)
    assert found == {
        f"{number + 1} {name}": texts[number]
        for name, texts in zip(shown, expected.values(), strict=True)
        for number in range(2)
    }
    assert len({texts[0] for texts in expected.values()}) == 4, "the adapters must answer differently"


def test_each_answers_in_the_template_that_it_was_trained_in(model_folder, adapters, peft, tmp_path, capsys):
    named = lambda name, template: write_adapter(tmp_path / name, model_folder, 1, config={"template": template})
    sums, boxes, unknown = named("sums", "arithmetic"), named("boxes", "boxed"), named("new", "of the future")
    load = lambda *names, template=None: command.load(None, list(names), jnp.float32, template)
    assert load(adapters[0], peft).templates == ("plain", "plain")
    assert "template" not in capsys.readouterr().err
    assert load(sums).templates == ("arithmetic",)
    assert "from training: arithmetic (sums); change with --template" in capsys.readouterr().err
    mixed = load(command.BASE, boxes, peft, sums)
    assert mixed.templates == ("boxed", "boxed", "boxed", "arithmetic")
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"from training: boxed \(base, .*boxes, .*peft\); arithmetic \(.*sums", said)
    encoded = command.encode(mixed, PROMPTS, NEW)
    for prompt, row in zip(PROMPTS, encoded, strict=True):
        assert row == [render(get_template(name), prompt, mixed.base.tokenizer) for name in mixed.templates]
    out = Blocks(io.StringIO(), PROMPTS, mixed.names)
    command.answer(mixed, encoded, Sampling(NEW, stop_tokens=mixed.base.stop_tokens), jax.random.key(0), out)
    assert load(boxes, sums, unknown, template="gsm8k").templates == ("gsm8k",) * 3
    with pytest.raises(command.InputError, match="new was trained with the template 'of the future', .*choose one of"):
        load(sums, unknown)
    for odd in ({"config": 3}, {"config": {"template": ["plain"]}}, {"config": None}):
        assert load(write_adapter(tmp_path / "odd", model_folder, 1, **odd)).templates == ("plain",)


def test_what_is_wrong_with_the_input_is_said(adapters, model_folder, other_model_folder, tmp_path):
    model, other = str(model_folder), str(other_model_folder)
    foreign = write_adapter(tmp_path / "foreign", other_model_folder, 1)
    renamed = write_adapter(tmp_path / "renamed", model_folder, 1)
    rank = write_adapter(tmp_path / "rank", model_folder, 1, TinyLoRA(rank=3))
    few = write_peft(tmp_path / "few", model_folder, ["q_proj", "v_proj"])
    nameless = write_peft(tmp_path / "nameless", model_folder)
    config = tmp_path / "nameless" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    theirs = write_peft(tmp_path / "theirs", other_model_folder)
    description = json.loads((tmp_path / "renamed" / "adapter.json").read_text())
    del description["description_sha256"]  # as an older version would have written it
    description["base"] = "moved-away"
    (tmp_path / "renamed" / "adapter.json").write_text(json.dumps(description))
    cases = [
        (flags(), "--model is missing"),
        (flags(model=model, adapter=[str(tmp_path / "no")]), "no/adapter.json is missing"),
        (flags(model=str(tmp_path / "no")), "no' is not a model"),
        (
            flags(adapter=[renamed]),
            "moved-away.*not in the cache.*set --allow_download to download it, or set --model",
        ),
        (flags(adapter=[adapters[0]] * 2), "is given twice"),
        (flags(adapter=[adapters[0], rank]), "rank adapts rank 3 and 14 weights, .*one/adapter rank 2 and 14 .*each"),
        (flags(adapter=[adapters[0], few]), "few adapts rank 2 and 4 weights, .*one/adapter rank 2 and 14"),
        (flags(adapter=[nameless]), "--model is missing: the adapter does not name its base model"),
        (flags(adapter=[adapters[0], theirs]), "theirs was trained on .*name the model of both"),
        (flags(adapter=[adapters[0], theirs], model=model), "theirs was trained on .* singular directions differ"),
        (flags(adapter=[adapters[0], foreign]), "foreign was trained on .*name the model of both"),
        (flags(adapter=[adapters[0], foreign], model=model), "foreign: .* whose factors differ"),
        (flags(adapter=adapters, model=other), "one/adapter: .* whose factors differ"),
        (flags(model=model, prompt=["", "x"]), "prompt 1 is empty"),
        (flags(model=model, prompt=["x", "\udcff"]), "prompt 2 is not UTF-8"),
        (flags(model=model, prompt=["x", "y " * 300]), "prompt 2 has .* leaves 244"),
        (flags(model=model, max_new_tokens=256), "prompt 1 has .* leaves 0"),
        (flags(model=model, template="gsm8"), "did you mean gsm8k"),
        (flags(model=model, samples=2), "--samples=2 would all be equal"),
    ]
    for values, message in cases:
        with pytest.raises((ValueError, OSError), match=message):
            command.run(values)
    assert issubclass(command.InputError, ValueError) and issubclass(AdapterError, ValueError)


def test_a_terminal_is_asked_line_by_line(monkeypatch):
    lines = iter(["one", "", "two"])

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    terminal = SimpleNamespace(isatty=lambda: True)
    assert list(command.prompts_of([], terminal)) == [["one"], ["two"]]
    with pytest.raises(command.InputError, match="no prompt"):
        next(command.prompts_of([], io.StringIO(" \n")))


def test_ctrl_c_ends_without_a_traceback(processes, model_folder):
    # Started from a shell's background job, a process ignores Ctrl-C.
    listen = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; runpy.run_module('experiments.generate', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"--model={model_folder}"],
        env=processes.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline().startswith("loading")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err


ON_DEVICES = """
import sys
from experiments.common import opening  # as `python -m` does, the flags come first
import runpy
try:
    runpy.run_module("experiments.generate", run_name="__main__")
except SystemExit as end:
    from tinylora_jax.rollout.stream import _advance
    print("compiled", _advance._cache_size(), file=sys.stderr)
    raise
"""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2,2,2", "0,1,0"])
def test_eight_devices_answer_as_one(processes, adapters, answering, mesh):
    given = [f"--adapter={name}" for name in [command.BASE, *adapters]]
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    env = processes.env | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    words = [*given, *prompts, f"--mesh={mesh}", f"--max_new_tokens={NEW}", "--json", *OPTIONS]
    ran = subprocess.run([sys.executable, "-c", ON_DEVICES, *words], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert answers(ran.stdout) == expected(answering, Sampling(NEW, 0.9, stop_tokens=answering.base.stop_tokens), 2)
    assert "compiled 1\n" in ran.stderr, "the parts of an answer run one program"


def test_a_mesh_must_fit_the_devices(adapters, capsys):
    with pytest.raises(ValueError, match="mesh data=3, fsdp=1, tensor=1 does not fit the number of devices, 1"):
        command.run(flags(adapter=adapters[:1], mesh="3,1,1"))
    with pytest.raises(ValueError, match="--mesh=8: expected data,fsdp,tensor"):
        command.run(flags(adapter=adapters[:1], mesh="8"))
    assert "loading" not in capsys.readouterr().err


def test_a_workdir_stands_for_its_adapter(adapters, tmp_path, capsys):
    workdir = Path(adapters[0]).parent
    assert command.folders_of(["base", str(workdir), adapters[1]]) == ["base", *adapters]
    assert capsys.readouterr().err == f"using the adapter {adapters[0]}\n"
    (tmp_path / "sweep" / "members" / "seed=0" / "adapter").mkdir(parents=True)
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    for name, said in (
        ("sweep", f"name the adapter of a member, such as {tmp_path / 'sweep/members/seed=0/adapter'}"),
        ("begun", "a run without an adapter; continue the run to its end"),
        ("begum", f"no such folder; did you mean {tmp_path / 'begun'}?"),
    ):
        with pytest.raises(SystemExit):
            command.folders_of([str(tmp_path / name)])
        assert said in capsys.readouterr().err
