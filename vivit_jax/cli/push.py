# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax push`: publish a model on the HuggingFace hub."""

from pathlib import Path
from typing import Annotated

import tyro

from checkpoints_convert.push import Upload, check_extra, check_repository, prepare, publish
from vivit_jax.errors import counted, printable
from vivit_jax.train.storage.saved_models import model_directory


def push(
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ORG/NAME")],
    /,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> int:
    """Publish a model on the HuggingFace hub, with its card, in one commit.

    Sent are the weights, config.json, the processor's file and README.md, besides the pictures that
    README.md shows and the text of a licence; never the state of training, logs or recipes. The
    model is opened first, and the card is checked. The token is that of HF_TOKEN or of
    `hf auth login`, the hub that of HF_ENDPOINT. Needs the extra hub.

    Args:
        model: A run of finetune, pretrain, probe or demo, whose best model is sent, or a model's
            directory.
        repository: Where it goes; created if it is not there.
        private: Make a new repository private. An error if it exists and is public.
        revision: A branch, created if it is not there. Default: main.
        message: Title of the commit.
        dry_run: Check everything and show what would be sent, without a network.
    """
    check_extra()
    check_repository(repository, revision)
    directory = Path(model_directory(model))
    upload = prepare(directory, repository, revision)
    branch = revision or "main"
    print(_listing(upload))
    if dry_run:
        print(f"would go to {repository}, branch {branch}; nothing was sent")
        return 0
    done = publish(upload, repository, private=private, revision=revision, message=message)
    if done.kept_card:
        print(
            "the card on the hub was written by hand and is kept; remove it there to send this one"
        )
    if done.removed:
        print(f"removed there, as the new files replace them: {', '.join(done.removed)}")
    made = " (new repository)" if done.created else ""
    print(f"published: {done.address}{made}")
    at = "" if revision is None else f"@{revision}"
    print(f'open it with vivit_jax.from_pretrained("{repository}{at}")')
    return 0


def _listing(upload: Upload) -> str:
    sizes = upload.sizes()
    width = max(map(len, sizes))
    lines = [f"{upload.model}; opened, and its weights fit its config"]
    lines += [f"  {name:{width}}  {size:>13,} bytes" for name, size in sizes.items()]
    lines += [f"  {counted(len(sizes), 'file')}, {sum(sizes.values()) / 1e6:,.1f} MB"]
    if upload.left_out:
        lines.append(f"not sent: {', '.join(upload.left_out)}")
    return "\n".join(printable(line, one_line=True) for line in lines)
