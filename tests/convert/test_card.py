# SPDX-License-Identifier: Apache-2.0
"""Model cards: their metadata by huggingface_hub's reader, and their code, which is run."""

import contextlib
import io
import re
import shutil
import sys

import numpy as np
import pytest
from clips import write_clip
from helpers import mostly_slow, random_params
from huggingface_hub import ModelCard
from tiny import CASES, config_of
from tiny_checkpoints import read_safetensors
from variants import variant_config

import vivit_jax
from checkpoints_convert.card import (
    Base,
    CardFacts,
    DataSummary,
    Metric,
    _listed,
    base_of,
    binomial_error,
    for_repository,
    front_matter,
    is_own,
)
from checkpoints_convert.source import find_checkpoint
from vivit_jax.models.build import build_model

SIZES = {"size": 26, "crop_size": (24, 16)}
VIDEOMAE = vivit_jax.VideoProcessor.named("videomae-imagenet", **SIZES)
VIVIT = vivit_jax.VideoProcessor.named("vivit-scenic", **SIZES)
NAMES = {"num_labels": 5, "id2label": ("R&amp;B", "wave left", "wave_right", "a|b", "<b>`x`")}
FACTS = CardFacts(
    base=Base(name="org/start", hub_id="org/start", licence={"license": "cc-by-nc-4.0"}),
    how=["Fine-tuned in a test."],
    data=[DataSummary(split="training", name="my clips", clips=1234, classes=5)],
    metrics=[
        Metric(
            name=name,
            value=value,
            data="held out",
            videos=320,
            protocol="4 x 3 views",
            standard_error=binomial_error(value, 320),
        )
        for name, value in (("accuracy", 0.875), ("accuracy_top_5", 1.0))
    ],
)


def saved(directory, case, processor=None, card=None, **changes):
    """A tiny model in a directory, with its card."""
    model = CASES[case][0](config_of(case, **changes))
    vivit_jax.save_pretrained(directory, model, random_params(model), processor, card=card)
    return directory


def card_of(directory) -> str:
    return (directory / "README.md").read_text("utf-8")


def code_of(directory) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card_of(directory), re.MULTILINE | re.DOTALL)


def printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "code of a card", "exec"), {})
    return out.getvalue()


RUN = {
    "mae cls": ("mae cls", VIDEOMAE, None, NAMES),
    "vivit cls, stride": ("vivit cls", VIVIT, None, NAMES | {"frame_stride": 3}),
    "mae cls, segments": ("mae cls", VIDEOMAE, None, NAMES | {"view_sampler": "segments"}),
    "several labels": (
        *("vivit cls", VIVIT, None, {"problem_type": "multi_label_classification"}),
    ),
    "regression": ("mae cls", VIDEOMAE, None, {"problem_type": "regression"}),
    "pretraining": ("mae pretraining", VIDEOMAE, None, {}),
    "encoder": ("vivit base", VIVIT, None, {}),
    "without processor": ("mae cls", None, None, {}),
    "several heads": ("vivit cls", VIVIT, None, {"class_splits": (2, 3)}),
    "depth": ("mae cls", None, None, {"num_channels": 1}),
}


@pytest.mark.parametrize("name", mostly_slow(RUN, "mae cls, segments", "vivit cls, stride"))
def test_both_blocks_of_code_run_and_agree(name, tmp_path, monkeypatch):
    case, processor, facts, changes = RUN[name]
    saved(tmp_path / "model", case, processor, facts, **changes)
    monkeypatch.chdir(tmp_path / "model")
    # Turned as phones do it; 14 frames are too few for 6 that are 3 apart.
    frames = 14 if name == "vivit cls, stride" else 41
    write_clip(tmp_path / "model/video.mp4", frames=frames, size=(32, 48), display=(90, False))
    ours, theirs = map(printed, code_of(tmp_path / "model"))
    assert "transformers opens it too" in card_of(tmp_path / "model")
    if name == "several heads":
        assert re.search(r"0\.\d+  LABEL_\d, LABEL_\d\n", ours) and theirs == "torch.Size([1, 5])\n"
        return
    if processor is None or case not in ("mae cls", "vivit cls"):
        shape = r"\(1, \d+(, \d+)?\)"
        assert re.search(r"\d" if case == "mae pretraining" else shape, ours) and theirs
        assert case == "mae pretraining" or theirs == f"torch.Size([{ours.strip()[1:-1]}])\n"
        return
    rows = [[line.split("  ", 1) for line in text.splitlines()] for text in (ours, theirs)]
    assert [[label for _, label in each] for each in rows][0] == [label for _, label in rows[1]]
    scores = np.array([[float(score) for score, _ in each] for each in rows])
    assert scores.shape == (2, 3)
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-4)  # printed with four digits
    card = card_of(tmp_path / "model")
    assert ("stride = max(1, min(3, " in card) == ("6 frames, every 3rd," in card)
    assert ("every 3rd," in card) == ("stride" in name)
    assert ("one from each of as many equal parts" in card) == ("segments" in name)


