"""Small environments that the tests register: `--env-id tiny_envs:<name>`."""

import gymnasium as gym
import numpy as np


class Scripted(gym.Env):
    """Observation (episode, t, 7). Even episodes terminate at t = 5, odd ones are truncated at t = 7; reward is t."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([2, 4], np.float32))

    def __init__(self, bad: str = "", bad_step: int = 0, render_mode=None):
        """`bad` (reward, observation) turns NaN at step `bad_step` of the environment's life."""
        self.episode, self.steps, self.bad, self.bad_step = -1, 0, bad, bad_step

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0, 7.0]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t, self.steps = self.t + 1, self.steps + 1
        bad = self.bad if self.steps == self.bad_step else ""
        obs = np.array([self.episode, self.t, np.nan if bad == "observation" else 7.0])
        terminated, truncated = self.episode % 2 == 0 and self.t == 5, self.t == 7
        return obs, np.nan if bad == "reward" else self.t, terminated, truncated, {}


class Reach(gym.Env):
    """One-step task: the observation is a target in [-1, 1]^2, the reward minus the squared distance of the action."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(np.array([-1, -3], np.float32), np.array([2, 1], np.float32))

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.target, {}

    def step(self, action):
        return self.target, -float(np.square(action - self.target).sum()), True, False, {}


def spaces(observation=None, action=None):
    """`Scripted` with another space."""
    spaces = {"observation_space": observation, "action_space": action}
    return type("Spaces", (Scripted,), {name: space for name, space in spaces.items() if space is not None})


Box, Discrete, Dict = gym.spaces.Box, gym.spaces.Discrete, gym.spaces.Dict
gym.register("Scripted-v0", Scripted)
gym.register("BadReward-v0", Scripted, kwargs={"bad": "reward", "bad_step": 60})
gym.register("BadObservation-v0", Scripted, kwargs={"bad": "observation", "bad_step": 60})
gym.register("Reach-v0", Reach)
gym.register("DiscreteObservation-v0", spaces(observation=Discrete(4)))
gym.register("DictObservation-v0", spaces(observation=Dict(x=Box(-1, 1, (3,)))))
gym.register("ImageObservation-v0", spaces(observation=Box(0, 255, (8, 8, 3), np.uint8)))
gym.register("DiscreteAction-v0", spaces(action=Discrete(4)))
gym.register("UnboundedAction-v0", spaces(action=Box(-np.inf, np.inf, (2,))))
