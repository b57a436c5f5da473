"""Makes data sets for offline-to-online training, in the published formats, by playing scripted experts or a policy.

    python benchmark/demonstrations/collect.py --env-id cube-single-play-v0 --episodes 1000
    python benchmark/demonstrations/collect.py --env-id lift --episodes 100
    python benchmark/demonstrations/collect.py --env-id mujoco/hopper/sac-flow-v0 --policy runs/<name>

OGBench (cube, scene and puzzle; `X-play-v0`): X.npz and X-val.npz, regenerated with the oracles that the ogbench
package ships, by the published protocol: the same code, other random draws. robosuite (lift, can, square): the layout
of robomimic's low_dim_v15.hdf5, but with demonstrations by the short scripts below, not by humans: shorter and less
diverse, so that results on them are not comparable with published numbers. Minari: a policy trained by sac_flow_g.py
or sac_flow_t.py, playing stochastically.

Episode i depends on --seed and i alone: the number of workers changes nothing, and a repeated call gives the same
bytes. Finished episodes wait in <out>.parts/; after an interruption the same command continues from there.
Needs: pip install -r requirements.txt -r benchmark/demonstrations/requirements.txt
"""

import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, NoReturn, Optional

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark" / "measurements")]
from sac_flow_offline2online import ROBOSUITE, play_set, read_flags  # noqa: E402

# The environment arguments of robomimic's v1.5 data sets, according to public quotations of their env_args
ENV_KWARGS = dict(
    robots=["Panda"], control_freq=20, lite_physics=False, reward_shaping=False, ignore_done=True, has_renderer=False,
    use_camera_obs=False, has_offscreen_renderer=False, use_object_obs=True,
    controller_configs=dict(type="BASIC", body_parts=dict(right=dict(
        type="OSC_POSE", input_max=1, input_min=-1, output_max=[0.05] * 3 + [0.5] * 3,
        output_min=[-0.05] * 3 + [-0.5] * 3, kp=150, damping=1, impedance_mode="fixed", kp_limits=[0, 300],
        damping_limits=[0, 10], position_limits=None, orientation_limits=None, uncouple_pos_ori=True,
        control_delta=True, interpolation=None, ramp_ratio=0.2, input_ref_frame="world", gripper=dict(type="GRIP"),
    ))),
)  # fmt: skip
INSTALL = "pip install -r requirements.txt -r benchmark/demonstrations/requirements.txt"
ATTEMPTS = 20  # at one episode, before the expert counts as broken

# Range from which each OGBench episode draws the probability that the next target is on top of another cube
P_STACK = {
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
    "scene": (0.5, 0.5),
    **{f"puzzle-{size}": (0.0, 0.0) for size in ("3x3", "4x4", "4x5", "4x6")},  # no cubes in it
}


@dataclass(frozen=True)
class Args:
    """Flags of the command line."""

    env_id: str = "lift"
    """lift, can, square; an OGBench play set such as cube-single-play-v0; with --policy the id of a new Minari set"""
    policy: Optional[Path] = None
    """folder of a run of sac_flow_g.py or sac_flow_t.py whose policy is played into a Minari data set"""
    episodes: int = 100
    """episodes to write; OGBench adds a tenth of them, at least one, as X-val.npz"""
    seed: int = 1
    """seed of the data set"""
    noise: Optional[float] = None
    """standard deviation of the expert's noise, 1 being the largest action; default: 0.1 (square 0.05, --policy 0)"""
    rows: int = 1001
    """rows per episode of OGBench play data; 1001 as published"""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    """processes, each of one thread; default one per core"""
    out: Optional[Path] = None
    """file to write, default data/<env>-<episodes>.hdf5 or .npz; Minari: folder of data sets, default Minari's own"""


