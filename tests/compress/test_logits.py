"""Stored logits say what the teacher says, teach what the teacher teaches, and only their run."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers

from bevatron.compress import store_logits, stored_logits
from bevatron.compress.logit_divergence import Divergence, Output, distillation_sums, top_of
from bevatron.compress.stored_logits import IDS, TAIL, VALUES, Info, LogitsError, StoredLogits
from bevatron.errors import BevatronError
from bevatron.nn.rank_communication import LOCAL
from bevatron.spec.json import to_json
from bevatron.train.config_file import load_config
from bevatron.train.launch import layout_of, prepared, work
from tests.commands import bevatron
from tests.compress.test_distill import STUDENT
from tests.compress.test_distill_command import CONFIG, teacher
from tests.compress.test_divergence import KINDS, ROWS, models
from tests.data.test_store import write_store
from tests.processes import Pool
from tests.train.small_run import lines

MEASURED = ("loss", "kl", "ce", "grad_norm", "val_loss", "val_kl", "val_ce")
TAUGHT = "objective={{name: distill, temperature: 1.5, ce: 0.25, {teacher}}}"


@pytest.fixture(scope="module")
def work_folder(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `stored`, made by one process in fp32."""
    folder = tmp_path_factory.mktemp("logits")
    (folder / "spec.json").write_text(to_json(STUDENT))
    source = random.Random(0)
    documents = [[source.randrange(101) for _ in range(40)] for _ in range(100)]
    write_store(folder / "tokens", documents, 101)
    write_store(folder / "others", [[1, 2, 3] * 40] * 9, 101)
    teacher(folder / "teacher")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    pool.run(1, make, folder, "stored")
    return folder


def objective(folder: Path, teacher: str) -> str:
    return TAUGHT.format(teacher=teacher.format(folder=folder))


def make(folder: Path, into: str, *overrides: str) -> None:
    """`bevatron logits`, as one of the ranks of a process group that exists already."""
    dtype = "fp16" if "half" in into else "fp32"
    said = objective(folder, f"logits: {folder}/{into}, top_k: 9")
    config = load_config(folder / "run.yaml", [said, *overrides])
    layout = layout_of(config, dist.get_world_size())
    store_logits.make(f"{folder}/teacher", config, layout, dtype, torch.device("cpu"))


def train(folder: Path, run: str, *overrides: str) -> None:
    config = load_config(folder / "run.yaml", [*overrides, f"run.dir={folder}/{run}"])
    work(config, layout_of(config, dist.get_world_size()), allow_changed=False)


def measured(folder: Path) -> list[list[float]]:
    return [[line[n] for n in MEASURED if n in line] for line in lines(folder)]


def test_what_is_stored_is_what_transformers_says(work_folder: Path) -> None:
    found = StoredLogits.open(work_folder / "stored")
    config = load_config(
        work_folder / "run.yaml", [objective(work_folder, f"logits: {work_folder}/stored")]
    )
    found.check(config)
    samplers = store_logits.prepared(
        f"{work_folder}/teacher", config, layout_of(config, 1), "fp32"
    )[2]  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(work_folder / "teacher").double()
    for kind, count in (("train", 32), ("validation", 8)):
        assert getattr(found.info, kind) == count
        tokens = samplers[kind].samples(np.arange(count))
        rows = found.read(kind, range(count), tokens)
        with torch.no_grad():
            p = (model(torch.from_numpy(tokens[:, :-1])).logits / 1.5).softmax(-1)
        best = p.topk(9, -1)
        assert (rows[IDS] == best.indices.numpy()).mean() > 0.999  # ties within rounding
        np.testing.assert_allclose(np.exp(rows[VALUES]), best.values, rtol=1e-5)
        np.testing.assert_allclose(np.exp(rows[TAIL]), 1 - best.values.sum(-1), rtol=1e-5)
        part = found.read(kind, range(3, 7), tokens[3:7])
        assert all(np.array_equal(part[name], rows[name][3:7]) for name in rows)
    mass = found.info.tail_mass
    assert mass is not None and 0.5 < mass < 1


def test_a_run_from_fp32_logits_is_the_run_with_the_teacher_bit_for_bit(
    pool: Pool, work_folder: Path
) -> None:
    said = objective(work_folder, "teacher: {folder}/teacher, top_k: 9")
    pool.run(1, train, work_folder, "online", said)
    pool.run(1, train, work_folder, "offline", objective(work_folder, "logits: {folder}/stored"))
    online = measured(work_folder / "online")
    assert len(online) == 7 and online[1][0] > 0.05
    assert measured(work_folder / "offline") == online


