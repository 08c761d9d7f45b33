# SPDX-License-Identifier: Apache-2.0
"""Lists in the formats of published data sets and of tables, with names of classes."""

import json

import numpy as np
import pytest
from PIL import Image

from vivit_jax.data.datasets.class_names import describe_unknown, read_class_names
from vivit_jax.data.datasets.dataset import count_frames, read_dataset, read_whole
from vivit_jax.data.datasets.list_formats import FORMATS
from vivit_jax.errors import UserError


def touched(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def named(dataset, root):
    """(path below `root`, name of the class) of each example."""
    names = dataset.classes
    return [
        (e.path.removeprefix(f"{root}/"), None if e.label is None else names[e.label])
        for e in dataset.examples
    ]


def listed(tmp_path, text, name="train.csv", **options):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_dataset(tmp_path / name, **options)


# ---- tables


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na/x.mp4,swim\nb y.mp4,run fast\n",
        "video_path,class\na/x.mp4,swim\nb y.mp4,run fast\n",
        "Filename;Category\r\na/x.mp4;swim\r\n\r\nb y.mp4;run fast\r\n",
        "id\tlabel\tfile_name\n1\tswim\ta/x.mp4\n# 2\n2\trun fast\tb y.mp4\n",
        '"label","path","fps"\n"swim","a/x.mp4",25\n"run fast","b y.mp4",30\n',
        "path,label_id,class_name\na/x.mp4,7,swim\nb y.mp4,3,run fast\n",
        b"\xef\xbb\xbfpath, label\na/x.mp4, swim\nb y.mp4, run fast\n",
        "a/x.mp4,swim\nb y.mp4,run fast\n",
        "a/x.mp4\tswim\nb y.mp4\trun fast\n",
        "swim,a/x.mp4\nrun fast,b y.mp4\n",
    ],
)
def test_a_table_of_paths_and_names(tmp_path, text):
    dataset = listed(tmp_path, text)
    assert dataset.classes == ("run fast", "swim")
    assert named(dataset, tmp_path) == [("a/x.mp4", "swim"), ("b y.mp4", "run fast")]
    unlabelled = listed(tmp_path, text, labels=0)
    assert unlabelled.labels_per_example == 0 and unlabelled.classes is None
    assert [e.path for e in unlabelled.examples] == [e.path for e in dataset.examples]


def test_a_path_keeps_its_delimiter_and_bytes_in_a_table(tmp_path):
    dataset = listed(tmp_path, b'path,label\n"a, b.mp4",x\nr\xe9.mp4,"y, ""z"""\n')
    assert named(dataset, tmp_path) == [("a, b.mp4", "x"), ("r\udce9.mp4", 'y, "z"')]


def test_rows_that_begin_with_a_hash_are_counted(tmp_path, caplog):
    text = '# path,label\npath,label\n#1.mp4,x\n# more\n"#2.mp4",y\n./#3.mp4,x\n #4.mp4,z\n'
    assert named(listed(tmp_path, text), tmp_path) == [("#2.mp4", "y"), ("./#3.mp4", "x")]
    told = 'train.csv: 2 rows, such as line 3, left out as comments: they begin with "#"; write ./'
    assert told in caplog.text
    caplog.clear()
    assert len(listed(tmp_path, "# a,b\npath,label\na.mp4,x\n# a comment\nb.mp4,y\n")) == 2
    assert not caplog.text


def test_numbers_in_a_column_stay_numbers(tmp_path):
    dataset = listed(tmp_path, "path,label\na.mp4,10\nb.mp4,2\n")
    assert [e.label for e in dataset.examples] == [10, 2] and dataset.classes is None
    assert listed(tmp_path, 'path,label\na.mp4,"3,4"\n').labels_per_example == 2


def test_whole_numbers_with_a_point_are_numbers(tmp_path):
    """As pandas writes them; with a name among them they are names."""
    dataset = listed(tmp_path, "path,label\na.mp4,3.0\nb.mp4,1.00\nc.mp4,3\n")
    assert [e.label for e in dataset.examples] == [3, 1, 3] and dataset.classes is None
    names = listed(tmp_path, "path,label\na.mp4,3.0\nb.mp4,1.5\n").classes
    assert names == ("1.5", "3.0")


def test_a_folder_of_frames_in_a_table_is_a_clip(tmp_path):
    for k in range(3):
        touched(tmp_path / "f 1")
        (tmp_path / "f 1").mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), k, np.uint8)).save(tmp_path / "f 1" / f"{k}.png")
    (example,) = listed(tmp_path, "path,label\nf 1,swim\n").examples
    np.testing.assert_array_equal(read_whole(example)[:, 0, 0, 0], [0, 1, 2])


