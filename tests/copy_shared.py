"""Copies a change of sac_flow_g.py to the scripts that share its text: python tests/copy_shared.py

Each of them keeps what is its own: sac_flow_t.py and sac_flow_naive.py docstring, the velocity's flags and the velocity
network; sac_gaussian.py docstring and policy; sac_flow_offline2online.py all but the functions and methods that are
named here. Tests hold that it has nothing to do.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTROLS = ROOT / "benchmark" / "controls"
G, T, NAIVE = ROOT / "sac_flow_g.py", ROOT / "sac_flow_t.py", CONTROLS / "sac_flow_naive.py"
GAUSSIAN, OFFLINE = CONTROLS / "sac_gaussian.py", ROOT / "sac_flow_offline2online.py"

OWN = ("docstring", "velocity's flags", "velocity network")
GAUSSIANS_OWN = [
    r'\A""".*?"""\n',
    r"^    # \w+ policy\n.*?(?=class BatchRenorm\()",
    r"^def make_actor\(.*?(?=\n\n\ndef )",
]
FLAGS = re.S | re.M
FUNCTIONS = """
    TimeEmbedding alpha_loss record with_gradients apply_gradients move_average Failure fail note first_line explained
    flag read_flags lock thread_failed new_folder in_plain_types target_entropy_of Generators is_legacy
    load read_policy seed_random record_videos to_obs to_action unchanged find_compiler set_matmul_precision CudaGraph
""".split()
METHODS = """
    step entropy_at largest_entropy draw_noise __enter__ __exit__ on_signal seconds paused kept check_finite mean_losses
    log_update say_how_it_goes write_scalars write_row should_save save save_policy save_as say_where
""".split()


def split(text: str) -> list[tuple[str, str]]:
    """A script in parts, cut at landmarks that each must occur once."""
    landmarks = [
        ("docstring", '"""'),
        ("header", "# /// script"),
        ("velocity's flags", "    velocity_dim: int"),
        ("velocity network", "\n\nclass TimeEmbedding("),
        ("from the actor on", "\n\nclass Actor("),
    ]
    positions = []
    for name, landmark in landmarks:
        assert text.count(landmark) == 1 or name == "docstring", landmark
        positions.append(text.index(landmark))
    assert positions == sorted(positions) and positions[0] == 0
    ends = [*positions[1:], len(text)]
    return [(name, text[a:b]) for (name, _), a, b in zip(landmarks, positions, ends, strict=True)]


def blocks() -> list[str]:
    """Patterns of what sac_flow_offline2online.py shares: functions, classes and methods, and the rollout's body."""
    functions = [rf"(?:^@[\w.]+\n)?^(?:def|class) {name}\b.*?(?=\n\n\n)" for name in FUNCTIONS]
    methods = [rf"^    def {name}\(.*?(?=\n\n    (?:def|@)|\n\n\n)" for name in METHODS]
    return [*functions, *methods, r"^        path = \[noise.*?(?=\n\n)"]


def with_shared(g: str, path: Path) -> str:
    """What the script at `path` is to be, given sac_flow_g.py's text."""
    text = path.read_text()
    if path == OFFLINE:
        for pattern in blocks():
            match = re.search(pattern, text, FLAGS)
            text = text[: match.start()] + re.search(pattern, g, FLAGS)[0] + text[match.end() :]
        return text
    if path == GAUSSIAN:
        for pattern in GAUSSIANS_OWN:
            match = re.search(pattern, g, FLAGS)
            g = g[: match.start()] + re.search(pattern, text, FLAGS)[0] + g[match.end() :]
        return g
    return "".join(b if name in OWN else a for (name, a), (_, b) in zip(split(g), split(text), strict=True))


if __name__ == "__main__":
    for path in (T, NAIVE, GAUSSIAN, OFFLINE):
        text = with_shared(G.read_text(), path)
        if text != path.read_text():
            path.write_text(text)
            print(f"changed: {path.relative_to(ROOT)}")
