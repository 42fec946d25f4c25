"""The model card of a saved policy: three lines of use, how it is played, its recipe and its front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_gym.checks import number, text
from dllm_gym.deciders.manner import Manner
from dllm_gym.deciders.saved import PICTURE, RESULTS
from dllm_gym.runs.files import read

NUMBERS = ("accuracy", "nfe", "reward")
OWN = "policy("  # what the rows of a policy begin with; all others are rules

TEMPLATE = """---
{{ card_data }}
---

# {{ policy }}

Decides which tokens a masked diffusion language model commits at each step.

```python
from dllm_gym import Decoder
decoder = Decoder(policy="OWNER/NAME")  # this repository, or a folder with its files
print(decoder(["..."])[0].text)
```

Beneath it is `Policy.load(...)`, or `{{ policy }}.from_pretrained(...)`, of `dllm_gym.deciders`.
{{ manner }}{{ front }}"""


@dataclass(frozen=True)
class Evidence:
    """How a policy did beside the rules: rows of a run's ``results.json``, and the picture of them.

    Raises:
        ValueError: a row lacks its name or a number.
    """

    rows: Sequence[Mapping[str, Any]]
    picture: bytes | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rows, list) or not all(isinstance(row, Mapping) for row in self.rows):
            raise ValueError("it is no list of rows")
        for row in self.rows:
            text("name", row.get("name"))
            for name in NUMBERS:
                number(name, row.get(name))

    @classmethod
    def beside(cls, folder: Path, picture: str) -> Evidence | None:
        """That in a folder, if there is any; ValueError if it is damaged."""
        path = (folder / RESULTS).resolve()  # a downloaded file is a link into the hub's cache
        if not path.is_file():
            return None
        image = (folder / picture).resolve()
        try:
            return cls(json.loads(read(path)), image.read_bytes() if image.is_file() else None)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / RESULTS} holds no results: {error}") from None

    def write(self, folder: Path) -> None:
        (folder / RESULTS).write_text(json.dumps(self.rows, indent=2) + "\n")
        if self.picture is not None:
            (folder / PICTURE).write_bytes(self.picture)

    @property
    def greedy(self) -> bool | None:
        """Whether the greedy decoding was chosen on validation, or the sampled one; None: neither."""
        chosen = [row["name"] for row in self.rows if row.get("chosen") is True and row["name"].startswith(OWN)]
        return chosen[0].startswith(f"{OWN}greedy") if chosen else None

    def front(self) -> list[Mapping[str, Any]]:
        """The policy's rows, and the rules that no other rule beats in accuracy and NFE; fastest first."""
        rules = [row for row in self.rows if not row["name"].startswith(OWN)]
        best = [row for row in rules if not any(_beats(other, row) for other in rules)]
        own = [row for row in self.rows if row["name"].startswith(OWN)]
        return sorted([*own, *best], key=lambda row: (row["nfe"], row["name"]))


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    no_worse = one["accuracy"] >= other["accuracy"] and one["nfe"] <= other["nfe"]
    return no_worse and (one["accuracy"], one["nfe"]) != (other["accuracy"], other["nfe"])


def told_manner(manner: Manner | None) -> str:
    """The card's part about how a policy is played and was trained; empty where that is not known."""
    if manner is None:
        return ""
    how = "greedy" if manner.greedy else f"sampled at temperature {manner.temperature:g}"
    facts = {
        "logits": f"`{manner.distribution}`, {how}",
        "speed weights (alpha)": manner.alpha and f"{manner.alpha[0]:g} to {manner.alpha[1]:g}, chosen when it decodes",
        "dLLM": manner.model.get("model") and f"`{manner.model['model']}` ({manner.family}, V = {manner.vocab_size})",
        "task": manner.task and f"`{manner.task}`",
        "environment": ", ".join(f"{name}={value}" for name, value in manner.env.items()),
    }
    lines = [f"| {name} | {fact} |" for name, fact in facts.items() if fact]
    recipe = f"\n## Recipe\n\n```bash\n{manner.recipe}\n```\n" if manner.recipe else ""
    return "\n".join(["\n| played and trained with | |", "|---|---|", *lines]) + f"\n{recipe}"


def told_front(evidence: Evidence | None) -> str:
    """The card's part about what a policy reaches beside the best rules; empty where nobody evaluated it."""
    if evidence is None:
        return ""
    picture = f"![accuracy against NFE]({PICTURE})\n\n" if evidence.picture is not None else ""
    head = "| decider | accuracy | forwards (NFE) | reward |\n|---|---|---|---|\n"
    rows = [f"| {r['name']} | {r['accuracy']:.3f} | {r['nfe']:.2f} | {r['reward']:.3f} |" for r in evidence.front()]
    return f"\n## Front\n\n{picture}{head}" + "\n".join(rows) + "\n"
