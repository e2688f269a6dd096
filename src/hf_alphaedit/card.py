"""The model card of an edited model: made from the run, put beside what people wrote themselves."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from hf_alphaedit import __version__
from hf_alphaedit.batches import count_facts, in_force
from hf_alphaedit.state import write_text


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

CARD_NAME = "README.md"
BEGIN = "<!-- begin hf_alphaedit: written by save_pretrained, your changes in here are lost -->"
END = "<!-- end hf_alphaedit -->"
TAGS = ("alphaedit", "knowledge-editing")
LONGEST_TABLE = 100
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # controls, and turns of direction


def write_card(
    editor: AlphaEditor,
    directory: str | Path,
    *,
    include_requests: bool = True,
    repository: str | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write `README.md` into `directory`. In one that is there already, only our marked section is written anew.

    Args:
        editor: is not changed.
        directory: holds the saved model.
        include_requests: with False the card says how many edits there are, and no word of them.
        repository: name that the card's code loads from; None takes the directory's.
        tags: for the card's metadata, beside our own.
    """
    path = Path(directory) / CARD_NAME
    # Bytes, because reading as text would change a hand-written card's line ends.
    existing = path.read_bytes().decode("utf-8") if path.is_file() else None
    section = card_section(editor, repository or path.parent.name, include_requests=include_requests)
    write_text(path, merged_card(existing, section, _metadata(editor, tags), repository or path.parent.name))
    return path


def card_section(editor: AlphaEditor, repository: str, *, include_requests: bool = True) -> str:
    """Our section of the card as Markdown, without its marks. All text from outside is escaped."""
    history, config = editor.history, editor.config
    count = count_facts(history.batches)
    if not count:
        return "This model has no edits: its weights are those of the base model."
    template = resources.files("hf_alphaedit").joinpath("model_card.md").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=False
    )  # what is missing must be noticed
    rows = _rows(editor) if include_requests else []
    withheld = sum(batch.withheld for batch in history.batches) if include_requests else count
    projection = {
        "hard": "hard, on the null space of the keys of a text corpus",
        "soft": f"soft constraint by the keys of a text corpus, weight {config.soft_weight:g}",
        "soft_inside_hard": f"hard, with a soft constraint of weight {config.soft_weight:g} inside",
        "none": "none",
    }[config.projection]
    return environment.from_string(template).render(
        base_link=_base_link(history.base_model),
        base_revision=escaped(history.base_revision or ""),
        fingerprint=history.base_fingerprint[:16],
        repository=re.sub(r"[^\w./-]", "_", repository),
        count=count,
        batches=len(history.batches),
        withheld=withheld,
        rows=rows[:LONGEST_TABLE],
        hidden=max(0, len(rows) - LONGEST_TABLE),
        measured=any(row["after"] for row in rows[:LONGEST_TABLE]),
        last=escaped(history.batches[-1].created[:10]),
        weights=_weights(editor),
        projection=f"{projection}; ridge {config.l2:g}; {'with' if config.use_history else 'without'} history",
        targets=f"{config.value_steps} steps, learning rate {config.learning_rate:g}, clamp {config.clamp_factor:g}",
        versions=(
            f"hf_alphaedit {__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
            f"accelerate {accelerate.__version__}"
        ),
    )


def merged_card(existing: str | None, section: str, metadata: Mapping[str, Any], title: str) -> str:
    """`existing` with our section in place of the old one, or at the end; a card of our own where there is none.

    Text outside the marks stays as it is (but for white space at its end). Entries are added to the metadata, never
    changed.
    """
    marked = f"{BEGIN}\n{section}\n{END}"
    if existing is None or not existing.strip():
        return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n# {escaped(title)}\n\n{marked}\n"
    card = ModelCard(existing, ignore_metadata_errors=True)
    head, body = existing[: len(existing) - len(card.text)], card.text
    entries = card.data.to_dict()
    tags = list(dict.fromkeys([*(entries.get("tags") or []), *metadata["tags"]]))
    completed: dict[str, Any] = {**metadata, **entries, "tags": tags}
    if completed != entries:
        head = f"---\n{ModelCardData(**completed, ignore_metadata_errors=True).to_yaml()}\n---\n"
    end = body.find(END)
    start = body.rfind(BEGIN, 0, max(end, 0))
    if start < 0:
        return f"{head}{body.rstrip()}\n\n{marked}\n"
    return head + body[:start] + marked + body[end + len(END) :]


def escaped(text: str) -> str:
    """`text` on one line, to be read as it is inside a Markdown table: no HTML, links, emphasis or cell borders."""
    text = html.escape(UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split())), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!$:@])", r"\\\1", text)


def _metadata(editor: AlphaEditor, tags: Sequence[str]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if _is_hub_name(editor.history.base_model):
        metadata["base_model"] = editor.history.base_model
    return metadata | {"tags": list(dict.fromkeys([*TAGS, *tags]))}


def _base_link(name: str | None) -> str:
    if name is None:
        return "a base model that was not named"
    if _is_hub_name(name):
        return f"[{escaped(name)}](https://huggingface.co/{name})"
    return f"{escaped(Path(name).name)} (a local model)"  # where it lay is nobody's business


def _is_hub_name(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _rows(editor: AlphaEditor) -> list[dict[str, str]]:
    """One row of the table for each edit whose request is known, escaped."""
    rows = []
    batches = editor.history.batches
    for batch, places in zip(batches, in_force(batches), strict=True):
        for place in places[: len(batch.requests)]:
            request, outcome = batch.requests[place], batch.outcomes[place] if batch.outcomes else {}
            row = {"prompt": escaped(request.text), "target": escaped(request.target_new)}
            row |= {name: escaped(str(outcome.get(name, ""))) for name in ("before", "after")}
            for name in ("p_new_before", "p_new_after"):
                row[name] = f"{outcome[name]:.3f}" if name in outcome else ""
            rows.append(row)
    return rows


def _weights(editor: AlphaEditor) -> list[dict[str, str]]:
    """Each changed weight and ‖Δ‖ / ‖W₀‖, from the factors: ‖Bᵀ A‖² = Σ (B Bᵀ) ∘ (A Aᵀ)."""
    weights = []
    for name, base in sorted(editor.history.base_weights.items()):
        update = editor.history.factors(name)
        if update is not None:
            inputs, outputs = update.inputs.double(), update.outputs.double()  # (n, d), (n, h)
            norm = ((inputs @ inputs.T) * (outputs @ outputs.T)).sum().clamp_min(0).sqrt()
            weights.append({"name": escaped(name), "change": f"{float(norm / base.double().norm()):.2%}"})
    return weights
