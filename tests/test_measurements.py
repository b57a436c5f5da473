"""The programs of benchmark/measurements refuse what they cannot measure, in a line of their own name."""

import importlib
import math

import pytest
import torch


@pytest.mark.parametrize(
    "program, flags, words",
    [
        ("gradient_norms", "--flow-steps 0", "--flow-steps must be 1 or more, not 0"),
        ("gradient_norms", "--flow-steps 4 -1", "--flow-steps must be 1 or more, not 4 -1"),
        ("gradient_norms", "--flow-steps", "--flow-steps must be 1 or more, not empty"),
        ("gradient_norms", "--seeds 0", "--seeds must be 1 or more"),
        ("gradient_norms", "--weight-scales nan", "--weight-scales must be above 0 and finite, not nan"),
        ("gradient_norms", "--obs-std inf", "--obs-std must be above 0 and finite"),
        ("gradient_norms", "--out /dev/null", "--out /dev/null cannot be written to"),
        ("gradient_norms", "--out /proc/x", "--out /proc/x cannot be written to"),
        ("gradient_norms", "--runs nowhere", "nowhere is not the folder of a run"),
        ("gradient_norms", "--runs of_lift", "of_lift is a run of sac_flow_offline2online, not of sac_flow_naive"),
        ("gradient_norms", "--runs damaged", "damaged/checkpoint.pt is truncated or corrupted"),
        ("gradient_norms", "--runs unfinished", "there is no unfinished/checkpoint.pt"),
        ("gradient_norms", "--sedes 3", "Perhaps you meant: --seeds"),
        ("action_noise", "", "--policies must name one or more policy files"),
        ("action_noise", "--policies nowhere", "nowhere is not the folder of a run"),
        ("action_noise", "--policies of_lift", "of_lift is a run of sac_flow_offline2online, not of sac_flow_naive"),
        ("action_noise", "--policies of_lift --out /proc/x", "--out /proc/x cannot be written to"),
        ("frozen_critic", "--run x --seeds 0", "--seeds must be 1 or more"),
        ("frozen_critic", "--run x --updates 0", "--updates must be 1 or more"),
        ("frozen_critic", "--run x --score-steps", "--score-steps must be one or more of"),
        ("frozen_critic", "--run x --out /proc/x", "--out /proc/x cannot be written to"),
        ("frozen_critic", "--run nowhere", "nowhere is not the folder of a run"),
        ("frozen_critic", "--run damaged", "damaged/checkpoint.pt is truncated or corrupted"),
        ("frozen_critic", "", "--run"),
        ("speed", "--rounds 0", "--rounds must be 1 or more"),
        ("speed", "--seconds nan", "--seconds must be above 0 and finite"),
        ("speed", "--out /proc/x", "--out /proc/x cannot be written to"),
        ("speed", "--suite nothing", "'nothing'"),
        ("speed", "--cores 9999", "--cores 9999: this machine has"),
        ("speed", "--scripts nothing", "--scripts nothing: no nothing.py"),
    ],
)
def test_bad_flags(program, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scripts = {"of_lift": "sac_flow_offline2online", "damaged": "sac_flow_g", "unfinished": "sac_flow_g"}
    for folder, script in scripts.items():
        (tmp_path / folder).mkdir()
        state = {"script": script, "args": {"env_id": "lift", "flow_steps": 4, "seed": 1}}
        torch.save(state, tmp_path / folder / "policy.pt")
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    before = {*tmp_path.rglob("*"), tmp_path / "gradients", tmp_path / "noise"}
    monkeypatch.setattr("sys.argv", [f"benchmark/measurements/{program}.py", *flags.split()])
    with pytest.raises(SystemExit) as error:
        importlib.import_module(program).main()
    stderr = capsys.readouterr().err
    assert error.value.code == 2 and len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith(f"{program}: error: ") and words in stderr, stderr
    assert {*tmp_path.rglob("*")} <= before  # no results


def test_action_noise_of_a_known_actor():
    """No velocity and no score: A_K = A_0 + sigma sqrt(dt) (eps_0 + ... + eps_3), with sigma = 1."""
    from action_noise import measure

    from sac_flow_t import Actor

    torch.manual_seed(0)
    actor = Actor(3, [-1, 2], [1, 6], score_step="none", sigma_dim=16, encoder_dim=16, dim=16)
    actor.eval().requires_grad_(False)
    actor.velocity_net.out.weight.zero_()
    actor.velocity_net.out.bias.zero_()
    actor.sigma_net[-1].weight.zero_()
    actor.sigma_net[-1].bias.fill_(math.atanh(1.5 / 3.5))
    row = measure(actor, torch.randn(50, 3))

    def deviation(spread, rest, quantile=False):
        """Of tanh(A + B) over A, of B's samples the mean or the median: A and B normal with these deviations."""
        middles = rest * torch.randn(2000, 1)
        deviations = torch.tanh(middles + spread * torch.randn(2000, 200)).std(1)
        return (deviations.median() if quantile else deviations.mean()).item()

    noise = math.sqrt(1 / 4)
    assert row["sigma"] == pytest.approx(1, rel=1e-4)
    assert row["deviation"] == pytest.approx(deviation(math.hypot(1, 2 * noise), 0, quantile=True), rel=0.05)
    assert row["start"] == pytest.approx(deviation(1, 2 * noise), rel=0.05)
    assert row["early"] == pytest.approx(deviation(math.hypot(1, math.sqrt(3) * noise), noise), rel=0.05)
    reached = torch.tanh(math.hypot(1, 2 * noise) * torch.randn(100_000))
    assert row["saturated"] == pytest.approx((reached.abs() > 0.97).float().mean().item(), rel=0.15)
    per_dimension = 0.5 * math.log(2 * math.pi * math.e) + math.log(noise)
    squash = torch.log(1 - reached.double() ** 2).mean().item()
    assert row["entropy"] == pytest.approx(2 * (per_dimension + squash), rel=0.05)
    # Where the first observation is above 0.5, in three of ten states, sigma is at its largest: the median ignores it.
    usual = actor.sigma_net.forward
    actor.sigma_net.forward = lambda obs: usual(obs) + 100 * (obs[:, :1] > 0.5)
    assert measure(actor, torch.randn(50, 3))["deviation"] == pytest.approx(row["deviation"], rel=0.04)
