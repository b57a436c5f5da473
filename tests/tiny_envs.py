"""Small environments that the tests register: `--env-id tiny_envs:<name>`."""

import builtins
import sys
import time

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, RecordEpisodeStatistics


class Scripted(gym.Env):
    """Observation (episode, t, 7). Even episodes terminate at t = 5, odd ones are truncated at t = 7; reward is t."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 4], np.float32))

    def __init__(self, bad: str = "", bad_step: int = 0):
        """`bad` is what goes wrong at step `bad_step` of the environment's life, or at every reset after it."""
        self.episode, self.steps, self.bad, self.bad_step = -1, 0, bad, bad_step

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        bad = self.bad == "reset" and self.steps > self.bad_step
        return np.array([self.episode, 0, np.nan if bad else 7.0]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t, self.steps = self.t + 1, self.steps + 1
        bad = self.bad if self.steps == self.bad_step else ""
        obs = np.array([self.episode, self.t, {"observation": np.nan, "vast": 1e39}.get(bad, 7.0)])
        terminated, truncated = self.episode % 2 == 0 and self.t == 5, self.t == 7
        reward = {"reward": np.nan, "infinite": np.inf, "huge": 1e39}.get(bad, self.t)
        return obs, reward, terminated, truncated, {}


class Renewing(Scripted):
    """`Scripted` whose action space is a new one at each access, as OGBench's."""

    @property
    def action_space(self):
        return gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 4], np.float32))


class Recorded(Scripted):
    """`Scripted` that keeps the seeds of its resets and the buffer's rows of its steps; a termination is a success."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    made = []  # every one of them

    def __init__(self, render_mode=None, **bad):
        super().__init__(**bad)
        self.render_mode, self.seeds, self.rows = render_mode, [], []
        self.made.append(self)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.obs, info = super().reset(seed=seed)
        return self.obs, info

    def step(self, action):
        before, (self.obs, reward, terminated, truncated, _) = self.obs, super().step(action)
        self.rows.append([*before, *action, reward, terminated, terminated or truncated, *self.obs])
        return self.obs, reward, terminated, truncated, {"success": terminated}

    def render(self):
        return np.full((64, 64, 3), 20 * self.t, np.uint8)


class Home(gym.Env):
    """Walk on a line in steps of at most 0.5 for 10 steps, then truncated; the reward is -|x| of before the step.

    So an action never changes its own reward, only those after it: it is learned by bootstrapping alone.
    """

    observation_space = gym.spaces.Box(-4, 4, (1,), np.float64)
    action_space = gym.spaces.Box(-0.5, 0.5, (1,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-2, 2), 0
        return np.array([self.x]), {}

    def step(self, action):
        reward, self.t = -abs(self.x), self.t + 1
        self.x = float(np.clip(self.x + action[0], -4, 4))
        return np.array([self.x]), reward, False, self.t == 10, {}


class Failing(Scripted):
    """`Scripted` that fails at step 60 of its life as careless environments do."""

    def reset(self, *, seed=None, options=None):
        if self.bad == "start" and self.steps > 60:
            raise RuntimeError("the arm fell off\nand much more")
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.steps == 60:
            if self.bad in ("RuntimeError", "OSError", "AssertionError"):
                raise vars(builtins)[self.bad]("the arm fell off\nand much more")
            if self.bad == "SystemExit":
                raise SystemExit(0)
            if self.bad == "values":
                return obs, reward, terminated, info
            reward = None if self.bad == "none" else reward
            obs = obs[:2] if self.bad == "shape" else obs
        return obs, reward, terminated, truncated, info


class Endless(Home):
    """`Home` without an end, every step a hundredth of a second."""

    def step(self, action):
        time.sleep(0.01)
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


class Absent(Home):
    """A robot that is not there."""

    def reset(self, *, seed=None, options=None):
        raise RuntimeError("robot not connected\nand much more")


class Episodic(Home):
    """`Home` that counts its episodes under a name that gymnasium's wrapper takes, too."""

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        return obs, {"episode": 3}


