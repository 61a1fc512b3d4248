"""The result as a picture: bars of characters for a terminal, and the same as a PNG.

    pictures.py PANELS.json PICTURE.png      draws what ``bench.py`` has written there

The PNG is drawn by Pillow, which lives in an environment of its own like the
peers; nothing else here needs it.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from benchmarks.figures import Summary
    from benchmarks.works import Work

BAR = 48
EIGHTHS = " ▏▎▍▌▋▊▉"


class Bar(NamedTuple):
    """One server; ``length`` is a share of the longest bar, ``text`` the figure itself."""

    label: str
    length: float
    text: str
    ours: bool


class Panel(NamedTuple):
    """The servers in one work, the best first."""

    title: str
    bars: Sequence[Bar]


def panels(summary: "Summary", works: "Sequence[Work]", titles: Mapping[str, str], ours: Sequence[str]) -> list[Panel]:
    """What there is to draw: CPU per delivery in each work, and the memory of a connection."""
    found = []
    for work in works:
        match work.kind:
            case "delivery" if not work.ours_only:
                figure, title, unit = "us", f"{work.name}: CPU per delivery", "µs"
            case "connection":
                figure, title, unit = "kb", f"{work.name}: memory of a connection", "KB"
            case _:
                continue
        values = {
            peer: summary[work.name, peer][figure].median
            for peer in titles
            if (work.name, peer) in summary and figure in summary[work.name, peer]
        }
        longest = max(values.values(), default=0)
        if longest > 0:
            bars = []
            for peer, value in sorted(values.items(), key=lambda item: item[1]):
                ratio = summary[work.name, peer].get("ratio")
                text = f"{value:.2f} {unit}" + (f", {ratio.median:.2f} ×" if ratio is not None else "")
                bars.append(Bar(titles[peer], max(0.0, value / longest), text, peer in ours))
            found.append(Panel(title, bars))
    return found


def text(some: Sequence[Panel]) -> str:
    """The picture in characters."""
    width = max((len(bar.label) for panel in some for bar in panel.bars), default=0)
    lines = []
    for panel in some:
        lines += [panel.title, ""]
        for bar in panel.bars:
            eighths = round(bar.length * BAR * 8)
            drawn = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
            lines.append(f"  {bar.label:>{width}} {drawn or '▏'} {bar.text}")
        lines.append("")
    return "\n".join(lines)


# --- the PNG -----------------------------------------------------------------
WIDTH, MARGIN, ROW, LABELS, TEXTS = 1200, 32, 30, 280, 200
PAPER, INK, FAINT, OURS, OTHERS = "#ffffff", "#1c2530", "#67727e", "#0b7285", "#c9d1d9"


def draw(title: str, caption: str, some: Sequence[Panel], path: Path) -> None:
    """The picture as a PNG; raises ``ImportError`` where there is no Pillow."""
    from PIL import Image, ImageDraw, ImageFont  # type: ignore[import-not-found]

    height = MARGIN * 2 + 84 + sum(58 + ROW * len(panel.bars) for panel in some)
    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(image)
    large, bold, small = (ImageFont.load_default(size) for size in (26, 19, 16))
    pen.text((MARGIN, MARGIN), title, INK, large)
    pen.text((MARGIN, MARGIN + 38), caption, FAINT, small)
    y = MARGIN + 84
    for panel in some:
        pen.text((MARGIN, y), panel.title, INK, bold)
        y += 34
        for bar in panel.bars:
            colour = INK if bar.ours else FAINT
            pen.text((MARGIN + LABELS - 12, y + ROW / 2), bar.label, colour, small, anchor="rm")
            left = MARGIN + LABELS
            right = left + max(2.0, bar.length * (WIDTH - 2 * MARGIN - LABELS - TEXTS))
            pen.rectangle((left, y + 4, right, y + ROW - 5), OURS if bar.ours else OTHERS)
            pen.text((right + 10, y + ROW / 2), bar.text, colour, small, anchor="lm")
            y += ROW
        y += 24
    image.save(path, optimize=True)


def main(arguments: Sequence[str]) -> int:
    """Draw what a file of panels holds."""
    given: dict[str, Any] = json.loads(Path(arguments[0]).read_text())
    plain = str.maketrans("µ×", "ux")  # the font that Pillow brings has neither
    some = [
        Panel(title, [Bar(*bar)._replace(text=Bar(*bar).text.translate(plain)) for bar in bars])
        for title, bars in given["panels"]
    ]
    draw(given["title"], given["caption"], some, Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