@pytest.mark.slow
def test_fewer_tokens_than_are_stored_and_halves_are_near(pool: Pool, work_folder: Path) -> None:
    for name, made, top_k, near in (("fewer", "stored", 4, 5e-5), ("rounded", "half", 9, 1e-3)):
        if made == "half":
            pool.run(4, make, work_folder, made, "parallel={tp: 2, pp: 2}")
        with_teacher = objective(work_folder, f"teacher: {{folder}}/teacher, top_k: {top_k}")
        pool.run(1, train, work_folder, f"{name}-online", with_teacher)
        said = objective(work_folder, f"logits: {{folder}}/{made}, top_k: {top_k}")
        pool.run(2, train, work_folder, name, said, "parallel.tp=2")
        online = measured(work_folder / f"{name}-online")
        for ours, wanted in zip(measured(work_folder / name), online, strict=True):
            assert ours == pytest.approx(wanted, rel=near)


@pytest.mark.parametrize(
    "parallel",
    ["{tp: 2, pp: 2, dp_shard: 2}", "{pp: 2, schedule: zbv}", "{dp_shard: 2}", "{cp: 2}"],
)
@pytest.mark.slow
def test_every_layout_learns_the_same_from_them(
    pool: Pool, work_folder: Path, parallel: str
) -> None:
    masked = "data.document_mask=true"
    said = objective(work_folder, "logits: {folder}/masked")
    if not (work_folder / "masked").exists():
        pool.run(2, make, work_folder, "masked", masked)
        pool.run(1, train, work_folder, "alone", said, masked)
    world, name = 8 if "tp" in parallel else 2, f"together-{len(parallel)}"
    pool.run(world, train, work_folder, name, said, masked, f"parallel={parallel}")
    alone, together = (measured(work_folder / run) for run in ("alone", name))
    for step, (ours, wanted) in enumerate(zip(together, alone, strict=True)):
        assert ours == pytest.approx(wanted, rel=5e-5 if step else 1e-5)


def half_made(folder: Path) -> str:
    """Fail at the third file; returns the message."""
    monkeypatch = pytest.MonkeyPatch()
    write, count = stored_logits.write_block, iter(range(9))

    def full(*arguments: object) -> None:
        if next(count) == 2:
            raise OSError(28, "No space left on device", "the disk")
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store_logits, "write_block", full)
    try:
        small_files(folder, "stopped")
    except BevatronError as error:
        return str(error)
    finally:
        monkeypatch.undo()
    return ""


def small_files(folder: Path, into: str) -> None:
    before, store_logits.FILE_BYTES = store_logits.FILE_BYTES, 8 << 10
    try:
        make(folder, into)
    finally:
        store_logits.FILE_BYTES = before