def fail(message: str) -> NoReturn:
    """Stop with one line on standard error and exit code 2."""
    tqdm.write(f"collect: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def quiet() -> None:
    """Keep the simulators' notes out of the output; call before they are imported."""
    os.environ.setdefault("MUJOCO_GL", "disabled")
    logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", module="gymnasium|minari")


# robosuite: scripted experts. An expert is a generator: it is sent observations and yields actions (7,), the
# controller's six position and rotation deltas and then the gripper, each in [-1, 1].

OPEN = -1.0
CLOSE = 1.0
NOISY = np.array([1, 1, 1, 1, 1, 1, 0])  # not the gripper: clipped at its bound, half of its noise would be lost


def heading(quat) -> float:
    """Angle in rad, about the vertical, of the x axis of a frame given as (x, y, z, w)."""
    x, y, z, w = quat
    return math.atan2(2 * (x * y + z * w), 1 - 2 * (y * y + z * z))


def wrapped(angle: float, period: float) -> float:
    """The angle nearest to 0 that differs from `angle` by a multiple of `period`."""
    return (angle + period / 2) % period - period / 2


def aligned(name: str, period: float) -> Callable:
    """turn(obs), the angle in rad that turns the gripper's x axis to the object's, up to multiples of `period`."""
    return lambda obs: wrapped(heading(obs[f"{name}_quat"]) - heading(obs["robot0_eef_quat"]), period)


def carried(name: str, goal) -> Callable:
    """target(obs) (3,), where the gripper must be for the object in it to be at `goal` (3,)."""
    return lambda obs: obs["robot0_eef_pos"] + goal - obs[f"{name}_pos"]


def steer(obs: dict, target, turn: float, grip: float) -> np.ndarray:
    """Action (7,) towards the gripper position `target` (3,), turning by `turn` rad and keeping the gripper upright."""
    x, y, z, w = obs["robot0_eef_quat"]
    down = 2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)  # the gripper's z axis
    rotation = np.cross(down, (0, 0, -1)) + (0, 0, turn)
    # The controller covers about a quarter of its largest delta, 5 cm, in a step: this gain is quick and still stable.
    return np.concatenate([(target - obs["robot0_eef_pos"]) / 0.02, rotation / 0.3, [grip]])


def go(obs: dict, target: Callable, turn: Callable, grip: float, within: float):
    """Move to target(obs) (3,) and turn by turn(obs) rad, until `within` metres of it; returns the last observation."""
    while np.linalg.norm(target(obs) - obs["robot0_eef_pos"]) > within or abs(turn(obs)) > 0.1:
        obs = yield steer(obs, target(obs), turn(obs), grip)
    return obs


def pick(obs: dict, grasp: Callable, turn: Callable):
    """Descend on grasp(obs) (3,) as the gripper becomes centred, and close it; returns the last obs."""

    def funnel(obs):
        aside = np.linalg.norm((grasp(obs) - obs["robot0_eef_pos"])[:2]) + 0.1 * abs(turn(obs))
        return grasp(obs) + (0, 0, np.clip(5 * aside - 0.04, 0, 0.08))

    obs = yield from go(obs, funnel, turn, OPEN, 0.007)
    for _ in range(8):
        obs = yield steer(obs, grasp(obs), 0, CLOSE)
    return obs


def lift(obs: dict, env):
    """Expert for Lift: grasp the cube by two of its faces and lift it."""
    obs = yield from pick(obs, lambda obs: obs["cube_pos"], aligned("cube", math.pi / 2))
    while True:
        obs = yield steer(obs, obs["robot0_eef_pos"] + (0, 0, 0.05), 0, CLOSE)


def can(obs: dict, env):
    """Expert for PickPlaceCan: carry the can over its bin, put it down, let go and leave."""
    place = env.target_bin_placements[env.object_id] - (0.04, 0.05, 0)  # its middle is at the limit of the arm's reach
    straight = lambda obs: -heading(obs["robot0_eef_quat"])  # noqa: E731
    obs = yield from pick(obs, lambda obs: obs["Can_pos"], straight)
    up = np.array([*obs["Can_pos"][:2], place[2] + 0.25])
    over = place + (0, 0, 0.25)
    down = place + (0, 0, 0.08)
    for goal, within in ((up, 0.05), (over, 0.05), (down, 0.02)):
        obs = yield from go(obs, carried("Can", goal), straight, CLOSE, within)
    while True:
        obs = yield steer(obs, obs["robot0_eef_pos"] + (0, 0, 0.02), 0, OPEN)