def test_animations_are_clips_in_folders_and_lists(tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), 60 * k, np.uint8)) for k in range(3)]
    options = dict(save_all=True, append_images=frames[1:], duration=100)
    for name in ("group/one/a.gif", "group/two/b.webp"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        frames[0].save(tmp_path / "set" / name, **options)
    in_folders = read_dataset(tmp_path / "set")
    assert in_folders.classes == ("one", "two") and len(in_folders) == 2
    text = "set/group/one/a.gif,one\nset/group/two/b.webp,two\n"
    in_list = listed(tmp_path, text)
    assert in_list.examples == in_folders.examples
    assert [count_frames(e) for e in in_list.examples] == [3, 3]


SPLIT = "path,label,split\na.mp4,x,train\nb.mp4,y,val\nc.mp4,z,Test\nd.mp4,y,train\n"


@pytest.mark.parametrize(
    "split, names", [("train", "ad"), ("training", "ad"), ("validation", "b"), ("test", "c"),
                     ("val", "b"), ("VAL", "b"), ("fold", None)],
)  # fmt: skip
def test_only_the_rows_of_the_wanted_split_are_read(tmp_path, split, names):
    if names is None:
        with pytest.raises(UserError, match="no rows of split .*train .2 rows.*--split"):
            listed(tmp_path, SPLIT, split=split)
        return
    found = [path[0] for path, _ in named(listed(tmp_path, SPLIT, split=split), tmp_path)]
    assert found == list(names)


def test_test_rows_validate_where_there_are_no_others(tmp_path, caplog):
    text = SPLIT.replace("b.mp4,y,val\n", "")
    assert named(listed(tmp_path, text, split="validation"), tmp_path) == [("c.mp4", "z")]
    assert "no clips of split validation; those of test are used" in caplog.text
    with pytest.raises(UserError, match="several splits: train .2 rows., Test .1 row.*--split"):
        listed(tmp_path, text)
    one = "path,label,split\na.mp4,x,train\n"
    assert len(listed(tmp_path, one)) == 1


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("path,label\n", {}, "a list without a clip"),
        ("path,label\na.mp4,x\nb.mp4\n", {}, "line 3: it has 1 field; expected 2"),
        ("path,label\na.mp4,x\n,y\n", {}, "line 3: there is no path"),
        ("path,label\na.mp4,x\nb.mp4,3\n", {}, "numbers such as 3 and names such as x"),
        ("path,label\na.mp4,x\nb.mp4,\n", {}, "differing numbers of labels: 1 in line 2 and 0 in"),
        ("path,label\na.mp4,x\na.mp4,y\n", {}, "a.mp4 has label x in line 2 and y in line 3"),
        ("path,label\na.mp4,x\n", {"labels": 2}, "one label for each clip; for labels=2"),
        ("path,label\na.mp4,99999999999\n", {}, "label 99999999999; expected at most"),
        ("youtube_id,label\nx,y\n", {}, "line 1: .*no label.*Kinetics: no column time_start; col"),
        ("foo,bar\na,b\n", {}, "columns with names: its first line names no column path, "),
        ("path,title\na.mp4,b\n", {}, "its first line names no column label, class"),
    ],
)
def test_refused_tables(tmp_path, text, options, message):
    with pytest.raises(UserError, match=message) as caught:
        listed(tmp_path, text, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "encoding, message",
    [
        ("latin-1", "class L.+ufer is not UTF-8 text; save the file as UTF-8"),
        ("utf-16", "UTF-16 text, save it as UTF-8"),
    ],
)
def test_other_encodings_are_refused(tmp_path, encoding, message):
    path = tmp_path / "list.csv"
    path.write_text("path,label\na.mp4,Läufer\nb.mp4,x\n", encoding=encoding)
    with pytest.raises(UserError, match=message):
        read_dataset(path)


def test_a_file_of_no_format_names_each_with_its_reason(tmp_path):
    with pytest.raises(UserError) as caught:
        listed(tmp_path, "some words\n", name="notes.txt")
    message = str(caught.value)
    assert "line 1: 'some words': there is no label, an integer, at its end" in message
    *others, _ = FORMATS
    places = [message.index(f"{each.name}: ") for each in others]
    assert places == sorted(places) and "\n" not in message


# ---- published data sets

