"""Uploads an exported pipeline to huggingface.co."""

from pathlib import Path

from common.errors import UserError, one_line


def push(folder: Path, repository: str, private: bool = False) -> None:
    """Creates the repository where there is none, and uploads the folder in one commit.

    Raises UserError with the hub's own reason; nothing is uploaded then.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export a pipeline")
    except Exception as error:  # noqa: BLE001 # the hub's own, and those of its HTTP client
        raise UserError(
            f"--push: {repository}: {one_line(str(error), 300)}; the export is in {folder}. Log in with hf "
            "auth login, and a token that may write"
        ) from None
    print(f"uploaded: {commit.commit_url}")
