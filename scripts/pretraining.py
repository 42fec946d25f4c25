"""What scripts/pretrain_tiny.py does: tokenizer, model, masks, loss and the stages of the training."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dllm_gym.checks import number, text, whole
from dllm_gym.checks import seed as check_seed
from dllm_gym.models.base import DLLM
from dllm_gym.models.families.llada import REQUIRED, llada_weights, llama_config
from dllm_gym.process.starts import completion_of
from dllm_gym.tasks.base import Example, ProceduralTask

EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"


def build_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate([EOS, MASK, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, mask_token=MASK, clean_up_tokenization_spaces=False
    )


def build_dllm(architecture: DictConfig, characters: str) -> tuple[LlamaForCausalLM, DLLM]:
    """A fresh Llama to train, and the frozen dLLM's view of the same weights (same tensors)."""
    tokenizer = build_tokenizer(characters)
    raw = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **REQUIRED,
        **OmegaConf.to_container(architecture),
        "vocab_size": len(tokenizer),
        "embedding_size": len(tokenizer),
        "weight_tying": False,
        "include_qkv_bias": False,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(llama_config(raw))
    dllm = DLLM(model.model, model.lm_head, tokenizer, raw)
    model.requires_grad_(True)
    return model, dllm


class Batch(NamedTuple):
    """Examples of a lesson with their solutions.

    Attributes:
        prompts: int64 [B, P]. completions: int64 [B, L] with their EOS tail. answer_length: int64 [B], without it.
        blanks: bool [B, L], what is to be decoded; all of it where the task has no template.
        follows: bool [B, L, L], [b, i, j]: position i is worked out from position j (one token per character).
    """

    prompts: Tensor
    completions: Tensor
    answer_length: Tensor
    blanks: Tensor
    follows: Tensor


