"""Python's own library as training text, with a tokenizer of its own; and curves over tokens."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

END = "<|end_of_text|>"


def bevatron(folder: Path, *arguments: str) -> None:
    """Run a command as a user would."""
    subprocess.run([sys.executable, "-m", "bevatron", *arguments], cwd=folder, check=True)


def prepare(folder: Path, vocab_size: int) -> dict[str, int]:
    """Text, tokenizer and token stores `train` and `val` in `folder`; the bytes of both texts. One
    file in twenty, by the hash of its name, is held out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Path(sysconfig.get_path("stdlib"))
    nbytes = {"train": 0, "val": 0}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if "site-packages" in name or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        held_out = hashlib.sha256(name.encode()).digest()[0] % 20 == 0
        part = "val" if held_out else "train"
        target = folder / f"{part}-text" / name.replace("/", "__").replace(".py", ".txt")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", newline="")
        nbytes[part] += len(text.encode())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(p) for p in sorted((folder / "train-text").iterdir())], trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    for part in nbytes:
        bevatron(folder, "tokenize", f"{part}-text", part, "--tokenizer", "tokenizer")
    return nbytes


COLOURS = ("#c0504d", "#1f6fb4", "#3d8b3d", "#8a5fb0", "#b8860b")
Curve = Sequence[tuple[int, float]]


def plot(curves: Mapping[str, Curve], unit: str, digits: int = 3) -> str:
    """Losses over tokens as SVG; curves are (tokens, loss) by label, `unit` what the loss is in."""
    left, top, width, height = 56, 16, 560, 300
    points = [point for curve in curves.values() for point in curve]
    most = max(t for t, _ in points)
    low = math.floor(10 * min(v for _, v in points)) / 10
    high = math.ceil(10 * max(v for _, v in points)) / 10

    def at(tokens: float, loss: float) -> str:
        x = left + width * tokens / most
        return f"{x:.1f},{top + height * (high - loss) / (high - low):.1f}"

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} '
        f'{top + height + 48}" font-family="sans-serif" font-size="12">',
        f'<rect width="{left + width + 20}" height="{top + height + 48}" fill="white"/>',
    ]
    for i in range(6):
        loss = low + (high - low) * i / 5
        y = top + height * (high - loss) / (high - low)
        out.append(f'<path d="M{left},{y:.1f}h{width}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
        x, tokens = left + width * i / 5, most * i / 5e6
        out.append(
            f'<text x="{x}" y="{top + height + 16}" text-anchor="middle">{tokens:.2f}</text>'
        )
    middle = left + width / 2
    out.append(f'<text x="{middle}" y="{top + height + 38}" text-anchor="middle">')
    out.append(f"million tokens; held-out {unit}</text>")
    for i, (label, curve) in enumerate(curves.items()):
        line = " ".join(at(*point) for point in curve)
        colour, y = COLOURS[i % len(COLOURS)], top + 20 + 18 * i
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{left + width}" y="{y}" fill="{colour}" text-anchor="end">')
        out.append(f"{label} {curve[-1][1]:.{digits}f}</text>")
    return "\n".join([*out, "</svg>"]) + "\n"
