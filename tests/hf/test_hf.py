"""`import bevatron.hf`: Llama-Nemotron is a transformers model like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import StaticCache

from bevatron import hf
from bevatron.bridge.convert import export_checkpoint, import_checkpoint
from bevatron.bridge.remote_code import AUTO_MAP, wont_read
from bevatron.evaluate.verify import compare_logits
from bevatron.families import by_name
from bevatron.families.published_models import preset
from bevatron.parallel.whole_decoder import load_decoder
from bevatron.spec import MLP, Attention, LayerSpec, Linear, ModelSpec
from bevatron.spec.json import from_json, to_json
from tests.nn.llama_nemotron_reference import (
    BLOCKS,
    ReferenceLlamaNemotron,
    block,
    published_config,
)

FIRST_EMPTY = [block(None, 1.0), block(None, None), *BLOCKS]
NO_ATTENTION = [block(None, 1.0), block("linear", None), block(None, "linear")]
CASES = {"mixed": BLOCKS, "first-without": FIRST_EMPTY, "no-attention": NO_ATTENTION}


def save(path: Path, blocks: list[dict[str, Any]], **changes: Any) -> ReferenceLlamaNemotron:
    """A random model as published ones are stored; computed by parts that are not ours."""
    config = published_config(blocks, **changes)
    model = ReferenceLlamaNemotron(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise * 0.2 if "norm" in name else noise * 0.1
    path.mkdir(exist_ok=True)
    tensors = {k: v for k, v in model.state_dict().items() if "rotary" not in k}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return model


def load(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def some_ids(*shape: int) -> Tensor:
    return torch.randint(4, 97, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_an_independent_composition(
    case: str, attention: str, tmp_path: Path
) -> None:
    reference = save(tmp_path, CASES[case])
    model = load(tmp_path, attn_implementation=attention)
    assert type(model) is hf.DeciLMForCausalLM
    ids = some_ids(2, 33)
    with torch.no_grad():
        expected = reference(ids)
        assert expected.std() > 0.1
        assert (model(ids).logits - expected).abs().max() <= 1e-5
        decoder, _ = load_decoder(tmp_path)
        assert (decoder.logits(ids) - expected).abs().max() <= 1e-5
    found = compare_logits(tmp_path, tmp_path)
    assert (found["a"], found["ok"]) == ("transformers", True)


@pytest.mark.parametrize("case", CASES)
def test_every_cache_gives_the_same_tokens(case: str, tmp_path: Path) -> None:
    reference = save(tmp_path, CASES[case])
    model = load(tmp_path)
    prompt = some_ids(1, 7)
    ids = prompt[0].tolist()
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(reference(torch.tensor([ids]))[0, -1].argmax()))
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        lookup = {"prompt_lookup_num_tokens": 3, "eos_token_id": 97}  # of no token: 4.57 wants one
        other = load(tmp_path)  # whose guesses are wrong: what they left in the cache is cut off
        other.lm_head.weight.data.neg_()
        assisted = [lookup, {"assistant_model": load(tmp_path)}, {"assistant_model": other}]
        for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}, *assisted):
            out = model.generate(prompt, **{**options, **more}, pad_token_id=0)
            assert out[0].tolist() == ids, more


@pytest.mark.parametrize("case", CASES)
def test_every_cache_gives_the_same_beams(case: str, tmp_path: Path) -> None:
    save(tmp_path, CASES[case])
    model = load(tmp_path)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    prompt, more = some_ids(2, 7), {"output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(prompt, **options, **more, pad_token_id=0, use_cache=False)
    for cache in ({}, {"cache_implementation": "static"}):
        out = model.generate(prompt, **options, **more, **cache, pad_token_id=0)
        assert torch.equal(out.sequences, expected.sequences), cache
        assert (out.sequences_scores - expected.sequences_scores).abs().max() <= 1e-5


def test_a_left_padded_batch_gives_the_same_tokens(tmp_path: Path) -> None:
    save(tmp_path, FIRST_EMPTY)
    model = load(tmp_path)
    ids = some_ids(1, 9)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids[:, :5]), 1)
    batch = torch.cat((ids, padded))
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)[:, -8:]
    for row, alone in zip(together, (ids, ids[:, :5]), strict=True):
        assert torch.equal(row, model.generate(alone, **options)[0, -8:])


def test_a_prompt_in_pieces_gives_the_same_logits(tmp_path: Path) -> None:
    """The cache has one name in the output, and either name is taken, whatever the release."""
    save(tmp_path, FIRST_EMPTY)
    model = load(tmp_path)
    ids = some_ids(1, 20)
    with torch.no_grad():
        whole = model(ids).logits
        for name in ("cache", "past_key_values"):
            first = model(ids[:, :11], use_cache=True)
            rest = model(ids[:, 11:], **{name: first[hf.CACHE]}).logits
            assert (torch.cat((first.logits, rest), 1) - whole).abs().max() <= 1e-5, name
        with pytest.raises(ValueError, match="one of cache and past_key_values"):
            model(ids, cache=first[hf.CACHE], past_key_values=first[hf.CACHE])


def test_a_step_with_a_static_cache_compiles_whole(tmp_path: Path) -> None:
    """What `_can_compile_fullgraph` says, which makes `generate` compile it on a GPU."""
    save(tmp_path, FIRST_EMPTY)
    model = load(tmp_path)
    assert model._can_compile_fullgraph
    ids = some_ids(1, 12)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        whole = model(ids).logits
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :9], **{hf.CACHE: cache})
        for i in range(9, 12):
            more = {"cache_position": torch.tensor([i])} if hf.POSITIONS else {}
            step = {hf.CACHE: cache, "position_ids": torch.tensor([[i]]), **more}
            logits = compiled(ids[:, i : i + 1], **step).logits
            assert (logits - whole[:, i : i + 1]).abs().max() <= 1e-5


def test_it_trains_with_recomputed_activations(tmp_path: Path) -> None:
    save(tmp_path, BLOCKS)
    ids = some_ids(2, 16)
    gradients = []
    for recompute in (False, True):
        model = load(tmp_path).train()
        if recompute:
            old = model.gradient_checkpointing_enable  # of 4.57; 5.24 warns about it
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        out = model(ids, labels=ids)
        out.loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        assert all(g is not None for g in gradients[-1].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6)


def test_hidden_states_and_attentions_come_out(tmp_path: Path) -> None:
    save(tmp_path, BLOCKS)
    model = load(tmp_path, attn_implementation="eager")
    out = model(some_ids(1, 5), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(BLOCKS) + 1
    kinds = [weights is not None for weights in out.attentions]
    assert kinds == [isinstance(b["attention"]["n_heads_in_group"], int) for b in BLOCKS]


def test_the_attention_kernel_can_be_changed_later(tmp_path: Path) -> None:
    save(tmp_path, BLOCKS)
    model = load(tmp_path)
    ids = some_ids(1, 9)
    before = model(ids, output_attentions=True)
    assert not any(weights is not None for weights in before.attentions)
    model.set_attn_implementation("eager")
    after = model(ids, output_attentions=True)
    assert any(weights is not None for weights in after.attentions)
    assert (before.logits - after.logits).abs().max() <= 1e-5


def test_a_layer_s_output_is_freed_unless_it_was_asked_for(tmp_path: Path) -> None:
    save(tmp_path, BLOCKS)
    model = load(tmp_path, attn_implementation="eager")
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, out: made.append(weakref.ref(out[0])))
    model.model.norm.register_forward_pre_hook(
        lambda *_: alive.append(len({id(t) for r in made if (t := r()) is not None}))
    )
    with torch.no_grad():
        model(some_ids(1, 5))
        model(some_ids(1, 5), output_hidden_states=True)
    assert alive[0] == 1 < alive[1]


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_again_it_is_the_same(tied: bool, tmp_path: Path) -> None:
    save(tmp_path / "a", BLOCKS)
    model = load(tmp_path / "a")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.resize_token_embeddings(105)
    model.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["intermediate_size"] is None
    assert config["num_key_value_heads"] is None
    assert config["block_configs"] == BLOCKS
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 8.0
    code = (tmp_path / "b" / "modeling_decilm.py").read_bytes()
    assert code == Path(hf.__file__).read_bytes()
    assert config["auto_map"] == AUTO_MAP, "that of the source names files that are not here"
    assert ("lm_head.weight" in load_file(tmp_path / "b" / "model.safetensors")) is not tied
    again = load(tmp_path / "b")
    ids = some_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert by_name("llama_nemotron").spec(config).tie_word_embeddings is tied


def test_heads_that_do_not_divide_the_hidden_size(tmp_path: Path) -> None:
    """A model whose heads were pruned: 6 heads of 8 in a hidden size of 64."""
    spec = by_name("llama_nemotron").spec(published_config(BLOCKS))
    layers = (LayerSpec(Attention(6, 3, 8), MLP(300)), LayerSpec(Attention(6, 6, 8), MLP(256)))
    config = by_name("llama_nemotron").config(
        replace(spec, layers=(*layers[1:], *layers[1:])), "float32"
    )
    config["block_configs"][0]["ffn"] |= {"ffn_mult": None, "intermediate_size": 300}
    model = hf.DeciLMForCausalLM(hf.DeciLMConfig(**config)).eval()
    assert model.model.layers[0].mlp.gate_proj.weight.shape == (300, 64)
    model.save_pretrained(tmp_path)
    decoder, found = load_decoder(tmp_path)
    assert found.layers == (LayerSpec(Attention(6, 6, 8), MLP(300)), layers[1])
    ids = some_ids(2, 12)
    with torch.no_grad():
        assert (decoder.logits(ids) - model(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("DeciLMForSequenceClassification", {"pad_token_id": 3, "id2label": {"0": "a", "1": "b"}}),
        ("DeciLMForTokenClassification", {"id2label": {"0": "a", "1": "b", "2": "c"}}),
        ("DeciLMForQuestionAnswering", {}),
        ("DeciLMModel", {}),
    ],
)
def test_heads_and_bare_models_agree_with_the_decoder(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = hf.DeciLMConfig(**published_config(BLOCKS, architectures=[name], **changes))
    torch.manual_seed(0)
    model = getattr(hf, name)(config).eval()
    model.save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out")
    found = compare_logits(tmp_path / "native", tmp_path / "out")
    assert (found["a"], found["b"]) == ("bevatron", "transformers")
    assert found["max_abs_difference"] <= 1e-5


REFUSED: list[tuple[str, str, Any]] = [
    *(("attention", key, value) for key, value in {
        "sparsify": ["2:4"], "window_length": 64, "num_sink_tokens": 4, "unshifted_sink": True,
        "use_prefill_window_in_sink_attention": True, "mamba": {"state_dim": 8}, "llama4": {},
        "num_key_value_heads": 3, "n_heads_in_group": 3, "replace_with_linear": True, "gate": 1,
    }.items()),
    *(("ffn", key, value) for key, value in {
        "sparsify": ["2:4"], "moe": {"num_experts": 4}, "gated": False, "hidden_act": "relu2",
        "intermediate_size": 300, "ffn_mult": -1.0, "replace_with_linear": True, "gate": 1,
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(("part", "key", "value"), REFUSED)
def test_blocks_that_it_cannot_compute_are_refused(part: str, key: str, value: Any) -> None:
    config = published_config(json.loads(json.dumps(BLOCKS)))
    block = config["block_configs"][0][part]
    block.update({"no_op": True} if key == "replace_with_linear" else {}, **{key: value})
    with pytest.raises(ValueError, match=rf"block_configs\[0\]\.{part}.*{key}"):
        hf.DeciLMConfig(**config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "none"),
        ("o_proj_bias", True),
        ("sliding_window", 16),
        ("block_configs", BLOCKS[1:]),
        ("block_configs", [{**BLOCKS[0], "parallel_blocks": [BLOCKS[0]]}, *BLOCKS[1:]]),
        ("block_configs", [{"attention": BLOCKS[0]["attention"]}, *BLOCKS[1:]]),
    ],
)
def test_models_that_it_cannot_compute_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        hf.DeciLMConfig(**{**published_config(BLOCKS), key: value})


def test_the_later_spelling_means_the_same_and_is_written_as_published() -> None:
    later = json.loads(json.dumps(BLOCKS))
    for entry in later:
        attention, ffn = entry["attention"], entry["ffn"]
        group, mult = attention.pop("n_heads_in_group"), ffn.pop("ffn_mult")
        attention |= {"num_key_value_heads": group and 8 // group, "mamba": None, "llama4": None}
        width = mult and hf.FFNBlock(mult).width(64)
        ffn |= {"intermediate_size": width, "gated": True, "hidden_act": "silu", "moe": None}
    config = hf.DeciLMConfig(**published_config(later, o_proj_bias=False))
    written = json.loads(config.to_json_string())["block_configs"]
    widths = [hf.FFNBlock(**b["ffn"]).width(64) for b in written]
    assert widths == [hf.FFNBlock(**b["ffn"]).width(64) for b in BLOCKS]
    for entry, published in zip(written, BLOCKS, strict=True):
        assert entry["attention"] == published["attention"]
        assert entry["ffn"].keys() == published["ffn"].keys()


def test_the_head_is_split_as_llama_s() -> None:
    """Under `tp_plan="auto"`, where a tied head without a plan fails; transformers' own tests of it
    run in tests/hf_common."""
    assert hf.DeciLMForCausalLM._tp_plan == transformers.LlamaForCausalLM._tp_plan
    assert hf.DeciLMConfig.base_model_tp_plan == transformers.LlamaConfig.base_model_tp_plan


def test_super_49b_has_as_many_parameters_as_published() -> None:
    config = by_name("llama_nemotron").config(preset("llama-nemotron-super-49b"), "bfloat16")
    with torch.device("meta"):
        model = hf.DeciLMForCausalLM(hf.DeciLMConfig(**config))
    assert sum(p.numel() for p in model.parameters()) == 49_867_145_216
    assert len(model.state_dict()) == 568


def readers(*layers: LayerSpec, hidden_size: int = 64) -> dict[str, str]:
    spec = ModelSpec(vocab_size=97, hidden_size=hidden_size, layers=layers)
    return {line.partition(" will not")[0]: line for line in wont_read(spec)}


def test_an_export_says_which_programs_will_not_read_it() -> None:
    usual = LayerSpec(Attention(8, 2, 8), MLP(256))
    assert readers(usual, LayerSpec(None, None), LayerSpec(None, MLP(512))) == {}
    assert set(readers(usual, LayerSpec(None, None))) == {"llama.cpp"}
    assert set(readers(usual, LayerSpec(Linear(), MLP(256)))) == {"vLLM", "SGLang"}
    found = readers(usual, LayerSpec(None, Linear()))
    assert set(found) == {"vLLM", "SGLang", "llama.cpp"}
    assert set(readers(usual, LayerSpec(Attention(8, 4, 8), MLP(256)))) == {"SGLang"}
    found = readers(LayerSpec(Attention(8, 2, 8), None), usual)
    assert set(found) == {"llama.cpp"}
    assert "left out silently" in found["llama.cpp"]
    assert set(readers(LayerSpec(None, MLP(256)), usual)) == {"vLLM", "SGLang", "llama.cpp"}
    assert set(readers(LayerSpec(None, None), usual)) == {"llama.cpp"}
    found = readers(LayerSpec(Attention(6, 2, 8), MLP(256)))
    assert "head_dim" in found.pop("llama.cpp")
    assert found == {}
    biases = LayerSpec(Attention(8, 2, 8, qkv_bias=True, o_bias=True), MLP(256))
    assert set(readers(biases)) == {"TensorRT-LLM"}
    biases = LayerSpec(Attention(8, 2, 8), MLP(256, bias=True))
    assert set(readers(biases)) == {"TensorRT-LLM", "SGLang"}


# --- as users meet it -----------------------------------------------------------------------------


def add_tokenizer(path: Path) -> None:
    """Words w0 to w96, and a chat template."""
    words = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}w4 {{ m['content'] }} {% endfor %}w5"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_pipeline_takes_chat_messages(tmp_path: Path) -> None:
    save(tmp_path, BLOCKS)
    add_tokenizer(tmp_path)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), dtype=torch.float32)
    messages = [{"role": "user", "content": "w7 w8"}]
    out = pipe(messages, max_new_tokens=4, do_sample=False, pad_token_id=0)
    answer = out[0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert set(answer["content"].split()) <= {f"w{i}" for i in range(97)}


@pytest.mark.slow
def test_the_transformers_command_line_knows_the_classes() -> None:
    code = "import sys, bevatron.hf as hf; import transformers as t; "
    code += "assert t.DeciLMForCausalLM is hf.DeciLMForCausalLM"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1800)
    line = [sys.executable, "-m", "bevatron", "transformers", "env"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=1800)
    assert f"`transformers` version: {transformers.__version__}" in done.stdout


STRANGER = """
import json, sys, torch, transformers
for line in sys.stdin:
    folder, kind, save = json.loads(line)
    auto = getattr(transformers, kind)
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    ids = torch.arange(4, 24).view(2, 10)
    with torch.no_grad():
        out = model(ids)
    torch.save([x for x in out.to_tuple() if isinstance(x, torch.Tensor)], folder + "/found.pt")
    if save:
        model.save_pretrained(save)
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("w1 w2")
assert "bevatron" not in sys.modules
"""


def run_stranger(home: Path, *tasks: tuple[Path, str, Path | None]) -> list[list[Tensor]]:
    """What a process that knows transformers and the folders, and nothing of us, computes.

    A task is a folder, the Auto class to load it with, and where to save it again."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(home / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER],
        input="".join(json.dumps([str(f), kind, to and str(to)]) + "\n" for f, kind, to in tasks),
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
        cwd=home,
        env={k: v for k, v in environment.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / "found.pt", weights_only=True) for folder, _, _ in tasks]