def square(obs: dict, env):
    """Expert for NutAssemblySquare: take the nut by its handle, square it with the peg and lower it."""
    peg = env.sim.data.body_xpos[env.peg1_body_id].copy()

    def handle(obs):
        angle = heading(obs["SquareNut_quat"])
        return obs["SquareNut_pos"] + (0.054 * math.cos(angle), 0.054 * math.sin(angle), 0)

    def squared(obs):  # to a multiple of 90 degrees, but not to 0: the handle would point away, out of the arm's reach
        angle = heading(obs["SquareNut_quat"])
        if abs(angle) < math.pi / 4:
            return math.copysign(math.pi / 2, angle) - angle
        return wrapped(-angle, math.pi / 2)

    nut = partial(carried, "SquareNut")
    obs = yield from pick(obs, handle, aligned("SquareNut", math.pi))
    up = np.array([*obs["SquareNut_pos"][:2], peg[2] + 0.14])
    obs = yield from go(obs, nut(up), lambda obs: 0, CLOSE, 0.05)  # turned on the table, it would slip
    obs = yield from go(obs, nut(up), squared, CLOSE, 0.05)
    obs = yield from go(obs, nut(peg + (0, 0, 0.14)), squared, CLOSE, 0.01)
    while True:
        obs = yield steer(obs, nut(peg)(obs), squared(obs), CLOSE)


class Task(NamedTuple):
    """A robosuite environment and its expert; `horizon` is the number of steps after which an attempt has failed."""

    name: str
    horizon: int
    expert: Callable
    noise: float


TASKS = {
    "lift": Task(*ROBOSUITE["lift"], lift, 0.1),
    "can": Task(*ROBOSUITE["can"], can, 0.1),
    "square": Task(*ROBOSUITE["square"], square, 0.05),
}


def make_robosuite(env_id: str):
    """The robosuite environment of lift, can or square; reset it with `reset_robosuite`."""
    quiet()
    import robosuite

    return robosuite.make(TASKS[env_id].name, **ENV_KWARGS)


def reset_robosuite(env, seed: int) -> dict:
    """Reset to an episode that depends on `seed` alone; returns robosuite's own observation."""
    # In place: the placement samplers hold the same generator. np.random.seed and reset() know nothing of it.
    env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
    env.reset()
    return env._get_observations(force_update=True)  # the first one still lacks the object's pose in the gripper


def robomimic_obs(obs: dict) -> dict:
    """robosuite's observation under robomimic's names: `object` and the robot's, each (d,) float64."""
    parts = {"object": obs["object-state"]}
    parts |= {key: obs[key] for key in obs if key.startswith("robot0_") and not key.endswith("-state")}
    return {key: np.asarray(value, np.float64) for key, value in parts.items()}


def robosuite_player(args: Args) -> Callable:
    """play(seed) -> one demonstration, or None if the expert failed: arrays (T, .) by their names in the HDF5 file."""
    env = make_robosuite(args.env_id)
    task = TASKS[args.env_id]

    def play(seed: int) -> Optional[dict]:
        rng = np.random.default_rng((seed, 1))
        obs = reset_robosuite(env, seed)
        model_file = env.sim.model.get_xml()
        expert = task.expert(obs, env)
        rows = defaultdict(list)
        action = next(expert)
        for _ in range(task.horizon):
            action = np.clip(action + args.noise * rng.standard_normal(7) * NOISY, -1, 1)
            rows["states"].append(env.sim.get_state().flatten())
            before = robomimic_obs(obs)
            obs, reward, *_ = env.step(action)
            for key, value in robomimic_obs(obs).items():
                rows[f"obs/{key}"].append(before[key])
                rows[f"next_obs/{key}"].append(value)
            rows["actions"].append(action)
            rows["rewards"].append(float(reward))
            rows["dones"].append(int(reward > 0))
            if reward > 0:
                rows["model_file"] = model_file
                return {key: np.array(value) for key, value in rows.items()}
            action = expert.send(obs)

    return play


def write_robomimic(args: Args, parts: list[Path], out: Path) -> int:
    """Write robomimic's low_dim_v15.hdf5 layout; returns the number of rows."""
    import h5py

    env_args = dict(env_name=TASKS[args.env_id].name, env_version=metadata.version("robosuite"), type=1)
    env_args["env_kwargs"] = ENV_KWARGS
    with h5py.File(out, "w") as file:
        data = file.create_group("data")
        total = 0
        for i, part in enumerate(parts):
            demo = data.create_group(f"demo_{i}")
            arrays = np.load(part)
            for key in arrays.files:
                if key not in ("model_file", "failures"):
                    demo[key] = arrays[key]
            demo.attrs["num_samples"] = len(arrays["actions"])
            demo.attrs["model_file"] = str(arrays["model_file"])
            total += len(arrays["actions"])
        data.attrs["total"] = total
        data.attrs["env_args"] = json.dumps(env_args, indent=4)
    return total


