"""Wrong settings of every command and constructor: each is refused by name, in one line, before any work.

A line of the tables is a command and its arguments, then what the refusal has to say.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import dllm_gym  # noqa: F401
from dllm_gym.models import load_dllm
from dllm_gym.tasks import GSM8K, Arithmetic, HumanEval, Mixture, ReasoningGym, Sudoku, SudokuFile

ROOT = Path(__file__).parents[2]

COMMANDS = """
train +rond=3                                            | rond is read by nothing: did you mean rounds?
train rond=3                                             | rond is no setting: did you mean rounds?
train +env.foo=1                                         | env.foo is read by nothing
train +env.block_lenght=5                                | did you mean env.block_length?
train +env.split=test                                    | env.split is read by nothing
train +env.model=tiny                                    | env.model is read by nothing
train +env.dtype=float32                                 | dtype is chosen with model.dtype
train +env.num_envs=4                                    | env.num_envs is read by nothing
train +reward.beta=1                                     | reward.beta is read by nothing
train +model.device=cpu                                  | model.device is read by nothing
train +model.quantisation=int4                           | did you mean model.quantization?
train +task.foo=1                                        | task.foo is read by nothing
train +task.min_given=1                                  | did you mean task.min_givens?
train task=gsm8k_math +task.tasks.gsm8k.shot=2           | shot
train +policy.depth=2                                    | policy.depth is read by nothing
train +agent.grup_size=4                                 | did you mean agent.group_size?
train +agent.algorithm.epoch=1                           | epoch
train +agent.algorithm.optimizer.rl=1                    | agent.algorithm.optimizer.rl is read by nothing
train +agent.algorithm.scheduler.warmup=1                | agent.algorithm.scheduler.warmup is read by nothing
train +distribution.temprature=1                         | did you mean distribution.temperature?
train +evaluation.sedes=[1]                              | did you mean evaluation.seeds?
train evaluation.sedes=[1]                               | did you mean evaluation.seeds?
train +checkpoints.keeep=2                               | did you mean checkpoints.keep?
train +logger.name=x                                     | logger.name is read by nothing
train +expert=threshold                                  | expert
train +reference=softmax                                 | reference
train agent=imitation +expert.limit=1                    | limit
train agnt=grpo                                          | agnt is no setting: did you mean agent?
train experiment=quick                                   | experiment=quick is for another command
train experiment=_lup                                    | experiment=_lup is only a part
train agent=_base                                        | agent=_base is only a part
train task=_dataset                                      | task=_dataset is only a part
train agent=gpro                                         | agent/gpro
train task=sudoko                                        | task/sudoko
train env=full                                           | env/full
train model=gpt                                          | model/gpt
train policy=cnn                                         | policy/cnn
train logger=mlfow                                       | logger/mlfow
train heuristics=some                                    | heuristics/some
train agent=                                             | agent
train env=5                                              | Config group override must be a string
train evaluation=5                                       | evaluation=5
train evaluation=null                                    | evaluation=None
train agent.algorithm=3                                  | agent.algorithm=3
train agent.algorithm.optimizer=adam                     | agent.algorithm.optimizer='adam'
train policy._target_=dllm_gym.deciders.networks.Nothing   | policy._target_='dllm_gym.deciders.networks.Nothing'
train agent.algorithm._target_=7                         | agent.algorithm._target_
train ~evaluation                                        | evaluation is missing
train ~seed                                              | seed is missing
train ~evaluation.seeds                                  | evaluation.seeds is missing
train seed=???                                           | seed=??? has to be given
train seed=[                                             | seed=[
train seed=${rnds}                                       | rnds
train seed=x                                             | seed='x'
train seed=-1                                            | seed=-1
train seed=1.5                                           | seed=1.5
train seed=true                                          | seed=True
train seed=null                                          | seed=None
train seed=99999999999999999999                          | seed=99999999999999999999
train rounds=0                                           | rounds=0
train rounds=many                                        | rounds='many'
train rounds=2.5                                         | rounds=2.5
train rounds=nan                                         | rounds=nan
train rounds=inf                                         | rounds=inf
train rounds=[3]                                         | rounds=[3]
train prompts_per_round=0                                | prompts_per_round=0
train prompts_per_round=-4                               | prompts_per_round=-4
train num_envs=0                                         | num_envs=0
train num_envs=100000000000                              | num_envs=100000000000
train num_envs=no                                        | num_envs='no'
train checkpoint_every=0                                 | checkpoint_every=0
train checkpoint_minutes=0                               | checkpoint_minutes=0
train checkpoint_minutes=soon                            | checkpoint_minutes='soon'
train checkpoints.keep=0                                 | checkpoints.keep=0
train checkpoints.validation=0                           | checkpoints.validation=0
train trust=mine                                         | trust='mine'
train max_prompt_length=0                                | max_prompt_length=0
train max_prompt_length=long                             | max_prompt_length='long'
train max_prompt_length=1                                | max_prompt_length=1
train threads=0                                          | threads=0
train threads=1.5                                        | threads=1.5
train threads=100000                                     | threads=100000
train device=warp                                        | device='warp'
train device=cuda:99                                     | device='cuda:99'
train device=0                                           | device=0
train resume=nowhere                                     | resume='nowhere'
train agent.warm_start=nowhere                           | agent.warm_start='nowhere'
train agent.warm_start=7                                 | agent.warm_start=7
train agent.group_size=0                                 | agent.group_size=0
train agent.group_size=1                                 | agent.group_size must be at least 2
train agent.group_size=two                               | agent.group_size='two'
train agent.max_batches=0                                | agent.max_batches=0
train agent=ppo agent.max_batches=2                      | agent.max_batches=2
train agent=upo distribution=dpls                        | distribution=one_position
train agent=upo                                          | reward.alpha=8.0
train agent=upo reward.alpha=1                           | reward.alpha=1
train agent=upo reward=additive                          | reward.alpha=
train agent=grpo distribution=one_position reward.alpha=.1 | reward.alpha=0.1
train experiment=upo_sudoku reward.alpha=0.5             | reward.alpha=0.5
train agent.imitation.rounds=-1                          | agent.imitation.rounds=-1
train agent.imitation.lr=0                               | agent.imitation.lr=0
train agent.imitation.rounds=2 agent.warm_start=RUN      | agent.warm_start='RUN'
train evaluation.greedy=often                            | evaluation.greedy='often'
train agent=upo reference=top_k policy.candidates=3      | policy.candidates=5
train agent=upo reference.temperature=0                  | temperature=0
train agent=upo agent.algorithm.beta=-1                  | beta=-1
train agent=ppo agent.algorithm.gamma=2                  | gamma=2
train agent=ppo agent.algorithm.lmbda=x                  | agent.algorithm.lmbda='x'
train agent=ppo agent.algorithm.critic_scale=0           | critic_scale=0
train agent=a2c agent.algorithm.entropy_scale=nan        | entropy_scale=nan
train agent=reinforce +agent.algorithm.epochs=2          | epochs=2
train agent=imitation expert.threshold=2                 | threshold=2
train agent=imitation expert.threshold=high              | expert.threshold='high'
train agent.algorithm.epochs=0                           | epochs=0
train agent.algorithm.epochs=1.5                         | epochs=1.5
train agent.algorithm.clip_epsilon=[0.1]                 | clip_epsilon=[0.1]
train agent.algorithm.clip_epsilon=0                     | clip_epsilon=0
train agent.algorithm.normalize=no                       | agent.algorithm.normalize='no'
train agent.algorithm.kl_scale=-1                        | kl_scale=-1
train agent.algorithm.max_grad_norm=0                    | max_grad_norm=0
train agent.algorithm.max_grad_norm=nan                  | max_grad_norm=nan
train agent.algorithm.chunk=0                            | chunk=0
train agent.algorithm.optimizer.lr=high                  | agent.algorithm.optimizer.lr='high'
train agent.algorithm.optimizer.lr=-1                    | -1
train agent.algorithm.optimizer.lr=inf                   | optimizer.lr=inf
train agent.algorithm.optimizer.lr=nan                   | agent.algorithm.optimizer.lr=nan
train agent.algorithm.optimizer.betas=[0.9]              | betas
train agent.algorithm.optimizer.betas=[0.9,1.5]          | beta
train agent.algorithm.optimizer.weight_decay=-1          | weight_decay
train agent.algorithm.scheduler.num_warmup_steps=x       | agent.algorithm.scheduler.num_warmup_steps='x'
train distribution.temperature=0                         | temperature=0
train distribution.temperature=hot                       | temperature='hot'
train distribution.evaluate_temperature=-1               | temperature=-1
train distribution.train=Bernoulli                       | distribution.train='Bernoulli'
train policy.width=wide                                  | policy.width='wide'
train policy.width=0                                     | width=0
train policy.width=30                                    | width=30
train policy.heads=0                                     | heads=0
train policy.ffn=-1                                      | ffn=-1
train policy.top_k=-1                                    | top_k=-1
train policy.top_k=21                                    | top_k=21
train policy.output_bias=inf                             | output_bias=inf
train policy.time_period=0                               | time_period=0
train policy.joint=maybe                                 | policy.joint='maybe'
train policy.preference=1                                | policy.preference=1
train policy.odds=-1                                     | odds=-1
train policy.haste=1                                     | haste=1
train policy.bound=-1                                    | bound=-1
train policy.blocks=0                                    | blocks=0
train policy.vocab_size=-1                               | vocab_size=-1
train task=equations task.operations=/                   | operations='/'
train task=one_way task.most_shown=2                     | most_shown=2
train policy.candidates=0                                | candidates=0
train policy.preference=true                             | reward.alpha=8.0
train policy=dit_hidden policy.hidden_size=7             | hidden_size=7
train policy.preference=false reward.alpha=[0.3,10]      | reward.alpha=[0.3, 10]
train reward.alpha=-1                                    | alpha=-1
train reward.alpha=fast                                  | reward.alpha='fast'
train reward.alpha=nan                                   | reward.alpha=nan
train reward.alpha=inf                                   | alpha=inf
train reward.alpha=[3,1] policy.preference=true          | alpha=[3, 1]
train reward.alpha=[0,1] policy.preference=true          | alpha=[0, 1]
train reward.alpha=[1,2,3] policy.preference=true        | alpha=[1, 2, 3]
train reward.alpha=true                                  | reward.alpha=True
train reward.reward=cubic                                | reward='cubic'
train evaluation.alphas=[1]                              | evaluation.alphas=[1]
train evaluation.alphas=[]                               | evaluation.alphas=[]
train evaluation.alphas=[1,1]                            | 1 is there twice
train policy.preference=true reward.alpha=[1,3] evaluation.alphas=[5] | evaluation.alphas=5
train evaluation.seeds=[]                                | evaluation.seeds=[]
train evaluation.seeds=[1,1]                             | 1 is there twice
train evaluation.seeds=42                                | evaluation.seeds=42
train evaluation.seeds=[x]                               | evaluation.seeds[0]='x'
train evaluation.seeds=[-1]                              | evaluation.seeds=-1
train evaluation.seeds=[99999999999999999999]            | 99999999999999999999
train evaluation.examples=0                              | evaluation.examples=0
train evaluation.examples=2.5                            | evaluation.examples=2.5
train evaluation.examples=100000                         | evaluation.examples=100000
train evaluation.num_envs=0                              | evaluation.num_envs=0
train evaluation.split=dev                               | split='dev'
train evaluation.split=3                                 | evaluation.split=3
train env.gen_length=4                                   | gen_length=4
train env.gen_length=0                                   | gen_length=0
train env.gen_length=long                                | env.gen_length='long'
train env.gen_length=100000                              | gen_length=100000
train task=arithmetic env.gen_length=4                   | gen_length=4
train env.block_length=7                                 | block_length=7
train env.block_length=0                                 | block_length=0
train env.temperature=-1                                 | temperature=-1
train env.temperature=nan                                | env.temperature=nan
train env.temperature=hot                                | env.temperature='hot'
train env.max_episode_steps=0                            | max_episode_steps=0
train env.stop_at_eos=perhaps                            | env.stop_at_eos='perhaps'
train env.lookahead=never                                | env.lookahead='never'
train +env.teacher_forcing=true                          | env.teacher_forcing=True: all answers would be right
evaluate +env.teacher_forcing=true                       | env.teacher_forcing=True: all answers would be right
watch +env.teacher_forcing=true                          | env.teacher_forcing=True: all answers would be right
train env.cache=big                                      | cache='big'
train env.cache=7                                        | env.cache=7
train +env.kl=-1                                         | kl=-1
train +env.kl=2 env.lookahead=false                      | lookahead=False
train +env.hidden=please                                 | env.hidden='please'
train model.model=nothing                                | model='nothing'
train model.dtype=float8                                 | dtype='float8'
train +model.compile=maybe                               | model.compile='maybe'
train +model.chat_template=maybe                         | model.chat_template='maybe'
train +model.rope_float32=maybe                          | model.rope_float32='maybe'
train +model.quantization=int3                           | quantization='int3'
train +model.mask_token=7                                | model.mask_token=7
train task.min_givens=-1                                 | min_givens=-1
train task.max_givens=17                                 | max_givens=17
train task.max_givens=few                                | task.max_givens='few'
train +task.sizes.train=0                                | sizes['train']=0
train +task.sizes.dev=5                                  | dev
train +task.sizes=5                                      | task.sizes=5
train task=arithmetic task.max_operations=0              | max_operations=0
train task=gsm8k task.data=nofile.jsonl                  | nofile.jsonl
train task=gsm8k task.shots=-1                           | shots=-1
train task=gsm8k task.held_out=2                         | held_out=2
train task=gsm8k task.prompt_style=html                  | prompt_style='html'
train task=gsm8k task.prefilled=maybe                    | task.prefilled='maybe'
train task=gsm8k task.max_prompt_chars=0                 | max_prompt_chars=0
train task=gsm8k_math task.weights={gsm8k:0,math:1}      | weights=
train task=gsm8k_math task.tasks.gsm8k.shots=many        | task.tasks.gsm8k.shots='many'
train task=sudoku4_csv                                   | sudoku4_csv
train task=sudoku4_csv task.score=half                   | score='half'
train task=humaneval task.sandbox=none                   | none
train task=humaneval task.timeout=0                      | timeout=0
train task=reasoning_gym task.options=5                  | task.options=5
train task=reasoning_gym task.seed=x                     | task.seed='x'
train logger=mlflow                                      | pip install 'dllm_gym[mlflow]'
train logger=trackio                                     | pip install 'dllm_gym[trackio]'
train logger=wandb                                       | pip install 'dllm_gym[wandb]'
train logger=tensorboard                                 | pip install 'dllm_gym[tensorboard]'
train hydra.run.dir=s3://bucket/run                      | hydra.run.dir=s3://bucket/run
train hydra.run.dir=/proc/nowhere                        | /proc/nowhere
evaluate +agent=grpo                                     | is read by nothing
evaluate +experiment=smoke                               | rounds
evaluate +rounds=3                                       | rounds is read by nothing
evaluate checkpoint=nowhere                              | checkpoint='nowhere'
evaluate checkpoint=7                                    | checkpoint
evaluate temperature=1                                   | temperature
evaluate heuristics=none                                 | checkpoint=null
evaluate checkpoint=[]                                   | checkpoint=[]: need a list with at least one entry
evaluate generations=7                                   | generations
evaluate evaluation.reward_alpha=-1                      | evaluation.reward_alpha=-1
evaluate evaluation.baseline=nobody                      | evaluation.baseline='nobody' is none of threshold(0.3)
evaluate reward.alpha=[0.3,10]                           | reward.alpha=[0.3, 10]
evaluate evaluation.alphas=[1]                           | evaluation.alphas=[1]
evaluate evaluation.seeds=[1,1]                          | 1 is there twice
evaluate evaluation.examples=-1                          | evaluation.examples=-1
evaluate env.gen_length=4                                | gen_length=4
evaluate threads=x                                       | threads='x'
evaluate heuristics.0.threshold=7                        | heuristics
watch greedy=maybe                                       | greedy='maybe'
watch greedy=false                                       | greedy is read by nothing here
watch alpha=2                                            | alpha is read by nothing here
watch alpha=0                                            | alpha=0
watch fps=0                                              | fps=0
watch fps=-1                                             | fps=-1
watch fps=nan                                            | fps=nan
watch fps=inf                                            | fps=inf
watch fps=1e-300                                         | fps=1e-300
watch fps=fast                                           | fps='fast'
watch gif=nodir/x.gif                                    | gif='nodir/x.gif'
watch gif=x.png                                          | gif='x.png'
watch gif=7                                              | gif=7
watch example=-1                                         | example=-1
watch example=99999                                      | example=99999
watch example=first                                      | example='first'
watch split=dev                                          | split='dev'
watch seed=99999999999999999999                          | seed=99999999999999999999
watch decider=threshold                                  | decider='threshold'
watch decider.threshold=2                                | threshold=2
watch +decider.limit=2                                   | decider.limit is read by nothing
watch decider._target_=dllm_gym.deciders.rules.Nothing         | dllm_gym.deciders.rules.Nothing
watch checkpoint=nowhere                                 | checkpoint='nowhere'
watch checkpoint=nowhere decider.threshold=0.5           | decider.threshold is read by nothing here
watch reward.alpha=[1,3]                                 | reward.alpha=[1, 3]
train resume=7                                           | resume=7
watch checkpoint=7                                       | checkpoint=7
watch num_envs=3                                         | num_envs is no setting
plot                                                     | results=??? has to be given
plot results=[]                                          | results=[]
plot results=nothing.json                                | nothing.json
plot results=7                                           | results=7
plot results=[broken.json]                               | broken.json
plot results=[list.json]                                 | list.json
plot results=[row.json]                                  | row.json
plot results=[broken.json,broken.json]                   | there twice
plot results=good.json picture=nodir/x.png               | picture='nodir/x.png'
plot results=good.json picture=x.exe                     | picture='x.exe'
plot results=good.json title=[1]                         | title=[1]
plot results=good.json +colour=red                       | colour is read by nothing
compare                                                  | runs=??? has to be given
compare runs=nowhere                                     | nowhere
compare runs=[]                                          | runs=[]
compare runs=[.,.]                                       | there twice
compare runs=. table=x.xlsx                              | table='x.xlsx'
compare runs=. table=nodir/x.md                          | table='nodir/x.md'
compare runs=. evaluated=worst                           | evaluated='worst'
compare runs=broken_run                                  | broken_run
benchmark measure=embedded                               | measure='embedded'
benchmark measure=[]                                     | measure=[]
benchmark measure=[gpu]                                  | measure='gpu'
benchmark measure=[embedded,embedded]                    | there twice
benchmark repeats=0                                      | repeats=0
benchmark workloads.embedded.num_envs=0                  | workloads.embedded.num_envs=0
benchmark workloads.embedded.caches=[triple]             | workloads.embedded.caches='triple'
benchmark workloads.embedded.block_lengths=[]            | workloads.embedded.block_lengths=[]
benchmark workloads.embedded.training=maybe              | workloads.embedded.training='maybe'
benchmark workloads.llada_8b.prompts=3                   | workloads.llada_8b.prompts is read by nothing here
benchmark measure=[llada_48m] agent=ppo                  | agent is read by nothing here
benchmark measure=[llada_48m] task=arithmetic            | task is read by nothing here
benchmark +workloads.embedded.foo=3                      | workloads.embedded.foo is read by nothing
benchmark deciders.threshold.threshold=7                 | threshold=7
reproduce examples=0                                     | examples=0
reproduce workers=0                                      | workers=0
reproduce run=maybe                                      | run='maybe'
reproduce run=false                                      | run=false
reproduce run=false folder=finished table=fuller.csv     | run=false
reproduce tasks=[]                                       | tasks=[]
reproduce tasks=sudoku                                   | tasks='sudoku'
reproduce tasks=[chess]                                  | tasks='chess'
reproduce tasks=[gsm8k]                                  | worlds.gsm8k
reproduce envs=[half]                                    | envs='half'
reproduce alphas=[1,1]                                   | there twice
reproduce alphas=[] training.conditioned=null            | alphas=[]
reproduce alphas=[x]                                     | alphas[0]='x'
reproduce alphas=[-1]                                    | alphas=-1
reproduce knob=[0]                                       | knob=0
reproduce seeds=[]                                       | seeds=[]
reproduce seeds=[1,1]                                    | there twice
reproduce seeds=[0.5]                                    | seeds=0.5
reproduce grids=[grid_nope]                              | grids='grid_nope'
reproduce grids=[]                                       | grids=[]
reproduce variant_grids=[x]                              | variant_grids='x'
reproduce transfer.families=[nobody]                     | transfer.families='nobody'
reproduce transfer.envs=[half]                           | transfer.envs='half'
reproduce folder=s3://bucket                             | folder='s3://bucket'
reproduce table=x.xlsx                                   | table='x.xlsx'
reproduce page=x.html                                    | page='x.html'
reproduce 'training.all=["rond=3"]'                      | rond is no setting
reproduce 'worlds.sudoku.full_diffusion=["env.x=3"]'     | env.x is no setting
reproduce experiment=smoke                               | experiment=smoke is for another command
reproduce +notes.foo=bar                                 | notes.foo is read by nothing
pretrain_tiny seed=-1                                    | seed=-1
pretrain_tiny threads=0                                  | threads=0
pretrain_tiny stages=[]                                  | stages
pretrain_tiny stages=[{steps:0,cooldown:0}]              | stages[0].steps=0
pretrain_tiny stages=[{steps:1}]                         | stages[0].cooldown is missing
pretrain_tiny learning_rate=high                         | learning_rate='high'
pretrain_tiny evaluate_every=0                           | evaluate_every=0
pretrain_tiny characters=1231                            | characters
pretrain_tiny 'characters="1231"'                        | characters='1231'
pretrain_tiny characters=''                              | characters=''
pretrain_tiny architecture.n_heads=0                     | architecture.n_heads=0
pretrain_tiny architecture.n_heads=3                     | 3
pretrain_tiny +architecture.depth=3                      | architecture.depth is read by nothing
pretrain_tiny save_to=s3://bucket                        | save_to='s3://bucket'
"""


def table() -> list[tuple[str, list[str], str]]:
    lines = [line.split("|") for line in COMMANDS.strip().splitlines()]
    return [(*split(call), words.strip()) for call, words in lines]


def split(call: str) -> tuple[str, list[str]]:
    script, *arguments = call.split()
    arguments = [argument.strip("'") for argument in arguments]
    own = {argument.partition("=")[0] for argument in arguments}
    if script == "train" and not own & {"task", "policy", "reward", "experiment", "resume", "--config-dir"}:
        arguments = ["task=sudoku", "reward=multiplicative", "policy=dit_confidence_small", *arguments]
    return script, arguments


def call(script: str, arguments: list[str], monkeypatch) -> tuple[int, str]:
    """Exit code and stderr of a command, in this process."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    main = importlib.import_module(script).main
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), errors.getvalue()
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
    return 0, errors.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with some files that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text('[{"name": ')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "row.json").write_text('[{"name": "a"}]')
    numbers = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "nfe", "nfe_low", "nfe_high", "reward"), 0.5)
    (tmp_path / "good.json").write_text(json.dumps([{"name": "a(1)", "family": "a", **numbers}]))
    (tmp_path / "broken_run").mkdir()
    for name in ("config.yaml", "metrics.csv", "results.json"):
        (tmp_path / "broken_run" / name).write_text('a,"b\n{')
    (tmp_path / "fuller.csv").write_text("task\nsudoku\n")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("script", "arguments", "words"), table())
