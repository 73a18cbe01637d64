"""Uploading a finished run."""

from pathlib import Path

from huggingface_hub import HfApi

from customize.checkpoint import read_info


def push(run: str, repo_id: str, private: bool = False) -> str:
    """Uploads a run folder without its checkpoints, class pictures and logs; returns the address."""
    read_info(Path(run))
    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    ignored = ["checkpoint-*/**", "class_images/**", "evaluation*/**", "logs/**", "*.partial/**", "*.old/**", "saving/**"]
    api.upload_folder(repo_id=repo_id, folder_path=run, ignore_patterns=ignored, commit_message=f"Upload {Path(run).name}")
    return str(address)
