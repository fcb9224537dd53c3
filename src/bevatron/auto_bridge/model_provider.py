"""A model to be built, under the field names that users of Megatron-Bridge know.

A provider starts as an exact description of a model, takes changes of its fields, and places the
model on the ranks of the job. Fields that mean nothing here are accepted by name, those that would
change what is computed are refused, and unknown ones are an AttributeError.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from bevatron.auto_bridge.placed_module import DistributedModel, Origin, to_logits
from bevatron.bridge.open_weights import Opened
from bevatron.checkpoint.save_and_load import DTYPES
from bevatron.errors import BevatronError
from bevatron.parallel.compile_and_recompute import Recompute
from bevatron.parallel.layout import Layout, LayoutError, check
from bevatron.parallel.on_all_ranks import on_all
from bevatron.parallel.placed_weights import fill_random, stream
from bevatron.parallel.placement import PRECISION, place
from bevatron.parallel.process_groups import default_device, join_world, mesh
from bevatron.spec import MLP, Attention, LayerSpec, ModelSpec

# Megatron's name -> ours, by the part of the spec that has the field.
MODEL = {
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
ATTENTION = {
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "add_qkv_bias": "qkv_bias",
}
MLPS = {"ffn_hidden_size": "intermediate_size"}
NORM = {"layernorm_epsilon": "eps"}
ROPE = {"rotary_base": "theta", "rotary_percent": "partial"}
INIT = {"init_method_std": "std"}
OF_LAYERS = ("num_layers", *ATTENTION, *MLPS)
SIZES = (*OF_LAYERS, *MODEL, *NORM, *ROPE, *INIT)

# What is not there, with the values that say so; the first is what reading the field gives.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "context_parallel_size": (1, None),
    "expert_model_parallel_size": (1, None),
    "expert_tensor_parallel_size": (1, None),
    "virtual_pipeline_model_parallel_size": (None,),
    "pipeline_model_parallel_layout": (None,),
    "num_layers_in_first_pipeline_stage": (None,),
    "num_layers_in_last_pipeline_stage": (None,),
    "num_moe_experts": (None, 0),
    "mtp_num_layers": (None, 0),
    "hidden_dropout": (0.0,),
    "attention_dropout": (0.0,),
    "should_pad_vocab": (False,),
    "fp8": (None,),
    "fp4": (None,),
}

# Kernels, fusions, overlap and memory habits of Megatron: accepted, kept, and without effect.
IGNORED_FIELDS = """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split apply_rope_fusion
    attention_backend attention_softmax_in_fp32 autocast_dtype batch_p2p_comm batch_p2p_sync
    bias_activation_fusion bias_dropout_add_fusion bias_dropout_fusion cross_entropy_fusion_impl
    cross_entropy_loss_fusion deallocate_pipeline_outputs distribute_saved_activations
    enable_autocast enable_cuda_graph fp16_lm_cross_entropy generation_config
    gradient_accumulation_fusion hf_model_id init_model_with_meta_device
    make_vocab_size_divisible_by
    masked_softmax_fusion memory_efficient_layer_norm overlap_p2p_comm parallel_output
    perform_initialization persist_layer_norm pipeline_dtype recompute_method recompute_modules
    recompute_num_layers scatter_embedding_sequence_parallel tp_comm_overlap tp_comm_overlap_cfg
    tp_only_amax_red transformer_layer_spec use_cpu_initialization use_te_rng_tracker
    variable_seq_lengths
