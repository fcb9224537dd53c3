"""`verify`: do two checkpoints hold the same model? Their tensors are compared, then their logits.

Without torch only the tensors are compared, and the report says so.

An HF folder runs in transformers' own class where there is one (remote code is never executed), and
a native checkpoint runs in Bevatron's decoder. So equal logits show that both implementations
compute the same function.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bevatron.bridge.compare_tensors import Side, VerifyReport, accepted_fields, compare_tensors
from bevatron.bridge.hf_folder import read_config

if TYPE_CHECKING:
    import torch

# Two implementations of one model in fp32 differ by rounding alone: 1e-6 to 1e-5 of a logit of
# usual size. A wrong rope, norm or permutation moves logits by far more than this.
TOLERANCE = 1e-4
BATCH, LENGTH = 2, 24


def verify(
    a: str | Path, b: str | Path, *, logits: bool = True, accept: Collection[str] = ()
) -> VerifyReport:
    """Compare two checkpoints: each an HF folder, a Hub id, a native checkpoint, a run or a
    Nanotron checkpoint.

    Every byte of every tensor is read. Raises BevatronError if one of them cannot be opened;
    what differs is in the report.

    Args:
        accept: fields of a config.json that are said to do nothing, besides those that an import
            recorded.
    """
    accept = {*accept, *accepted_fields(a), *accepted_fields(b)}
    report, left, right = compare_tensors(a, b, accept)
    if logits:
        report.logits = _logits_of_sides(left, right, accept)
    return report


def _logits_of_sides(a: Side, b: Side, accept: Collection[str]) -> dict[str, Any]:
    if a.spec is None or b.spec is None:
        return {"reason": a.unknown or b.unknown}
    if a.spec != replace(b.spec, init=a.spec.init):
        return {"reason": "the models differ"}
    return compare_logits(a.path, b.path, accept)


def compare_logits(a: str | Path, b: str | Path, accept: Collection[str] = ()) -> dict[str, Any]:
    """Logits of both (or what their head gives) for the same fixed token ids, fp32, on the CPU.
    `accept`: fields of a config.json that are said to do nothing.

    Returns:
        {ok, max_abs_difference, max_relative_difference, tolerance, a, b}: relative to
        max(1, |logit|); `a`, `b`: who computed it. Or {reason} if one of them cannot be run.
    """
    try:
        import torch
    except ImportError:
        return {"reason": "torch is not installed"}
    one, name_a, why_a = _logits(a, accept)
    two, name_b, why_b = _logits(b, accept)
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


def prompt(vocab_size: int, length: int, avoid: int | None = None) -> torch.Tensor:
    """Fixed token ids [BATCH, length], spread over the vocabulary, none of them `avoid`."""
    import torch

    ids = torch.arange(BATCH * length) * 7919 + 13
    ids = (ids % vocab_size).view(BATCH, length)
    return ids if avoid is None else torch.where(ids == avoid, (ids + 1) % vocab_size, ids)


def _logits(path: str | Path, accept: Collection[str]) -> tuple[torch.Tensor, str, str | None]:
    """Outputs, who computed them, and why not transformers (for an HF folder)."""
    import torch

    from bevatron.bridge.open_weights import open_weights
    from bevatron.parallel.whole_decoder import load_opened

    opened = open_weights(path, accept=accept)
    spec = opened.spec
    ids = prompt(spec.vocab_size, min(LENGTH, spec.max_position_embeddings), spec.head.pad_token_id)
    if spec.head.kind == "sequence_classification" and spec.head.pad_token_id is None:
        ids = ids[:1]  # neither side can tell where several sequences end
    why = None
    if not opened.native and not opened.made:
        found = _by_transformers(opened.folder, ids)
        if not isinstance(found, str):
            return found, "transformers", None
        why = found
    decoder, _ = load_opened(opened, "cpu", torch.float32)
    with torch.inference_mode():
        return decoder.logits(ids).float(), "bevatron", why


def _ours() -> Any:
    """transformers' classes that we bring."""
    from bevatron import hf

    return hf


def _by_transformers(path: Path, ids: torch.Tensor) -> torch.Tensor | str:
    """Outputs by the class that config.json names, or why there is none."""
    try:
        import transformers
    except ImportError:
        return "transformers is not installed; install bevatron[hf] to compare with it"
    import torch

    config = read_config(path)
    name = (config.get("architectures") or [""])[0]
    cls = getattr(transformers, name, None) or getattr(_ours(), name, None)
    if cls is None:
        return f"transformers {transformers.__version__} has no class {name or 'in config.json'}"
    try:
        model = cls.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        return f"transformers cannot load it ({str(error).splitlines()[0][:200]})"
    model.train(False)
    with torch.inference_mode():
        out = model(input_ids=ids)
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits), -1).float()
    found: torch.Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found.float()