class Windowless(Home):
    """`Home` that cannot be drawn, and says so as gymnasium's own environments do."""

    metadata = {"render_modes": []}

    def __init__(self, render_mode=None):
        assert render_mode is None or render_mode in self.metadata["render_modes"]


class InPlace(Home):
    """`Home` whose observation is one float32 array, changed in place, as careless environments do."""

    observation_space = gym.spaces.Box(-4, 4, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.obs = super().reset(seed=seed)[0].astype(np.float32)
        return self.obs, {}

    def step(self, action):
        obs, *rest = super().step(action)
        self.obs[:] = obs
        return self.obs, *rest


class Dice(Home):
    """`Home` with a die thrown into every reward by numpy's global generator, as careless environments do."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + np.random.randint(1, 7), *rest


def spaces(observation=None, action=None):
    """`Scripted` with another space."""
    spaces = {"observation_space": observation, "action_space": action}
    return type("Spaces", (Scripted,), {name: space for name, space in spaces.items() if space is not None})


Box, Discrete, Dict = gym.spaces.Box, gym.spaces.Discrete, gym.spaces.Dict
gym.register("Scripted-v0", Scripted, max_episode_steps=100)
gym.register("BadReward-v0", Scripted, kwargs={"bad": "reward", "bad_step": 60}, max_episode_steps=100)
gym.register("BadObservation-v0", Scripted, kwargs={"bad": "observation", "bad_step": 60}, max_episode_steps=100)
gym.register("BadReset-v0", Scripted, kwargs={"bad": "reset", "bad_step": 60}, max_episode_steps=100)
gym.register("InfiniteReward-v0", Scripted, kwargs={"bad": "infinite", "bad_step": 60}, max_episode_steps=100)
gym.register("HugeReward-v0", Scripted, kwargs={"bad": "huge", "bad_step": 60}, max_episode_steps=100)
gym.register("HugeObservation-v0", Scripted, kwargs={"bad": "vast", "bad_step": 60}, max_episode_steps=100)
for bad in ("RuntimeError", "OSError", "AssertionError", "SystemExit", "values", "none", "shape", "start"):
    gym.register(f"Failing-{bad}-v0", Failing, max_episode_steps=100, kwargs={"bad": bad})
gym.register("Home-v0", "tiny_envs:Home")  # by name, as Minari needs it
gym.register("Recorded-v0", "tiny_envs:Recorded")
gym.register("NormalizedObservation-v0", lambda: NormalizeObservation(Home()))
gym.register("NormalizedReward-v0", lambda: NormalizeReward(Home()))
gym.register("Episodic-v0", lambda: RecordEpisodeStatistics(Episodic()))
gym.register("Windowless-v0", Windowless)
gym.register("Dice-v0", Dice)
gym.register("InPlace-v0", InPlace)
gym.register("Renewing-v0", Renewing, max_episode_steps=100)
gym.register("Absent-v0", Absent, max_episode_steps=9)
gym.register("Endless-v0", Endless)
gym.register("Broken-v0", lambda: 1 / 0)
gym.register("Exits-v0", lambda: sys.exit(0))
gym.register("DiscreteObservation-v0", spaces(observation=Discrete(4)), max_episode_steps=100)
gym.register("DictObservation-v0", spaces(observation=Dict(x=Box(-1, 1, (3,)))), max_episode_steps=100)
gym.register("ImageObservation-v0", spaces(observation=Box(0, 255, (8, 8, 3), np.uint8)), max_episode_steps=100)
gym.register("DiscreteAction-v0", spaces(action=Discrete(4)))
gym.register("UnboundedAction-v0", spaces(action=Box(-np.inf, np.inf, (2,))), max_episode_steps=100)
huge = np.finfo(np.float32).max
gym.register("HugeAction-v0", spaces(action=Box(-huge, huge, (2,))), max_episode_steps=100)
gym.register("NoAction-v0", spaces(action=Box(-1, 1, (0,))), max_episode_steps=100)
