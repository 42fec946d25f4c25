"""Text and pixel replay of an episode: the prompt beside a grid of completion cells that fill up step by step."""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dllm_gym.checks import number

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

END = "∎"  # the text to give for an EOS token: drawn faintly, where "<|endoftext|>" would drown the answer

# Okabe and Ito's colours, which stay apart for colour-blind eyes; masked cells run from pale to deep blue.
INK, FAINT, PAPER, LINE = (34, 40, 49), (150, 156, 166), (255, 255, 255), (206, 211, 219)
ORANGE, BLUE_PALE, BLUE_DEEP, GREY = (230, 159, 0), (222, 235, 247), (0, 90, 160), (240, 241, 243)

CELL_WIDTH, CELL_HEIGHT, GAP, MARGIN = 52, 44, 4, 16  # pixels
PROMPT_WIDTH, CAPTION_HEIGHT, LEGEND_HEIGHT, LEAST_WIDTH = 236, 46, 38, 672
ADVANCE = 0.602  # width of a letter of the font, as a share of its size
SHADES = "░▒▓█"  # a masked cell in text, by quarters of confidence
PLAIN = str.maketrans("░▒▓█·∎␣↵⇥", ".:+#-$_|>")  # for terminals that have ASCII only
LEAST_FPS, MOST_FPS = 0.01, 1000.0  # what a timer can wait for


@dataclass(frozen=True)
class Frame:
    """One moment of one lane, as plain data.

    Args:
        prompt: the text before the completion.
        tokens: L texts, one per completion position: the committed token, :data:`END` for an EOS. The text of a
            masked position is its proposal, drawn faintly; ``""`` draws none.
        masked: bool [L], the positions that still hold a mask.
        confidence: float [L] in [0, 1], the probability of the proposal (read at masked positions only).
        fresh: bool [L], the positions that the last step committed.
        legal: bool [L], the positions that may be unmasked now: masked and in the active block.
        step: steps taken so far, which is the NFE of the episode so far.
        score: the task's grade in [0, 1], once the episode has ended.
        reward: the episode's reward, once it has ended.
        given: how many tokens were there from the start (a task's template).

    Raises:
        ValueError: the fields disagree about L.
    """

    prompt: str
    tokens: Sequence[str]
    masked: NDArray[np.bool_]
    confidence: NDArray[np.floating]
    fresh: NDArray[np.bool_]
    legal: NDArray[np.bool_]
    step: int
    score: float | None = None
    reward: float | None = None
    given: int = 0

    def __post_init__(self) -> None:
        for name in ("masked", "confidence", "fresh", "legal"):
            if np.shape(getattr(self, name)) != (len(self.tokens),):
                shape = np.shape(getattr(self, name))
                raise ValueError(f"{name} has shape {shape}, but there are {len(self.tokens)} tokens: need (L,)")

    @property
    def caption(self) -> str:
        """NFE and progress in words, with the result once there is one."""
        length = len(self.tokens) - self.given
        done = length - int(np.sum(self.masked))
        parts = [f"NFE {self.step}", f"{done}/{length} tokens"]
        if self.step:
            parts.append(f"{done / self.step:.1f} per step")
        if self.score is not None:
            parts.append(f"score {self.score:.2f}")
        if self.reward is not None:
            parts.append(f"reward {self.reward:.2f}")
        return "   ".join(parts)


def grid_columns(length: int) -> int:
    """Cells in a row for ``length`` positions when nobody chose: about a square, with full rows where L allows it.

    >>> grid_columns(20), grid_columns(48), grid_columns(256)
    (5, 8, 16)
    """
    side = max(1, math.ceil(math.sqrt(length)))
    return next((c for c in range(side, 2 * side + 1) if length % c == 0), side)