# OGBench: the package's own oracles.


def ogbench_player(args: Args) -> Callable:
    """play(seed) -> an episode, arrays (args.rows, .) as in the published file, or None for one to leave out."""
    quiet()
    import gymnasium
    import ogbench  # noqa: F401  registers the environments
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    name = play_set(args.env_id).removesuffix("-play-v0")
    kwargs = dict(terminate_at_goal=False, mode="data_collection", visualize_info=False, max_episode_steps=args.rows)
    env = gymnasium.make(f"{name}-v0", **kwargs)
    options = dict(env=env, noise=args.noise, noise_smoothing=0.5)
    oracles = dict(
        cube=CubePlanOracle(**options),
        button=ButtonPlanOracle(**options, gripper_always_closed=name.startswith("puzzle")),
        drawer=DrawerPlanOracle(**options),
        window=WindowPlanOracle(**options),
    )
    types = dict(observations=np.float32, actions=np.float32, terminals=bool, qpos=np.float32, qvel=np.float32)

    def play(seed: int) -> Optional[dict]:
        np.random.seed(seed)  # the oracles draw from it
        obs, info = env.reset(seed=seed)
        p_stack = np.random.uniform(*P_STACK[name])
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        rows = defaultdict(list)
        done = False
        while not done:
            action = oracle.select_action(obs, info)
            row = dict(observations=obs, actions=action)
            row.update({key: info[key] for key in ("qpos", "qvel", "button_states") if key in info})
            obs, _, terminated, truncated, info = env.step(action)
            done = row["terminals"] = terminated or truncated
            for key, value in row.items():
                rows[key].append(value)
            if oracle.done:
                target = env.unwrapped.set_new_target(p_stack=p_stack)
                oracle = oracles[target[1]["privileged/target_task"]]
                oracle.reset(*target)
        episode = {key: np.array(value, types.get(key, np.int64)) for key, value in rows.items()}
        if name == "scene":  # as published, drop episodes in which the cube leaves the view, except into the drawer
            _, y, z = episode["qpos"][:, 14:17].T
            in_drawer = (z >= 0.06) & (z <= 0.08)
            unseen = (y >= 0.29) | ((y <= -0.3) & ~in_drawer)
            if unseen.any():
                return None
        return episode

    return play


def write_npz(args: Args, parts: list[Path], out: Path) -> int:
    """Write the episodes one after another, as np.savez_compressed does; returns the number of rows."""
    with zipfile.ZipFile(out, "w") as archive:
        for key in (key for key in np.load(parts[0]).files if key != "failures"):  # one at a time, to save memory
            member = zipfile.ZipInfo(f"{key}.npy")  # without the time of day: the same data are the same bytes
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as file:
                arrays = [np.load(part)[key] for part in parts]
                np.lib.format.write_array(file, np.concatenate(arrays))
    return args.rows * len(parts)


# Minari: a trained policy.


def minari_player(args: Args) -> Callable:
    """play(seed) -> an episode of the policy, arrays as in EpisodeBuffer: observations (T+1, .), others (T, .)."""
    quiet()
    import gradient_norms
    import torch

    torch.set_num_threads(1)
    script, actor, env = gradient_norms.policy_and_env(args.policy)
    scale = (env.action_space.high - env.action_space.low) / 2

    def play(seed: int) -> dict:
        torch.manual_seed(seed)
        rng = np.random.default_rng((seed, 1))
        obs, _ = env.reset(seed=seed)
        rows = defaultdict(list, observations=[np.array(obs)])  # copies: an environment may change its own in place
        done = False
        while not done:
            with torch.no_grad():
                action = actor.act(torch.from_numpy(script.to_obs(obs))[None])[0].numpy()
            noise = args.noise * scale * rng.standard_normal(scale.shape)
            action = script.to_action(action.reshape(scale.shape) + noise, env.action_space)
            obs, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            obs = np.array(obs)
            row = dict(observations=obs, actions=action, rewards=reward, terminations=terminated, truncations=truncated)
            for key, value in row.items():
                rows[key].append(value)
        rows["seed"] = seed
        return {key: np.array(value) for key, value in rows.items()}

    return play