def test_making_goes_on_where_it_stopped(pool: Pool, work_folder: Path) -> None:
    assert "No space left" in pool.run(1, half_made, work_folder)[0]
    folder = work_folder / "stopped"
    with pytest.raises(LogitsError, match="are not finished; start `bevatron logits` again"):
        StoredLogits.open(folder)
    made = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(made) == 2
    pool.run(2, small_files, work_folder, "stopped")  # over two ranks now
    assert all((folder / name).stat().st_mtime_ns == at for name, at in made.items())
    pool.run(1, small_files, work_folder, "at-once")
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 6 and names == {path.name for path in (work_folder / "at-once").iterdir()}
    for name in names - {"logits.json"}:
        ours, theirs = (work_folder / n / name for n in ("stopped", "at-once"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_they_are_refused_for_any_other_run(work_folder: Path) -> None:
    folder, said = work_folder / "stored", objective(work_folder, "logits: {folder}/stored")
    prepared(work_folder / "run.yaml", [said], 1)
    for overrides, message in {
        ("train.seed=1",): "train.seed is not what it was",
        ("data.seq_len=8", "train.seed=2"): "train.seed, data.seq_len are not what they were",
        ("data.document_mask=true",): "data.document_mask is not",
        (f"data.train=[{{path: {work_folder}/others}}]",): "data.train is not what it was",
        ("train.steps=5",): "has the logits of 32 samples of train, the run takes 40",
        ("train.val_batches=2",): "8 samples of validation, the run takes 16",
        ("objective.temperature=1",): "was made at 1.5, and the tail of another temperature",
        ("objective.top_k=10",): "has 9 tokens of each distribution",
        (f"objective.teacher={work_folder}/teacher",): "and not both",
        (f"objective.logits={work_folder}/tokens",): "has no logits.json",
    }.items():
        with pytest.raises(BevatronError) as refused:
            prepared(work_folder / "run.yaml", [said, *overrides], 1)
        assert message in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(LogitsError, match="sample 3 has other tokens in this run"):
        StoredLogits.open(folder).read("train", range(3, 4), np.zeros((1, 17), dtype=np.int64))
    status, said = bevatron(work_folder, "logits", "teacher", "run.yaml", said)
    assert status == 2 and "is finished already" in said and "Traceback" not in said


def test_damage_is_found_before_it_teaches(pool: Pool, work_folder: Path) -> None:
    folder, said = work_folder / "damaged", objective(work_folder, "logits: {folder}/damaged")
    shutil.copytree(work_folder / "stored", folder)
    file = folder / "train-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(LogitsError, match="bytes, expected"):
        StoredLogits.open(folder)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AssertionError, match="sample 31 is not as it was written"):
        pool.run(1, train, work_folder, "run", said)


def test_the_command_makes_them_with_processes_of_its_own(work_folder: Path) -> None:
    said = objective(work_folder, "logits: {folder}/by-command")
    arguments = ("logits", "teacher", "run.yaml", said, "--nproc", "2", "--json")
    status, shown = bevatron(work_folder, *arguments)
    assert status == 0, shown
    assert '"top_k": 64' in shown and '"dtype": "fp16"' in shown
    prepared(work_folder / "run.yaml", [said], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_of_a_distribution_teaches_as_all_of_it_at_the_same_k(kind: str) -> None:
    """And the same by half precision within its rounding; the gradient, too."""
    student, taught, labels = models()
    options = Divergence(kind, 2.0, 5, 0.3)  # type: ignore[arg-type]
    more = top_of(taught, LOCAL, ROWS, 2.0, 11)
    half = type(more)(more.values.half().float(), more.ids, more.tail).normalised()
    assert float(half.values.exp().sum(1).add(half.tail.exp()).sub(1).abs().max()) < 1e-6
    found = []
    for given in (taught, more.first(5), half.first(5)):
        sums = distillation_sums(student, given, labels, LOCAL, ROWS, options)
        found.append(
            (sums.detach(), *torch.autograd.grad(sums[0], (student.hidden, student.weight)))
        )
    for got, tolerance in ((found[1], 1e-6), (found[2], 1e-3)):
        for ours, wanted in zip(got, found[0], strict=True):
            assert float((ours - wanted).norm() / wanted.norm()) < tolerance


def test_the_size_of_a_token_is_what_the_page_says() -> None:
    """64 tokens: 260 bytes of a vocabulary of up to 65,536, 388 of a larger one."""
    sizes = {"model": "", "teacher": "", "top_k": 64, "temperature": 1.0, "dtype": "fp16"}
    counts = {"order": {}, "train": 9, "validation": 0, "per_file": 9, "seq_len": 1000}
    for vocabulary, each in ((65_536, 260), (128_256, 388)):
        info = Info(**sizes, **counts, vocab_size=vocabulary)
        assert info.nbytes(9) - info.nbytes(8) == pytest.approx(each * 1000, rel=1e-3)


def test_a_teacher_that_is_larger_than_16_bit_ids_is_stored_in_32(tmp_path: Path) -> None:
    sizes = {"model": "", "teacher": "", "top_k": 2, "temperature": 1.0, "dtype": "fp32"}
    counts = {"order": {}, "train": 2, "validation": 0, "per_file": 2, "seq_len": 1}
    info = Info(**sizes, **counts, vocab_size=70_000)
    tokens = np.array([[1, 2], [3, 69_999]])
    made = {
        "tokens": tokens,
        "tail": np.zeros((2, 1)),
        "values": np.zeros((2, 1, 2)),
        "ids": np.array([[[69_999, 0]], [[65_536, 1]]]),
    }
    stored_logits.write_block(tmp_path, info, info.blocks()[0], made)
    (tmp_path / "logits.json").write_text(info.to_json())
    found = StoredLogits.open(tmp_path).read("train", range(2), tokens)
    assert np.array_equal(found[IDS], made["ids"])


def test_logits_are_an_output_of_one_end() -> None:
    """The k likeliest of chunks of tokens are those of all of them."""
    _, taught, _ = models()
    p = Output(taught.hidden, taught.weight, taught.cap).logits(slice(None)).softmax(-1)
    top = top_of(taught, LOCAL, ROWS, 1.0, 6)
    assert torch.equal(top.ids, p.topk(6, -1).indices)
    torch.testing.assert_close(top.tail.exp(), 1 - p.topk(6, -1).values.sum(-1))