@pytest.mark.parametrize(
    ("case", "changes"),
    mostly_slow(
        [
            ("encoder", {}),
            ("vivit cls", {"pooling": "mean"}),
            ("mae cls", {"cosine_attention": True}),
            ("mae cls", {"layer_scale_init": 0.1}),
        ],
        ("vivit cls", {"pooling": "mean"}),
    ),
    ids=str,
)
def test_what_transformers_cannot_open_is_said(case, changes, tmp_path, monkeypatch):
    if case in CASES:
        saved(tmp_path / "model", case, VIVIT if "vivit" in case else VIDEOMAE, **changes)
    else:
        config = variant_config(case)
        model = build_model(config, "classification")
        vivit_jax.save_pretrained(tmp_path / "model", model, random_params(model))
    text = card_of(tmp_path / "model")
    assert "Transformers does not have this model; its Auto classes refuse" in text
    assert "not for transformers" in text and front_matter(text)["library_name"] == "vivit_jax"
    (code,) = code_of(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    write_clip("video.mp4", frames=41, size=(48, 32))
    assert printed(code)


def test_the_hubs_reader_takes_the_metadata(tmp_path):
    text = card_of(saved(tmp_path / "model", "mae cls", VIDEOMAE, FACTS, **NAMES))
    card = ModelCard(text)
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "video-classification")
    assert data.license == "cc-by-nc-4.0" and data.base_model == "org/start"
    assert data.metrics == ["accuracy"] and {"videomae", "vivit_jax", "jax"} <= set(data.tags)
    first, second = data.eval_results
    assert (first.task_type, first.metric_type) == ("video-classification", "accuracy")
    assert (first.metric_value, first.metric_name) == (0.875, "Accuracy")
    assert (second.metric_value, second.metric_name) == (1.0, "Top-5 accuracy")
    assert first.dataset_name == "held out"
    # Of 280 of 320 right, with two of four more.
    error = round(float(np.sqrt(282 / 324 * 42 / 324 / 324)), 6)
    expected = {"protocol": "4 x 3 views", "videos": 320, "standard_error": error}
    assert first.metric_args == expected
    # What the reader writes again says the same.
    assert ModelCard(card.content).data.to_dict() == data.to_dict() == front_matter(text)


def test_the_text_says_what_the_metadata_cannot(tmp_path):
    text = card_of(saved(tmp_path / "model", "mae cls", VIDEOMAE, FACTS, **NAMES))
    for line in (
        "| training | my clips | 1,234 | 5 |",
        r"5 in this order: R\&amp;B, wave left, wave\_right, a\|b, \<b\>\`x\`.",
        "| Accuracy | 87.5% | 1.9% | held out, 320 videos | 4 x 3 views |",
        "| Top-5 accuracy | 100.0% | 0.4% | held out, 320 videos | 4 x 3 views |",
        "6 frames, every 4th, from the middle of the video. Each frame: resized to shortest edge "
        "26 (bilinear); centre crop of 24 x 16; bytes divided by 255; minus the mean 0.485, 0.456, "
        "0.406, divided by the deviation 0.229, 0.224, 0.225 (",
        "cc-by-nc-4.0, that of the base model [org/start](https://huggingface.co/org/start).",
    ):
        assert line in text
    assert "None is set" in card_of(saved(tmp_path / "other", "mae cls"))


def test_of_many_classes_some_are_shown(tmp_path):
    names = tuple(f"class {i}" for i in range(400))
    changes = {"num_labels": 400, "id2label": names}
    text = card_of(saved(tmp_path / "model", "vivit cls", **changes))
    assert "400: class 0, class 1," in text and "and 380 more under `id2label`" in text
    assert "class 21" not in text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a", "b"), "a, b"),
        (("a, in b", "c"), "a, in b; c"),
        (("a, b; c", "d / e"), "\u201ca, b; c\u201d, \u201cd / e\u201d"),
    ],
)
def test_names_with_commas_stay_apart(names, text):
    assert _listed(names) == text


def test_names_that_break_lines_do_not(tmp_path):
    names = ("---\nlicense: mit", "\x1b[31mred", "\ud800", "\u2028x", "y" * 5000)
    text = card_of(saved(tmp_path / "model", "vivit cls", num_labels=5, id2label=names))
    assert "license" not in front_matter(text) and "\x1b" not in text and len(text) < 6000
    ModelCard(text)


def test_a_card_needs_no_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert is_own(card_of(saved(tmp_path / "model", "mae cls", VIDEOMAE, FACTS)))


