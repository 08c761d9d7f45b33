# SPDX-License-Identifier: Apache-2.0
"""Publishes a model's directory on the HuggingFace hub: what is sent, checked before it is."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import yaml

from checkpoints_convert.card import card_text, for_repository, has_metadata, is_own
from checkpoints_convert.card_code import SavedModel
from checkpoints_convert.files.save import is_weight_file
from checkpoints_convert.pretrained import plan_load
from checkpoints_convert.rules import stored_dtype
from checkpoints_convert.source import Source, open_source
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import CheckpointError, MissingExtra, UserError, counted, first_line, quoted
from vivit_jax.files.staging import names_in
from vivit_jax.hub import CARD, PROCESSOR_FILES, SAFETENSORS, SAFETENSORS_INDEX, hub_id

_CONFIG = "config.json"
_SAFE = (SAFETENSORS, SAFETENSORS_INDEX)
# What else of a directory is sent: a licence's text, and pictures and videos that the card shows. A
# video.mp4 that its code was tried with is nobody's business.
_LICENCE = re.compile(r"(LICENSE|LICENCE|NOTICE)(\.\w+)?", re.IGNORECASE)
_PICTURE = re.compile(r".+\.(png|jpe?g|gif|webp|mp4)", re.IGNORECASE)
_SHOWN = re.compile(
    r"""(?<!\\)\]\(\s*(?:<([^>\n]+)>|([^)\s]+))|^\s*\[[^\]\n]+\]:\s*(\S+)"""
    r"""|\b(?:src|href)\s*=\s*["']([^"'\n]+)["']""",
    re.MULTILINE,
)
# Paths of this machine, in texts that are about to be public; not the paths of addresses.
_MACHINE = re.compile(
    r"(?<![\w/.:~-])(?:/(?:home|Users|root|tmp|var|mnt|media|data|opt|srv|scratch|workspace|work|"
    r"private|Volumes|content|kaggle|gpfs|lustre|nfs)/[^\s\"'`)<>|]+|[A-Za-z]:\\+[^\s\"'`)<>|]+|"
    r"\\\\\w+\\[^\s\"'`)<>|]+|file://[^\s\"'`)<>|]+)"
)


@dataclasses.dataclass(frozen=True)
class Upload:
    """What goes to a repository: contents by name; the names in the directory that do not go."""

    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]
    model: str  # in words

    def sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


@dataclasses.dataclass(frozen=True)
class Published:
    """Where a model lies now; `kept_card`: a card that was edited on the hub was left as it is."""

    address: str
    created: bool
    removed: tuple[str, ...]
    kept_card: bool


def check_extra() -> None:
    """Raises MissingExtra without huggingface_hub."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "publishing a model") from None


