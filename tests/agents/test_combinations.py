"""Every agent with every policy and every distribution, from the configs: it runs two updates, or an error says why."""

from __future__ import annotations

import itertools
import sys
import zlib
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from hydra import compose, initialize_config_dir

from agents.training import Collector, Prompts
from dllm_gym.deciders import OnePosition, PolicyDecider, TopK
from dllm_gym.tasks import Sudoku

ROOT = Path(__file__).parents[2]


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml"))


ONE_BY_ONE = ("dpls", "one_position")  # ordered or single picks: a set of several is no action of theirs
TAUGHT = ("grpo_es", "imitation", "ontrack")
FORCED = ("gt_margin", "sas")  # need teacher forcing
REASONS = {
    **{("upo", d): "use distribution=one_position" for d in choices("distribution") if d != "one_position"},
    **{(a, d): "never takes the actions of the expert" for a in TAUGHT for d in ONE_BY_ONE},
}


class Checksum(Sudoku):
    """Grades any text by its checksum: half of the answers are right, all other episodes differ."""

    def grade(self, example, completion):
        return min(1.0, zlib.crc32(completion.encode()) % 1000 / 500)


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(ROOT / "scripts"))
    import factory
    import training_run

    yield factory, training_run
    sys.path.remove(str(ROOT / "scripts"))


def make_envs(**more):
    """Sees all that any policy reads; three steps are enough to learn from."""
    return gym.make_vec(
        "DLLMUnmask-v0",
        num_envs=9,
        task=Checksum(min_givens=2),
        top_k=8,
        hidden=True,
        tokens=True,
        alpha=[0.1, 10],
        block_input=True,
        max_episode_steps=3,
        **more,
    )


@pytest.fixture(scope="module")
def envs():
    return make_envs()


@pytest.fixture(scope="module")
def forced():
    return make_envs(teacher_forcing=True)


def two_updates(scripts, envs, *overrides):
    """Metrics of two rounds of a composed configuration, and the policy."""
    shared, training = scripts
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("train", list(overrides))
    torch.manual_seed(0)
    policy = shared.make_policy(cfg)
    before = torch.cat([p.detach().flatten() for p in policy.parameters()])
    learner = training.make_learner(cfg, policy)
    collector = Collector(envs, Prompts(50, 0), 0, 3, 3)
    for _ in range(2):
        episodes = collector.collect(learner.algorithm, learner.player)
        metrics = learner.algorithm.update(episodes.batch, episodes.reward, episodes.group)
    return metrics, before, torch.cat([p.detach().flatten() for p in policy.parameters()])


POLICIES = [name for name in choices("policy") if name != "dit_confidence"]  # the same network as the small one


@pytest.mark.parametrize(
    ("agent", "policy", "distribution"),
    list(itertools.product(choices("agent"), POLICIES, choices("distribution"))),
)
def test_two_updates_or_a_reason(scripts, envs, forced, agent, policy, distribution):
    envs = forced if agent in FORCED else envs
    overrides = [f"agent={agent}", f"policy={policy}", f"distribution={distribution}"]
    if policy.endswith("_lup"):  # they do not begin as the identity: our rate throws them off in one step
        overrides.append("agent.algorithm.optimizer.lr=3e-5")
    if (agent, distribution) in REASONS:
        with pytest.raises(ValueError, match=REASONS[agent, distribution]):
            two_updates(scripts, envs, *overrides)
        return
    metrics, before, after = two_updates(scripts, envs, *overrides)
    assert metrics["gradient_steps"] >= 1
    assert after.isfinite().all() and not torch.equal(before, after)


@pytest.mark.parametrize(
    "overrides",
    [
        ("agent=upo", "reference=max_confidence"),
        ("agent=upo", "reference=top_k"),
        ("agent=upo", "reference=softmax_published", "agent.algorithm.normalize=false"),
        ("agent=upo", "reference=max_confidence_published"),
        ("agent=imitation", "expert=max_confidence", "distribution=one_position"),
        ("agent=imitation", "expert=max_confidence", "distribution=dpls"),
        ("agent=imitation", "expert=blockwise_threshold"),
        ("agent=grpo_es", "expert=threshold"),
        ("agent=grpo", "agent.algorithm.kl_scale=0.1", "agent.algorithm.clip_epsilon=[0.2,0.28]"),
    ],
    ids=" ".join,
)
def test_the_other_choices_of_an_agent(scripts, envs, overrides):
    metrics, before, after = two_updates(scripts, envs, *overrides)
    assert metrics["gradient_steps"] >= 1 and not torch.equal(before, after)


@pytest.mark.parametrize("policy", ["mlp", "upo_published"])
def test_a_run_may_begin_by_imitating_the_most_confident_position(scripts, envs, policy):
    shared, training = scripts
    settings = ["agent=upo", f"policy={policy}", "agent.imitation.rounds=6", "agent.algorithm.epochs=6"]
    settings += ["prompts_per_round=12", "agent.imitation.lr=5e-3", "agent.algorithm.optimizer.lr=0"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("train", [*settings, "agent.algorithm.max_grad_norm=1"])
    torch.manual_seed(0)
    network = shared.make_policy(cfg)
    observation, _ = envs.reset(seed=5)
    player, rule = PolicyDecider(network, OnePosition), TopK(1)
    wanted = rule(observation, None).to(torch.int8)

    @torch.no_grad()
    def likelihood() -> float:
        return float(player.distribution(observation).log_prob(wanted).mean())

    before = likelihood()
    training.imitate(cfg, envs, network)
    assert likelihood() > before + 0.3


@pytest.mark.parametrize("reference", ["softmax", "softmax_published", "max_confidence_published", "top_k"])
def test_the_vocabulary_of_a_reference_is_the_models_own(scripts, reference):
    shared, training = scripts
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("train", ["agent=upo", "policy=mlp", f"reference={reference}", "task=sudoku"])
    policy = shared.make_policy(cfg)
    used = training.make_learner(cfg, policy).algorithm.reference
    vocabulary = shared.make_dllm(cfg).vocab_size
    expected = {"softmax": 0, "softmax_published": vocabulary}
    assert getattr(used, "vocab_size", None) == expected.get(reference)


def test_the_top_k_reference_narrows_the_policy(scripts):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("train", ["agent=upo", "reference=top_k", "policy=mlp"])
        assert cfg.policy.candidates == cfg.reference.k == 5
        assert compose("train", ["agent=upo"]).policy.candidates is None