def test_an_edited_card_is_kept_and_our_own_is_renewed(tmp_path, caplog):
    directory = saved(tmp_path / "model", "mae cls", VIDEOMAE)
    first = card_of(directory)
    model, params = vivit_jax.from_pretrained(directory)
    vivit_jax.save_pretrained(directory, model, params, VIDEOMAE, card=FACTS, overwrite=True)
    renewed = card_of(directory)
    assert renewed != first and "87.5%" in renewed and not caplog.messages
    for edited in (
        renewed.replace("87.5%", "99.9%"),
        renewed.replace("license: cc-by-nc-4.0", "license: mit"),
        renewed + "\nAnd a line.\n",
        "# My own\n",
    ):
        caplog.clear()
        (directory / "README.md").write_text(edited)
        vivit_jax.save_pretrained(directory, model, params, VIDEOMAE, overwrite=True)
        assert card_of(directory) == edited
        (told,) = caplog.messages
        assert f"{directory / 'README.md'} was written or edited by hand and is kept" in told
    windows = renewed.replace("\n", "\r\n")  # as git may check it out
    (directory / "README.md").write_bytes(windows.encode())
    vivit_jax.save_pretrained(directory, model, params, VIDEOMAE, overwrite=True)
    assert card_of(directory) == first


def test_a_conversion_keeps_an_edited_card(run, checkpoints, tmp_path, caplog):
    source, out = checkpoints.path("vivit cls"), tmp_path / "out"
    assert run("convert", source, out)[0] == 0
    assert "Converted by vivit-convert from hf: VivitForVideoClassification" in card_of(out)
    assert str(tmp_path) not in card_of(out)
    (out / "README.md").write_text("mine")
    status, told, _ = run("convert", source, out, "--overwrite", "--dtype", "bfloat16")
    assert status == 0 and card_of(out) == "mine" and "README.md" not in told
    assert "was written or edited by hand and is kept" in caplog.text
    assert {str(tensor.dtype) for tensor in read_safetensors(out).values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("card", "licence", "above"),
    [
        ("---\nlicense: mit\nbase_model: org/first\n---\n", {"license": "mit"}, "org/first"),
        (
            "---\nlicense: other\nlicense_name: of its own\nlicense_link: https://a.b\n---\nx",
            {"license": "other", "license_name": "of its own", "license_link": "https://a.b"},
            None,
        ),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}, None),
        ("---\nlicense: [mit, apache-2.0]\nbase_model: [a/b]\n---\n", {}, None),
        ("---\nlicense_name: alone\nbase_model: /home/me/model\n---\n", {}, None),
        ("---\nlicense: 'open\n---\n", {}, None),
        ("---\n- a list\n---\n", {}, None),
        (f"---\na: {'[' * 10000}\n---\n", {}, None),
        ("license: mit\n", {}, None),
        ("", {}, None),
    ],
)
def test_a_licence_is_carried_over_and_never_made_up(checkpoints, tmp_path, card, licence, above):
    directory = shutil.copytree(checkpoints.path("vivit cls"), tmp_path / "start")
    (directory / "README.md").write_text(card, newline="")
    base = base_of(find_checkpoint(directory))
    assert base == Base(name="start", hub_id=above, licence=licence)
    text = card_of(saved(tmp_path / "made", "vivit cls", card=CardFacts(base=base)))
    values = front_matter(text)
    assert {k: v for k, v in values.items() if k.startswith("license")} == licence
    assert values.get("base_model") == above
    assert ("was not at hand when this file was written" in text) == (not licence)


def test_the_base_of_a_conversion_from_the_hub(checkpoints, tmp_path, monkeypatch):
    """Its card is that of the commit that the weights came from."""
    from huggingface_hub import constants

    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(checkpoints.path("vivit cls"), repository / "snapshots" / commit)
    found = base_of(find_checkpoint("someone/tiny@main"))
    assert found == Base(name="someone/tiny", hub_id="someone/tiny")
    (repository / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n")
    found = base_of(find_checkpoint("someone/tiny"))
    assert found == Base(name="someone/tiny", hub_id="someone/tiny", licence={"license": "mit"})


def test_a_published_card_opens_the_repository(tmp_path):
    text = card_of(saved(tmp_path / "model", "mae cls", VIDEOMAE, FACTS))
    published = for_repository(text, "org/name", "v1")
    assert is_own(published) and 'from_pretrained("org/name", revision="v1")' in published
    assert published.count("org/name") == 3 and '"."' not in published
    assert "Run in this directory" in text and "Run in this directory" not in published
    assert 'from_pretrained("org/name")' in for_repository(text, "org/name")
    assert for_repository(f"{text}edited", "org/name") == f"{text}edited"


def test_a_standard_error_is_never_zero():
    assert binomial_error(0.7, 10**6) == pytest.approx((0.7 * 0.3 / 10**6) ** 0.5, rel=1e-3)
    assert 0.05 < binomial_error(1.0, 8) < 0.2 and binomial_error(0.0, 8) == pytest.approx(
        binomial_error(1.0, 8)
    )
