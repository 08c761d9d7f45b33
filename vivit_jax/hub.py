# SPDX-License-Identifier: Apache-2.0
"""Finds checkpoint files: local paths as they are, HuggingFace hub ids through the hub's cache.

A hub id is `org/name`, `org/name@revision` with a branch, tag or commit, or a weight file in a
repository, `org/name/folder/weights.pth`, with or without a revision. If the hub cannot be reached
the files in its cache are used; with HF_HUB_OFFLINE=1 it is not contacted.
"""

import dataclasses
import re
from pathlib import Path

from vivit_jax.errors import CheckpointError, MissingExtra, first_line, quoted
from vivit_jax.files.addresses import address_text, is_address
from vivit_jax.files.fetched import fetched_checkpoint, fetched_file
from vivit_jax.files.json_files import read_json

_NAME = r"[A-Za-z0-9][\w.-]{,255}"
_PART = r"(?!\.\.?(?:[/@]|\Z))[\w.-]{1,255}"  # of a path; "." and ".." are not allowed
_HUB_ID = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME})"
    rf"(?:/(?P<file>(?:{_PART}/){{,15}}{_PART}\.(?:safetensors|bin|pth|pt|ckpt|msgpack)))?"
    rf"(?:@(?P<revision>(?:{_PART}/){{,15}}{_PART}))?",
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"
CARD = "README.md"


@dataclasses.dataclass(frozen=True)
class HubId:
    """A repository on the hub, optionally one of its files, optionally at a revision."""

    repository: str
    file: str | None = None
    revision: str | None = None


def hub_id(source: str | Path, revision: str | None = None) -> HubId | None:
    """A text read as a hub id; None if it is not one.

    Raises CheckpointError if it names another revision than `revision`.
    """
    match = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if match is None:
        return None
    written = match["revision"]
    if revision is not None and written not in (None, revision):
        raise CheckpointError(f"{source} and revision={revision!r} disagree; give one of them")
    return HubId(match["repository"], match["file"], written or revision)


def resolve_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """A local checkpoint directory or file; a hub id is downloaded into the hub's cache.

    From a repository come config.json, one of PROCESSOR_FILES and the weights in one format,
    safetensors if possible; for a weight file, the file and the other two beside it, if they exist.
    Raises CheckpointError for a text that is neither a path nor a hub id, an unknown repository,
    file or revision, and if the hub cannot be reached and its cache lacks a file; MissingExtra
    without huggingface_hub.
    """
    if not isinstance(source, str | Path) or not str(source):
        raise CheckpointError(
            f"a checkpoint is a directory, a weight file or a hub id, got {quoted(repr(source))}"
        )
    if is_address(source):
        return _resolve_address(address_text(source), revision)
    remote = _local_or_remote(source, revision)
    if isinstance(remote, Path):
        return remote
    if remote.file is not None:
        return _resolve_file_of(remote, remote.file)
    config = _download(remote, _CONFIG)
    if config is None:
        raise CheckpointError(_without_config(remote))
    # The commit that config.json came from: a push between two downloads must not mix weights.
    remote = dataclasses.replace(remote, revision=config.parent.name)
    _processor_file(remote)
    for name in WEIGHT_FILES:
        weights = _download(remote, name)
        if weights is None:
            continue
        if name.endswith(".index.json"):
            for shard in sorted(set(read_index(weights).values())):
                _required(remote, shard)
        return config.parent
    where = "the local cache (offline)" if _offline() else "the repository"
    raise CheckpointError(f"{source}: {where} holds none of {', '.join(WEIGHT_FILES)}")


def _resolve_address(address: str, revision: str | None) -> Path:
    """The checkpoint at an address, copied into the cache of this machine; as `resolve_checkpoint`.

    `hf://org/name` is the hub id.
    """
    if address.startswith("hf://"):
        return resolve_checkpoint(address.removeprefix("hf://"), revision)
    if revision is not None:
        raise CheckpointError(f"revision={revision!r} is for hub ids; {address} is an address")
    try:
        found = fetched_checkpoint(address, (_CONFIG, *PROCESSOR_FILES, CARD), WEIGHT_FILES)
    except OSError as error:
        raise CheckpointError(f"{address}: {error.strerror}") from None
    for name in WEIGHT_FILES:
        if name.endswith(".index.json") and (found / name).exists():
            for shard in sorted(set(read_index(found / name).values())):
                fetched_file(f"{address}/{shard}", found / shard)
    return found


def resolve_processor(source: str, revision: str | None = None) -> Path:
    """The first of PROCESSOR_FILES in a hub repository, beside the weight file if one is named.

    Raises as `resolve_checkpoint` does, and if none of them is there.
    """
    remote = _local_or_remote(source, revision)
    if isinstance(remote, Path):
        raise CheckpointError(f"{source} is a local path, expected a hub id")
    found = _processor_file(remote)
    return found or _required(remote, _beside(remote, PROCESSOR_FILES[0]))


def resolve_config(source: str, revision: str | None = None) -> Path | None:
    """The config.json of a hub id; None if there is none."""
    remote = _local_or_remote(source, revision)
    return None if isinstance(remote, Path) else _download(remote, _beside(remote, _CONFIG))


