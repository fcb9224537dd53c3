"""`AutoBridge`: Hugging Face models in and out, under the names that users of Megatron-Bridge know.

No torch is imported here. Converting moves bytes and needs neither a model nor a process group; the
methods that build, read or write a model on the ranks of a job import what they need for it when
they are called. What each argument means here: docs/autobridge.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bevatron.bridge.conversion_report import ConversionReport
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.hf_config import as_dict, config_of, spec_at, understand
from bevatron.bridge.hf_folder import INDEX, SINGLE
from bevatron.bridge.open_weights import Opened, open_weights
from bevatron.checkpoint.dtypes import FLOATS, parse_dtype, stated_dtype
from bevatron.errors import BevatronError
from bevatron.families.registry import architectures
from bevatron.spec.model import ModelSpec

if TYPE_CHECKING:
    import torch

    from bevatron.auto_bridge.hf_tensors import ConversionTask, HFWeight
    from bevatron.auto_bridge.model_provider import Provider
    from bevatron.auto_bridge.placed_module import DistributedModel, Origin

    Model = DistributedModel | Sequence[DistributedModel]

T = TypeVar("T")
DType = Any  # a torch.dtype or its name; torch is not imported to look at one


class AutoBridge:
    """One model and where it comes from. Make it with one of the `from_` methods."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        source: str | Path | None = None,
        revision: str | None = None,
        config: Mapping[str, Any] | None = None,
        has_weights: bool = False,
        opened: Opened | None = None,
        dtype: DType = None,
    ) -> None:
        self._spec, self._source, self._revision = spec, source, revision
        self._config, self._has_weights, self._dtype = config, has_weights, _dtype_name(dtype)
        self._weights = opened
        self._provider: Provider | None = None  # the last one handed out

    # --- what is supported -----------------------------------------------------------------------

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """The Hugging Face classes that can be converted and trained."""
        return architectures()

    @classmethod
    def supports(cls, config: object) -> bool:
        """Whether a config.json (a transformers config, or a dict) is understood in full."""
        try:
            understand(as_dict(config))
        except BevatronError:
            return False
        return True

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False) -> bool:
        """Whether the model at `path` (a folder or a Hub id) is supported, by its config.json.

        Args:
            trust_remote_code: accepted; no code of the model's is ever run.
        """
        try:
            return cls.supports(config_of(path, None))
        except BevatronError:
            return False

    # --- making one ------------------------------------------------------------------------------

    @classmethod
    def from_hf_pretrained(
        cls,
        path: str | Path,
        *,
        trust_remote_code: bool = False,
        torch_dtype: DType = None,
        dtype: DType = None,
        revision: str | None = None,
        device_map: object = None,
        attn_implementation: object = None,
        low_cpu_mem_usage: object = None,
    ) -> AutoBridge:
        """A bridge to a Hugging Face folder or Hub id. Reads its config.json and nothing else yet.

        Args:
            torch_dtype, dtype: torch.bfloat16, torch.float16 or torch.float32 for all weights;
                None (or "auto") keeps each as it is stored.
            revision: of a Hub id.
            trust_remote_code: accepted; no code of the model's is ever run.
            device_map, attn_implementation, low_cpu_mem_usage: accepted, without effect.
        Raises BevatronError if config.json is not understood in full.
        """
        config = config_of(path, revision)
        spec = spec_at(path, config)
        has_weights = not Path(path).is_dir() or any((Path(path) / f).exists() for f in WEIGHTS)
        return cls(
            spec,
            source=path,
            revision=revision,
            config=config,
            has_weights=has_weights,
            dtype=torch_dtype if torch_dtype is not None else dtype,
        )

    @classmethod
    def from_hf_config(cls, config: object) -> AutoBridge:
        """A bridge to a model without weights, from a transformers config object or a dict."""
        found = as_dict(config)
        return cls(understand(found)[1], config=found)

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, dtype: DType = None) -> AutoBridge:
        """A bridge to a native checkpoint, or to a run's latest step."""
        opened = open_weights(path)
        return cls(opened.spec, source=path, has_weights=True, opened=opened, dtype=dtype)

    # --- whole checkpoints, without a model ------------------------------------------------------

    @classmethod
    def import_ckpt(
        cls,
        hf_model_id: str | Path,
        megatron_path: str | Path,
        *,
        torch_dtype: DType = None,
        dtype: DType = None,
        revision: str | None = None,
        overwrite: bool = False,
        show_progress: bool = True,
        trust_remote_code: bool = False,
        device_map: object = None,
        attn_implementation: object = None,
        low_cpu_mem_usage: object = None,
        low_memory_save: bool = False,
        accept_fields: Collection[str] = (),
    ) -> ConversionReport:
        """Convert a Hugging Face folder or Hub id into a native checkpoint, streaming.

        Under torchrun one process converts and the others wait. Other arguments: as for
        `from_hf_pretrained`; `low_memory_save` has no effect, it is always so; `accept_fields` of
        config.json are not understood, and do nothing.
        """
        to = _dtype_name(torch_dtype if torch_dtype is not None else dtype)
        return _once(
            lambda: import_checkpoint(
                hf_model_id,
                megatron_path,
                dtype=to,
                revision=revision,
                overwrite=overwrite,
                show_progress=show_progress,
                accept=accept_fields,
            )
        )

    @classmethod
    def export_ckpt(
        cls,
        megatron_path: str | Path,
        hf_path: str | Path,
        show_progress: bool = True,
        strict: bool = True,
        source_path: str | Path | None = None,
        *,
        overwrite: bool = False,
    ) -> ConversionReport:
        """Convert a native checkpoint, or a run's latest step, into a Hugging Face folder.

        On the class and on an instance alike: a native checkpoint holds all that it needs. Under
        torchrun one process converts and the others wait.

        Args:
            strict: without effect, every tensor is always accounted for.
            source_path: without effect, the source's other files lie in the checkpoint.
        """
        return _once(
            lambda: export_checkpoint(
                megatron_path, hf_path, overwrite=overwrite, show_progress=show_progress
            )
        )

    # --- models on the ranks of a job ------------------------------------------------------------

    def to_megatron_provider(
        self, load_weights: bool = True, hf_path: str | Path | None = None
    ) -> Provider:
        """The model to be built, whose fields can be changed before it is.

        Args:
            load_weights: False gives random ones, as does a bridge made from a config alone.
            hf_path: take the weights from there.
        """
        import torch

        from bevatron.auto_bridge.model_provider import Provider

        weights: Callable[[], Opened] | None = None
        if load_weights and hf_path is not None:
            weights = _opener(hf_path)
        elif load_weights and self._has_weights:
            weights = self._opened
        self._provider = Provider(
            self._spec,
            open_origin=lambda: self._origin(load_weights),
            weights=weights,
            dtype=getattr(torch, self._dtype) if self._dtype else None,
            config_dtype=self._config_dtype(),
        )
        return self._provider

    to_provider = to_megatron_provider

    @property
    def transformer_config(self) -> Provider:
        """The model's sizes, under Megatron's names."""
        kept = self._provider
        provider = self.to_megatron_provider(load_weights=False)
        self._provider = kept
        return provider

    def to_megatron_model(
        self, load_weights: bool = True, hf_path: str | Path | None = None, **kwargs: Any
    ) -> list[DistributedModel]:
        """`to_megatron_provider(...).provide_distributed_model(**kwargs)`."""
        return self.to_megatron_provider(load_weights, hf_path).provide_distributed_model(**kwargs)

    def load_megatron_model(
        self,
        path: str | Path,
        *,
        mp_overrides: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[DistributedModel]:
        """Build the model of a native checkpoint, or of a run's latest step.

        The layout is that of the provider that this bridge gave out last, as far as it was set,
        whatever layout wrote the checkpoint.

        Args:
            mp_overrides: provider fields, for another layout.
            kwargs: of `provide_distributed_model`.
        """
        last = self._provider
        bridge = AutoBridge.from_checkpoint(path, dtype=self._dtype)
        provider = bridge.to_megatron_provider()
        if last is not None:
            provider.take_layout(last)
        for name, value in (mp_overrides or {}).items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(**kwargs)

    def load_hf_weights(self, model: Model, hf_path: str | Path | None = None) -> list[Any]:
        """Stream weights into a model that is there already; returns it.

        Args:
            hf_path: a Hugging Face folder, Hub id or native checkpoint; the bridge's own if None.
        """
        from bevatron.parallel.on_all_ranks import on_all
        from bevatron.parallel.placed_weights import stream

        if hf_path is None and not self._has_weights:
            raise BevatronError("this bridge was made from a config alone; pass hf_path")
        found: list[Opened] = []
        target = _one(model)
        opener = self._opened if hf_path is None else _opener(hf_path)
        on_all(lambda: found.append(opener()))
        stream(target.placed, found[0])
        return [target]

    def get_conversion_tasks(
        self, megatron_model: Model, hf_path: str | Path | None = None
    ) -> list[ConversionTask]:
        """The weight map, line by line: what every native parameter consists of, and which pipeline
        stage holds it. `hf_path` has no effect: the map follows from the model."""
        from bevatron.auto_bridge.hf_tensors import conversion_tasks

        return conversion_tasks(_one(megatron_model))

    def export_hf_weights(
        self,
        model: Model,
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: Sequence[ConversionTask] | None = None,
        merge_adapter_weights: bool = True,
        weight_dtype: DType = None,
    ) -> Iterator[HFWeight]:
        """Every tensor of the Hugging Face folder that `save_hf_pretrained` would write, whole and
        on every rank, one native parameter in memory at a time. All ranks must take them together.

        Args:
            cpu: yield CPU tensors.
            conversion_tasks: some of `get_conversion_tasks`, to export those parameters alone.
            weight_dtype: instead of the model's own dtypes.
            merge_adapter_weights: without effect, there are no adapters.
        """
        import torch

        from bevatron.auto_bridge.hf_tensors import hf_weights

        name = _dtype_name(weight_dtype)
        return hf_weights(
            _one(model),
            dtype=getattr(torch, name) if name else None,
            cpu=cpu,
            tasks=conversion_tasks,
            show_progress=show_progress,
        )

    def save_hf_pretrained(
        self,
        model: Model,
        path: str | Path,
        show_progress: bool = True,
        source_path: str | Path | None = None,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: DType = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write a model as a Hugging Face folder, with the other files of where it came from. All
        ranks call it. A model that was not changed gives the source's files, byte for byte.

        Every rank writes its own part beside the target (which takes the weights' size on the disk
        once more for the time being), then one streams it into place.

        Args:
            weight_dtype: instead of the model's own dtypes.
            overwrite: replace `path`, which stays until the new folder is complete.
            source_path, strict, merge_adapter_weights, distributed_save, save_every_n_ranks:
                without effect; see docs/autobridge.md.
        Raises BevatronError on all ranks if it fails on one; nothing is left at `path` then.
        """
        from bevatron.auto_bridge.save_model import save_hf

        save_hf(
            _one(model),
            Path(path),
            dtype=_dtype_name(weight_dtype),
            overwrite=overwrite,
            show_progress=show_progress,
        )

    def save_hf_weights(
        self,
        model: Model,
        path: str | Path,
        show_progress: bool = True,
        strict: bool = True,
        merge_adapter_weights: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        weight_dtype: DType = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """As `save_hf_pretrained`, but the safetensors and their index alone."""
        from bevatron.auto_bridge.save_model import save_hf

        save_hf(
            _one(model),
            Path(path),
            dtype=_dtype_name(weight_dtype),
            weights_only=True,
            overwrite=overwrite,
            show_progress=show_progress,
        )

    def save_megatron_model(
        self,
        model: Model,
        path: str | Path,
        hf_tokenizer_path: str | Path | None = None,
        low_memory_save: bool = False,
        hf_tokenizer_kwargs: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write a model as a native checkpoint, with the other files of where it came from. All
        ranks call it.

        Args:
            hf_tokenizer_path: a folder to take a tokenizer from, if the model came without one.
            low_memory_save, hf_tokenizer_kwargs: without effect.
        """
        from bevatron.auto_bridge.save_model import save_native

        tokenizer = Path(hf_tokenizer_path) if hf_tokenizer_path is not None else None
        save_native(_one(model), Path(path), tokenizer=tokenizer, overwrite=overwrite)

    # --- where it comes from ---------------------------------------------------------------------

    def _opened(self) -> Opened:
        if self._weights is None:
            assert self._source is not None
            self._weights = open_weights(self._source, self._revision)
        return self._weights

    def _origin(self, load_weights: bool) -> Origin:
        """Where the model's other files come from. For random weights nothing is downloaded."""
        from bevatron.auto_bridge.placed_module import Origin

        folder = Path(self._source) if self._source is not None else None
        here = folder is not None and folder.is_dir()
        if self._has_weights and (load_weights or here):
            return Origin(weights=self._opened())
        return Origin(config=self._config, tokenizer=folder if here else None)

    def _config_dtype(self) -> torch.dtype:
        """What config.json says, for weights that are not there to ask."""
        import torch

        name = stated_dtype(self._config or {})
        return getattr(torch, name) if name in ("bfloat16", "float16") else torch.float32


WEIGHTS = (SINGLE, INDEX)


def _opener(path: str | Path) -> Callable[[], Opened]:
    return lambda: open_weights(path)


def _dtype_name(dtype: DType) -> str | None:
    """`bfloat16` for torch.bfloat16 or "bf16"; None for None and "auto"."""
    if dtype is None or dtype == "auto":
        return None
    return FLOATS[parse_dtype(str(dtype).removeprefix("torch."))]


def _once(act: Callable[[], T]) -> T:
    """Under a launcher, on rank 0 while the others wait; else just here."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 and not _in_group():
        return act()
    from bevatron.auto_bridge.save_model import on_first
    from bevatron.parallel.process_groups import default_device, join_world

    join_world(default_device())
    return on_first(act)


def _in_group() -> bool:
    """Whether a process group runs already; asked without loading torch."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def _one(model: Model) -> DistributedModel:
    """The model itself, of a list of one or as it is."""
    from bevatron.auto_bridge.placed_module import DistributedModel

    found = model[0] if isinstance(model, (list, tuple)) and len(model) == 1 else model
    if not isinstance(found, DistributedModel):
        raise BevatronError(
            f"expected what provide_distributed_model returned, or its one member; found "
            f"{type(model).__name__}"
        )
    return found