def ansi(frame: Frame, columns: int | None = None) -> str:
    """The frame as lines of text with ANSI colours.

    Masked positions are shades (``░▒▓█`` by confidence, ``·`` outside the active block), fresh tokens stand on
    orange, so that the frame also reads where colours are lost.

    Args:
        frame: what to show.
        columns: positions in a row; None chooses by :func:`grid_columns`. A block's length is a good choice.
    """
    columns = columns or grid_columns(len(frame.tokens))
    cells = [_ansi_cell(frame, i) for i in range(len(frame.tokens))]
    rows = [" ".join(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return "\n".join([f"\x1b[1m{frame.caption}\x1b[0m", *_lines(frame.prompt), "", *rows, ""])


def _ansi_cell(frame: Frame, i: int) -> str:
    if frame.masked[i]:
        if not frame.legal[i]:
            return "\x1b[90m·\x1b[0m"
        shade = SHADES[min(3, int(4 * _unit(frame.confidence[i])))]
        return f"\x1b[34m{shade}\x1b[0m"
    text = _visible(frame.tokens[i])
    if frame.fresh[i]:
        return f"\x1b[30;48;5;214m{text}\x1b[0m"
    return f"\x1b[90m{text}\x1b[0m" if text in (END, "↵") else text


def pixels(frame: Frame, columns: int | None = None) -> NDArray[np.uint8]:
    """The frame as a picture.

    Args:
        frame: what to show.
        columns: cells in a row; None chooses by :func:`grid_columns`.

    Returns:
        uint8 [H, W, 3]; H and W are multiples of 16 (video encoders want that) and depend on L and ``columns`` only.
    """
    from PIL import Image, ImageDraw

    length = len(frame.tokens)
    columns = columns or grid_columns(length)
    width, height = _canvas_size(length, columns)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    top, bottom = CAPTION_HEIGHT, height - LEGEND_HEIGHT
    _draw_caption(draw, frame, width)
    _draw_prompt(draw, frame.prompt, (MARGIN, top, MARGIN + PROMPT_WIDTH, bottom))
    left = 2 * MARGIN + PROMPT_WIDTH
    left += (width - MARGIN - left - columns * (CELL_WIDTH + GAP) + GAP) // 2  # in the middle of what is left
    first = top + (bottom - top - math.ceil(length / columns) * (CELL_HEIGHT + GAP) + GAP) // 2
    for i in range(length):
        row, column = divmod(i, columns)
        _draw_cell(draw, frame, i, (left + column * (CELL_WIDTH + GAP), first + row * (CELL_HEIGHT + GAP)))
    _draw_legend(draw, width, bottom)
    return np.array(image)


WRITERS = {"ansi": ansi, "rgb_array": pixels}  # render mode -> frame in that mode


def check_mode(render_mode: str | None, modes: Sequence[str]) -> str | None:
    """``render_mode`` if it is one of these, or None."""
    if render_mode is not None and render_mode not in modes:
        raise ValueError(f"render_mode={render_mode!r} is not supported: choose one of {', '.join(modes)}")
    return render_mode


class Viewer:
    """Shows frames to a person: in a matplotlib window where one can be opened, otherwise in the terminal.

    Whether a window can be opened is matplotlib's finding (its backend, which ``MPLBACKEND`` may choose).

    Args:
        fps: frames per second; :meth:`show` waits so long.
        columns: positions in a row; None chooses by :func:`grid_columns`.
    """

    def __init__(self, fps: float = 4.0, columns: int | None = None):
        self.fps, self.columns = number("fps", fps, LEAST_FPS, MOST_FPS), columns
        self._image: Any = None  # matplotlib's AxesImage, once a window is open

    def show(self, frame: Frame) -> None:
        """Draw ``frame`` and wait for 1 / fps seconds."""
        if not _has_window():
            start = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""  # a fresh screen; plain lines in a file
            print(encodable(start + ansi(frame, self.columns), sys.stdout.encoding), flush=True)
            time.sleep(1 / self.fps)
            return
        import matplotlib.pyplot as plt

        picture = pixels(frame, self.columns)
        if self._image is None or self._image.get_size() != picture.shape[:2]:
            self.close()
            figure = plt.figure("dllm_gym", figsize=(picture.shape[1] / 100, picture.shape[0] / 100), dpi=100)
            axes = figure.add_axes((0, 0, 1, 1))
            axes.set_axis_off()
            self._image = axes.imshow(picture)
        self._image.set_data(picture)
        plt.pause(1 / self.fps)

    def close(self) -> None:
        """Close the window, if one is open. May be called twice."""
        if self._image is not None:
            import matplotlib.pyplot as plt

            plt.close(self._image.figure)
            self._image = None


def encodable(text: str, encoding: str | None) -> str:
    """``text`` in letters that a terminal of this encoding has.

    >>> encodable("░▒▓█ ∎", "ascii")
    '.:+# $'
    """
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return text.translate(PLAIN).encode(encoding or "ascii", errors="replace").decode(encoding or "ascii")
    return text


def _has_window() -> bool:
    import matplotlib
    from matplotlib.backends import BackendFilter, backend_registry

    return matplotlib.get_backend().lower() in backend_registry.list_builtin(BackendFilter.INTERACTIVE)


def _unit(confidence: float) -> float:
    """A confidence kept in [0, 1] for drawing; NaN counts as 0."""
    return min(1.0, max(0.0, float(confidence))) if confidence == confidence else 0.0


def _visible(text: str) -> str:
    """A token's text on one line: blanks around words go, a token of blanks and line ends gets visible signs."""
    shown = text.strip(" ") or text.replace(" ", "␣")
    shown = shown.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")
    return _printable(shown)


def _printable(text: str) -> str:
    """``text`` without what would move a cursor or cannot be encoded."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def _lines(prompt: str) -> list[str]:
    return [_printable(line.expandtabs(4)) for line in prompt.rstrip().splitlines()] or [""]


def _canvas_size(length: int, columns: int) -> tuple[int, int]:
    """Width and height in pixels, each a multiple of 16."""
    width = 3 * MARGIN + PROMPT_WIDTH + columns * (CELL_WIDTH + GAP) - GAP
    height = CAPTION_HEIGHT + LEGEND_HEIGHT + math.ceil(length / columns) * (CELL_HEIGHT + GAP) + 2 * MARGIN
    return 16 * math.ceil(max(width, LEAST_WIDTH) / 16), 16 * math.ceil(height / 16)


@cache
def _font(size: int) -> FreeTypeFont:
    """DejaVu Sans Mono as matplotlib ships it: the same picture on every machine."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")), size)