def test_a_wrong_setting_is_refused_by_name_in_one_line(script, arguments, words, place, monkeypatch):
    before = contents(place)
    code, said = call(script, arguments, monkeypatch)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert words in said
    assert contents(place) == before


def test_the_tables_are_long_enough():
    assert len(table()) + len(CONSTRUCTORS) >= 200
    commands = {path.stem for path in (ROOT / "scripts").glob("*.py") if "@command(" in path.read_text()}
    assert {script for script, *_ in table()} == commands - {"decode"}  # its own: test_decode_command.py


def make(**settings):
    return lambda: gym.make("DLLMUnmask-v0", **settings)


def make_vec(**settings):
    return lambda: gym.make_vec("DLLMUnmask-v0", **settings)


CONSTRUCTORS = [
    (make(foo=1), "'foo'"),
    (make(task="chess"), "task='chess'"),
    (make(task=7), "task=7"),
    (make(split="dev"), "split='dev'"),
    (make(split=None), "split=None"),
    (make(gen_length=0), "gen_length=0"),
    (make(gen_length=True), "gen_length=True"),
    (make(gen_length="20"), "gen_length='20'"),
    (make(block_length=3), "block_length=3"),
    (make(block_length=2.0), "block_length=2.0"),
    (make(top_k=0), "top_k=0"),
    (make(top_k=1000), "top_k=1000"),
    (make(temperature=-1), "temperature=-1"),
    (make(temperature=float("nan")), "temperature=nan"),
    (make(temperature="0"), "temperature='0'"),
    (make(temperature=True), "temperature=True"),
    (make(reward="cubic"), "reward='cubic'"),
    (make(reward=None), "reward=None"),
    (make(alpha=-1), "alpha=-1"),
    (make(alpha="1"), "alpha='1'"),
    (make(alpha=True), "alpha=True"),
    (make(alpha=float("inf")), "alpha=inf"),
    (make(alpha=[2, 1]), "alpha=[2, 1]"),
    (make(alpha=[1]), "alpha=[1]"),
    (make(alpha=[True, 2]), "alpha=[True, 2]"),
    (make(alpha=None), "alpha=None"),
    (make(stop_at_eos="no"), "stop_at_eos='no'"),
    (make(stop_at_eos=2), "stop_at_eos=2"),
    (make(lookahead=None), "lookahead=None"),
    (make(cache="big"), "cache='big'"),
    (make(cache=None), "cache=None"),
    (make(hidden="yes"), "hidden='yes'"),
    (make(entropy=0.5), "entropy=0.5"),
    (make(margin=[]), "margin=[]"),
    (make(kl=-1), "kl=-1"),
    (make(kl=True), "kl=True"),
    (make(max_prompt_length=0), "max_prompt_length=0"),
    (make(device="warp"), "device='warp'"),
    (make(dtype="int7"), "dtype='int7'"),
    (make(model="nothing"), "model='nothing'"),
    (make(model=7), "model='7'"),
    (make(render_mode="film"), "film"),
    (make_vec(num_envs=0), "num_envs=0"),
    (make_vec(num_envs=True), "num_envs=True"),
    (make_vec(num_envs=2.0), "num_envs=2.0"),
    (make_vec(num_envs=10**12), "num_envs=1000000000000"),
    (make_vec(num_envs=2, max_episode_steps=0), "max_episode_steps=0"),
    (make_vec(num_envs=2, autoreset_mode="Sometimes"), "Sometimes"),
    (lambda: load_dllm("tiny", compile="no"), "compile='no'"),
    (lambda: load_dllm("tiny", chat_template="no"), "chat_template='no'"),
    (lambda: load_dllm("tiny", rope_float32=3), "rope_float32=3"),
    (lambda: load_dllm("tiny", quantization="int3"), "quantization='int3'"),
    (lambda: load_dllm("tiny", mask_token=3), "mask_token=3"),
    (lambda: load_dllm("tiny", mask_token="<nope>"), "mask_token='<nope>'"),
    (lambda: load_dllm("tiny", device_map=3), "device_map=3"),
    (lambda: load_dllm("tiny", dtype=3), "dtype=3"),
    (lambda: load_dllm(""), "model=''"),
    (lambda: Sudoku(min_givens=5, max_givens=4), "min_givens=5"),
    (lambda: Sudoku(max_givens="4"), "max_givens='4'"),
    (lambda: Sudoku(seed=-1), "seed=-1"),
    (lambda: Sudoku(seed="x"), "seed='x'"),
    (lambda: Sudoku(sizes=[1]), "sizes=[1]"),
    (lambda: Sudoku(sizes={"dev": 1}), "dev"),
    (lambda: Arithmetic(min_operations=0), "min_operations=0"),
    (lambda: Arithmetic(max_operations=1.5), "max_operations=1.5"),
    (lambda: GSM8K(shots="two"), "shots='two'"),
    (lambda: GSM8K(held_out=float("nan")), "held_out=nan"),
    (lambda: GSM8K(prompt_style=3), "prompt_style=3"),
    (lambda: GSM8K(prefilled="no"), "prefilled='no'"),
    (lambda: GSM8K(data=7), "data=7"),
    (lambda: GSM8K(data=[]), "data=[]"),
    (lambda: SudokuFile(score="most"), "score='most'"),
    (lambda: HumanEval(sandbox="none"), "none"),
    (lambda: HumanEval(timeout="soon"), "timeout='soon'"),
    (lambda: HumanEval(workers=0), "workers=0"),
    (lambda: ReasoningGym(dataset=3), "dataset=3"),
    (lambda: ReasoningGym(options=[1]), "options=[1]"),
    (lambda: Mixture([]), "tasks=[]"),
    (lambda: Mixture([Sudoku()], weights=[-1]), "weights=[-1]"),
]


