"""A population's members are the runs they would be alone."""

import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import grpo, sweep
from experiments.common.population import combinations, member_configs, parse_member, parse_variation
from experiments.common.specs import ConfigError
from experiments.plot import plot, plot_curves, read_run
from tinylora_jax import rl
from tinylora_jax.io.adapter import read_adapter
from tinylora_jax.training import DivergenceError

VARY = ["optimizer.learning_rate=0.05,0.01", "seed=0,3"]
TYINGS = ["adapter.n_tie=14,1", "adapter.u=1,2"]


class Never:
    """No signal comes."""

    def check(self):
        pass


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def swept(make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    return folder, sweep.run(make_config(), VARY, folder, Never())


@pytest.mark.parametrize("rate, seed", [(0.05, 0), (0.01, 3)])
def test_a_member_is_the_run_it_would_be_alone(swept, make_config, tmp_path, rate, seed):
    folder, _ = swept
    config = make_config()
    config.optimizer.learning_rate, config.seed = rate, seed
    grpo.run(config, tmp_path / "alone", Never())
    member = folder / "members" / f"learning_rate={rate},seed={seed}"
    alone, together = rows_of(tmp_path / "alone"), rows_of(member)
    assert len(alone) == len(together) == 5
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a["v"], b["v"], atol=1e-4)
        assert a["reward"] == b["reward"] and a["length"] == b["length"]
    assert np.abs(alone[-1]["v"]).max() > 1e-2
    for step in range(5):
        page = f"samples/{step:06d}.txt"
        assert (tmp_path / "alone" / page).read_text() == (member / page).read_text()
    summaries = [json.loads((path / "summary.json").read_text()) for path in (tmp_path / "alone", member)]
    assert summaries[0]["eval_after"] == summaries[1]["eval_after"]


def test_members_are_drawn_and_their_seeds_make_curves(swept, blank_panels, tmp_path):
    folder, summary = swept
    for row in summary["members"]:
        member = folder / "members" / row["member"]
        run = read_run(member)
        for found, expected in ((run.before, summary["eval_before"]), (run.after, row["eval_after"])):
            assert found == {grade: expected[grade] for grade in ("strict", "lenient")}
        assert not blank_panels(plot(member, tmp_path / "member.png").read_bytes())
    plot_curves([folder], tmp_path / "curves.png")
    result = json.loads((tmp_path / "curves.json").read_text())
    assert {curve["label"] for curve in result["curves"]} == {"rate 0.01", "rate 0.05"}
    for curve in result["curves"]:
        rewards = [[row["reward"] for row in rows_of(Path(run))] for run in curve["runs"]]
        assert len(rewards) == 2 and curve["values"] == rewards and len(curve["trained"]) == 2


def test_members_differ_and_are_compared(swept):
    folder, summary = swept
    assert len(summary["members"]) == 4 and summary["eval_before"]["questions"] == 6
    last = {row["member"]: rows_of(folder / "members" / row["member"])[-1]["v"] for row in summary["members"]}
    assert len({tuple(v) for v in last.values()}) == 4
    strict = [row["eval_after"]["strict"] for row in summary["members"]]
    assert strict == sorted(strict, reverse=True)
    assert "untrained" in sweep.members_table(summary, folder)


def test_the_command_draws_the_curves_at_its_end(swept, make_config, monkeypatch, capsys):
    folder, summary = swept
    flags = type("Flags", (), {"workdir": str(folder), "config": make_config(), "vary": VARY, "member": []})
    flags.json = flags.dry_run = False
    monkeypatch.setattr(sweep, "FLAGS", flags)
    sweep.main([])
    out, err = capsys.readouterr()
    assert f"{folder / 'curves.png'}\n" in err and json.loads(out.splitlines()[-1]) == summary
    curves = json.loads((folder / "curves.json").read_text())["curves"]
    assert sorted(curve["label"] for curve in curves) == ["rate 0.01", "rate 0.05"]


@pytest.mark.slow
def test_different_adapters_share_one_program(make_config, tmp_path):
    config = make_config()
    config.max_steps = 3
    others = ["method=lora_xs,optimizer.learning_rate=0.01", "targets=.*/(q|up)_proj/kernel,adapter.n_tie=1"]
    summary = sweep.run(config, TYINGS, tmp_path / "sweep", Never(), others)
    assert sorted(row["params"] for row in summary["members"]) == [1, 2, 8, 14, 28, 56]
    alone = {"n_tie=1,u=2": {"adapter.n_tie": 1, "adapter.u": 2}}
    alone["targets=._q_up__proj_kernel,n_tie=1"] = {"adapter.n_tie": 1, "targets": ".*/(q|up)_proj/kernel"}
    for name, changes in alone.items():
        own = config.copy_and_resolve_references()
        own.update_from_flattened_dict(changes)
        grpo.run(own, tmp_path / name, Never())
        member = tmp_path / "sweep" / "members" / name
        together = rows_of(member)
        for a, b in zip(rows_of(tmp_path / name), together, strict=True):
            np.testing.assert_allclose(a["v"], b["v"], atol=1e-4)
        saved, theirs = (read_adapter(folder / "adapter")[0] for folder in (tmp_path / name, member))
        assert saved == theirs


