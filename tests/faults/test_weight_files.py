"""Weight files that are damaged, contradict themselves or are something else."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch

from tests.faults.refusal import NORM, change_header, file_of, put, refused, rename, shard


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def overlap(header):
    first, second = sorted(
        (k for k in header if k[0] != "_"), key=lambda k: header[k]["data_offsets"]
    )[:2]
    n = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [0, n]
    assert first != second


def twice(path):
    header, data = shard(path)
    text = json.dumps(header)
    put(path, (text[:-1] + f', "{NORM}": {json.dumps(header[NORM])}' + "}").encode(), data)


def set_norm(**changes):
    return lambda path: change_header(path, lambda h: h[NORM].update(changes))


def write(data: bytes):
    return lambda path: path.write_bytes(data)


def header_text(text: bytes):
    return lambda path: put(path, text, b"")


def called(name: str):
    return lambda path: rename(path, NORM, name)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
FAULTS = {
    "fault-01-truncated": (cut, "truncated"),
    "fault-02-trailing-bytes": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "trailing"),
    "fault-03-empty": (write(b""), "empty"),
    "fault-03-shorter-than-a-length": (write(b"abc"), "3 bytes"),
    "fault-04-header-past-the-end": (write(struct.pack("<Q", 9999) + b"{}"), "9999"),
    "fault-05-header-over-the-cap": (write(struct.pack("<Q", 1 << 60) + b"{}"), "more than"),
    "fault-06-overlapping-offsets": (lambda p: change_header(p, overlap), "overlaps"),
    "fault-07-gap-in-offsets": (lambda p: change_header(p, lambda h: h.pop(NORM)), "gap"),
    "fault-08-shape-does-not-make-the-bytes": (set_norm(shape=[31]), "takes 62"),
    "fault-08-begin-after-end": (set_norm(data_offsets=[64, 0]), "begin before end"),
    "fault-09-shape-overflow": (set_norm(shape=[1 << 40] * 2), "larger"),
    "fault-09-shape-overflow-times-zero": (set_norm(shape=[1 << 63, 0]), "larger"),
    "fault-09-negative-shape": (set_norm(shape=[-1]), "non-negative"),
    "fault-09-shape-of-floats": (set_norm(shape=[32.0]), "non-negative integers"),
    "fault-09-a-million-dimensions": (set_norm(shape=[1 << 40] * 10**6), "1000000 dimensions"),
    "fault-08-offsets-of-texts": (set_norm(data_offsets=["a" * 10**6, 64]), "non-negative"),
    "fault-10-duplicate-name": (twice, "twice"),
    "fault-16-lfs-pointer": (write(LFS), "LFS"),
    "fault-16-html-error-page": (write(b"\n <!DOCTYPE html><html>401"), "web page"),
    "fault-16-json-error": (write(b'{"error":"Repository not found"}'), "more than"),
    "fault-17-pickle-named-safetensors": (write(pickle.dumps({"a": 1})), "pickle"),
    "fault-17-torch-zip-named-safetensors": (lambda p: torch.save({"a": 1}, p), "pickle"),
    "fault-31-packed-dtype": (set_norm(dtype="F4"), "'F4'"),
    "fault-31-dtype-of-a-list": (set_norm(dtype=[1] * 10**5), "unknown"),
    "fault-39-header-not-json": (header_text(b"{nonsense"), "JSON"),
    "fault-39-header-with-a-bom": (header_text(b"\xef\xbb\xbf{}"), "begin with '{'"),
    "fault-39-header-nested": (header_text(b'{"a":' + b"[" * 10**6), "nested"),
    "fault-39-header-with-nan": (header_text(b'{"a": NaN}'), "NaN"),
    "fault-39-header-of-a-huge-number": (header_text(b'{"a": ' + b"9" * 5000 + b"}"), "digits"),
    "fault-39-header-without-objects": (header_text(b'{"a": 1}'), "exactly dtype"),
    "fault-39-metadata-of-numbers": (header_text(b'{"__metadata__": {"a": 1}}'), "strings"),
    "fault-40-name-not-utf-8": (header_text(b'{"\xff": 1}'), "UTF-8"),
    "fault-40-half-a-surrogate-pair": (called("a\ud800.rotary_emb.inv_freq"), "no Unicode"),
    "fault-40-very-long-name": (called("n" * 10**6), NORM),
    "fault-40-very-long-name-twice": (
        header_text(b"{" + b",".join([b'"' + b"n" * 10**6 + b'": 1'] * 2) + b"}"),
        "twice",
    ),
    "fault-40-very-long-name-and-a-gap": (
        lambda p: change_header(
            p, lambda h: h.update({"n" * 10**6: {**h.pop(NORM), "dtype": "F4"}})
        ),
        "unknown or packed",
    ),
}


@pytest.mark.parametrize("name", ["one", "many"])
@pytest.mark.parametrize("fault", FAULTS)
def test_damage(model, fault: str, name: str) -> None:
    source = model(name)
    path = file_of(source, NORM)
    damage, word = FAULTS[fault]
    damage(path)
    refused(source, word, str(source))


NAMES = {
    "fault-40-unknown-name-that-is-very-long": "n" * 10**6,
    "fault-40-unknown-name-with-line-breaks": "a\nb\r",
    "fault-40-unknown-name-that-speaks-to-the-terminal": "\x1b]0;title\x07\x1b[2J",
    "fault-40-unknown-name-that-is-right-to-left": "\u202egpj.exe",
    "fault-40-unknown-name-with-a-null": "a\0b",
    "fault-40-unknown-name-that-is-empty": "",
}


@pytest.mark.parametrize("fault", NAMES)
def test_names_are_shown_harmlessly(model, fault: str) -> None:
    """`refused` checks that the message is one printable line of less than 3000 characters."""
    source = model()
    path: Path = file_of(source, NORM)
    header, data = shard(path)
    header[NAMES[fault]] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    put(path, header, data + b"x")
    refused(source, "1 tensors belong to no parameter")
