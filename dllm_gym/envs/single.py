"""The Gymnasium face: one lane, numpy."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import MultiBinary

from dllm_gym import render
from dllm_gym.envs.dealer import check_alphas, check_example, check_options, draw
from dllm_gym.envs.spaces import check_action, observation_space
from dllm_gym.process.config import EnvConfig
from dllm_gym.process.unmasking import Unmasking


class DLLMUnmaskEnv(gym.Env):
    """Decide which tokens of a masked-diffusion language model to commit, and when.

    >>> import gymnasium as gym, dllm_gym
    >>> env = gym.make("DLLMUnmask-v0", task="sudoku", alpha=1.0)
    >>> observation, info = env.reset(seed=0)
    >>> while True:
    ...     sure = observation["confidence"][:, 0] > 0.9
    ...     action = (sure | ~sure.any()) & (observation["action_mask"] == 1)
    ...     observation, reward, terminated, truncated, info = env.step(action)
    ...     if terminated or truncated:
    ...         break
    >>> sorted(info["episode"])
    ['example', 'l', 'r', 'score']

    ## Description
    A frozen dLLM fills a completion of L mask tokens after a prompt. At every step it predicts all masked positions at
    once; the action chooses which of its proposals are committed, the rest stays masked. Committing much at once is
    fast and risks tokens that do not fit each other; committing little is slow. (*Learning Unmasking Policies for
    Diffusion Language Models*, arXiv 2512.09106, section 3.)

    ## Action Space
    ``MultiBinary(L)``: 1 unmasks. Bits where ``action_mask`` is 0 (already committed, or outside the active block) are
    ignored. An action without a legal bit commits nothing: it costs a step and no forward of the dLLM.

    ## Observation Space
    ``Dict``:

    - ``confidence`` float32 [L, K]: the K largest probabilities of the dLLM at every masked position, descending;
      committed positions read 1, 0, ..., 0, or (``committed_confidence=True``) the largest probabilities there, too.
    - ``mask`` int8 [L]: 1 where the position is still masked.
    - ``action_mask`` int8 [L]: 1 where it may be unmasked now: masked and in the active block.
    - ``time`` float32 [1]: steps / L.

    On request:

    - ``entropy`` float32 [L] (``entropy=True``): Shannon entropy in nats of the dLLM's distribution at every masked
      position; committed positions read 0.
    - ``margin`` float32 [L] (``margin=True``): the largest probability minus the second largest; committed: 1.
    - ``kl`` float32 [L, H] (``kl=H``): KL(p_t || p_{t-1}) in nats between the distributions of successive steps of the
      episode, the last H of them, newest first (KLASS, arXiv 2511.05664). 100, the most that is shown, where the
      episode has had fewer steps, 0 for a step that unmasked nothing; committed positions read 0. It keeps L * V * 4
      bytes per lane.
    - ``true_log_prob``, ``true_margin`` (``teacher_forcing=True``): how likely the dLLM holds the token of the right
      completion, which is what will be committed there.
      ``true_log_prob`` float32 [L] is its log-probability, -100 at least (committed: 0),
      ``true_margin`` float32 [L] its probability minus the largest of all other tokens (committed: 1).
    - ``committed`` float32 [L] (``committed=True``): the largest probability at the time when the position was
      committed; masked positions, and those that no action committed, read 0.
    - ``tokens`` int64 [L] (``tokens=True``): the tokens of the completion, at masked positions those that would be
      committed now.
    - ``hidden`` float32 [L, d] (``hidden=True``): the dLLM's last hidden states.
    - ``block_input`` float32 [L, d] (``block_input=True``): what the dLLM's last block reads.
    - ``preference`` float32 [1] (``alpha=[low, high]``): where in the range the episode's alpha lies, on a logarithmic
      scale: 0 is low (quality counts), 1 is high (speed counts). Every episode draws its own, unless
      ``reset(options={"alpha": ...})`` chooses it.

    With ``lookahead=False`` masked positions that may not be unmasked now read 0 in all of these but ``hidden``
    and ``block_input``, and the mask in ``tokens``.

    ``confidence``, ``entropy``, ``margin`` and ``kl`` describe the untempered distribution, in which tokens that are
    never proposed (the mask, padding) have no probability; they are computed in float32.

    ## State
    What the next steps depend on; what is observed of it is above. Per lane: the prompt and the completion so far
    (``core.tokens``), the number of steps (``core.steps``), the episode's random stream (``core.key``; for tokens at a
    temperature), its alpha where there is a range, with ``kl`` the distributions of the step before, with ``committed``
    the probabilities of committed tokens, and with ``cache`` the stored keys and values. Beside them the generator that
    draws the next example and stream (``np_random``; in many lanes one generator each and the queue:
    :class:`~dllm_gym.envs.dealer.Dealer`). Proposals and confidences are no state: they follow from the tokens, stream
    and step.

    ## Starting State
    All L positions masked, after the prompt of an example drawn from ``split`` with the environment's generator, or of
    ``reset(options={"examples": i})``. Where the task has a template for the example, its blanks alone are masked: the
    other positions are given, committed from the start.

    ## Rewards
    0 until the episode ends; then ``reward`` of the task's score in [0, 1], the number of steps T and L:
    ``"multiplicative"`` score * ((L - min(T, L) + 1) / L) ** alpha, or ``"additive"`` score - alpha * T / L. With a
    template L is the number of blanks here.

    ## Episode End
    Terminated when no mask is left; truncated after ``max_episode_steps`` steps, or (``steps_per_block``) when all
    blocks with masks have had their steps (what stands then is graded).

    ## Information
    When an episode ends, ``info["episode"]`` holds ``r`` (reward), ``l`` (NFE: steps in which a mask was left),
    ``score`` and ``example`` (its index in the split). The text is read with :meth:`last_completion`.

    ## Arguments
    The fields of :class:`~dllm_gym.process.config.EnvConfig` (``model, task, split, gen_length, max_prompt_length,
    cut_prompts, block_length, block_origin, top_k, temperature, reward, alpha, max_episode_steps, steps_per_block,
    committed_confidence, stop_at_eos, lookahead, cache, teacher_forcing, hidden, block_input, entropy, margin,
    committed, tokens, kl, device, dtype``) and ``render_mode``.
    ``gym.make`` keeps ``max_episode_steps`` for its own ``TimeLimit`` wrapper, which cuts an episode from outside,
    ungraded; construct ``DLLMUnmaskEnv(max_episode_steps=...)`` (or use ``gym.make_vec``) for a limit that is part of
    the process.

    Raises:
        ValueError: a setting is wrong.

    ## Version History
    v0: first version.
    """

    metadata: dict[str, Any] = {"render_modes": [*render.WRITERS, "human"], "render_fps": 4}

    def __init__(self, render_mode: str | None = None, **settings: Any):
        self.render_mode = render.check_mode(render_mode, self.metadata["render_modes"])
        self.core = Unmasking(1, EnvConfig.of(settings))
        self.observation_space = observation_space(self.core)
        self.action_space = MultiBinary(self.core.L)
        self._over: bool | None = None  # None: never reset
        self._viewer = render.Viewer(fps=self.metadata["render_fps"]) if render_mode == "human" else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; ``options["examples"]`` chooses the example by its index in the split, ``options["alpha"]``
        the speed weight where there is a range of them."""
        super().reset(seed=seed)
        example, key = draw(self.np_random, len(self.core.examples))
        options = check_options(options, ("examples", "alpha"))
        chosen = options.get("examples")
        if chosen is not None:
            chosen = chosen[0] if np.ndim(chosen) == 1 and len(chosen) == 1 else chosen  # [i] means the same as i
            example = check_example(chosen, len(self.core.examples))
        self.core.begin([0], [example], [key], check_alphas(options, self.core.alpha_range, 1))
        self._over = False
        self.core.predict()
        self._watch()
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Unmask the chosen positions.

        Args:
            action: integers or bools [L]; 1 unmasks.

        Raises:
            ValueError: wrong shape or dtype. gymnasium.error.ResetNeeded: no episode is running.
        """
        if self._over is not False:
            raise gym.error.ResetNeeded("step() was called before reset()" if self._over is None else "episode is over")
        self.core.commit(check_action(action, (self.core.L,), self.core.dllm.device)[None])
        outcome = self.core.settle()
        self._over = bool(outcome.done[0])
        info = {}
        if self._over:
            info["episode"] = {
                "r": float(outcome.reward[0]),
                "l": int(outcome.nfe[0]),
                "score": float(outcome.score[0]),
                "example": int(outcome.example[0]),
            }
            if self.core.alpha_range is not None:
                info["episode"]["alpha"] = float(outcome.alpha[0])
        self.core.predict()
        self._watch()
        terminated, truncated = bool(outcome.terminated[0]), bool(outcome.truncated[0])
        return self._observation(), float(outcome.reward[0]), terminated, truncated, info

    def _observation(self) -> dict[str, np.ndarray]:
        return {name: value[0].cpu().numpy() for name, value in self.core.observe().items()}

    def action_masks(self) -> np.ndarray:
        """bool [2 L]: for every position whether its bit may be 0 (always), and whether it may be 1.

        This is how sb3-contrib's MaskablePPO wants to be told about a MultiBinary action space.
        """
        legal = self.core.observe()["action_mask"][0].cpu().numpy().astype(bool)  # (L,)
        return np.stack([np.ones_like(legal), legal], -1).reshape(-1)

    def last_completion(self) -> str | None:
        """The text of the last finished episode (None before the first)."""
        return self.core.completions[0]

    def render(self) -> Any:
        """A text (ansi), a uint8 array [H, W, 3] (rgb_array), or None (human: every step shows itself).

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._over is None:
            raise gym.error.ResetNeeded("render() was called before reset()")
        return render.WRITERS[self.render_mode](self.core.frame(0)) if self.render_mode in render.WRITERS else None

    def _watch(self) -> None:
        if self._viewer:
            self._viewer.show(self.core.frame(0))

    def close(self) -> None:
        """Close the window of ``render_mode="human"``; weights are shared within the process and stay."""
        if self._viewer:
            self._viewer.close()