def resolve_card(remote: HubId, checkpoint: Path) -> Path | None:
    """The card of the repository that a weight file in the cache came from, of the same commit.

    None if the repository has none, and if the hub cannot be reached.
    """
    depth = 0 if remote.file is None else remote.file.count("/")
    commit = checkpoint.parents[depth].name
    if not _COMMIT.fullmatch(commit):
        return None
    try:
        return _download(HubId(remote.repository, None, commit), CARD)
    except CheckpointError:
        return None


def _processor_file(remote: HubId) -> Path | None:
    files = (_download(remote, _beside(remote, name)) for name in PROCESSOR_FILES)
    return next((file for file in files if file is not None), None)


def _resolve_file_of(remote: HubId, file: str) -> Path:
    weights = _required(remote, file)
    depth = file.count("/") + 1
    remote = dataclasses.replace(remote, revision=weights.parents[depth - 1].name)
    _download(remote, _beside(remote, _CONFIG))
    _processor_file(remote)
    return weights


def _beside(remote: HubId, filename: str) -> str:
    """A file's path in a repository: at its top, or beside the weight file that is named."""
    return filename if remote.file is None else str(Path(remote.file).with_name(filename))


def _local_or_remote(source: str | Path, revision: str | None) -> Path | HubId:
    """What a source names: a path that exists, or a hub id. CheckpointError for neither."""
    path = Path(source)
    try:
        exists = path.exists()
    except (OSError, ValueError):  # longer than a name may be, or with a zero byte
        exists = False
    if exists:
        if revision is not None:
            raise CheckpointError(f"revision={revision!r} is for hub ids; {source} is a local path")
        return path
    remote = hub_id(source, revision)
    if remote is not None:
        return remote
    raise CheckpointError(
        f"{quoted(source)} does not exist, and is not a hub id of the form org/name or "
        "org/name@revision either"
    )


def _offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def _without_config(remote: HubId) -> str:
    """The message for a repository without config.json, naming the weight files it has."""
    from huggingface_hub import list_repo_files

    found: list[str] = []
    if not _offline():
        try:
            files = list_repo_files(remote.repository, revision=remote.revision)
            found = [f for f in files if _HUB_ID.fullmatch(f"{remote.repository}/{f}")]
        except Exception:  # the message is about config.json, with or without a list
            found = []
    at = "" if remote.revision is None else f"@{remote.revision}"
    message = f"{remote.repository}{at} on the hub holds no {_CONFIG}"
    if not found:
        return message
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return (
        f"{message}; of its weight files ({shown}) name one, "
        f"{remote.repository}/{found[0]}{at}, if it is of VideoMAE's authors"
    )


def _required(remote: HubId, filename: str) -> Path:
    path = _download(remote, filename, required=True)
    if path is None:
        raise CheckpointError(f"{remote.repository} on the hub holds no {filename}")
    return path


def _download(remote: HubId, filename: str, *, required: bool = False) -> Path | None:
    """The cached path of a file; None if the repository has no such file.

    Offline, a file that is neither `required` nor in the cache counts as absent, except
    config.json, which every model needs.
    """
    source, revision = remote.repository, remote.revision
    try:
        from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download
        from huggingface_hub import try_to_load_from_cache as cached_path
    except ImportError:
        what = f"{source} is not a local path, and downloading it"
        raise MissingExtra("huggingface_hub", "hub", what) from None
    # A commit does not change, so the hub is not asked again.
    if revision is not None and _COMMIT.fullmatch(revision):
        cached = cached_path(source, filename, revision=revision)
        if cached is _CACHED_NO_EXIST:
            return None
        if isinstance(cached, str):
            return Path(cached)
    try:
        return Path(hf_hub_download(source, filename, revision=revision))
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{source} does not exist, and is not a hub id either: {first_line(error)}"
        ) from None
    except errors.LocalEntryNotFoundError:
        if _offline() and not required and filename != _CONFIG:
            return None
        reason = "HF_HUB_OFFLINE is set" if _offline() else "the hub cannot be reached"
        raise CheckpointError(
            f"{source} is not a local path, and {filename} of that hub repository is not in the "
            f"local cache and cannot be downloaded: {reason}; give a local directory, or fill the "
            f"cache on a machine with a network: hf download {source}"
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
        return None
    except ValueError as error:  # a name that this file system does not allow
        raise CheckpointError(f"{source}: {filename}: {first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"{source}: the hub answered {error}") from None


SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"


PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


WEIGHT_FILES = (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)  # in order of preference


# Files that transformers has saved processors in, the most common first.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


def read_index(path: Path) -> dict[str, str]:
    """Each tensor's shard by file name; CheckpointError unless it is an index of plain names."""
    values = read_json(path, CheckpointError, "expected an index of weights")
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise CheckpointError(
            f"{path} is not a weight index: expected a JSON object whose weight_map names the "
            "shard of every tensor"
        )
    if not all(Path(name).name == name for name in weight_map.values()):
        raise CheckpointError(f"{path} names shards outside its own directory")
    long = [name for name in weight_map.values() if len(name) > 200]
    if long:
        raise CheckpointError(f"{path} names a shard {quoted(long[0])}, expected a file's name")
    return weight_map