def test_one_that_diverges_disturbs_no_other(swept, make_config, tmp_path, monkeypatch):
    whole, _ = swept
    finish, broken = rl.Learner.finish, "learning_rate=0.05,seed=3"
    population, calls = {}, Counter()

    def spy(self, underway):
        calls[id(self)] += 1
        if population.setdefault(id(self), len(population)) == 1 and calls[id(self)] == 3:
            raise DivergenceError({"loss": float("nan")})
        return finish(self, underway)

    monkeypatch.setattr(rl.Learner, "finish", spy)
    summary = sweep.run(make_config(), VARY, tmp_path / "sweep", Never())
    dropped = [row for row in summary["members"] if row["dropped"]]
    assert [row["member"] for row in dropped] == [broken] and "step 2 is not finite" in dropped[0]["dropped"]
    assert len(rows_of(tmp_path / "sweep" / "members" / broken)) == 2
    for name in ("learning_rate=0.05,seed=0", "learning_rate=0.01,seed=3"):
        theirs, ours = (rows_of(folder / "members" / name)[-1]["v"] for folder in (whole, tmp_path / "sweep"))
        np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_an_interrupted_sweep_continues_to_the_same_bits(swept, make_config, tmp_path):
    whole, expected = swept

    class After:
        calls = 0

        def check(self):
            self.calls += 1
            if self.calls == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run(make_config(), VARY, tmp_path / "sweep", After())
    jax.clear_caches()
    summary = sweep.run(make_config(), VARY, tmp_path / "sweep", Never())
    assert summary["members"] == expected["members"]
    for row in expected["members"]:
        theirs, ours = (rows_of(folder / "members" / row["member"]) for folder in (whole, tmp_path / "sweep"))
        assert [r["v"] for r in theirs] == [r["v"] for r in ours]
    assert sweep.run(make_config(), VARY, tmp_path / "sweep", Never()) == summary


@pytest.mark.parametrize(
    "text, message",
    [
        ("samples=2,4", "may differ only in seed, method, targets, optimizer"),
        ("adapter.rank=1,2", "may differ only in seed, method, targets, optimizer"),
        ("optimizer.rate=1", "has no such field"),
        ("lora.rank=1,2", "may differ only in seed, method, targets, optimizer"),
        ("seed", "expected field=value"),
        ("seed=", "expected field=value"),
        ("seed=1,a", "expected a value of type int"),
        ("seed=1,1", "is repeated"),
    ],
)
def test_a_variation_that_means_nothing(make_config, text, message):
    with pytest.raises(ConfigError, match=message):
        parse_variation(text, make_config())


def test_members_that_are_alike_are_refused(make_config):
    config = make_config()
    same = [{"seed": 1, "optimizer.learning_rate": 0.5}, {"optimizer.learning_rate": 0.5, "seed": 1}]
    with pytest.raises(ConfigError, match="seed=1,learning_rate=0.5 and learning_rate=0.5,seed=1 are equal"):
        member_configs(config, same)
    with pytest.raises(ConfigError, match="seed=1 and seed=1,precision=float32 are equal"):
        member_configs(config, [{"seed": 1}, {"seed": 1, "optimizer.precision": "float32"}])
    with pytest.raises(ConfigError, match="seed=1 is repeated"):
        member_configs(config, [{"seed": 1}, {"seed": 1}])


def test_members_whose_fields_end_alike_have_whole_names(make_config):
    assert list(member_configs(make_config(), [{"seed": 1}, {"adapter.seed": 1}])) == ["seed=1", "adapter.seed=1"]


def test_a_member_out_of_range(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)member u=0: .*adapter: .*u >= 1"):
        sweep.run(make_config(), ["adapter.u=1,0"], tmp_path / "sweep", Never())
    assert not (tmp_path / "sweep" / "members").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed=1,seed=2", "is repeated"),
        ("seed=1,", "expected field=value"),
        ("method=lora,samples=3", "may differ only in"),
    ],
)
def test_a_member_that_means_nothing(make_config, text, message):
    with pytest.raises(ConfigError, match=message):
        parse_member(text, make_config())


@pytest.mark.parametrize(
    "targets, message", [(".*/v_proj/kernel", "targets outside them"), (".*/qkv/kernel", "matches no leaf")]
)
def test_a_member_adapts_what_the_sweep_does_not(make_config, tmp_path, targets, message):
    config = make_config()
    config.targets = ".*/q_proj/kernel"
    with pytest.raises(ConfigError, match=rf"(?s)member targets=.*: .*{message}"):
        sweep.run(config, [f"targets={targets}"], tmp_path / "sweep", Never())
    assert not (tmp_path / "sweep" / "members").exists()


def test_members_must_be_there_and_differ(make_config, tmp_path):
    with pytest.raises(ConfigError, match="needs members"):
        sweep.run(make_config(), [], tmp_path / "sweep", Never())
    with pytest.raises(ConfigError, match="member seed=1 is repeated"):
        member_configs(make_config(), [{"seed": 1}, {"seed": 1}])
    with pytest.raises(ConfigError, match="trains 'tinylora' or 'lora_xs'"):
        sweep.run(make_config(), [], tmp_path / "sweep", Never(), ["method=lora"])


def test_all_combinations(make_config):
    variations = [parse_variation(text, make_config()) for text in VARY]
    configs = member_configs(make_config(), combinations(variations))
    assert {(c.optimizer.learning_rate, c.seed) for c in configs.values()} == {
        (0.05, 0),
        (0.05, 3),
        (0.01, 0),
        (0.01, 3),
    }
    assert list(configs)[1] == "learning_rate=0.05,seed=3"
