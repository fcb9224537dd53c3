"""Comparing what two checkpoints compute. The one file of this room that needs torch and a model.

An HF folder runs in transformers' own class where there is one (remote code is never executed), a
native checkpoint in Bevatron's decoder, so that agreement says that both mean the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bevatron.checkpoint.locate import is_native

if TYPE_CHECKING:
    import torch

# Two implementations of one model in fp32 differ by rounding alone: 1e-6 to 1e-5 of a logit of
# usual size. A wrong rope, norm or permutation moves logits by far more than this.
TOLERANCE = 1e-4
BATCH, LENGTH = 2, 24


def compare_logits(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Logits of both for the same fixed token ids, in fp32 on the CPU.

    Returns:
        {ok, max_abs_difference, max_relative_difference, tolerance, a, b}: relative to
        max(1, |logit|); `a`, `b`: who computed it. Or {reason} if one of them cannot be run.
    """
    try:
        import torch
    except ImportError:
        return {"reason": "torch is not installed"}
    one, name_a, why_a = _logits(Path(a))
    two, name_b, why_b = _logits(Path(b))
    found: dict[str, Any] = {"a": name_a, "b": name_b}
    if why_a or why_b:
        found["note"] = why_a or why_b
    if one.shape != two.shape:
        return {
            **found,
            "ok": False,
            "reason": f"logits of shape {list(one.shape)} and {list(two.shape)}",
        }
    difference = (one - two).abs()
    relative = difference / two.abs().clamp(min=1.0)
    finite = bool(torch.isfinite(one).all()) and bool(torch.isfinite(two).all())
    if not finite:
        return {**found, "ok": False, "reason": "some logits are NaN or infinite"}
    found["max_abs_difference"] = float(difference.max())
    found["max_relative_difference"] = float(relative.max())
    found["tolerance"] = TOLERANCE
    found["ok"] = found["max_relative_difference"] <= TOLERANCE
    return found


def prompt(vocab_size: int, length: int) -> torch.Tensor:
    """Fixed token ids [BATCH, length], spread over the vocabulary."""
    import torch

    ids = torch.arange(BATCH * length) * 7919 + 13
    return (ids % vocab_size).view(BATCH, length)


def _logits(path: Path) -> tuple[torch.Tensor, str, str | None]:
    """Logits [B, T, V], who computed them, and why not transformers (for an HF folder)."""
    why = None
    if not is_native(path):
        found = _transformers_logits(path)
        if not isinstance(found, str):
            return found, "transformers", None
        why = found
    import torch

    from bevatron.generate.load import load_decoder

    decoder, spec = load_decoder(path, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        ids = prompt(spec.vocab_size, min(LENGTH, spec.max_position_embeddings))
        return decoder.logits(ids).float(), "bevatron", why


def _transformers_logits(path: Path) -> torch.Tensor | str:
    """Logits by transformers, or why it cannot."""
    try:
        import transformers
    except ImportError:
        return "transformers is not installed; install bevatron[hf] to compare with it"
    import torch

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    except (ValueError, KeyError, OSError, AttributeError) as error:
        return f"transformers cannot read config.json ({str(error).splitlines()[0][:200]})"
    if not known:
        return f"transformers has no class for {config.model_type}"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    length = min(LENGTH, int(getattr(config, "max_position_embeddings", LENGTH)))
    model.train(False)
    with torch.inference_mode():
        logits: torch.Tensor = model(prompt(int(config.vocab_size), length)).logits
    return logits.float()
