"""A random model of a few thousand weights in the Hugging Face layout, and a run on it that takes seconds."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from experiments import grpo
from experiments.common import runs
from experiments.common.preemption import Stopped
from tinylora_jax.adapters.targets import path_string
from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.io.hf._weights import parameter_names
from tinylora_jax.models import init_params

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent

HF_CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = """
from experiments.configs import base

def get_config():
    config = base.get_config()
    config.model = {model!r}
    config.dtype = config.save_dtype = "float32"
    config.adapter.u, config.adapter.n_tie = 2, 4  # 14 modules: 4 vectors of 2 numbers
    config.train_data.source = config.eval_data.source = "arithmetic"
    config.train_data.limit, config.eval_data.limit = 16, 6
    config.template, config.reward = "arithmetic", "tiny_rewards:even"
    config.max_prompt_tokens, config.max_new_tokens = 96, 6
    config.epochs, config.max_steps = 2, 5
    config.batch_size, config.samples = 4, 2
    config.eval_batch_size, config.eval_samples = 4, 0
    config.grpo.stream_tokens, config.grpo.remat = 64, "off"
    config.optimizer.learning_rate = 0.05
    return config
"""


def _write_tokenizer(folder):
    """Byte-level BPE learned from a few lines, small enough that a random model ends completions now and then."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    lines = [f"What is {i} + {j}?\n{i} + {j} = {i + j}\n#### {i + j}" for i in range(40) for j in range(9, 40, 3)]
    lines += ["system user assistant system user assistant"] * 9
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=96, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_model(folder, seed=0):
    """A model whose answers depend on the question."""
    folder.mkdir()
    hf_config = HF_CONFIG | {"vocab_size": _write_tokenizer(folder)}
    (folder / "config.json").write_text(json.dumps(hf_config))
    config = parse_config(hf_config)
    leaves = jax.tree_util.tree_flatten_with_path(init_params(config, seed))[0]
    by_path = {path_string(path): np.asarray(leaf) for path, leaf in leaves}
    tensors = {}
    for name, (path, _) in parameter_names(config).items():
        leaf = by_path["/".join(map(str, path))]
        leaf = leaf * {"embedding": 50, "lm_head": 2}.get(path[-1] if path[0] != "lm_head" else path[0], 1)
        tensors[name] = np.ascontiguousarray(leaf.T if path[-1] == "kernel" else leaf)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory):
    """Other weights of the same shapes."""
    return write_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def config_file(model_folder):
    path = model_folder.parent / "tiny_config.py"
    path.write_text(CONFIG.format(model=str(model_folder)))
    return path


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """The many runs of these tests compile the same few programs: once, for this process and its children."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla-cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # JAX looks at the folder's name only once
    yield settings["jax_compilation_cache_dir"]
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture(scope="session", autouse=True)
def rewards_on_path():
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="session")
def make_config(config_file):
    """The tiny run's config, a fresh one for each call."""
    spec = importlib.util.spec_from_file_location("tiny_config", config_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda: module.get_config().lock()


@pytest.fixture
def config(make_config):
    return make_config()


class StopAfter:
    """Stands where `StopRequests` does, and leaves the signal handlers of pytest alone."""

    def __init__(self, checks=math.inf):
        self.checks = checks

    def check(self):
        self.checks -= 1
        if self.checks < 0:
            raise Stopped(signal.SIGTERM)


@pytest.fixture(scope="session")
def stop():
    return StopAfter()


@pytest.fixture
def interrupted(tmp_path):
    """A run of a config that was stopped in the middle, with checkpoints: its workdir."""

    def make(config, checks=6):  # evaluation asks twice, a step twice
        workdir = tmp_path / "interrupted"
        with pytest.raises(Stopped):
            grpo.run(config, workdir, StopAfter(checks))
        assert list((workdir / "checkpoints").iterdir())
        return workdir

    return make


@pytest.fixture
def one_host():
    """The flags that most commands share, as they are unless given."""
    hosts = {"multihost": False, "coordinator": None, "num_processes": None, "process_id": None, "connect_timeout": 300}
    return {**hosts, "json": False, "dry_run": False, "showcase": 0}


@pytest.fixture
def command_line(monkeypatch, capsys, one_host):
    """`main` of experiments.grpo, or another, in this process: `(config, workdir)` to exit code, stdout and stderr."""
    monkeypatch.setattr(runs, "StopRequests", StopAfter)

    def call(config, workdir, command=grpo):
        values = SimpleNamespace(config=config, workdir=str(workdir), **one_host)
        monkeypatch.setattr(command, "FLAGS", values, raising=False)
        capsys.readouterr()
        try:
            command.main([])
        except SystemExit as stopped:
            code = stopped.code
        else:
            code = 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


class Processes:
    """Starts `python -m experiments.<name>` with a compilation cache that all of them share."""

    def __init__(self, config_file, cache):
        self.config_file = config_file
        self.env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "JAX_PLATFORMS": "cpu",
        }

    def start(self, name, *flags, file_kib=None, config=True):
        flags = (f"--config={self.config_file}", *flags) if config else flags
        command = [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]
        if file_kib is not None:
            command = ["bash", "-c", f'ulimit -f {file_kib} && exec "$@"', "bash", *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.env, cwd=ROOT, **pipes)

    def run(self, name, *flags, **options):
        process = self.start(name, *flags, **options)
        out, err = process.communicate(timeout=300)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    def signal_when(self, process, number, ready, timeout_s=240):
        """Sends a signal as soon as `ready()` holds, and waits for the end."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=timeout_s)
        return SimpleNamespace(code=process.returncode, out=out, err=err, killed=process.returncode == -signal.SIGKILL)


TIMINGS = ("rollout_s", "grading_s", "update_s", "tokens_per_s")


@pytest.fixture(scope="session")
def traces():
    """What a run leaves that must not depend on interruptions: `(workdir)` to bytes, metrics and pages."""

    def read(workdir):
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        rows = [{k: x for k, x in json.loads(line).items() if k not in TIMINGS} for line in lines]
        pages = {path.name: path.read_text() for path in sorted((workdir / "samples").iterdir())}
        summary = json.loads((workdir / "summary.json").read_text())
        summary = {k: x for k, x in summary.items() if k not in ("wall_s", "generated_tokens_per_s")}
        vector = (workdir / "adapter" / "vector.bin").read_bytes()
        return {"v": vector, "rows": rows, "pages": pages, "summary": summary}

    return read


@pytest.fixture(scope="session")
def processes(config_file, compilation_cache):
    return Processes(config_file, compilation_cache)


@pytest.fixture(scope="session")
def finished(make_config, tmp_path_factory):
    """A finished run, undisturbed, in this process: its workdir and the summary that `run` returned."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    summary = grpo.run(make_config(), workdir, StopAfter())
    return SimpleNamespace(workdir=workdir, summary=summary)
