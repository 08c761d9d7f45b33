# SPDX-License-Identifier: Apache-2.0
"""Finding checkpoint files: a local path as it is, a HuggingFace hub id through its cache."""

import re
from pathlib import Path

from vivit_jax.errors import CheckpointError, MissingExtra

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ALWAYS, _IF_PRESENT = "config.json", "preprocessor_config.json"


def resolve_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """A local checkpoint directory or file; a hub id `org/name` is downloaded into the hub's cache.

    Of a hub repository come config.json, preprocessor_config.json and one format of the weights,
    safetensors where there are any. Raises CheckpointError for what is neither a path nor a hub id,
    for an unknown repository or revision, and when the hub cannot be reached; MissingExtra without
    huggingface_hub.
    """
    from checkpoints_convert.io import WEIGHT_FILES, read_index

    if not isinstance(source, str | Path) or not str(source):
        raise CheckpointError(
            f"a checkpoint is a directory, a weight file or a hub id, got {source!r}"
        )
    local = _local(source, revision)
    if local is not None:
        return local
    config = _download(source, _ALWAYS, revision, required=True)
    # The commit that config.json came from: a push between two downloads must not mix weights.
    commit = config.parent.name
    _download(source, _IF_PRESENT, commit)
    for name in WEIGHT_FILES:
        weights = _download(source, name, commit)
        if weights is None:
            continue
        if name.endswith(".index.json"):
            for shard in sorted(set(read_index(weights).values())):
                _download(source, shard, commit, required=True)
        return config.parent
    where = "the local cache (offline)" if _offline() else "the repository"
    raise CheckpointError(f"{source}: {where} holds none of {', '.join(WEIGHT_FILES)}")


def resolve_file(source: str | Path, filename: str, *, revision: str | None = None) -> Path:
    """One file of a checkpoint: in a directory, beside a weight file, or in a hub repository.

    Raises as `resolve_checkpoint`, and where there is no such file.
    """
    local = _local(source, revision)
    if local is None:
        return _download(source, filename, revision, required=True)
    path = (local if local.is_dir() else local.parent) / filename
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    return path


def _local(source: str | Path, revision: str | None) -> Path | None:
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"revision={revision!r} is for hub ids; {source} is a local path")
        return path
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return None
    raise CheckpointError(
        f"{source} does not exist, and is not a hub id of the form org/name either"
    )


def _offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def _download(source, filename: str, revision: str | None, *, required: bool = False):
    """The cached path of a file; None if the repository has no such file and it may be absent."""
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", f"downloading {source}") from None
    try:
        return Path(hf_hub_download(str(source), filename, revision=revision))
    except errors.LocalEntryNotFoundError:
        if not required and _offline():
            return None
        raise CheckpointError(
            f"{source} is no local path, and {filename} of that hub repository is not in the local "
            "cache and cannot be downloaded: "
            + ("HF_HUB_OFFLINE is set" if _offline() else "the hub cannot be reached")
        ) from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{source} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{source} has no revision {revision!r} on the hub") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{source} is neither a local path nor a repository on the hub that you can read"
        ) from None
    except errors.EntryNotFoundError:
        if not required:
            return None
        raise CheckpointError(f"{source} on the hub holds no {filename}") from None
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"{source}: the hub answered {error}") from None