KINETICS = """label,youtube_id,time_start,time_end,split
riding a bike,-abc_d,5,15,train
abseiling,xyz,100.0,110.0,validate
abseiling,0123,1234567,1234577,train
"""


@pytest.mark.parametrize(
    "layout", ["{0}", "riding a bike/{0}", "riding_a_bike/{0}", "train/{0}",
               "train/riding a bike/{0}"],
)  # fmt: skip
def test_kinetics(tmp_path, layout):
    root = tmp_path / "videos"
    touched(root, layout.format("-abc_d_000005_000015.mp4"))
    dataset = listed(tmp_path, KINETICS, root=root, split="train")
    other = layout.replace("riding a bike", "abseiling").replace("riding_a_bike", "abseiling")
    assert named(dataset, root) == [
        (layout.format("-abc_d_000005_000015.mp4"), "riding a bike"),
        (other.format("0123_1234567_1234577.mp4"), "abseiling"),
    ]
    pretraining = listed(tmp_path, KINETICS, root=root, split="train", labels=0)
    assert [e.path for e in pretraining.examples] == [e.path for e in dataset.examples]


def test_kinetics_rows_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="none of its 2 clips, such as -abc_d_000005_000015.mp4, "):
        listed(tmp_path, KINETICS, split="train")
    with pytest.raises(UserError, match="line 2: times 'x' and '15'; expected seconds"):
        listed(tmp_path, KINETICS.replace(",5,", ",x,"))
    touched(tmp_path, "xyz_000100_000110.mp4")
    found = listed(tmp_path, KINETICS, split="validation")
    assert named(found, tmp_path) == [("xyz_000100_000110.mp4", "abseiling")]


SOMETHING = [
    {"id": "78", "label": "holding a cup", "template": "Holding [something]", "placeholders": []},
    {"id": 42, "label": "a cup left", "template": "Moving [something] to [the left]"},
]