def write_minari(args: Args, parts: list[Path], out: Path) -> int:
    """Write the folder `out` of a Minari data set; returns the number of steps."""
    quiet()
    import gradient_norms
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer

    def buffers():
        for i, part in enumerate(parts):
            arrays = dict(np.load(part))
            del arrays["failures"]
            yield EpisodeBuffer(id=i, **{**arrays, "seed": int(arrays["seed"])})

    script, _, env = gradient_norms.policy_and_env(args.policy)
    about = f"{script.SCRIPT}.py, {args.policy.resolve().name}, stochastic, noise {args.noise:g}, seed {args.seed}"
    staging = out.parent / ".minari"  # hidden from Minari's own listing
    shutil.rmtree(staging, ignore_errors=True)
    os.environ["MINARI_DATASETS_PATH"] = str(staging)
    dataset = minari.create_dataset_from_buffers(
        args.env_id, buffers(), env=env, algorithm_name="SAC Flow", description=about
    )
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staging / args.env_id, out)
    return dataset.total_steps


# Common to all: episodes become parts, and parts become a file.


class Kind(NamedTuple):
    """A family of environments: the packages whose versions matter, how to play and how to write."""

    packages: list[str]
    player: Callable
    write: Callable
    suffix: str


KINDS = {
    "robosuite": Kind(["robosuite", "mujoco", "h5py", "numpy"], robosuite_player, write_robomimic, ".hdf5"),
    "ogbench": Kind(["ogbench", "mujoco", "dm_control", "numpy"], ogbench_player, write_npz, ".npz"),
    "minari": Kind(["minari", "gymnasium", "mujoco", "h5py", "torch", "numpy"], minari_player, write_minari, ""),
}


def kind_of(args: Args) -> str:
    """robosuite, ogbench or minari; stops the program if --env-id is none of these."""
    if args.policy:
        if not re.fullmatch(r"([-\w][-\w/]*[-\w]/)?[-\w]+-v\d+", args.env_id):
            fail(f"--env-id {args.env_id}: with --policy, name the new data set, such as mujoco/hopper/sac-flow-v0")
        return "minari"
    if args.env_id in TASKS:
        return "robosuite"
    if play_set(args.env_id) in {f"{name}-play-v0" for name in P_STACK}:
        return "ogbench"
    fail(f"--env-id {args.env_id}: not {', '.join(TASKS)} or one of {', '.join(P_STACK)} with -play-v0 after it")


def parse_args() -> Args:
    """Flags, with their defaults filled in."""
    args = read_flags(Args, __doc__)
    kind = kind_of(args)
    for name, least in dict(episodes=1, workers=1, rows=2, seed=0).items():
        if getattr(args, name) < least:
            fail(f"--{name} must be {least} or more, not {getattr(args, name)}")
    noise = args.noise
    if noise is None:
        noise = TASKS[args.env_id].noise if kind == "robosuite" else {"ogbench": 0.1, "minari": 0.0}[kind]
    if not 0 <= noise < math.inf:
        fail(f"--noise must be 0 or more, not {noise}")
    if kind == "minari":
        root = args.out or Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
        out = root / args.env_id
    else:
        out = args.out or Path("data") / f"{play_set(args.env_id)}-{args.episodes}{KINDS[kind].suffix}"
        if out.suffix != KINDS[kind].suffix:
            fail(f"--out {out}: the name must end in {KINDS[kind].suffix}")
    return replace(args, noise=noise, out=out)