def check_repository(repository: str, revision: str | None = None) -> None:
    """UserError for texts that do not name a repository, as org/name, and a branch of it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    named = hub_id(repository)
    if named is not None and named.revision is not None:
        raise UserError(
            f"{repository} names a revision; give it as --revision {named.revision}: expected "
            f"org/name, {named.repository}"
        )
    if named is None or named.file is not None:
        shown = quoted(repository) or "an empty text"
        raise UserError(f"{shown} is not a repository's name; expected org/name")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository} is not a name that the hub takes: {error}") from None
    if revision is not None and hub_id(f"{repository}@{revision}") is None:
        raise UserError(
            f"--revision {quoted(revision)!r} is not the name of a branch; expected letters, "
            "digits, '.', '_', '-' and '/', such as v1"
        )


def prepare(directory: Path, repository: str, revision: str | None = None) -> Upload:
    """What publishing a model's directory sends; touches no network and writes nothing.

    The model is opened, and its weights compared with its config, name by name and shape by shape.
    Sent are config.json, the safetensors, the processor and the card, besides the text of a licence
    and the pictures and videos that the card shows; a directory without a card gets one. Raises
    UserError or a subclass for anything that should not be published so.
    """
    check_extra()
    check_repository(repository, revision)
    source = _opened(directory)
    report = plan_load(source, None).report
    if report.dropped or report.fresh:
        raise CheckpointError(
            f"the weights do not fit config.json: {' '.join(str(report).split())}"
        )
    wanted = {_CONFIG, *PROCESSOR_FILES, *(path.name for path in source.checkpoint.files)}
    wanted |= {source.checkpoint.path.name}
    card = directory / CARD
    text = _text_of(card) if card.is_file() else card_text(_saved(source))
    wanted |= _shown(text)
    others = sorted(name for name in names_in(directory) if name != CARD)
    sent = [n for n in others if n in wanted or _LICENCE.fullmatch(n)]
    sent = [n for n in sent if (directory / n).is_file()]
    files: dict[str, Path | bytes] = {CARD: for_repository(text, repository, revision).encode()}
    files |= {name: directory / name for name in sent}
    for name, content in files.items():
        if name == CARD or name.endswith(".json"):
            _check_private(directory / name, content)
    _check_card(card, text)
    count = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in source.tensors.values())
    model = f"{source.architecture}, {counted(len(source.tensors), 'tensor')}, {count:,} parameters"
    return Upload(files, tuple(n for n in others if n not in files), model)


def _opened(directory: Path) -> Source:
    """The model of a directory. CheckpointError unless it is safetensors beside a config.json."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; expected a run or a saved model")
    source = open_source(directory)
    if not source.layout.in_transformers or source.checkpoint.path.name not in _SAFE:
        raise CheckpointError(
            f"{source.checkpoint.path} is not what the hub takes for a model, {SAFETENSORS} beside "
            f"{_CONFIG}; write that first: vivit-convert convert {directory} NEW"
        )
    return source


def _saved(source: Source) -> SavedModel:
    """What the card of a model without one is written from."""
    processor = None
    with contextlib.suppress(UserError):
        processor = VideoProcessor.from_pretrained(source.checkpoint.path.parent)
    return SavedModel(
        config=source.config,
        head=source.head,
        parameters=sum(
            int(np.prod(tensor.shape, dtype=np.int64)) for tensor in source.tensors.values()
        ),
        dtype=stored_dtype(source.tensors),
        processor=processor,
        pooler=source.stored.pooler,
    )


def _text_of(card: Path) -> str:
    try:
        return card.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{card} is not UTF-8: {error}; save it as that") from None


def _shown(text: str) -> set[str]:
    """The names of pictures and videos beside a card that it shows or links to."""
    found = ("".join(groups) for groups in _SHOWN.findall(text))
    names = {unquote(name).removeprefix("./") for name in found}
    return {name for name in names if _PICTURE.fullmatch(name)}


def _check_private(path: Path, content: Path | bytes) -> None:
    """UserError for a text that names a place on this machine."""
    raw = content if isinstance(content, bytes) else content.read_bytes()
    text = raw.decode("utf-8", "replace")
    found = _MACHINE.search(text)
    place = found[0] if found else next((each for each in _places() if each in text), None)
    if place is not None:
        raise UserError(
            f"{path} names a place on this machine, {quoted(place)}; remove it before the file is "
            "published"
        )


def _places() -> list[str]:
    """The home and the working directory, where they are more than one name."""
    return [str(path) for path in (Path.home(), Path.cwd()) if len(path.parts) > 2]


def _check_card(path: Path, text: str) -> None:
    """UserError for a card whose metadata huggingface_hub does not take."""
    from huggingface_hub import ModelCard

    if not has_metadata(text):
        raise UserError(
            f"{path} has no metadata for the hub between lines of --- at its top; add it, or "
            "remove the file for a card that has it"
        )
    try:
        ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        lines = " ".join(str(error).split())
        raise UserError(f"{path}: the metadata between the lines --- is wrong: {lines}") from None