"""
IGNORED = frozenset(IGNORED_FIELDS.split())


class Provider:
    """A model to be built. Made by `AutoBridge.to_megatron_provider`.

    Besides the sizes of the model (`num_layers`, `hidden_size`, `ffn_hidden_size`,
    `num_attention_heads`, `num_query_groups`, `kv_channels`, `vocab_size`, ...):

    Attributes:
        tensor_model_parallel_size, pipeline_model_parallel_size: of the layout; the ranks that are
            left over are data-parallel and share the parameters out (FSDP).
        sequence_parallel: also share out the sequence between the layers of tensor-parallel ranks.
        params_dtype: to compute in, and of the weights when they leave the model. Reading gives
            the dtype of most weights; setting one converts all of them.
        bf16, fp16: the same, as flags.
        seq_length: in tokens; what the split into pipeline stages is balanced for.
        recompute_granularity: None, "selective" or "full", to recompute activations.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        open_origin: Callable[[], Origin],
        weights: Callable[[], Opened] | None,
        dtype: torch.dtype | None,
        config_dtype: torch.dtype,
    ) -> None:
        """
        Args:
            open_origin: opens what is saved along with the model; called on building it.
            weights: opens what to stream the weights from; None for random ones.
            dtype: that the user asked for; `config_dtype`: what it is otherwise, where there are no
                weights to ask.
        """
        self._base, self._edits = spec, dict[str, Any]()
        self._open_origin, self._weights = open_origin, weights
        self._dtype, self._config_dtype = dtype, config_dtype
        self._seq_length: int | None = None
        self._seed = 0
        self.tensor_model_parallel_size = 1
        self.pipeline_model_parallel_size = 1
        self.sequence_parallel = False
        self.recompute_granularity: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SIZES:
            self._edits[name] = value
        elif name in ONLY and value not in ONLY[name]:
            allowed = " or ".join(str(v) for v in ONLY[name])
            raise BevatronError(
                f"provider.{name} is {value!r}, but only {allowed} is supported; leave it out"
            )
        elif name in KNOWN or name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(_unknown(name))

    def __getattr__(self, name: str) -> Any:
        """Fields that were never set."""
        if name.startswith("_"):
            raise AttributeError(name)
        if name in SIZES:
            return self._edits.get(name, _read(self._base, name))
        if name in ONLY:
            return ONLY[name][0]
        if name in IGNORED:
            return None
        raise AttributeError(_unknown(name))

    @property
    def spec(self) -> ModelSpec:
        """The model with all changes made so far. Set another one to change what has no field."""
        return resized(self._base, self._edits)

    @spec.setter
    def spec(self, spec: ModelSpec) -> None:
        self._base, self._edits = spec, {}

    @property
    def params_dtype(self) -> torch.dtype:
        if self._dtype is not None:
            return self._dtype
        return DTYPES[self._weights().dtype] if self._weights else self._config_dtype

    @params_dtype.setter
    def params_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in PRECISION:
            raise BevatronError(
                f"provider.params_dtype is {dtype!r}, expected torch.bfloat16, torch.float16 or "
                "torch.float32"
            )
        self._dtype = dtype

    @property
    def bf16(self) -> bool:
        return self.params_dtype == torch.bfloat16

    @bf16.setter
    def bf16(self, on: bool) -> None:
        self._flag(torch.bfloat16, on)

    @property
    def fp16(self) -> bool:
        return self.params_dtype == torch.float16

    @fp16.setter
    def fp16(self, on: bool) -> None:
        self._flag(torch.float16, on)

    def _flag(self, dtype: torch.dtype, on: bool) -> None:
        if on:
            self.params_dtype = dtype
        elif self.params_dtype == dtype:
            self.params_dtype = torch.float32

    @property
    def seq_length(self) -> int:
        return self._seq_length or self.spec.max_position_embeddings

    @seq_length.setter
    def seq_length(self, tokens: int) -> None:
        self._seq_length = tokens

    @property
    def layout(self) -> Layout:
        """The parallel sizes over the job's processes. Raises LayoutError if these do not fit."""
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if dist.is_initialized():
            world = dist.get_world_size()
        else:
            world = int(os.environ.get("WORLD_SIZE", "1"))
        if tp < 1 or pp < 1 or world % (tp * pp):
            raise LayoutError(
                f"{world} processes cannot be divided by tensor_model_parallel_size {tp} x "
                f"pipeline_model_parallel_size {pp}; start a multiple of {tp * pp} with torchrun, "
                "or change the sizes"
            )
        return Layout(
            pp=pp, dp_shard=world // (tp * pp), tp=tp, sequence_parallel=self.sequence_parallel
        )

    def take_layout(self, other: Provider) -> None:
        """The parallel sizes, dtype and lengths that another provider was given."""
        for name in ("_dtype", "_seq_length", "_seed", *PARALLEL):
            setattr(self, name, getattr(other, name))

    def finalize(self) -> None:
        """Check that the model exists and fits on the job's processes. Building does it as well."""
        layout = self.layout
        batch = layout.dp * layout.pp
        check(layout, self.spec, seq_len=self.seq_length, global_batch=batch, micro=1)

    def initialize_model_parallel(self, seed: int | None = None) -> None:
        """Join the process group. `seed`: for random weights."""
        self.finalize()
        join_world(default_device())
        self._seed = seed or 0

    def provide_distributed_model(
        self,
        *,
        wrap_with_ddp: bool = True,
        ddp_config: object = None,
        fp16: bool | None = None,
        bf16: bool | None = None,
        use_cpu_initialization: bool | None = False,
        init_model_with_meta_device: bool | None = None,
        data_parallel_random_init: bool = True,
        overlap_param_gather_with_optimizer_step: bool = False,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        mixed_precision_wrapper: object = None,
    ) -> list[DistributedModel]:
        """Build the model on all ranks of the job, and stream its weights straight into the shards:
        every rank reads its own bytes and no others. One process needs no launcher.

        Args:
            fp16, bf16: set params_dtype.
            use_cpu_initialization: build on the CPU even where there is an accelerator.
            wrap_with_ddp and the rest: without effect; parameters are always sharded over the
                data-parallel ranks with FSDP2, and random weights are the same at every layout.

        Returns:
            a list with this rank's part as its one member: there are no virtual stages.
        Raises BevatronError, with one message on all ranks if it fails on one of them.
        """
        if init_model_with_meta_device:
            raise BevatronError(
                "init_model_with_meta_device=True would build a model without weights; use "
                "provider.spec to look at a model that is not built"
            )
        for flag, dtype in ((fp16, torch.float16), (bf16, torch.bfloat16)):
            if flag is not None:
                self._flag(dtype, flag)
        self.finalize()
        device = torch.device("cpu") if use_cpu_initialization else default_device()
        join_world(device)
        return [self._build(device)]

    def _build(self, device: torch.device) -> DistributedModel:
        spec, layout = self.spec, self.layout
        found: list[tuple[Origin, Opened | None]] = []
        on_all(lambda: found.append(self._open(spec)))
        origin, weights = found[0]
        stored = weights or origin.weights
        dtypes = _dtypes(spec, self._dtype, stored, self._config_dtype)
        dtype = self._dtype or (DTYPES[stored.dtype] if stored else self._config_dtype)
        placed = place(
            spec,
            layout,
            mesh(layout, device),
            to_logits,
            device=device,
            precision=PRECISION[dtype],
            seq_len=self.seq_length,
            recompute=self._recompute(),
        )
        if weights is None:
            fill_random(placed, self._seed)
        else:
            stream(placed, weights)
        return DistributedModel(placed, dtypes, origin)

    def _recompute(self) -> Recompute:
        wanted = self.recompute_granularity
        if wanted not in (None, "selective", "full"):
            raise BevatronError(
                f"provider.recompute_granularity is {wanted!r}, expected None, 'selective' or "
                "'full'"
            )
        return wanted or "none"  # type: ignore[return-value]

    def _open(self, spec: ModelSpec) -> tuple[Origin, Opened | None]:
        weights = self._weights() if self._weights else None
        if weights is not None and [*weights.spec.parameters()] != [*spec.parameters()]:
            raise BevatronError(
                f"{weights.folder}: its weights do not fit the provider, of which "
                f"{', '.join(self._edits) or 'spec'} was changed; build it with random weights "
                "(to_megatron_provider(load_weights=False)) or leave the sizes as they are"
            )
        return self._open_origin(), weights


PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel")
OTHERS = ("recompute_granularity", "spec", "params_dtype", "bf16", "fp16", "seq_length")
KNOWN = frozenset((*PARALLEL, *OTHERS, *SIZES, *ONLY, *IGNORED))


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, KNOWN, 1, 0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"a provider has no field {name!r}{hint}"


def _read(spec: ModelSpec, name: str) -> Any:
    """A field of the spec under Megatron's name."""
    if name == "num_layers":
        return len(spec.layers)
    for table, part in ((MODEL, spec), (NORM, spec.norm), (ROPE, spec.rope), (INIT, spec.init)):
        if name in table:
            return getattr(part, table[name])
    attention, mlp = _every_layer(spec, name)
    sublayer = attention if name in ATTENTION else mlp
    return getattr(sublayer, {**ATTENTION, **MLPS}[name])


def _every_layer(spec: ModelSpec, name: str) -> tuple[Attention, MLP]:
    """The attention and the MLP of all layers, which are alike."""
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    alike = len(set(spec.layers)) == 1
    if not (alike and isinstance(attention, Attention) and isinstance(mlp, MLP)):
        raise BevatronError(
            f"provider.{name}: the layers of this model are not all alike; look at "
            "provider.spec.layers, and set provider.spec to another ModelSpec to change them"
        )
    return attention, mlp


def resized(spec: ModelSpec, edits: Mapping[str, Any]) -> ModelSpec:
    """`spec` with fields changed, given by Megatron's names. All at once: heads and groups may not
    fit one another in between."""

    def among(table: Mapping[str, str]) -> dict[str, Any]:
        return {ours: edits[theirs] for theirs, ours in table.items() if theirs in edits}

    layers: Iterable[LayerSpec] = spec.layers
    if changed := [name for name in OF_LAYERS if name in edits]:
        attention, mlp = _every_layer(spec, changed[0])
        attention, mlp = replace(attention, **among(ATTENTION)), replace(mlp, **among(MLPS))
        layers = [LayerSpec(attention, mlp)] * edits.get("num_layers", len(spec.layers))
    return replace(
        spec,
        layers=tuple(layers),
        norm=replace(spec.norm, **among(NORM)),
        rope=replace(spec.rope, **among(ROPE)),
        init=replace(spec.init, **among(INIT)),
        **among(MODEL),
    )


def _dtypes(
    spec: ModelSpec, asked: torch.dtype | None, stored: Opened | None, otherwise: torch.dtype
) -> dict[str, torch.dtype]:
    """What every parameter is when it leaves the model: as asked for, else as it is stored."""
    entries = stored.manifest.weights() if stored else {}
    main = asked or (DTYPES[stored.dtype] if stored else otherwise)
    dtypes = {}
    for p in spec.parameters():
        dtypes[p.name] = asked or (DTYPES[entries[p.name].dtype] if p.name in entries else main)
        if dtypes[p.name] not in PRECISION:
            raise BevatronError(
                f"{p.name} is stored as {dtypes[p.name]}, which a model here cannot hold; pass "
                "torch_dtype=torch.float32 (or another) to round it knowingly"
            )
    return dtypes
