"""The adapter's way to the Hugging Face hub: checked before the first step, taken after the last."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from ..errors import KronAError
from .settings import OutputSettings


def hub_repository(output: OutputSettings) -> str | None:
    """The repository that a run is pushed to: of the output's name where it has none of its own, or None."""
    if not output.push_to_hub:
        return None
    return output.hub_model_id or output.output_dir.resolve().name.removesuffix(".safetensors")


def check_hub(repository: str) -> None:
    """See that the hub takes this user's files, and make the repository if it is missing.

    Raises:
        KronAError: the user is not logged in or has no right to it, or the hub cannot be reached.
    """
    try:
        HfApi().create_repo(repository, exist_ok=True)
    except (OSError, ValueError) as error:
        raise KronAError(
            f"The hub does not let {repository} be written to, so nothing was begun: {error}. "
            "Log in with `hf auth login`, check the name, or leave push_to_hub out."
        ) from error


def push(path: Path, repository: str) -> None:
    """Upload an adapter, a file or a folder without its run.

    Raises:
        OSError: the hub could not be reached, or did not take it.
    """
    api = HfApi()
    if path.suffix == ".safetensors":
        api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repository)
    else:
        api.upload_folder(folder_path=path, repo_id=repository, ignore_patterns=["run/*"])
