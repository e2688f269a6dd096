"""Upload an edited model to the Hugging Face Hub, with its history and its card."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from hf_alphaedit import __version__
from hf_alphaedit.batches import count_facts
from hf_alphaedit.card import CARD_NAME, write_card
from hf_alphaedit.processes import Processes
from hf_alphaedit.saving import require_checkpoint


if TYPE_CHECKING:
    from hf_alphaedit.editor import AlphaEditor

# Weights of an earlier upload that this one doesn't replace under the same name: other shards, other formats.
STALE_WEIGHTS = [
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"
]  # fmt: skip


def push_to_hub(
    editor: AlphaEditor,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: Sequence[str] | None = None,
    include_requests: bool = True,
) -> str:
    """Upload what `save_pretrained` writes, in one commit. The keywords are those of transformers' `push_to_hub`.

    The card is made from the run and lies in the same commit. If the repository has a card already, its text stays
    and only our marked section is written anew. Weight files of an earlier upload that would be left beside the new
    ones are deleted in the commit.

    Args:
        editor: is not changed.
        repo_id: name of the repository; it is made if it doesn't exist.
        commit_message: None says how many facts were edited.
        commit_description: longer text of the commit or pull request.
        private: for a new repository; None takes the organisation's default.
        token: None takes the one that `hf auth login` stored.
        revision: branch to upload to; it is made if it doesn't exist.
        create_pr: open a pull request instead of a commit on the branch.
        max_shard_size: of the weight files; None takes transformers' default.
        tags: for the card's metadata, beside our own.
        include_requests: with False no text of a request is in any file of the commit. Earlier commits keep theirs.

    Returns:
        Address of the commit, or of the pull request; of the repository in all processes but the main one.

    Raises:
        UnsupportedModelError: as `save_pretrained`; the Hub isn't asked for anything.
        huggingface_hub.errors.HfHubHTTPError: the Hub's own error, as it is.
        huggingface_hub.errors.OfflineModeIsEnabled: the Hub is switched off by `HF_HUB_OFFLINE`.
    """
    api = HfApi(token=token, library_name="hf_alphaedit", library_version=__version__)
    if not Processes.current().is_main:  # every process has the same model: one upload is enough
        return f"{api.endpoint}/{repo_id}"
    require_checkpoint(editor, edited=bool(editor.history.batches))
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name before it
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    count = count_facts(editor.history.batches)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.rsplit("/", 1)[-1]  # a new card is titled after its folder
        folder.mkdir()
        if api.file_exists(repo_id, CARD_NAME, revision=revision):
            card = api.hf_hub_download(repo_id, CARD_NAME, revision=revision)
            (folder / CARD_NAME).write_bytes(Path(card).read_bytes())
        sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        editor.save_pretrained(folder, include_requests=include_requests, **sharding)
        write_card(editor, folder, include_requests=include_requests, repository=repo_id, tags=tags or ())
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Edit {count} {'fact' if count == 1 else 'facts'} with AlphaEdit",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=STALE_WEIGHTS,
        )
    return commit.pr_url if create_pr and commit.pr_url else commit.commit_url