def publish(
    upload: Upload,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Published:
    """Send a prepared upload in one commit, creating the repository and the branch if need be.

    Weights and processors of earlier pushes that readers would take instead leave in the same
    commit. The token is huggingface_hub's: HF_TOKEN, or that of `hf auth login`. Raises UserError
    for whatever the hub refuses, and where it cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, branch = HfApi(), revision or "main"
    with _refusals_told(repository):
        held = _visibility(api, repository)
        if private and held == "public":
            raise UserError(
                f"{repository} is on the hub already and is public, so --private would not hide "
                "what is sent; make it private in its settings there, or choose another name"
            )
        if held is None:
            api.create_repo(repository, private=private or None, exist_ok=True)
        if branch != "main":
            api.create_branch(repository, branch=branch, exist_ok=True)
        there = api.list_repo_files(repository, revision=branch)
        files = dict(upload.files)
        kept_card = CARD in there and _edited_there(api, repository, branch, files[CARD])
        if kept_card:
            del files[CARD]
        removed = tuple(name for name in there if name not in files and _replaced(name, files))
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in removed),
            ],
            commit_message=message or f"Publish {upload.model.partition(',')[0]}",
            revision=branch,
        )
    return Published(commit.commit_url, held is None, removed, kept_card)


def _visibility(api: Any, repository: str) -> str | None:
    """ "private" or "public"; None where there is no such repository, or none to see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return "private" if api.repo_info(repository).private else "public"
    except RepositoryNotFoundError:
        return None


def _edited_there(api: Any, repository: str, branch: str, card: Path | bytes) -> bool:
    """Whether the repository's card was written by hand, and the one to send was not."""
    assert isinstance(card, bytes)
    there = Path(api.hf_hub_download(repository, CARD, revision=branch)).read_bytes()
    by_hand = not is_own(there.decode("utf-8", "replace"))
    return by_hand and is_own(card.decode()) and there != card


def _replaced(name: str, files: Mapping[str, Any]) -> bool:
    """Whether a file of an earlier push would be read beside or instead of `files`."""
    processor = name in PROCESSOR_FILES and not files.keys().isdisjoint(PROCESSOR_FILES)
    return processor or is_weight_file(name)


@contextlib.contextmanager
def _refusals_told(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a UserError of one line."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(repository, error)) from None
    except errors.OfflineModeIsEnabled:
        raise UserError(
            f"{repository} cannot be sent: HF_HUB_OFFLINE is set; unset it, or use --dry-run"
        ) from None
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise UserError(f"the hub cannot be reached: {first_line(error)}") from None
    except RuntimeError as error:  # of the threads that upload
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise UserError(_refusal(repository, cause)) from None
        raise UserError(f"{first_line(error)} {first_line(cause or '')}") from None
    except (KeyError, TypeError, AttributeError) as error:  # an answer of another form
        raise UserError(
            f"{repository}: the hub's answer is not understood ({type(error).__name__}: "
            f"{first_line(error)}); is HF_ENDPOINT a Hugging Face hub?"
        ) from error
    except ValueError as error:  # mostly metadata that the hub does not take
        said = " ".join(str(error).split())
        raise UserError(f"{repository} cannot be sent: {quoted(said)}") from None


def _refusal(repository: str, error: Any) -> str:
    from huggingface_hub import get_token

    status, said = error.response.status_code, getattr(error, "server_message", None)
    because = f": {quoted(first_line(said))}" if said else ""
    if status == 401:
        if get_token() is None:
            return f"{repository}: no token is set; set HF_TOKEN, or log in with `hf auth login`"
        return f"{repository}: the hub does not accept the token{because}; renew it, or HF_TOKEN"
    if status == 403:
        return (
            f"{repository}: the token may not write there{because}; use one with write access to "
            f"{repository.partition('/')[0]}"
        )
    if status == 404:
        owner = repository.partition("/")[0]
        return f"{repository} is not on the hub{because}; is {owner} a user or an organisation?"
    if status in (409, 412):  # somebody has written meanwhile
        return f"{repository}: the hub answered {status}{because}; push again"
    return f"{repository}: the hub answered {status}{because or f': {first_line(error)}'}"