def batch_of(task: ProceduralTask, examples: Sequence[Example], dllm: DLLM) -> Batch:
    """These examples with their solutions.

    Raises:
        ValueError: a solution does not have what its template gives.
    """
    L = task.gen_length
    prompts = torch.tensor([dllm.encode(task.prompt(e)) for e in examples], dtype=torch.int64)
    answers = [dllm.encode(task.solution(e)) for e in examples]
    completions = torch.tensor([answer + [dllm.eos_id] * (L - len(answer)) for answer in answers])
    starts = torch.from_numpy(np.stack([completion_of(task, e, dllm, L) for e in examples]))
    blanks = starts == dllm.mask_id
    for row in (~(blanks | (starts == completions)).all(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"task {task.name!r}: the solution {task.solution(examples[row])!r} does not have what the template "
            f"{task.template(examples[row])!r} gives"
        )
    follows = torch.zeros(len(examples), L, L, dtype=torch.bool)
    for row, example in zip(follows, examples, strict=True):
        for effect, causes in task.causes(example).items():
            row[effect, causes] = True
    return Batch(prompts, completions, torch.tensor([len(answer) for answer in answers]), blanks, follows)


def random_masks(batch: Batch, left_to_right: float) -> Tensor:
    """Which blanks to mask.

    Args:
        batch: its ``answer_length`` and ``blanks`` are read.
        left_to_right: share of rows that are clean left of a random cut, masked at random in a window of at most 12
            behind it and fully masked after that (counted in blanks); the others are masked at a uniform rate
            everywhere.

    Returns:
        bool [B, L], blanks only, at least one position per row.
    """
    B, length = batch.blanks.shape
    rate = ((torch.randperm(B) + torch.rand(B)) / B)[:, None]  # stratified over the batch
    uniform = torch.rand(B, length) < rate
    place = batch.blanks.cumsum(1) - 1  # of a blank among the blanks
    inside = (batch.blanks & (torch.arange(length) < batch.answer_length[:, None])).sum(1)
    cut = (torch.rand(B) * (inside + 1)).long()[:, None]
    window = torch.randint(1, 13, (B, 1))
    blockwise = (place >= cut) & (uniform | (place >= cut + window))
    masks = torch.where(torch.rand(B, 1) < left_to_right, blockwise, uniform) & batch.blanks
    first = (place == 0) & batch.blanks
    return masks | (first & ~masks.any(1, keepdim=True))


def causes_first(batch: Batch, masks: Tensor, share: float) -> Tensor:
    """The masks bool [B, L], in a share of rows with every blank masked that is worked out from a masked position."""
    unknown = (batch.follows & masks[:, None]).any(2) & batch.blanks
    return masks | (unknown & (torch.rand(len(masks), 1) < share)) if batch.follows.any() else masks


def sample_batch(lesson: DictConfig, task: ProceduralTask, dllm: DLLM, rng: random.Random, step: int) -> Batch:
    """Examples of the training split, no longer than the lesson's ramp allows at this step."""
    longest = task.max_operations if lesson.ramp else 0
    now = min(longest, 1 + longest * step // lesson.ramp) if lesson.ramp else 0
    examples = []
    while len(examples) < lesson.batch_size:
        example = task.draw(rng, "train")
        if not lesson.ramp or len(example["chain"]) // 2 <= now:
            examples.append(example)
    return batch_of(task, examples, dllm)


def denoising_loss(model: LlamaForCausalLM, dllm: DLLM, batch: Batch, masks: Tensor, eos_weight: float) -> Tensor:
    """Weighted cross-entropy over masked positions; a row with m of them counts as sqrt(m)."""
    prompts, completions = batch.prompts, batch.completions
    noisy = torch.cat([prompts, torch.where(masks, dllm.mask_id, completions)], 1)  # (B, P + L)
    hidden = model.model(noisy, use_cache=False).last_hidden_state[:, prompts.shape[1] :]
    loss = F.cross_entropy(model.lm_head(hidden[masks]), completions[masks], reduction="none")
    weight = torch.where(completions == dllm.eos_id, eos_weight, 1.0) / masks.sum(1, keepdim=True).sqrt()
    return (weight[masks] * loss).sum() / weight[masks].sum()


@torch.no_grad()
def decode_score(task: ProceduralTask, dllm: DLLM, block_length: int, count: int) -> float:
    """Mean grade on validation examples, one blank per step, most confident first."""
    examples = list(task.examples("validation").select(range(count)))
    batch = batch_of(task, examples, dllm)
    tokens = torch.cat([batch.prompts, batch.completions.where(~batch.blanks, dllm.mask_id)], 1)  # (B, P + L)
    P, T = batch.prompts.shape[1], tokens.shape[1]
    block = (torch.arange(T) - P) // block_length
    while (mask := tokens == dllm.mask_id).any():
        rows = mask & (block == torch.where(mask, block, T).amin(1, keepdim=True))
        prediction = dllm.predict(tokens, None, rows)
        confidence = torch.full(tokens.shape, -1.0).masked_scatter(rows, prediction.confidence)
        proposal = torch.zeros_like(tokens).masked_scatter(rows, prediction.token)
        best = torch.arange(T) == confidence.argmax(1, keepdim=True)
        tokens = torch.where(best & rows, proposal, tokens)
    texts = [dllm.decode(completion) for completion in tokens[:, P:].tolist()]
    return sum(map(task.grade, examples, texts)) / count


def save_checkpoint(model: LlamaForCausalLM, dllm: DLLM, folder: Path) -> None:
    """Config, weights and tokenizer the way LLaDA publishes them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dllm.config, indent=2) + "\n")
    save_file(llada_weights(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    dllm.tokenizer.save_pretrained(folder)


def build_optimizers(model: LlamaForCausalLM, cfg: DictConfig, stage: DictConfig) -> list[tuple]:
    """(optimizer, schedule) of the matrices and of the rest: warm-up, constant, linear cooldown."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    settings = {"lr": cfg.learning_rate, "weight_decay": cfg.weight_decay}
    optimizers = [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(others, **settings),
    ]

    def factor(step: int) -> float:
        return min(1, (step + 1) / cfg.warmup, (stage.steps - step) / max(stage.cooldown, 1))

    return [(o, torch.optim.lr_scheduler.LambdaLR(o, factor)) for o in optimizers]


class LearningCurve:
    """learning_curve.csv: mean loss since the last line and score on validation examples, per task."""

    def __init__(self, path: Path, cfg: DictConfig, lessons: list[tuple]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.cfg, self.lessons = path.open("w", newline=""), cfg, lessons
        self.writer = csv.writer(self.file)
        names = [task.name for _, task in lessons]
        self.writer.writerow(["step", *(f"loss/{n}" for n in names), *(f"score/{n}" for n in names)])
        self.losses: list[list[float]] = [[] for _ in lessons]

    def write(self, step: int, dllm: DLLM) -> None:
        losses = [sum(values) / len(values) for values in self.losses]
        count = self.cfg.evaluate_examples
        scores = [decode_score(task, dllm, lesson.block_length, count) for lesson, task in self.lessons]
        self.writer.writerow([step, *(f"{value:.4f}" for value in (*losses, *scores))])
        self.file.flush()
        self.losses = [[] for _ in self.lessons]


def run_stage(cfg: DictConfig, index: int, model: LlamaForCausalLM, dllm: DLLM, curve: LearningCurve) -> None:
    """Train through one stage, writing the curve and the checkpoint as it goes."""
    stage, before = cfg.stages[index], sum(s.steps for s in cfg.stages[:index])
    if index:
        torch.manual_seed(cfg.seed + index)  # the first stage goes on from the initialisation
    rng = random.Random(cfg.seed + index)
    optimizers = build_optimizers(model, cfg, stage)
    for step in track(range(before, before + stage.steps), f"stage {index + 1}/{len(cfg.stages)}"):
        for i, (lesson, task) in enumerate(curve.lessons):
            batch = sample_batch(lesson, task, dllm, rng, step)
            masks = random_masks(batch, lesson.left_to_right)
            masks = causes_first(batch, masks, lesson.get("causes_first", 0.0))
            loss = denoising_loss(model, dllm, batch, masks, cfg.eos_weight)
            loss.backward()
            curve.losses[i].append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if (step + 1) % cfg.evaluate_every == 0 or step + 1 == before + stage.steps:
            curve.write(step + 1, dllm)
            save_checkpoint(model, dllm, Path(cfg.save_to))


def check_settings(cfg: DictConfig) -> None:
    """ValueError for a setting that makes no sense, before any work."""
    check_seed("seed", cfg.seed)
    whole("threads", cfg.threads, most=1024)
    for name in ("warmup", "evaluate_every", "evaluate_examples"):
        whole(name, cfg[name])
    for name in ("learning_rate", "weight_decay", "eos_weight"):
        number(name, cfg[name], least=0)
    number("max_grad_norm", cfg.max_grad_norm, above=0)
    if "://" in text("save_to", cfg.save_to):
        raise ValueError(f"save_to={cfg.save_to!r}: need a local folder")
    if len(set(text("characters", cfg.characters))) < len(cfg.characters):
        raise ValueError(f"characters={cfg.characters!r}: need each character once")
    for i, stage in enumerate(cfg.stages):
        whole(f"stages[{i}].steps", stage.steps)
        whole(f"stages[{i}].cooldown", stage.cooldown, least=0, most=stage.steps)
    if not cfg.stages or not cfg.lessons:
        raise ValueError(f"stages={cfg.stages}, lessons={cfg.lessons}: need at least one of each")
    for i, lesson in enumerate(cfg.lessons):
        check_lesson(f"lessons[{i}]", lesson)
    for name, value in cfg.architecture.items():
        (number if name in ("rope_theta", "rms_norm_eps") else whole)(
            f"architecture.{name}", value, 1e-12 if name == "rms_norm_eps" else 1
        )


def check_lesson(path: str, lesson: DictConfig) -> None:
    for name in ("batch_size", "block_length"):
        whole(f"{path}.{name}", lesson[name])
    number(f"{path}.left_to_right", lesson.left_to_right, least=0, most=1)
    number(f"{path}.causes_first", lesson.get("causes_first", 0.0), least=0, most=1)
    whole(f"{path}.ramp", lesson.ramp, least=0)


def pretrain(cfg: DictConfig) -> None:
    """Train through all stages and write the checkpoint."""
    check_settings(cfg)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    lessons = [(lesson, hydra.utils.instantiate(lesson.task)) for lesson in cfg.lessons]
    model, dllm = build_dllm(cfg.architecture, cfg.characters)
    curve = LearningCurve(Path(cfg.save_to).parent / "learning_curve.csv", cfg, lessons)
    for index in range(len(cfg.stages)):
        run_stage(cfg, index, model, dllm, curve)