def pruned(tmp_path: Path) -> Path:
    """A native model that no published folder describes: an export of one that was changed."""
    save(tmp_path / "hf", BLOCKS)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    add_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "modeling_x.py").write_text("# nobody names this file")
    import_checkpoint(tmp_path / "hf", tmp_path / "native")
    spec_file = tmp_path / "native" / "spec.json"
    spec = from_json(spec_file.read_text())
    spec_file.write_text(to_json(replace(spec, max_position_embeddings=256)))
    return tmp_path / "native"


def test_an_export_without_code_of_its_own_brings_ours(tmp_path: Path) -> None:
    report = export_checkpoint(
        pruned(tmp_path), tmp_path / "out", dtype="fp32", max_shard_size="9KB"
    )
    code = (tmp_path / "out" / "modeling_decilm.py").read_bytes()
    assert code == Path(hf.__file__).read_bytes()
    assert any("vLLM will not read it" in note for note in report.notes)
    assert code == (tmp_path / "out" / "modeling_decilm.py").read_bytes()
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()
    again = tmp_path / "again"
    bare, labelled, answers, saved = (tmp_path / name for name in ("bare", "seq", "qa", "saved"))
    shutil.copytree(tmp_path / "out", bare)
    config = hf.DeciLMConfig(**published_config(BLOCKS, pad_token_id=3))
    heads = [hf.DeciLMForSequenceClassification(config), hf.DeciLMForQuestionAnswering(config)]
    for head, folder in zip(heads, (labelled, answers), strict=True):
        head.eval().save_pretrained(folder)
    model = load(tmp_path / "out")
    model.save_pretrained(saved)
    found = run_stranger(
        tmp_path,
        (tmp_path / "out", "AutoModelForCausalLM", again),
        (bare, "AutoModel", None),
        (labelled, "AutoModelForSequenceClassification", None),
        (answers, "AutoModelForQuestionAnswering", None),
        (saved, "AutoModelForCausalLM", None),
    )
    ids = torch.arange(4, 24).view(2, 10)
    decoder, _ = load_decoder(tmp_path / "native")
    with torch.no_grad():
        logits = decoder.logits(ids)
        expected = [logits, model.model(ids).last_hidden_state, heads[0](ids).logits]
        for one, two in zip(found, expected, strict=False):
            assert (one[0] - two).abs().max() <= 1e-5
        assert (found[3][1] - heads[1](ids).end_logits).abs().max() <= 1e-5
        assert (found[4][0] - logits).abs().max() <= 1e-5
    assert (again / "modeling_decilm.py").read_bytes() == code
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP == hf.auto_map()


def test_an_unchanged_import_gets_nothing_added(tmp_path: Path) -> None:
    save(tmp_path / "hf", BLOCKS)
    import_checkpoint(tmp_path / "hf", tmp_path / "native")
    report = export_checkpoint(tmp_path / "native", tmp_path / "out")
    assert report.identical
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_code_that_the_source_brought_stays(tmp_path: Path) -> None:
    save(tmp_path / "hf", BLOCKS)
    (tmp_path / "hf" / "modeling_decilm.py").write_text("# theirs")
    import_checkpoint(tmp_path / "hf", tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "out", dtype="bf16")
    assert (tmp_path / "out" / "modeling_decilm.py").read_text() == "# theirs"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == published_config(BLOCKS)["auto_map"]