def test_something_something(tmp_path):
    text = json.dumps(SOMETHING, indent=1)
    expected = [("78.webm", "Holding something"), ("42.webm", "Moving something to the left")]
    dataset = listed(tmp_path, text, "train.json")
    assert named(dataset, tmp_path) == expected
    assert dataset.classes == ("Holding something", "Moving something to the left")
    names = {"Moving something to the left": "0", "Throwing something": "1"}
    (tmp_path / "labels.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match="1 class not in the file of class names: Holding"):
        listed(tmp_path, text, "train.json")
    (tmp_path / "labels.json").write_text(json.dumps(names | {"Holding something": "2"}))
    dataset = listed(tmp_path, text, "train.json")
    assert named(dataset, tmp_path) == expected and [e.label for e in dataset.examples] == [2, 0]
    given = tmp_path / "other.txt"
    given.write_text("Holding something\nMoving something to the left\n")
    dataset = listed(tmp_path, text, "train.json", class_names=given)
    assert [e.label for e in dataset.examples] == [0, 1]
    unlabelled = listed(tmp_path, '[{"id": "7"}]', "test.json")
    assert named(unlabelled, tmp_path) == [("7.webm", None)]
    with pytest.raises(UserError, match="JSON, but not the list of objects with 'id'"):
        listed(tmp_path, '{"a": 1}', "x.json")
    with pytest.raises(UserError, match="not valid JSON"):
        listed(tmp_path, "[{", "x.json")


def test_ucf101(tmp_path):
    train = "Tai Chi/v_TaiChi_g08_c01.avi 2\nApply/v_Apply_g08_c02.avi 1\n"
    test = "Tai Chi/v_TaiChi_g01_c01.avi\nApply/v_Apply_g01_c02.avi\n"
    alone = listed(tmp_path, train, "trainlist01.txt")
    assert alone.classes == ("Apply", "Tai Chi")
    (tmp_path / "classInd.txt").write_text("1 Zumba\r\n2 Tai Chi\r\n3 Apply\r\n")
    dataset = listed(tmp_path, train.replace(" 1\n", " 3\n"), "trainlist01.txt")
    assert dataset.classes == ("Zumba", "Tai Chi", "Apply")
    assert named(dataset, tmp_path) == [
        ("Tai Chi/v_TaiChi_g08_c01.avi", "Tai Chi"),
        ("Apply/v_Apply_g08_c02.avi", "Apply"),
    ]
    dataset = listed(tmp_path, test, "testlist01.txt")
    assert [e.label for e in dataset.examples] == [1, 2]
    assert dataset.examples[1].path.endswith("/Apply/v_Apply_g01_c02.avi")
    with pytest.raises(UserError, match="line 2: class 4; expected 1 to 3"):
        listed(tmp_path, train.replace(" 1\n", " 4\n"), "trainlist01.txt")
    # A list of one's own with such a name is one of numbers.
    (tmp_path / "classInd.txt").unlink()
    own = listed(tmp_path, "x/a.mp4 3\n", "trainlist01.txt")
    assert own.classes is None and own.examples[0].label == 3


@pytest.mark.parametrize("layout", ["{label}/{name}", "{name}"])
def test_hmdb51(tmp_path, layout):
    lists = tmp_path / "splits"
    lists.mkdir()
    (lists / "wave_test_split1.txt").write_text("w 1.avi 1 \nw2.avi 2 \nw3.avi 0 \n")
    (lists / "sit_up_test_split1.txt").write_text("s1.avi 1 \ns2.avi 2 \n")
    (lists / "wave_test_split2.txt").write_text("w2.avi 1 \n")
    touched(
        tmp_path,
        layout.format(label="wave", name="w2.avi"),
        layout.format(label="sit_up", name="s1.avi"),
    )
    source = lists / "wave_test_split1.txt"
    for split, expected in (
        ("train", [("s1.avi", "sit_up"), ("w 1.avi", "wave")]),
        ("validation", [("s2.avi", "sit_up"), ("w2.avi", "wave")]),
        ("test", [("s2.avi", "sit_up"), ("w2.avi", "wave")]),
    ):
        dataset = read_dataset(source, tmp_path, split=split)
        below = [(layout.format(label=label, name=name), label) for name, label in expected]
        assert dataset.classes == ("sit_up", "wave") and named(dataset, tmp_path) == below
    with pytest.raises(UserError, match="several splits: train .2 rows., test .2 rows"):
        read_dataset(source, tmp_path)
    source.write_text("w1.avi\n")
    with pytest.raises(UserError, match="line 1 of wave_test_split1.txt: 'w1.avi'; expected a"):
        read_dataset(source, tmp_path, split="train")


# ---- names of classes


@pytest.mark.parametrize(
    "name, text",
    [
        ("n.txt", "swim\nrun\n"),
        ("n.txt", "0 swim\n1 run\n"),
        ("n.txt", "1 swim\n2 run\n"),
        ("n.txt", "2 run\n\n1 swim\n"),
        ("n.json", '["swim", "run"]'),
        ("n.json", '{"swim": "0", "run": 1}'),
        ("n.json", '{"1": "run", "0": "swim"}'),
    ],
)
def test_files_of_class_names(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path / name) == ("swim", "run")
    dataset = listed(tmp_path, "a.mp4 1\n", class_names=tmp_path / name)
    assert named(dataset, tmp_path) == [("a.mp4", "run")] and dataset.classes == ("swim", "run")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("n.txt", "", "no names of classes; expected a name in each line"),
        ("n.txt", "a\nb\na\n", "names two classes a"),
        ("n.txt", "1 a\n3 b\n", "its 2 numbers are not 0 to 1 or 1 to 2"),
        ("n.json", '{"a": "b"}', "maps neither names to numbers nor numbers to names"),
        ("n.json", "3", "neither a list of names nor an object"),
        ("n.txt", b"\xff\xfe", "codec can't decode"),
    ],
)
def test_refused_class_names(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_class_names(tmp_path / name)


def test_class_names_that_do_not_belong(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("swim\nrun\n")
    with pytest.raises(UserError, match="a.mp4 has label 2, and the file of class names names cl"):
        listed(tmp_path, "a.mp4 2\n", class_names=names)
    with pytest.raises(UserError, match="not in the file of class names: rum .did you mean run.."):
        listed(tmp_path, "path,label\na.mp4,rum\n", class_names=names)
    touched(tmp_path / "set", "a/x.mp4")
    with pytest.raises(UserError, match="folders name their classes"):
        read_dataset(tmp_path / "set", class_names=names)
    with pytest.raises(UserError, match="none.txt: No such file"):
        read_class_names(tmp_path / "none.txt")


def test_unknown_names_come_with_what_is_close():
    known = ["Playing guitar", "abseiling"]
    assert describe_unknown(["playing_guitar"], known) == (
        "playing_guitar (did you mean Playing guitar?)"
    )
    many = describe_unknown([f"{k} zzz" for k in range(30)], known)
    assert many.startswith("0 zzz, 1 zzz") and many.endswith("19 zzz and 10 more")
