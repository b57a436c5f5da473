"""The programs of benchmark/measurements refuse what they cannot measure, in a line of their own name."""

import importlib

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
    before = {*tmp_path.rglob("*"), tmp_path / "gradients"}
    monkeypatch.setattr("sys.argv", [f"benchmark/measurements/{program}.py", *flags.split()])
    with pytest.raises(SystemExit) as error:
        importlib.import_module(program).main()
    stderr = capsys.readouterr().err
    assert error.value.code == 2 and len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith(f"{program}: error: ") and words in stderr, stderr
    assert {*tmp_path.rglob("*")} <= before  # no results
