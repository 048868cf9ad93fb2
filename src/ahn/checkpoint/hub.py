"""Sharing a memory: from a model to a repository on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ahn.attachment import attachment_of
from ahn.checkpoint.adapter import save
from ahn.checkpoint.anchors import save_anchors
from ahn.checkpoint.card import CARD, write_card
from ahn.checkpoint.content import BaseInfo, memory_tensors
from ahn.checkpoint.files import brief, failure, is_hub_id


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a memory",
    license: str | None = None,
    datasets: Sequence[str] = (),
    card: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> str:
    """Uploads the memory of a model, and the weights of its anchor scores if it has any, to the Hugging Face hub.

    The repository is made if it is not there. It gets what `save` and `save_anchors` write and a model card; a card
    that is there already is replaced only by one that is given.

    Args:
        model: A model with a memory attached.
        repo_id: The repository, `owner/name`.
        private: Whether a new repository is private; the hub's own default if left out.
        token: Access token; the one that is logged in if left out.
        revision: Branch to upload to; the main one if left out.
        commit_message: What the commit says.
        license: Licence of the memory as the hub names it, such as "apache-2.0".
        datasets: Names on the hub of what it was trained on.
        card: Text of the model card (Markdown with metadata); one is written from the settings if left out.
        dtype: As for `save`.

    Returns:
        Address of the commit.

    Raises:
        ModelError: No memory is attached.
        CheckpointError: The name is no `owner/name`, a weight is not finite, or the hub refuses.
    """
    attachment = attachment_of(model)
    if not is_hub_id(repo_id):
        raise failure(repo_id, "this is no name on the hub", "Give it as owner/name")
    with tempfile.TemporaryDirectory(prefix="ahn-") as temporary:
        folder = Path(temporary)
        save(model, folder, dtype)
        has_anchors = any(layer.anchor_weights for layer in attachment.layers)
        if has_anchors:
            save_anchors(model, folder, dtype)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        write_card(
            folder,
            attachment.config,
            BaseInfo.of_model(model),
            parameters=sum(tensor.numel() for tensor in memory_tensors(model).values()),
            source=repo_id,
            anchors=has_anchors,
            licence=license,
            datasets=datasets,
        )
        return _upload(folder, repo_id, private, token, revision, commit_message, keeps_card=card is None)


def _upload(
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    message: str,
    keeps_card: bool,
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="ahn")
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if keeps_card and api.file_exists(repo, CARD, revision=revision):
            (folder / CARD).unlink()
        commit = api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    except Exception as error:  # the hub's client raises errors of four libraries
        raise failure(
            repo_id,
            f"the hub did not take it ({type(error).__name__}: {brief(error).split('. ')[0]})",
            "Check the name, the connection and that you are logged in with write access (hf auth login)",
        ) from None
    return str(commit.commit_url)
