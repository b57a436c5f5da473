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
        ("gradient_norms", "--runs damaged", "damaged/checkpoint.pt is unreadable, truncated or corrupted"),
        ("gradient_norms", "--runs unfinished", "there is no unfinished/checkpoint.pt"),
        ("gradient_norms", "--sedes 3", "Perhaps you meant: --seeds"),
        ("action_noise", "", "--policies must name one or more policy files"),
        ("action_noise", "--policies nowhere", "nowhere is not the folder of a run"),
        ("action_noise", "--policies of_lift", "of_lift is a run of sac_flow_offline2online, not of sac_flow_naive"),
        ("action_noise", "--policies of_lift --out /proc/x", "--out /proc/x cannot be written to"),
        ("critic_ranking", "", "--runs must name one or more folders of runs"),
        ("critic_ranking", "--runs nowhere", "there is no nowhere/checkpoint.pt"),
        ("critic_ranking", "--runs damaged", "damaged/checkpoint.pt is unreadable, truncated or corrupted"),
        ("critic_ranking", "--runs x --best-of 4 0", "--best-of must be 1 or more, not 0"),
        ("critic_ranking", "--runs x --further-updates -1", "--further-updates must be 0 or more, not -1"),
        ("critic_ranking", "--runs x --episodes 0", "--episodes must be 1 or more"),
        ("critic_ranking", "--runs x --out /proc/x", "--out /proc/x cannot be written to"),
        ("frozen_critic", "--run x --seeds 0", "--seeds must be 1 or more"),
        ("frozen_critic", "--run x --updates 0", "--updates must be 1 or more"),
        ("frozen_critic", "--run x --score-steps", "--score-steps must be one or more of"),
        ("frozen_critic", "--run x --out /proc/x", "--out /proc/x cannot be written to"),
        ("frozen_critic", "--run nowhere", "nowhere is not the folder of a run"),
        ("frozen_critic", "--run damaged", "damaged/checkpoint.pt is unreadable, truncated or corrupted"),
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
    before = {*tmp_path.rglob("*"), tmp_path / "gradients", tmp_path / "noise", tmp_path / "ranking"}
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


def test_critic_ranking_of_known_critics():
    """Critics that see the observation alone, that agree, that contradict each other, or that share nothing."""
    from critic_ranking import measure

    class Known:
        """Chunks (0, e, 0) with e uniform in [-2, 2]; half of the range is 2 in each coordinate."""

        scale = torch.full((3,), 2.0)

        def draw_noise(self, batch):
            return 4 * torch.rand(batch) - 2

        def rollout(self, obs, noise):
            return torch.stack([0 * noise, noise, 0 * noise], dim=1), None, None

        def normalized(self, action):
            return action / self.scale

    obs = torch.arange(1001.0)[:, None] / 1000  # deviation sqrt(1 / 12)
    uniform = math.sqrt(1 / 3)  # deviation of e / 2

    def of(first, second):
        return measure(Known(), [first, second], obs)

    row = of(lambda s, a: 5 + 60 * s[:, 0] + 3 * a[:, 1], lambda s, a: 7 + 60 * s[:, 0] + a[:, 1])
    assert row["value"] == pytest.approx(36, rel=0.01)
    assert row["between"] == pytest.approx(60 * math.sqrt(1 / 12), rel=0.03)
    assert row["within"] == pytest.approx(2 * uniform, rel=0.03)
    assert row["apart"] == pytest.approx(2, rel=0.05)  # |2 - 2 e / 2|, e / 2 uniform in [-1, 1]
    assert row["agreement"] == pytest.approx(1, abs=1e-4)
    assert row["noise"] == pytest.approx(uniform / 3, rel=0.03)  # two coordinates of three have none
    row = of(lambda s, a: a[:, 1], lambda s, a: a[:, 1])  # states differ only in the mean of their 32 chunks
    assert row["between"] == pytest.approx(uniform / math.sqrt(32), rel=0.1)
    assert of(lambda s, a: a[:, 1], lambda s, a: 4 - a[:, 1])["agreement"] == pytest.approx(-1, abs=1e-4)
    assert of(lambda s, a: a[:, 1], lambda s, a: a[:, 1].square())["agreement"] == pytest.approx(0, abs=0.05)


def test_the_best_chunk_is_the_one_of_largest_q():
    """Twin critics: neither alone, but their mean decides."""
    import numpy as np
    from critic_ranking import best_chunk

    from sac_flow_offline2online import Actor

    actor = Actor(3, [-1, 0], [1, 4], chunk=1, sigma=1)
    actor.eval().requires_grad_(False)
    obs = np.ones(3, np.float32)
    torch.manual_seed(1)
    chunks = actor.act(torch.ones(8, 3))
    critics = [lambda obs, action: action[:, 1] - 3 * action[:, 0], lambda obs, action: 3 * action[:, 0]]
    torch.manual_seed(1)
    best = best_chunk(actor, critics, 8, obs)
    assert best == pytest.approx(chunks[chunks[:, 1].argmax()].numpy())
    assert chunks[:, 1].argmax() != chunks[:, 0].argmax() != chunks[:, 0].argmin()
