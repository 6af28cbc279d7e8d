"""What is suggested: the fewest devices that fit, of equally many those named first, then the fastest mesh."""

import pytest

pytest.importorskip("libtpu", reason="pip install 'jax[tpu]'")

from experiments.aot.chips import topology  # noqa: E402
from experiments.aot.suggest import candidates, ranked, search  # noqa: E402
from experiments.compile import make_case  # noqa: E402
from experiments.configs import base  # noqa: E402


def make(target, spec, slots, stream_tokens):
    config = base.get_config()  # Qwen2.5-7B, 256 completions of 512 + 4096 tokens: 15 GB of weights, 68 GB of cache
    config.slots, config.grpo.stream_tokens = slots, stream_tokens
    return make_case(config, None, target, spec)


def found(*names):
    targets = [topology(name) for name in names]
    return ranked(targets, candidates(targets, make, 256, 8192))


@pytest.mark.slow
def test_eight_chips_of_v5e_hold_all_completions_and_four_hold_a_half():
    eight, four = found("v5e:2x4"), found("v5e:2x2")
    assert eight[0].slots == 256 and {c.mesh.tensor for c in eight if c.slots == 256} >= {4, 8}
    assert max(c.slots for c in four) == 128
    for candidate in (*eight, *four):
        assert candidate.predicted_bytes < 16e9
    how = lambda several: [(c.topology.name, c.mesh, c.slots) for c in several]
    assert how(found("v5e:2x4", "v5e:2x2")) == how([*four, *eight]), "fewer devices are cheaper"


@pytest.mark.slow
def test_of_equally_many_devices_the_topology_named_first_is_tried_first():
    for names in (("v5e:2x4", "v6e:2x4"), ("v6e:2x4", "v5e:2x4")):
        tried = list(dict.fromkeys(candidate.topology.name for candidate in found(*names)))
        assert tried == list(names)


@pytest.mark.slow
def test_the_first_that_compiles_is_taken_with_shorter_streams_if_the_update_alone_is_too_large():
    tried = []

    def prove(case, target):
        tried.append((case.mesh.shape["tensor"], case.config.grpo.stream_tokens))
        update = {"program": "update, …", "fits": len(tried) == 2}
        return {"fits": len(tried) == 2, "programs": [{"program": "rollout", "fits": True}, update]}

    result = search([topology("v5e:2x4")], make, 256, 8192, prove)
    best = found("v5e:2x4")[0]
    assert tried == [(best.mesh.tensor, 8192), (best.mesh.tensor, 4096)]
    assert result["suggestion"] == {"tensor": best.mesh.tensor, "slots": 256, "stream_tokens": 4096}


def test_what_fits_nowhere_says_so():
    refuse = lambda case, target: {"fits": False, "programs": [{"program": "rollout", "fits": False}]}
    for name in ("v5e:1x1", "v5e:2x4"):  # nothing is predicted to fit the one, nothing compiles for the other
        with pytest.raises(ValueError, match=f"nothing fits {name}"):
            search([topology(name)], make, 256, 8192, refuse)
