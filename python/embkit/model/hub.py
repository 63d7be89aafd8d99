"""Push an export to the Hugging Face hub, or to a server that speaks its protocol."""

from __future__ import annotations

from pathlib import Path

from embkit.errors import UsageError

_NEEDED = ("README.md", "config.json", "model.safetensors", "modules.json", "tokenizer.json")


def push_to_hub(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload a model of embkit",
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload an export as one commit; the repository is made when it is not there.

    The card's snippets load the model by the name it was exported under: export with
    ``name=repo_id``.

    Args:
        folder: a directory that :func:`embkit.model.export` wrote.
        repo_id: ``"user/model"``.
        private: of a repository that is made now. revision: branch, default ``main``.
        create_pr: open a pull request, where the branch is not yours to write.
        message: of the commit. token: default, that of ``hf auth login`` or ``HF_TOKEN``.
        endpoint: another server than the hub.

    Returns:
        The address of the commit.

    Raises:
        UsageError: no export, a name that the hub does not take, no right to write there, or no
            answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    root = Path(folder)
    missing = [name for name in _NEEDED if not (root / name).is_file()]
    if missing:
        raise UsageError(
            f"No export: {', '.join(missing)} missing.", where=root, fix="embkit export MODEL --out"
        )
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it needs the user or organisation: USER/MODEL")
    except HFValidationError as error:
        raise UsageError(f"No name for the hub: {error}", where=repo_id) from error
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=root, commit_message=message, revision=revision,
            create_pr=create_pr,
        )  # fmt: skip
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        raise UsageError(
            f"The hub refused ({status}): {str(error).splitlines()[0][:300]}",
            where=repo_id,
            fix="log in by `hf auth login` with a token that may write there"
            if status in (401, 403, 404)
            else "try again; what was sent before is not sent again",
        ) from error
    except (OSError, ValueError) as error:  # no token, no network
        raise UsageError(
            f"The hub cannot be reached: {str(error).splitlines()[0][:300]}",
            where=repo_id,
            fix="check the network and `hf auth login`",
        ) from error
    return str(done.pr_url or done.commit_url)