@pytest.mark.parametrize(("construct", "words"), CONSTRUCTORS)
def test_a_wrong_argument_is_refused_by_name(construct, words):
    with pytest.raises((ValueError, TypeError)) as refusal:
        construct()
    assert words in str(refusal.value)


def process(line: str, **environment: str) -> subprocess.CompletedProcess:
    """A command line as a shell runs it."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"} | environment
    line = f"set -o pipefail; {sys.executable} {ROOT / 'scripts'}/{line}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=surroundings, errors="replace")


def test_a_shell_gets_one_line_and_exit_code_2(place):
    done = process("train.py +rond=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: rond is read by nothing: did you mean rounds?\n"
    shown = process("train.py +rond=3", DLLM_GYM_DEBUG="1")
    assert shown.returncode == 2 and "Traceback" in shown.stderr and shown.stderr.endswith(done.stderr)


def test_several_processes_are_refused_by_name(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = call("train", ["experiment=smoke"], monkeypatch)
    assert code == 2 and said.startswith("error: WORLD_SIZE=2")


def test_a_replay_needs_neither_unicode_nor_a_patient_reader(place):
    plain = process("watch.py fps=1000", LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert plain.returncode == 0 and plain.stdout.isascii() and "NFE 1" in plain.stdout and not plain.stderr
    closed = process("watch.py fps=1000 | head -2")
    first, second = closed.stdout.splitlines()
    assert first == "watch: model=own, task=sudoku" and second.startswith("threshold(0.9)")
    assert closed.stderr == "" and closed.returncode in (0, 141)


def test_help_and_the_composed_configuration_are_still_shown(place):
    shown = process("train.py --cfg job rounds=7")
    assert shown.returncode == 0 and "rounds: 7" in shown.stdout


@pytest.mark.parametrize(("script", "most"), [("train", 10), ("evaluate", 5), ("watch", 5)])
def test_help_says_first_what_matters_and_what_it_is_now(script, most, place):
    shown = process(f"{script}.py --help task=arithmetic").stdout
    assert shown.index("What matters first") < shown.index("== Configuration groups ==")
    lines = re.findall(r"^  ([a-z_.]+)  +(\w.+)$", shown, re.MULTILINE)
    assert len(dict(lines)) == most and "(arithmetic)" in dict(lines)["task"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose(script)
    for name, _ in lines:
        group, _, last = name.rpartition(".")
        assert last in (OmegaConf.select(cfg, group) if group else cfg), name


def test_names_that_look_like_markup_are_printed_as_they_are(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    shown = importlib.import_module("command").console(width=80)
    from agents.evaluation import table as results

    numbers = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "nfe", "reward"), 0.5)
    with shown.capture() as capture:
        shown.print(results([{"name": "rule([/x] [bold] :smile:)", **numbers}], "title [/y]"))
        shown.print("written: a[/b]/results.json")
    assert all(
        text in capture.get() for text in ("rule([/x] [bold] :smile:)", "title [/y]", "written: a[/b]/results.json")
    )
