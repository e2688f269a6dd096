"""Targets on disk: an interrupted or repeated run doesn't search again for what it has found before."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from hf_alphaedit import __version__
from hf_alphaedit.errors import StateError
from hf_alphaedit.models.encoding import EncodedRequest
from hf_alphaedit.models.fingerprint import weight_digest
from hf_alphaedit.processes import Processes
from hf_alphaedit.state import read_state, write_state
from hf_alphaedit.targets import Targets, compute_targets, product_dtype


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

logger = logging.getLogger(__name__)

KIND = "targets"
ENTRIES_KEPT = 256
# The settings that a target depends on; the others only matter for the solve.
SEARCH_SETTINGS = (
    "value_steps", "learning_rate", "adam_betas", "clamp_factor", "kl_factor", "weight_decay", "stop_loss",
    "stop_at_argmax", "contexts_in_turn",
)  # fmt: skip


def cached_targets(editor: AlphaEditor, requests: Sequence[EncodedRequest], layer: int) -> Targets:
    """The targets of these requests, read if this very search was made before, else searched for and written.

    A whole batch is one entry, because the bits of a target depend a little on what runs beside it. The key covers
    the token rows, the layer, the search's settings and dtype, the base model, the edited weights as they are now, the
    device, the number of threads and the versions of torch, transformers and this package. A damaged entry is searched
    for again. The oldest entries are deleted beyond the last 256.

    Args:
        editor: its model is not changed; `config.cache_targets=False`, and a launch of several processes, search
            without the cache.
        requests: n encoded requests.
        layer: whose value is searched for.

    Raises:
        EditingError, UnsupportedModelError: as `compute_targets`.
    """
    if not editor.config.cache_targets or Processes.current().count > 1:
        return compute_targets(editor.architecture, requests, layer, editor.config)
    path = editor.target_directory / f"{_key(editor, requests, layer)}.safetensors"
    try:
        if path.is_file():
            _, tensors = read_state(path, KIND)
            path.touch()
            return Targets(**tensors)
    except (StateError, TypeError) as error:
        logger.warning("cached targets can't be used and are searched for again: %s", error)
    targets = compute_targets(editor.architecture, requests, layer, editor.config)
    try:
        write_state(path, KIND, {"requests": len(requests)}, vars(targets))
        _forget_oldest(path.parent)
    except OSError as error:  # a full disk must not cost the edit
        logger.warning("targets can't be cached in %s: %s", path.parent, error)
    return targets


def _key(editor: AlphaEditor, requests: Sequence[EncodedRequest], layer: int) -> str:
    dtype = product_dtype(editor.architecture, editor.config)
    settings = editor.config.to_dict()
    document = {
        "rows": [asdict(request) for request in requests],
        "layer": layer,
        "settings": {name: settings[name] for name in SEARCH_SETTINGS},
        "dtype": str(dtype),
        "base": editor.history.base_fingerprint,
        "weights": {site.name: weight_digest(site.read()) for site in editor.sites()},
        "device": str(editor.architecture.input_device),
        "threads": torch.get_num_threads(),
        "versions": [torch.__version__, transformers.__version__, __version__],
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _forget_oldest(directory: Path) -> None:
    entries = sorted(directory.glob("*.safetensors"), key=lambda entry: entry.stat().st_mtime)
    for entry in entries[:-ENTRIES_KEPT]:
        entry.unlink(missing_ok=True)