def settings_of(args: Args) -> dict:
    """All that determines the episodes, including package versions; stops the program if a package is missing."""
    kind = kind_of(args)
    versions = {}
    for package in KINDS[kind].packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            fail(f"{package} is missing: {INSTALL}")
    settings = dict(env_id=play_set(args.env_id), episodes=args.episodes, seed=args.seed, noise=args.noise, **versions)
    settings["collect.py"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if kind == "ogbench":
        settings["rows"] = args.rows
    if kind == "minari":
        import gradient_norms

        gradient_norms.described(args.policy)
        file = args.policy if args.policy.suffix == ".pt" else args.policy / "policy.pt"
        try:
            settings["policy"] = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            fail(f"--policy {args.policy}: {error.strerror} (policy.pt)")
    return settings


@cache
def player_of(args: Args) -> Callable:
    """This process's environment and expert."""
    return KINDS[kind_of(args)].player(args)


def collect(args: Args, parts: Path, i: int) -> int:
    """Play episode i until it succeeds and keep it as <parts>/<i>.npz; returns the number of failed attempts."""
    for attempt in range(ATTEMPTS):
        seed = int(np.random.SeedSequence((args.seed, i, attempt)).generate_state(1)[0])
        if (episode := player_of(args)(seed)) is not None:
            temporary = parts / f"{i}.{os.getpid()}.tmp"
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **episode, failures=attempt)
            os.replace(temporary, parts / f"{i}.npz")
            return attempt
    raise RuntimeError(f"episode {i}: no success in {ATTEMPTS} attempts; with less --noise the expert is better")


def follow_parent() -> None:
    """End this worker when its parent ends, however that happens."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def collect_all(args: Args, parts: Path, missing: list[int], bar) -> None:
    """Play the missing episodes in args.workers processes."""
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", NUMBA_NUM_THREADS="1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.workers, len(missing)), context, follow_parent) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: Ctrl-C is for this process
        futures = [pool.submit(collect, args, parts, i) for i in missing]
        signal.signal(signal.SIGINT, handler)
        try:
            failures = 0
            for future in as_completed(futures):
                failures += future.result()
                bar.update()
                bar.set_postfix(failed=failures, refresh=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def keep_settings(parts: Path, settings: dict) -> None:
    """Make the folder of parts for these settings; stops the program if it exists for others."""
    parts.mkdir(parents=True, exist_ok=True)
    known = parts / "settings.json"
    if not known.exists():
        (parts / "settings.tmp").write_text(json.dumps(settings))
        os.replace(parts / "settings.tmp", known)
    kept = json.loads(known.read_text())
    for name in {**kept, **settings}:
        if kept.get(name) != settings.get(name):
            was = f"{name} {kept.get(name)}, not {settings.get(name)}"
            fail(f"{parts} holds episodes of other settings ({was}): remove it or choose another --out")


def run(args: Args, parts: Path) -> None:
    """Play what is missing in `parts`, then write the data set and remove `parts`."""
    kind = KINDS[kind_of(args)]
    total = args.episodes
    outs = {args.out: range(total)}
    if kind.write is write_npz:
        total += max(1, args.episodes // 10)
        outs[args.out.with_name(f"{args.out.stem}-val.npz")] = range(args.episodes, total)
    for out in outs:
        if out.exists() and not parts.exists():  # else it is from a merge that was interrupted
            fail(f"{out} exists: move it away or choose another --out")
    keep_settings(parts, settings_of(args))
    missing = [i for i in range(total) if not (parts / f"{i}.npz").exists()]
    done = total - len(missing)
    pause = 0.1 if sys.stderr.isatty() else 60  # seconds: a log file gets a line a minute
    with tqdm(total=total, initial=done, unit="episode", dynamic_ncols=True, mininterval=pause) as bar:
        if missing:
            collect_all(args, parts, missing, bar)
    for out, episodes in outs.items():
        files = [parts / f"{i}.npz" for i in episodes]
        rows = kind.write(args, files, parts / "merged")
        if out.is_dir():  # Minari's, of a merge that was interrupted
            shutil.rmtree(out)
        os.replace(parts / "merged", out)
        failures = sum(int(np.load(file)["failures"]) for file in files)
        print(f"saved {out}: {len(files)} episodes, {rows} rows; failed attempts left out: {failures}")
    shutil.rmtree(parts)


def main() -> None:
    args = parse_args()
    parts = args.out.with_name(f"{args.out.name}.parts")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill is handled as Ctrl-C is
    try:
        run(args, parts)
    except KeyboardInterrupt:
        print(f"stopped; {parts} keeps the finished episodes: run the command again", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenProcessPool:
        fail(f"a worker was killed (out of memory?); {parts} keeps the finished episodes: run the command again")
    except OSError as error:
        fail(f"cannot write {error.filename or args.out}: {error.strerror or error}")
    except Exception as error:  # a simulator may raise anything
        fail(f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}")


if __name__ == "__main__":
    main()
