"""Everything that can be wrong with a saved file of edits, and a word of the message that each must give."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_alphaedit import state


Damage = Callable[[Path], None]


def bytes_changed(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def flipped(position: Callable[[bytes], int]) -> Damage:
    def change(content: bytes) -> bytes:
        place = position(content)
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return bytes_changed(change)


def after_header(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def opened(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["hf_alphaedit"]), tensors


def metadata_changed(**changes: Any) -> Damage:
    """Another entry in the metadata, without a new checksum; None takes the entry out."""

    def damage(path: Path) -> None:
        entry, tensors = opened(path)
        entry = {name: value for name, value in {**entry, **changes}.items() if value is not None}
        save_file(tensors, path, metadata={"hf_alphaedit": json.dumps(entry)})

    return damage


def forged(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Damage:
    """Another content under a checksum that is right: what the checksum can't find must be found all the same."""

    def damage(path: Path) -> None:
        entry, tensors = opened(path)
        replaced = change(entry["document"], tensors)
        state.write_state(path, entry["kind"], entry["document"] if replaced is None else replaced, tensors)

    return damage


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return min(name for name in tensors if name.endswith(part))


def with_tensor(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return forged(
        lambda document, tensors: tensors.update({first(tensors, part): change(tensors[first(tensors, part)])})
    )


def with_entry(name: str, value: Any) -> Damage:
    return forged(lambda document, tensors: document.update({name: value}))


def with_batch_entry(name: str, value: Any) -> Damage:
    return forged(lambda document, tensors: document["batches"][0].update({name: value}))


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


REQUEST = {"prompt": "{} is", "subject": "a", "target_new": "b"}

# name: (what is done to the file, a word of the message)
DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty": (bytes_changed(lambda content: b""), "damaged or cut short"),
    "half": (bytes_changed(lambda content: content[: len(content) // 2]), "damaged or cut short"),
    "last byte missing": (bytes_changed(lambda content: content[:-1]), "damaged or cut short"),
    "header only": (bytes_changed(lambda content: content[: after_header(content)]), "damaged or cut short"),
    "bytes appended": (bytes_changed(lambda content: content + b"more"), "damaged or cut short"),
    "header length absurd": (bytes_changed(lambda content: b"\xff" * 8 + content[8:]), "damaged or cut short"),
    "zeros": (bytes_changed(lambda content: bytes(len(content))), "damaged or cut short"),
    "text": (lambda path: path.write_text("edits") and None, "damaged or cut short"),
    "JSON": (lambda path: path.write_text('{"batches": []}') and None, "damaged or cut short"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"batches": []})) and None, "damaged or cut short"),
    "torch archive": (lambda path: torch.save({"a": torch.ones(2)}, path), "damaged or cut short"),
    "one bit of a tensor": (flipped(after_header), "SHA-256"),
    "last bit": (flipped(lambda content: len(content) - 1), "SHA-256"),
    "one letter of a request": (flipped(lambda content: content.index(b"Secret prompt")), "SHA-256"),
    "another safetensors file": (lambda path: save_file({"weight": torch.ones(2, 2)}, path), "kind is missing"),
    "metadata no JSON": (lambda path: save_file({}, path, metadata={"hf_alphaedit": "{"}), "damaged or cut short"),
    "metadata a list": (lambda path: save_file({}, path, metadata={"hf_alphaedit": "[]"}), "kind is missing"),
    "another kind": (metadata_changed(kind="hf_alphaedit.moments"), "'hf_alphaedit.moments'"),
    "newer format": (metadata_changed(format_version=2), "upgrade"),
    "format zero": (metadata_changed(format_version=0), "format 0"),
    "format a text": (metadata_changed(format_version="one"), "format_version is 'one'"),
    "no format": (metadata_changed(format_version=None), "format_version is missing"),
    "no checksum": (metadata_changed(sha256=None), "sha256 is missing"),
    "no document": (metadata_changed(document=None), "SHA-256"),
    "document a list": (forged(lambda document, tensors: [1]), "document is [1]"),
    "no fingerprint": (with_entry("base_fingerprint", None), "base_fingerprint is None"),
    "fingerprint no digest": (with_entry("base_fingerprint", "latest"), "'latest'"),
    "tokenizer fingerprint a number": (with_entry("tokenizer_fingerprint", 7), "tokenizer_fingerprint is 7"),
    "model name a list": (with_entry("base_model", ["a"]), "base_model"),
    "contexts of numbers": (with_entry("contexts", [1]), "contexts=[1]"),
    "batches an object": (with_entry("batches", {}), "batches"),
    "batch a text": (forged(lambda document, tensors: document["batches"].append("x")), "str instead of an object"),
    "no settings": (with_batch_entry("settings", None), "settings"),
    "count a text": (with_batch_entry("count", "2"), "count"),
    "count too small": (with_batch_entry("count", 1), "counts 1 edits"),
    "request without placeholder": (with_batch_entry("requests", [{**REQUEST, "prompt": "x"}] * 2), "placeholder"),
    "request with unknown field": (with_batch_entry("requests", [{**REQUEST, "code": "x"}] * 2), "code"),
    "request a number": (with_batch_entry("requests", [1, 2]), "can't be read"),
    "outcomes numbers": (with_batch_entry("outcomes", [1]), "outcomes"),
    "tensor missing": (forged(lambda document, tensors: tensors.__delitem__(first(tensors, "/inputs"))), "no inputs"),
    "tensor too many": (forged(lambda document, tensors: tensors.update(other=torch.ones(1))), "other"),
    "tensor a vector": (with_tensor("/inputs", lambda tensor: tensor[0]), "finite matrix"),
    "tensor of integers": (with_tensor("/inputs", lambda tensor: tensor.long()), "finite matrix"),
    "not a number": (with_tensor("/outputs", with_nan), "finite matrix"),
    "rows missing": (with_tensor("/outputs", lambda tensor: tensor[1:]), "different numbers of rows"),
    "narrower": (with_tensor("/outputs", lambda tensor: tensor[:, 1:]), "shape|here it is"),
}  # fmt: skip
