"""Environments that no loader knows, for test_any_data.py: `--env-id goal_envs:Reach-v0`."""

import gymnasium as gym
import numpy as np

Box = gym.spaces.Box


class Reach(gym.Env):
    """Move a point to a goal, both in [-1, 1]^2, by at most 0.2 a step and axis; its dict of observations is nested.

    Reward -1, and 0 once it is within 0.2 of the goal, which terminates; `half`: it starts in the left half.
    """

    observation_space = gym.spaces.Dict(
        position=Box(-1, 1, (2,), np.float64),
        goal=gym.spaces.Dict(x=Box(-1, 1, (1,), np.float64), y=Box(-1, 1, (1,), np.float64)),
    )
    action_space = Box(-1, 1, (2,), np.float32)

    def __init__(self, half: bool = False):
        self.half = half

    def obs(self):
        return dict(position=self.position.copy(), goal=dict(x=self.goal[:1].copy(), y=self.goal[1:].copy()))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        if self.half:
            self.position[0] = -abs(self.position[0])
        return self.obs(), {"is_success": False}

    def step(self, action):
        self.position = np.clip(self.position + 0.2 * np.clip(action, -1, 1), -1, 1)
        success = bool(np.abs(self.position - self.goal).max() < 0.2)
        return self.obs(), float(success) - 1, success, False, {"is_success": success}


class Unbounded(Reach):
    """`Reach` with actions in any unit of length, 1 being 0.2."""

    action_space = Box(-np.inf, np.inf, (2,), np.float64)


class Huge(Reach):
    """`Unbounded` as some libraries write it, with the largest numbers for bounds."""

    action_space = Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,), np.float32)


class Narrow(Reach):
    """`Reach` with tiny actions."""

    action_space = Box(-5e-4, 5e-4, (2,), np.float32)


class Unplugged(Reach):
    """A robot that is not there."""

    def reset(self, *, seed=None, options=None):
        raise RuntimeError("robot not connected")


gym.register("Huge-v0", Huge, max_episode_steps=15)
gym.register("Narrow-v0", Narrow, max_episode_steps=15)
gym.register("Unplugged-v0", Unplugged, max_episode_steps=15)
gym.register("Reach-v0", Reach, max_episode_steps=15)
gym.register("Unbounded-v0", Unbounded, max_episode_steps=15)
gym.register("Timeless-v0", Reach)