def _draw_caption(draw: ImageDraw, frame: Frame, width: int) -> None:
    draw.text((MARGIN, 22), frame.caption, INK, _font(16), anchor="lm")
    share = 1 - float(np.mean(frame.masked)) if len(frame.tokens) else 1.0
    y, end = CAPTION_HEIGHT - 6, width - MARGIN
    draw.rectangle((MARGIN, y, end, y + 3), LINE)
    if share > 0:
        draw.rectangle((MARGIN, y, MARGIN + round(share * (end - MARGIN)), y + 3), BLUE_DEEP)


def _draw_prompt(draw: ImageDraw, prompt: str, box: tuple[int, int, int, int]) -> None:
    """The prompt in the largest size that fits the box; a longer one loses its middle."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top - 2 * MARGIN
    for size in (24, 18, 14, 11):
        letters, most = int(width / (ADVANCE * size)), max(1, int(height / (1.3 * size)))
        lines = _wrapped(prompt, letters)
        if len(lines) <= most:
            break
    else:
        lines = [*lines[: most // 2], "…", *lines[len(lines) - (most - most // 2 - 1) :]]
    left += max(0, int(width - ADVANCE * size * max(map(len, lines)))) // 2
    y = (top + bottom - int(1.3 * size * len(lines))) // 2
    for line in lines:
        draw.text((left, y), line, INK, _font(size))
        y += int(1.3 * size)


def _wrapped(text: str, letters: int) -> list[str]:
    return [part for line in _lines(text) for part in textwrap.wrap(line, letters) or [""]]


def _draw_cell(draw: ImageDraw, frame: Frame, i: int, corner: tuple[int, int]) -> None:
    x, y = corner
    box = (x, y, x + CELL_WIDTH - 1, y + CELL_HEIGHT - 1)
    middle = (x + CELL_WIDTH / 2, y + CELL_HEIGHT / 2)
    text = _visible(frame.tokens[i])
    if not frame.masked[i]:
        faint = text in (END, "↵") and not frame.fresh[i]
        fill = ORANGE if frame.fresh[i] else PAPER
        draw.rounded_rectangle(box, 6, fill, ORANGE if frame.fresh[i] else LINE, 2 if frame.fresh[i] else 1)
        _draw_token(draw, text, middle, FAINT if faint else INK)
    elif not frame.legal[i]:
        draw.rounded_rectangle(box, 6, GREY)
    else:
        confidence = _unit(frame.confidence[i])
        draw.rounded_rectangle(box, 6, _shade(confidence))
        ink = PAPER if confidence > 0.55 else INK
        if text:
            _draw_token(draw, text, (middle[0], y + 0.36 * CELL_HEIGHT), ink, largest=17)
        percent = f"{int(100 * confidence)}%"  # rounded down: 100% only where nothing else is possible
        draw.text((middle[0], y + (0.78 if text else 0.5) * CELL_HEIGHT), percent, ink, _font(11), anchor="mm")


def _draw_token(
    draw: ImageDraw, text: str, middle: tuple[float, float], ink: tuple[int, int, int], largest: int = 24
) -> None:
    """A token's text in the largest size that fits a cell; a longer one is cut."""
    room = CELL_WIDTH - 6
    size = next((s for s in (24, 20, 17, 14, 12, 10) if s <= largest and ADVANCE * s * len(text) <= room), 10)
    most = int(room / (ADVANCE * size))
    draw.text(middle, text if len(text) <= most else text[: most - 1] + "…", ink, _font(size), anchor="mm")


def _shade(confidence: float) -> tuple[int, int, int]:
    red, green, blue = (
        round(pale + confidence * (deep - pale)) for pale, deep in zip(BLUE_PALE, BLUE_DEEP, strict=True)
    )
    return red, green, blue


def _draw_legend(draw: ImageDraw, width: int, top: int) -> None:
    y, x = top + LEGEND_HEIGHT // 2, MARGIN
    for k in range(40):  # the scale of the masked cells
        draw.line((x + k, y - 6, x + k, y + 6), _shade(k / 39))
    x = _draw_label(draw, "masked, by confidence", (x + 48, y))
    for label, fill, edge in (("later block", GREY, GREY), ("just unmasked", ORANGE, ORANGE), ("done", PAPER, LINE)):
        draw.rounded_rectangle((x, y - 6, x + 13, y + 6), 3, fill, edge)
        x = _draw_label(draw, label, (x + 20, y))
    assert x <= width, "LEAST_WIDTH holds the whole legend"


def _draw_label(draw: ImageDraw, label: str, where: tuple[int, int]) -> int:
    """Write a label of the legend; where the next entry starts."""
    draw.text(where, label, INK, _font(12), anchor="lm")
    return where[0] + int(ADVANCE * 12 * len(label)) + 22
