"""Readers of users' own data: what small files hold is what is read, and broken ones give one clear error."""

import builtins
import json
import os
import pathlib
import pickle
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reweigh.benchmarks.readers import (
    DataError,
    Scene,
    load_images,
    load_scene,
    long_tail_counts,
    long_tailed,
    read_celeba,
    read_cifar,
    read_coco,
    read_conll,
    read_documents,
    read_image_list,
    read_metadata,
    read_nyuv2,
    read_table,
    read_waterbirds,
    span_f1,
    spans,
)


def complain(match, call, *args, **options):
    """The call raises a DataError that says ``match`` and shows no other exception."""
    with pytest.raises(DataError, match=match) as caught:
        call(*args, **options)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return str(caught.value)


def image(path, color=(255, 0, 0), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


# CIFAR


def batch(classes, labels, seed, *, protocol=2, keys=str.encode):
    """A pickle, and the images (N, 32, 32, 3) that it holds."""
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    data = np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(labels), 3072))
    name = "labels" if classes == 10 else "fine_labels"
    entries = {keys("data"): data, keys(name): list(labels), keys("batch_label"): b"testing"}
    return pickle.dumps(entries, protocol=protocol), images


def write_cifar10(folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    truth = {}
    for number, file in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        labels = [(number + step) % 10 for step in range(10 if file == "test_batch" else 6)]
        content, images = batch(10, labels, number, **options)
        (folder / file).write_bytes(content)
        truth[file] = images, labels
    return truth


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("keys", [str, str.encode])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_cifar10_is_what_was_written(tmp_path, protocol, keys, module):
    folder = tmp_path / "cifar-10-batches-py"
    truth = write_cifar10(folder, protocol=protocol, keys=keys)
    if protocol < 4:  # names are lines
        for file in folder.iterdir():
            content = file.read_bytes()
            assert (b"cnumpy.core.multiarray\n" in content) != (b"cnumpy._core.multiarray\n" in content)
            content = content.replace(b"cnumpy.core.multiarray\n", b"c" + module + b"\n")
            file.write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"c" + module + b"\n"))
    for root in (folder, tmp_path):
        found = read_cifar(root, 10)
        assert list(found) == ["train", "test"]
        images, labels = found["train"]
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        order = [truth[f"data_batch_{n}"] for n in range(1, 6)]
        assert np.array_equal(images, np.concatenate([own for own, _ in order]))
        assert labels.tolist() == [label for _, own in order for label in own]
        assert np.array_equal(found["test"][0], truth["test_batch"][0])
        assert found["test"][1].tolist() == truth["test_batch"][1]


def test_cifar100_has_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (tmp_path / "train").mkdir()  # of other data beside it
    truth = {}
    for seed, file in enumerate(["train", "test"]):
        labels = np.random.default_rng(seed).permutation(100).tolist()
        content, truth[file] = batch(100, labels, seed)
        entries = {**pickle.loads(content), b"coarse_labels": [0] * 100}
        (folder / file).write_bytes(pickle.dumps(entries, protocol=2))
        truth[file] = truth[file], labels
    for root in (folder, tmp_path):
        found = read_cifar(root, 100)
        for part, (images, labels) in truth.items():
            assert np.array_equal(found[part][0], images)
            assert found[part][1].tolist() == labels


def python2(entries):
    """A pickle as Python 2 wrote it: byte strings everywhere, the array's state too."""

    def text(value):
        long = len(value) > 255
        return (b"T" + struct.pack("<i", len(value)) if long else b"U" + bytes([len(value)])) + value

    def number(value):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    def array(value):
        head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff"
        dtype += b"J\xff\xff\xff\xffK\x00tb"
        shape = number(value.shape[0]) + number(value.shape[1]) + b"\x86"
        return head + b"(K\x01" + shape + dtype + b"\x89" + text(value.tobytes()) + b"tb"

    body = b""
    for key, value in entries.items():
        if isinstance(value, list):
            made = b"](" + b"".join(map(number, value)) + b"e"
        else:
            made = array(value) if isinstance(value, np.ndarray) else text(value)
        body += text(key) + made + b"s"
    return b"\x80\x02}" + body + b"."


def test_pickles_of_python_2(tmp_path):
    truth = write_cifar10(tmp_path)
    images, labels = truth["test_batch"]
    data = np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(-1, 3072))
    content = python2({b"batch_label": b"testing batch 1 of 1", b"labels": labels, b"data": data})
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], data)
    (tmp_path / "test_batch").write_bytes(content)
    found = read_cifar(tmp_path, 10)["test"]
    assert np.array_equal(found[0], images)
    assert found[1].tolist() == labels


class Reduced:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def marked(marker):
    """Pickles that write the marker when they are loaded without care."""
    yield "system", Reduced(os.system, f"echo > '{marker}'")
    yield "eval", Reduced(builtins.eval, f"open({str(marker)!r}, 'w').close()")
    yield "exec", Reduced(builtins.exec, f"open({str(marker)!r}, 'w').close()")
    yield "touch", Reduced(pathlib.Path.touch, Reduced(pathlib.Path, str(marker)))


@pytest.mark.parametrize("name", ["system", "eval", "exec", "touch"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("entry", [None, "data", "labels", "other"])
def test_hostile_pickles_are_refused_and_not_run(tmp_path, name, protocol, entry):
    marker = tmp_path / "marker"
    hostile = dict(marked(marker))[name]
    content = pickle.dumps(hostile if entry is None else {"data": 0, "labels": [1], entry: hostile}, protocol=protocol)
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(content)
    said = complain("not run", read_cifar, tmp_path, 10)
    assert said.startswith(f"{tmp_path / 'data_batch_2'}: ")
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()  # so it was hostile


HOSTILE = {
    "path object": pickle.dumps(pathlib.PurePosixPath("x"), protocol=2),
    "object by its class": b"\x80\x02cpathlib\nPurePosixPath\n)\x81.",
    "old instance": b"(ipathlib\nPurePosixPath\n.",
    "object of an object array": pickle.dumps(np.array([{}], object), protocol=2),
    "codec that imports": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
    "class of numpy": b"cnumpy\nmemmap\n(X\x01\x00\x00\x00atR.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
    "function of numpy": b"\x80\x04\x8c\x05numpy\x8c\x04load\x93.",
    "a call of ndarray": b"cnumpy\nndarray\n(I1\ntR.",
    "a state of a function": b"c_codecs\nencode\n}X\x01\x00\x00\x00aI1\nsb.",
    "slots of a function": b"c_codecs\nencode\nN}X\x05\x00\x00\x00_callI1\ns\x86b.",
    "array of floats": pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}, protocol=2),
    "persistent id": b"Pname\n.",
    "more bytes than there are": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"a.",
    "numbers that take all memory": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "the same in letters": b"Np2147483647\n.",
    "nothing on the stack": b".",
    "text": b"no pickle at all",
    "number": pickle.dumps(7),
    "stand for a label": b"}(X\x04\x00\x00\x00dataI1\nX\x06\x00\x00\x00labelscnumpy\ndtype\nu.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_pickles_are_refused(tmp_path, name):
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(HOSTILE[name])
    said = "found number 2147483647" if name in ("numbers that take all memory", "the same in letters") else "must|only"
    assert complain(said, read_cifar, tmp_path, 10).startswith(f"{tmp_path / 'test_batch'}: ")
    from reweigh.benchmarks.readers import cifar

    assert cifar._encode("é", "latin1") == b"\xe9"  # and no state was left


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (b"K\x02M\x00\x0c\x86", r"as many bytes as its shape says, found 3072 for \(2, 3072\)"),
        (b"J\xff\xff\xff\xffM\x00\x0c\x86", r"found 3072 for \(-1, 3072\)"),
        (b"M\x00\x0c\x85", r"found shape \(3072,\)"),
        (b"K\x01", "found 3072 for 1"),
    ],
)
def test_arrays_of_another_shape_are_refused(tmp_path, shape, said):
    write_cifar10(tmp_path)
    content, _ = batch(10, [3], 0, protocol=3)  # without frames, whose lengths would be wrong
    assert content.count(b"K\x01M\x00\x0c\x86") == 1  # (1, 3072)
    (tmp_path / "test_batch").write_bytes(content.replace(b"K\x01M\x00\x0c\x86", shape))
    complain(said, read_cifar, tmp_path, 10)


@given(cut=st.floats(0, 1, exclude_max=True), protocol=st.integers(0, 4))
def test_truncated_pickles_are_refused(tmp_path_factory, cut, protocol):
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar10(folder)
    content, _ = batch(10, range(10), 5, protocol=protocol)
    (folder / "test_batch").write_bytes(content[: int(cut * len(content))])
    complain("must be a whole CIFAR pickle|must not be empty", read_cifar, folder, 10)


@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_damaged_pickles_give_data_or_one_error(tmp_path_factory, at, byte):
    folder = tmp_path_factory.mktemp("cifar")
    write_cifar10(folder)
    content = bytearray(python2({b"labels": list(range(10)), b"data": np.zeros((10, 3072), np.uint8)}))
    content[int(at**8 * len(content))] = byte  # mostly near the beginning, before the pixels
    (folder / "test_batch").write_bytes(content)
    said = ""
    try:
        images, labels = read_cifar(folder, 10)["test"]
    except DataError as error:
        said = str(error)
    if said:
        assert said.startswith(str(folder))
    else:
        assert images.shape == (10, 32, 32, 3)
        assert sorted(labels.tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([*range(9), 10], r"label must be an integer in \[0, 10\), found 10 \(number 10\)"),
        ([*range(9), -1], "found -1"),
        ([*range(9), True], "found True"),
        ([*range(9), "9"], "found '9'"),
        ([*range(9), 8], r"every class in \[0, 10\) must have a sample, found none of class 9"),
    ],
)
def test_cifar_labels_are_checked(tmp_path, labels, said):
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(batch(10, labels, 0)[0])
    complain(said, read_cifar, tmp_path, 10)


def test_cifar_entries_are_checked(tmp_path):
    write_cifar10(tmp_path)
    good = pickle.loads(batch(10, range(10), 0)[0])
    for change, said in (
        ({b"data": None}, "'data' must be an array"),
        ({b"data": np.zeros((10, 3071), np.uint8)}, r"found shape \(10, 3071\)"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, r"found shape \(0, 3072\)"),
        ({b"labels": list(range(9))}, "must be a list of 10 labels, found 9"),
        ({b"labels": "0123456789"}, "must be a list of 10 labels, found str"),
    ):
        (tmp_path / "test_batch").write_bytes(pickle.dumps({**good, **change}, protocol=4))
        complain(said, read_cifar, tmp_path, 10)
    del good[b"labels"]
    (tmp_path / "test_batch").write_bytes(pickle.dumps(good, protocol=2))
    complain("must have an entry 'labels'", read_cifar, tmp_path, 10)


def test_wrong_cifar_folders_say_what_a_right_one_holds(tmp_path):
    assert "data_batch_1" in complain("found nothing at this path", read_cifar, tmp_path / "no", 10)
    (tmp_path / "file").write_text("x")
    complain("found a file", read_cifar, tmp_path / "file", 10)
    assert "cifar-10-batches-py" in complain("found 'file'", read_cifar, tmp_path, 10)
    write_cifar10(tmp_path / "cifar-10-batches-py")
    complain("must be a CIFAR-100 folder", read_cifar, tmp_path, 100)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    complain("without 'data_batch_3'", read_cifar, tmp_path, 10)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").mkdir()
    complain("data_batch_3: must be a file, found a folder", read_cifar, tmp_path, 10)
    complain("classes must be 10 or 100, found 20", read_cifar, tmp_path, 20)


def test_long_tail_of_the_papers():
    assert long_tail_counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tail_counts(5000, 10, 10.0)[-1] == 500
    assert sum(long_tail_counts(500, 100, 100)) == 10847
    assert long_tail_counts(5000, 10, 100, "step") == [5000] * 5 + [50] * 5
    assert long_tail_counts(7, 1, 3) == [7]
    assert long_tail_counts(900, 3, 9) == [900, 300, 100]
    assert long_tail_counts(1000, 4, 1000) == [1000, 100, 10, 1]
    assert int(32 * 32 ** (-2 / 5)) == 7  # the floats of the formula say 7 where it is 8
    assert long_tail_counts(32, 6, 32) == [32, 16, 8, 4, 2, 1]


@given(
    largest=st.integers(1, 10_000),
    classes=st.integers(1, 60),
    imbalance=st.one_of(st.integers(1, 300), st.floats(1, 300)),
    kind=st.sampled_from(["exp", "step"]),
)
def test_long_tail_counts_are_exact_floors(largest, classes, imbalance, kind):
    def is_floor(n, c):
        if kind == "step":
            wanted = Fraction(largest) if c < classes // 2 else largest / Fraction(imbalance)
            return n <= wanted < n + 1
        last = max(classes - 1, 1)
        wanted = Fraction(largest) ** last / Fraction(imbalance) ** c  # of the power ``last``
        return n**last <= wanted < (n + 1) ** last

    try:
        counts = long_tail_counts(largest, classes, imbalance, kind)
    except DataError:
        assert is_floor(0, classes - 1)
        return
    assert len(counts) == classes
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= 1
    assert all(is_floor(n, c) for c, n in enumerate(counts))


@pytest.mark.parametrize(
    "args",
    [(0, 10, 10), (100, 0, 10), (100, 10, 0.5), (100, 10, float("nan")), (100, 10, float("inf")), (1.5, 10, 10)],
)
def test_long_tail_arguments_are_checked(args):
    complain("must be", long_tail_counts, *args)
    complain("kind must be", long_tail_counts, 10, 10, 10, "linear")
    complain("found none for class 5", long_tail_counts, 10, 10, 11, "step")


def test_long_tailed_chooses_as_many_as_asked():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 50))
    counts = [50, 20, 5, 1]
    chosen = long_tailed(labels, counts, seed=3)
    assert chosen.dtype == np.int64
    assert np.bincount(labels[chosen]).tolist() == counts
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert np.array_equal(chosen, long_tailed(labels, counts, seed=3))
    assert not np.array_equal(chosen, long_tailed(labels, counts, seed=4))
    assert set(long_tailed(labels, [40, 10, 5, 1], seed=3)) < set(chosen)
    complain("class 1 must have the 51 samples asked for, found 50", long_tailed, labels, [50, 51, 5, 1], 0)
    complain(r"must be in \[0, 3\), found 3", long_tailed, labels, [1, 1, 1], 0)
    complain("must be integers", long_tailed, labels / 2, [1, 1, 1, 1], 0)


# lists of images


def write_list(tmp_path, content, names=("a.png", "b/c d.png", "e.png")):
    for name in names:
        image(tmp_path / "images" / name)
    file = tmp_path / "list.txt"
    file.write_bytes(content.encode())
    return file, tmp_path / "images"


@pytest.mark.parametrize("classes", [None, 2])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_image_lists(tmp_path, classes, end):
    file, images = write_list(tmp_path, end.join(["a.png 0", "", "b/c d.png 1", "e.png\t0", ""]))
    paths, labels = read_image_list(file, images, classes=classes)
    assert paths == [images / "a.png", images / "b" / "c d.png", images / "e.png"]
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "name",
    [
        "../out.png",
        "b/../../out.png",
        "b/../a.png",
        "{root}/out.png",
        "..\\out.png",
        "C:\\out.png",
        "C:out.png",
        "\\out.png",
    ],
)
def test_lists_may_not_leave_the_folder(tmp_path, name):
    image(tmp_path / "out.png")
    image(tmp_path / "images" / "..\\out.png")  # a plain name here, a way out on Windows
    file, images = write_list(tmp_path, f"a.png 0\n{name.format(root=tmp_path)} 1\n")
    complain("list.txt, line 2: a path must stay below", read_image_list, file, images)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a.png 0\na.png\n", "line 2: must be 'relative/path label', found 'a.png'"),
        ("a.png 0\na.png x\n", "line 2: the label must be an integer"),
        ("a.png 1_0\n", "found '1_0'"),
        ("a.png -1\n", "found '-1'"),
        ("a.png 3\n", "found '3'"),
        ("a.png 99999999999999999999\n", "found '99999999999999999999'"),
        ("a.png 0\na.png 2\n", "found none of class 1"),
        ("a.png 0\nno.png 1\n", "line 2: must name a file below .* found no file 'no.png'"),
        ("a.png 0\nb 1\n", "found no file 'b'"),
        ("a\0.png 0\n", "found no file"),
        ("x" * 300 + ".png 0\n", "found no file"),
        ("", "must not be empty"),
        (" \n\n", "must not be empty"),
    ],
)
def test_wrong_lines_are_named(tmp_path, content, said):
    file, images = write_list(tmp_path, content)
    assert "list.txt" in complain(said, read_image_list, file, images, classes=3)


def test_lists_without_files(tmp_path):
    file, images = write_list(tmp_path, "a.png 0\na.png 2\n")
    complain("found none of class 1", read_image_list, file, images)  # without a number of classes too
    complain("must be an image folder", read_image_list, file, tmp_path / "no")
    complain("must be a file, found nothing", read_image_list, tmp_path / "no.txt", images)
    file.write_bytes(b"a.png 0\n\xff.png 1\n")
    complain(r"line 2: must be UTF-8, found the byte b'\\xff'", read_image_list, file, images)
    complain("classes must be >= 1", read_image_list, file, images, classes=0)


def test_images_are_resized_cut_and_normalised(tmp_path):
    red = image(tmp_path / "red.png", (255, 0, 51), (64, 40))
    found = load_images([red, red], 28)
    assert found.dtype == np.float32
    assert found.shape == (2, 3, 28, 28)
    wanted = (np.array([1, 0, 0.2]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(found, np.broadcast_to(wanted[:, None, None], (2, 3, 28, 28)), rtol=1e-5)
    own = load_images([red], 28, mean=(0.5, 0, 0), std=(0.5, 1, 2))
    np.testing.assert_allclose(own[0, :, 3, 3], [1, 0, 0.1], rtol=1e-6)


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_is_cut_out(tmp_path, wide):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    pixels = pixels if wide else pixels.transpose(1, 0, 2)
    Image.fromarray(pixels).save(tmp_path / "a.png")  # 28 * 256 / 224 = 32: nothing to resize
    centre = pixels[2:30, 10:38] if wide else pixels[10:38, 2:30]
    found = load_images([tmp_path / "a.png"], 28, mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_allclose(found[0], centre.transpose(2, 0, 1) / 255, rtol=1e-6)
    shown = Image.fromarray(pixels).resize((96, 64) if wide else (64, 96), Image.Resampling.BILINEAR)
    larger = np.asarray(shown)[4:60, 20:76] if wide else np.asarray(shown)[20:76, 4:60]
    found = load_images([tmp_path / "a.png"], 56, mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_allclose(found[0], larger.transpose(2, 0, 1) / 255, rtol=1e-6)


def test_grey_images_have_three_colours(tmp_path):
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    found = load_images([tmp_path / "grey.png"], 7, mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_allclose(found, np.full((1, 3, 7, 7), 0.2), rtol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif"])
@pytest.mark.parametrize("keep", [0, 3, 30, 0.5, 0.8])
def test_truncated_images_are_named(tmp_path, suffix, keep):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = tmp_path / f"broken.{suffix}"
    Image.fromarray(pixels).save(file)
    content = file.read_bytes()
    assert load_images([file], 8).shape == (1, 3, 8, 8)
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    good = image(tmp_path / "good.png")
    complain(f"broken.{suffix}: must be a whole image", load_images, [good, file], 8)


def test_image_arguments_are_checked(tmp_path):
    good = image(tmp_path / "good.png")
    complain("no.png: must be an image file", load_images, [good, tmp_path / "no.png"], 8)
    complain("size must be", load_images, [good], 0)
    complain("std > 0", load_images, [good], 8, std=(1, 1, 0))
    complain("must be 3 numbers", load_images, [good], 8, mean=(1, 1))


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match="load_images needs Pillow"):
        load_images([tmp_path / "a.png"], 8)


# groups

COMBINATIONS = [(y, place, split) for split in range(3) for y in range(2) for place in range(2)]


def write_waterbirds(root, rows=COMBINATIONS, header="img_id,img_filename,y,place,split"):
    names = [f"{number % 3}/bird, {number}.png" for number in range(len(rows))]
    for name in names:
        image(root / name)
    lines = [f'{at},"{name}",{",".join(map(str, row))}' for at, (name, row) in enumerate(zip(names, rows, strict=True))]
    (root / "metadata.csv").write_text("\n".join([header, *lines]) + "\n")
    return [root / name for name in names]


def test_waterbirds(tmp_path):
    rows = [*COMBINATIONS, (1, 0, 0), (0, 1, 2)]
    paths = write_waterbirds(tmp_path, rows)
    found = read_waterbirds(tmp_path)
    assert list(found) == ["train", "val", "test"]
    for number, part in enumerate(found.values()):
        own = [at for at, row in enumerate(rows) if row[2] == number]
        assert part.paths == tuple(paths[at] for at in own)
        assert part.label.tolist() == [rows[at][0] for at in own]
        assert part.group.tolist() == [2 * rows[at][0] + rows[at][1] for at in own]
        assert part.groups == 4
        assert part.label.dtype == part.group.dtype == np.int64


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*COMBINATIONS, (2, 0, 0)], "line 14, column 'y': must be one of 0, 1, found '2'"),
        ([*COMBINATIONS, (0, "", 0)], "line 14, column 'place': must be one of 0, 1, found ''"),
        ([*COMBINATIONS, (0, 0, 3)], "line 14, column 'split': must be one of 0, 1, 2, found '3'"),
        ([*COMBINATIONS, (0, 0)], "line 14: must have the 5 columns of the header, found 4"),
        (COMBINATIONS[1:], r"train \(split 0\): every group in \[0, 4\) must have a sample, found none of group 0"),
        (COMBINATIONS[:-1], r"test \(split 2\): .* found none of group 3"),
        (COMBINATIONS[:8], r"test \(split 2\): .* found none of group 0"),
        ([], "must have rows below its header"),
    ],
)
def test_wrong_rows_of_waterbirds(tmp_path, rows, said):
    write_waterbirds(tmp_path, rows)
    assert "metadata.csv" in complain(said, read_waterbirds, tmp_path)


def test_wrong_folders_of_waterbirds(tmp_path):
    assert "metadata.csv" in complain("must be a Waterbirds folder", read_waterbirds, tmp_path / "no")
    assert "metadata.csv" in complain("found nothing", read_waterbirds, tmp_path)
    paths = write_waterbirds(tmp_path)
    paths[4].unlink()
    complain("line 6: must name a file below", read_waterbirds, tmp_path)
    write_waterbirds(tmp_path, header="img_id,img_filename,y,background,split")
    complain("must have a column 'place', found 'img_id'", read_waterbirds, tmp_path)
    write_waterbirds(tmp_path, header="img_id,img_filename,y,y,split")
    complain("a name must occur once, found 'y' again", read_waterbirds, tmp_path)
    text = (tmp_path / "metadata.csv").read_text()
    for content, said in (
        (text + '12,"never closed', "must be CSV"),
        ("", "must not be empty"),
        ("a" * 200_000, "must be CSV|rows"),
    ):
        (tmp_path / "metadata.csv").write_text(content)
        complain(said, read_waterbirds, tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"img_filename,y\n\xe9,1\n")
    complain("line 2: must be UTF-8", read_waterbirds, tmp_path)


ATTRIBUTES = ["Bald", "Male", "Blond_Hair"]


def write_celeba(root, suffix, rows=None, inner=""):
    """Rows (name, values of the three attributes, part)."""
    if rows is None:
        rows = [
            (f"{at:06}.jpg", [1, 2 * place - 1, 2 * y - 1], split) for at, (y, place, split) in enumerate(COMBINATIONS)
        ]
    for name, *_ in rows:
        image(root / "img_align_celeba" / inner / name)
    if suffix == "csv":
        attributes = [",".join(["image_id", *ATTRIBUTES])]
        attributes += [",".join([name, *map(str, values)]) for name, values, _ in rows]
        parts = ["image_id,partition", *(f"{name},{part}" for name, _, part in rows)]
    else:
        attributes = [str(len(rows)), " ".join(ATTRIBUTES) + " "]
        attributes += [f"{name} " + " ".join(f"{value:>2}" for value in values) for name, values, _ in rows]
        parts = [f"{name} {part}" for name, _, part in rows]
    (root / f"list_attr_celeba.{suffix}").write_text("\n".join(attributes) + "\n")
    (root / f"list_eval_partition.{suffix}").write_text("\n".join(parts) + "\n")
    return rows


@pytest.mark.parametrize("suffix", ["csv", "txt"])
@pytest.mark.parametrize("inner", ["", "img_align_celeba"])
def test_celeba(tmp_path, suffix, inner):
    rows = write_celeba(tmp_path, suffix, inner=inner)
    parts = tmp_path / f"list_eval_partition.{suffix}"
    lines = parts.read_text().splitlines()
    head = 1 if suffix == "csv" else 0
    parts.write_text("\n".join([*lines[:head], *lines[head:][::-1]]))  # joined by name, not by line
    found = read_celeba(tmp_path)
    for number, part in enumerate(["train", "val", "test"]):
        own = [(name, values) for name, values, split in rows if split == number]
        assert found[part].paths == tuple(tmp_path / "img_align_celeba" / inner / name for name, _ in own)
        assert found[part].label.tolist() == [int(values[2] == 1) for _, values in own]
        assert found[part].group.tolist() == [2 * int(values[2] == 1) + int(values[1] == 1) for _, values in own]
        assert found[part].groups == 4
    swapped = read_celeba(tmp_path, target="Male", attribute="Blond_Hair")["val"]
    assert swapped.label.tolist() == [int(values[1] == 1) for _, values, split in rows if split == 1]
    assert swapped.group.tolist() == [0, 2, 1, 3]
    complain("found none of group 0", read_celeba, tmp_path, target="Bald")
    complain("must have a column 'Hat', found 'image.*', 'Bald'", read_celeba, tmp_path, target="Hat")
    complain("target and attribute must differ", read_celeba, tmp_path, target="Male")


@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_wrong_rows_of_celeba(tmp_path, suffix):
    rows = write_celeba(tmp_path, suffix)
    for change, said in (
        ([*rows, ("x.jpg", [1, 0, 1], 0)], "column 'Male': must be one of -1, 1, found '0'"),
        ([*rows, ("x.jpg", [1, 1, 1], 3)], "column 'partition': must be one of 0, 1, 2, found '3'"),
        ([*rows, ("x.jpg", [1, 1], 0)], "must have (the )?4 columns"),
        ([*rows, rows[0]], "found '000000.jpg' again"),
        ([*rows, ("../out.png", [1, 1, 1], 0)], "a path must stay below"),
    ):
        write_celeba(tmp_path, suffix, change)
        complain(said, read_celeba, tmp_path)
    write_celeba(tmp_path, suffix)
    (tmp_path / "img_align_celeba" / "000003.jpg").unlink()
    complain("found no file '000003.jpg'", read_celeba, tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "txt"])
@pytest.mark.parametrize("file", ["list_attr_celeba", "list_eval_partition"])
def test_celeba_lists_name_the_same_images(tmp_path, suffix, file):
    write_celeba(tmp_path, suffix)
    path = tmp_path / f"{file}.{suffix}"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    shorter = suffix == "txt" and file == "list_attr_celeba"
    said = "12 images that its first line says, found 11" if shorter else "found no '000011.jpg'"
    assert path.name in complain(said, read_celeba, tmp_path)
    path.write_text("7\n")
    complain("must", read_celeba, tmp_path)
    path.unlink()
    assert "img_align_celeba" in complain(f"without {file}", read_celeba, tmp_path)


def test_celeba_needs_its_images(tmp_path):
    (tmp_path / "other").mkdir()
    complain("CelebA folder .* without 'img_align_celeba': found 'other'", read_celeba, tmp_path)


def write_metadata(root, rows):
    for row in rows:
        image(root / row[0])
    (root / "own.csv").write_text("\n".join(["file,what,where,part", *(",".join(map(str, row)) for row in rows)]))


def metadata(root):
    return read_metadata(root, "own.csv", image="file", label="what", group="where", split="part")


def test_metadata_of_numbers(tmp_path):
    write_metadata(tmp_path, [("a.png", 1, 0, 2), ("b.png", 0, 2, 0), ("c.png", 2, 1, 0)])
    found = metadata(tmp_path)
    assert set(found) == {"train", "test"}
    assert found["train"].paths == (tmp_path / "b.png", tmp_path / "c.png")
    assert found["train"].label.tolist() == [0, 2]
    assert found["train"].group.tolist() == [2, 1]
    assert found["test"].group.tolist() == [0]
    assert found["test"].groups == 3
    assert found["test"].label_names == ()


def test_metadata_of_texts(tmp_path):
    write_metadata(
        tmp_path, [("a.png", "cat", "sea", "id"), ("b.png", "ant", "air", "ood"), ("c.png", "cat", "air", "id")]
    )
    found = metadata(tmp_path)
    assert set(found) == {"id", "ood"}
    assert found["id"].label.tolist() == [1, 1]
    assert found["id"].group.tolist() == [1, 0]
    assert found["ood"].label.tolist() == [0]
    assert found["ood"].label_names == ("ant", "cat")
    assert found["ood"].group_names == ("air", "sea")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (("x.png", "l", 0, 0), "line 4, column 'what': must be an integer >= 0, as above, found 'l'"),
        (("x.png", -1, 0, 0), "found '-1'"),
        (("x.png", 3, 0, 0), "column 'what': every class .* found none of class 2"),
        (("x.png", 0, 3, 0), "column 'where': every group .* found none of group 2"),
        (("x.png", "", 0, 0), "must not be empty"),
        (("x.png", 0, 0, ""), "column 'part': must not be empty"),
    ],
)
def test_wrong_metadata(tmp_path, row, said):
    write_metadata(tmp_path, [("a.png", 0, 1, 0), ("b.png", 1, 0, 0), row])
    complain(said, metadata, tmp_path)


def test_metadata_of_texts_and_numbers(tmp_path):
    write_metadata(tmp_path, [("a.png", "cat", 1, 0), ("b.png", 7, 0, 0)])
    complain("line 3, column 'what': must be a text that is no integer", metadata, tmp_path)
    write_metadata(tmp_path, [("a.png", 0, 0, 0)])
    with open(tmp_path / "own.csv", "a") as file:
        file.write("\n../own.csv,0,0,0\n")
    complain("line 3: a path must stay below", metadata, tmp_path)
    (tmp_path / "own.csv").unlink()
    complain("without 'own.csv'", metadata, tmp_path)


# several labels


def coco():
    """Three images, categories 2 and 7."""
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 30, "file_name": "c.png"},
            {"id": 10, "file_name": "a.png"},
            {"id": 20, "file_name": "b.png"},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7},
            {"id": 2, "image_id": 10, "category_id": 2},
            {"id": 3, "image_id": 10, "category_id": 2},
            {"id": 4, "image_id": 30, "category_id": 2},
        ],
    }


def write_coco(tmp_path, content):
    for name in "abc":
        image(tmp_path / "images" / f"{name}.png")
    file = tmp_path / "instances.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file, tmp_path / "images"


def test_coco(tmp_path):
    found = read_coco(*write_coco(tmp_path, coco()))
    assert found.paths == tuple(tmp_path / "images" / f"{name}.png" for name in "cab")
    assert found.labels.dtype == np.float32
    assert found.labels.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert found.names == ("cat", "dog")


@pytest.mark.parametrize("lines", ["20\n10\n", "a.png\r\n\r\nb.png\r\n", "10\nb.png\n10\n"])
def test_coco_keeps_what_a_list_names(tmp_path, lines):
    keep = tmp_path / "keep.txt"
    keep.write_bytes(lines.encode())
    found = read_coco(*write_coco(tmp_path, coco()), keep=keep)
    assert found.paths == (tmp_path / "images" / "a.png", tmp_path / "images" / "b.png")
    assert found.labels.tolist() == [[1, 1], [0, 0]]


def test_voc_in_the_form_of_coco_has_text_ids(tmp_path):
    content = coco()
    for entry in content["images"]:
        entry["id"] = f"2007_{entry['id']:06}"
    for entry in content["annotations"]:
        entry["image_id"] = f"2007_{entry['image_id']:06}"
    keep = tmp_path / "keep.txt"
    keep.write_text("2007_000010\n")
    assert read_coco(*write_coco(tmp_path, content), keep=keep).labels.tolist() == [[1, 1]]


def test_wrong_lists_to_keep(tmp_path):
    keep, (file, images) = tmp_path / "keep.txt", write_coco(tmp_path, coco())
    keep.write_text("10\n40\n")
    complain("keep.txt, line 2: must be an image id or a file name", read_coco, file, images, keep=keep)
    keep.write_text("30\n")
    complain("keep.txt: every category must have an image, found none of 'dog'", read_coco, file, images, keep=keep)
    keep.write_text("")
    complain("keep.txt: must not be empty", read_coco, file, images, keep=keep)
    complain("must be a file, found nothing", read_coco, file, images, keep=tmp_path / "no.txt")


def changed(path, value):
    content = coco()
    at = content
    for key in path[:-1]:
        at = at[key]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "must hold an object, found list"),
        (json.dumps(coco())[:-20], "must be JSON, found an error at line 1"),
        ("[" * 200_000, "must be JSON"),
        ('{"images": ' + "9" * 5000 + "}", "must"),
        ("", "must not be empty"),
        (changed(["images"], KeyError), "must have a list 'images' that is not empty, found 'info'"),
        (changed(["images"], []), "found an empty list"),
        (changed(["annotations"], {}), "must have a list 'annotations'"),
        (changed(["annotations", 1], 5), r"annotations\[1\]: must be an object, found 5"),
        (
            changed(["annotations", 1, "image_id"], 11),
            r"annotations\[1\]: image_id must be an id of the file, found 11",
        ),
        (changed(["annotations", 1, "image_id"], "10"), "image_id must be an id of the file, found '10'"),
        (changed(["annotations", 1, "category_id"], 3), "category_id must be an id of the file, found 3"),
        (changed(["annotations", 1, "category_id"], None), "must be an integer or a text, found None"),
        (changed(["annotations", 0, "category_id"], [2]), r"must be an integer or a text, found \[2\]"),
        (changed(["annotations", 0, "category_id"], 2), "every category must have an image, found none of 'dog'"),
        (changed(["images", 0, "id"], 10), r"images\[1\]: 'id' must occur once, found 10 again"),
        (changed(["images", 0, "id"], "10"), r"images\[1\]: 'id' must occur once, found 10 again"),
        (changed(["images", 0, "id"], True), r"images\[0\]: 'id' must be an integer or a text, found True"),
        (changed(["images", 0, "file_name"], "a.png"), "'file_name' must occur once"),
        (changed(["images", 0, "file_name"], KeyError), "'file_name' must be a text, found None"),
        (changed(["images", 0, "file_name"], "../instances.json"), "image 30: a path must stay below"),
        (changed(["images", 0, "file_name"], "/etc/passwd"), "image 30: a path must stay below"),
        (changed(["images", 0, "file_name"], "d.png"), "image 30: must name a file below .* found no file 'd.png'"),
        (changed(["categories", 0, "name"], "cat"), r"categories\[1\]: 'name' must occur once, found 'cat' again"),
    ],
)
def test_wrong_coco(tmp_path, content, said):
    file, images = write_coco(tmp_path, content)
    assert complain(said, read_coco, file, images).startswith(str(file))


# tags

CONLL = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
-DOCSTART- -X- -X- O
\t
end NN I-NP O"""


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_conll(tmp_path, end):
    file = tmp_path / "eng.train"
    file.write_bytes((CONLL + end).replace("\n", "\r\n").encode())
    assert read_conll(file) == [
        (["EU", "rejects"], ["I-ORG", "O"]),
        (["Peter", "Blackburn"], ["I-PER", "I-PER"]),
        (["end"], ["O"]),
    ]
    assert read_conll(file, token=1, tag=2)[0] == (["NNP", "VBZ"], ["I-NP", "I-VP"])


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("a O\nb\n", {}, "line 2: must have 2 columns, as above, found 1"),
        ("a O\n\nb x O\n", {}, "line 3: must have 2 columns, as above, found 3"),
        ("a\n", {}, r"line 1: must have different columns 0 \(token\) and -1 \(tag\), found 1 columns"),
        ("a O\n", {"tag": 3}, "different columns 0 .* and 3"),
        ("a O\n", {"token": -3}, "different columns -3"),
        ("a O\n", {"token": 1}, "different columns 1"),
        ("-DOCSTART- O\n\n", {}, "must have a sentence, found none"),
        ("\n \n", {}, "must not be empty"),
        ("", {}, "must not be empty"),
    ],
)
def test_wrong_conll(tmp_path, content, options, said):
    file = tmp_path / "dev.txt"
    file.write_text(content)
    assert complain(said, read_conll, file, **options).startswith(str(file))


def test_conll_must_be_utf8(tmp_path):
    (tmp_path / "latin").write_bytes("a O\n\nfaçade O\n".encode("latin1"))
    complain("latin, line 3: must be UTF-8", read_conll, tmp_path / "latin")
    complain("must be a file, found nothing", read_conll, tmp_path / "no")
    complain("must be a file, found a folder", read_conll, tmp_path)


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("", set()),
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("I-PER I-PER B-PER I-LOC", {("PER", 0, 2), ("PER", 2, 3), ("LOC", 3, 4)}),
        ("S-PER S-PER B-LOC I-LOC E-LOC O", {("PER", 0, 1), ("PER", 1, 2), ("LOC", 2, 5)}),
        ("O E-PER E-PER I-PER", {("PER", 1, 2), ("PER", 2, 3), ("PER", 3, 4)}),
        ("B-a-b I-a-b I-a", {("a-b", 0, 2), ("a", 2, 3)}),
        ("B I O S", {("", 0, 2), ("", 3, 4)}),
    ],
)
def test_spans_by_hand(tags, wanted):
    assert spans(tags.split()) == wanted


def conlleval(tags):
    """The tables of startOfChunk and endOfChunk, with S as in later versions."""
    ends = {"BB", "BS", "BO", "IB", "IS", "IO"} | {first + then for first in "ES" for then in "BIESO"}
    starts = {first + then for first in "BIESO" for then in "BS"} | {first + then for first in "ESO" for then in "EI"}
    found, before, kind, start = set(), "O", "", 0
    for at, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        if (before + mark in ends) or (before != "O" and own != kind):
            found.add((kind, start, at))
        if (before + mark in starts) or (mark != "O" and own != kind):
            start = at
        before, kind = mark, own
    return found


tag_lists = st.lists(st.sampled_from(["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in "xy")]), max_size=12)


@given(tags=tag_lists)
def test_spans_follow_conlleval(tags):
    assert spans(tags) == conlleval(tags)


@given(data=st.data())
@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "BIOES"])
def test_spans_undo_every_scheme(scheme, data):
    pieces = data.draw(st.lists(st.tuples(st.sampled_from(["", "x", "y"]), st.integers(1, 3)), max_size=8))
    tags, truth = [], set()
    before = ""
    for kind, length in pieces:
        start = len(tags)
        if not kind:
            tags += ["O"] * length
        else:
            truth.add((kind, start, start + length))
            marks = ["I"] * length
            if scheme != "IOB1" or before == kind:
                marks[0] = "B"
            if scheme == "BIOES":
                marks[-1] = "S" if length == 1 else "E"
            tags += [f"{mark}-{kind}" for mark in marks]
        before = kind
    assert spans(tags) == truth


@pytest.mark.parametrize("tag", ["PER", "X-PER", "B-", "", "b-PER", "B-PER\n", "B_PER"])
def test_other_tags_are_refused(tag):
    complain(r"number 2\)", spans, ["O", tag])


def test_span_f1_by_hand():
    wanted = [{("a", 0, 2), ("b", 3, 4)}, {("a", 0, 1)}, set()]
    found = [{("a", 0, 2), ("a", 3, 4)}, set(), {("a", 0, 1), ("b", 3, 4)}]
    score = span_f1(found, wanted)  # 1 of 4 found, 1 of 3 wanted
    assert score == pytest.approx((1 / 4, 1 / 3, 2 / 7))
    assert score.f1 == pytest.approx(2 * score.precision * score.recall / (score.precision + score.recall))
    assert span_f1(wanted, wanted) == (1.0, 1.0, 1.0)
    assert span_f1([set()], [set()]) == (0.0, 0.0, 0.0)
    assert span_f1([], []) == (0.0, 0.0, 0.0)
    complain("as many sentences, found 3 and 1", span_f1, found, wanted[:1])


# documents


def test_documents_of_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\nline two\r\n\r\n \t\r\n\r\nzwei\u2028drei\r\n".encode())
    assert read_documents(tmp_path / "a.txt") == ["one\nline two", "zwei\u2028drei"]


def test_documents_of_json_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\n\\nstill one", "n": 1}\n\n{"text": " two\u2028"}\n', encoding="utf-8")
    assert read_documents(file) == ["one\n\nstill one", " two\u2028"]
    file.write_text('{"text": "one", "body": "other"}')
    assert read_documents(file, field="body") == ["other"]


def test_documents_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("three\n\nfour\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "c.TXT").write_text("five")
    (tmp_path / "._b.txt").write_bytes(b"\xff")
    (tmp_path / "d.md").write_text("other")
    (tmp_path / "e.txt").mkdir()
    assert read_documents(tmp_path) == ["one", "two", "three", "four", "five"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"one\n\ntw\xe9\n", r"a.txt, line 3: must be UTF-8, found the byte b'\\xe9'"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xe9"}\n', "a.jsonl, line 2: must be UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "tw\n', "a.jsonl, line 2: must be JSON"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', "a.jsonl, line 2: must be an object"),
        ("a.jsonl", b'{"body": "one"}\n', "a.jsonl, line 1: must have a field 'text', found 'body'"),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl, line 1: field 'text' must be a text"),
        ("a.jsonl", b'{"text": " "}\n', "a.jsonl, line 1: field 'text' must be a text that is not empty"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000 + b"\n", "a.jsonl, line 1: must be JSON"),
        ("a.txt", b"", "a.txt: must not be empty"),
        ("a.txt", b" \n\n", "a.txt: must not be empty"),
    ],
)
def test_wrong_documents(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        complain(said, read_documents, path)


def test_wrong_places_of_documents(tmp_path):
    (tmp_path / "a.md").write_text("x")
    complain("must hold .txt or .jsonl files, found 'a.md'", read_documents, tmp_path)
    complain("found the suffix '.md'", read_documents, tmp_path / "a.md")
    complain("must be a file, found nothing", read_documents, tmp_path / "no.txt")


# scenes


def write_nyuv2(root, names=("10", "2", "0")):
    truth = {}
    for part in ("train", "val"):
        for seed, name in enumerate(names):
            rng = np.random.default_rng(seed)
            truth[part, name] = {
                "image": rng.random((4, 6, 3)),
                "label": rng.integers(-1, 13, (4, 6)).astype(np.float64),
                "depth": rng.random((4, 6, 1), dtype=np.float32),
                "normal": rng.random((4, 6, 3), dtype=np.float32),
            }
            for kind, array in truth[part, name].items():
                (root / part / kind).mkdir(parents=True, exist_ok=True)
                np.save(root / part / kind / f"{name}.npy", array)
    return truth


def test_nyuv2(tmp_path):
    truth = write_nyuv2(tmp_path)
    (tmp_path / "train" / "image" / "notes.txt").write_text("x")
    index = read_nyuv2(tmp_path)
    assert list(index) == ["train", "val"]
    for part, scenes in index.items():
        assert [scene.image.stem for scene in scenes] == ["0", "2", "10"]
        for scene in scenes:
            wanted, found = truth[part, scene.image.stem], load_scene(scene)
            assert list(found) == ["image", "label", "depth", "normal"]
            assert [array.dtype for array in found.values()] == [np.float32, np.int64, np.float32, np.float32]
            assert found["depth"].shape == (4, 6)
            for kind, array in found.items():
                assert getattr(scene, kind) == tmp_path / part / kind / f"{scene.image.stem}.npy"
                np.testing.assert_array_equal(array, wanted[kind].reshape(array.shape).astype(array.dtype))


def test_wrong_folders_of_nyuv2(tmp_path):
    assert "train and val" in complain("must be an NYUv2 folder .* found nothing", read_nyuv2, tmp_path / "no")
    complain("without 'train', 'val'", read_nyuv2, tmp_path)
    write_nyuv2(tmp_path)
    (tmp_path / "val" / "depth" / "2.npy").unlink()
    complain("depth: must have the same names as its neighbours, without '2.npy'", read_nyuv2, tmp_path)
    write_nyuv2(tmp_path)
    (tmp_path / "val" / "normal" / "3.npy").write_bytes(b"")
    complain("image: must have the same names as its neighbours, without '3.npy'", read_nyuv2, tmp_path)
    for kind in ("image", "label", "depth", "normal"):
        for file in (tmp_path / "val" / kind).iterdir():
            file.unlink()
    complain("image: must hold .npy files, found none", read_nyuv2, tmp_path)
    (tmp_path / "val" / "depth").rmdir()
    complain("without 'depth'", read_nyuv2, tmp_path)


@pytest.mark.parametrize(
    ("kind", "array", "said"),
    [
        ("image", np.zeros((3, 4, 6)), r"image.0.npy: must be floats \(H, W, 3\), found float64 \(3, 4, 6\)"),
        ("image", np.zeros((4, 6, 3), np.uint8), "must be floats .* found uint8"),
        ("image", np.full((4, 6, 3), np.nan), "image.0.npy: must be finite in 32 bits, found nan"),
        ("image", np.full((4, 6, 3), 1e300), "found 1e\\+300"),
        ("image", np.zeros((0, 6, 3)), r"found float64 \(0, 6, 3\)"),
        (
            "label",
            np.zeros((6, 4)),
            r"label.0.npy: must be whole numbers \(4, 6\), as the image, found float64 \(6, 4\)",
        ),
        ("label", np.full((4, 6), 13), r"label.0.npy: a label must be a whole number in \[-1, 13\), found 13"),
        ("label", np.full((4, 6), -2.0), "found -2.0"),
        ("label", np.full((4, 6), 0.5), "found 0.5"),
        ("label", np.full((4, 6), np.nan), "found nan"),
        ("label", np.zeros((4, 6), bool), "found bool"),
        ("depth", np.zeros((4, 6, 2)), r"depth.0.npy: must be floats \(4, 6\) or \(4, 6, 1\), as the image"),
        ("depth", np.full((4, 6), np.inf), "depth.0.npy: must be finite"),
        ("normal", np.zeros((4, 6)), r"normal.0.npy: must be floats \(4, 6, 3\)"),
        ("normal", np.zeros((4, 6, 3), complex), "found complex128"),
    ],
)
def test_wrong_arrays_of_scenes(tmp_path, kind, array, said):
    write_nyuv2(tmp_path)
    np.save(tmp_path / "train" / kind / "0.npy", array)
    complain(said, load_scene, read_nyuv2(tmp_path)["train"][0])


def test_depth_without_a_last_axis_and_own_classes(tmp_path):
    write_nyuv2(tmp_path)
    depth = np.arange(24.0).reshape(4, 6)
    np.save(tmp_path / "train" / "depth" / "0.npy", depth)
    np.save(tmp_path / "train" / "label" / "0.npy", np.full((4, 6), 39, np.uint8))
    scene = read_nyuv2(tmp_path)["train"][0]
    np.testing.assert_array_equal(load_scene(scene, classes=40)["depth"], depth)
    complain(r"in \[-1, 39\), found 39", load_scene, scene, classes=39)


@pytest.mark.parametrize("kind", ["image", "label", "depth", "normal"])
def test_broken_arrays_are_named(tmp_path, kind):
    write_nyuv2(tmp_path)
    file = tmp_path / "train" / kind / "0.npy"
    good = file.read_bytes()
    scene = read_nyuv2(tmp_path)["train"][0]
    huge = good.replace(b"(4, 6", b"(1" + b"0" * 12 + b", 6")
    for content in (good[:-1], good[:60], good[:7], b"", b"PK\x03\x04" + good, huge):
        assert content != good
        file.write_bytes(content)
        complain(f"{kind}.0.npy: must", load_scene, scene)
    file.unlink()
    complain(f"{kind}.0.npy: must be a file", load_scene, scene)


def test_objects_in_arrays_are_not_unpickled(tmp_path):
    marker = tmp_path / "marker"
    write_nyuv2(tmp_path)
    scene = read_nyuv2(tmp_path)["train"][0]
    hostile = dict(marked(marker))["eval"]
    np.save(scene.depth, np.array([hostile], object))
    complain("depth.0.npy: must be a whole .npy array", load_scene, scene)
    scene.depth.write_bytes(pickle.dumps(hostile))
    complain("depth.0.npy: must be a .npy array, found other data", load_scene, scene)
    assert not marker.exists()
    assert isinstance(scene, Scene)


# tables

TABLE = """age,colour,income,who,city
20, red ,yes,b,x
30,blue,no,a,y
1e1,"red",yes,b,z
"""


def write_table(tmp_path, content=TABLE):
    file = tmp_path / "table.csv"
    file.write_bytes(content.encode())
    return file


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_table(tmp_path, start, end):
    file = write_table(tmp_path, start + TABLE.replace("\n", end))
    found = read_table(file, target="income", group="who", ignore=["city"])
    assert found.names == ("age", "colour=blue", "colour=red")
    assert found.inputs.dtype == np.float32
    assert found.inputs.tolist() == [[20, 0, 1], [30, 1, 0], [10, 0, 1]]
    assert found.target.dtype == np.int64
    assert found.target.tolist() == [1, 0, 1]
    assert found.classes == ("no", "yes")
    assert found.group.tolist() == [1, 0, 1]
    assert found.group_names == ("a", "b")
    assert read_table(file, target="income").group is None


def test_table_of_numbers(tmp_path):
    file = write_table(tmp_path)
    found = read_table(file, target="age", ignore=["city", "who"], kind="number")
    assert found.target.dtype == np.float32
    assert found.target.tolist() == [20, 30, 10]
    assert found.classes == ()
    assert found.names == ("colour=blue", "colour=red", "income=no", "income=yes")


def test_integer_classes_are_in_numeric_order(tmp_path):
    found = read_table(write_table(tmp_path, "a,y\n1,10\n2,9\n3,10\n"), target="y")
    assert found.classes == ("9", "10")
    assert found.target.tolist() == [1, 0, 1]


def test_columns_can_be_declared_categories(tmp_path):
    file = write_table(tmp_path, "floor,y\n1,a\n2,b\nK,a\n")
    complain("line 4, column 'floor': must be a number, as others of the column", read_table, file, target="y")
    found = read_table(file, target="y", categories=["floor"])
    assert found.names == ("floor=1", "floor=2", "floor=K")
    assert found.inputs.tolist() == np.eye(3).tolist()


@pytest.mark.parametrize("cell", ["", "NA", "nan", "NaN", "n/a", "null", "?", " "])
def test_missing_cells(tmp_path, cell):
    file = write_table(tmp_path, f"n,t,y\n1,a,0\n{cell},b,1\n4,b,0\n4,{cell},0\n")
    complain("table.csv, line 3, column 'n': must not be missing", read_table, file, target="y")
    found = read_table(file, target="y", missing="mean")
    assert found.names == ("n", "t=a", "t=b")
    np.testing.assert_allclose(found.inputs, [[1, 1, 0], [3, 0, 1], [4, 0, 1], [4, 1 / 3, 2 / 3]], rtol=1e-6)
    file = write_table(tmp_path, f"n,t,y\n1,a,0\n2,b,1\n4,{cell},0\n")
    complain("table.csv, line 4, column 't': must not be missing", read_table, file, target="y")


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("a,y\n1,0\n2,\n", {"missing": "mean"}, "line 3, column 'y': must not be missing"),
        ("a,y\n1,0\n2,\n", {"kind": "number", "missing": "mean"}, "line 3, column 'y': must be a number, found ''"),
        ("a,y\n1,0\n2,x\n", {"kind": "number"}, "line 3, column 'y': must be a number, found 'x'"),
        ("a,y\n1,0\n2,1e39\n", {"kind": "number"}, "line 3, column 'y': must be finite in 32 bits, found '1e39'"),
        ("a,y\n1,0\n1e400,1\n", {}, "line 3, column 'a': must be finite in 32 bits, found '1e400'"),
        ("a,y\n1,0\ninf,1\n", {}, "line 3, column 'a': must be a number"),
        ("a,y\n1,0\n1_0,1\n", {}, "line 3, column 'a': must be a number"),
        ("a,y\n,0\n?,1\n", {"missing": "mean"}, "column 'a': must have values, found only missing cells"),
        ("a,y\n1,0\n2,0\n", {}, "column 'y': must have at least 2 classes, found '0'"),
        ("a,y\n1,0\n2\n", {}, "line 3: must have the 2 columns of the header, found 1"),
        ("a,y\n1,0\n2,1,3\n", {}, "line 3: must have the 2 columns of the header, found 3"),
        ("a,a,y\n1,1,0\n", {}, "a name must occur once, found 'a' again"),
        ("a,z\n1,0\n", {}, "must have a column 'y', found 'a', 'z'"),
        ("a,y\n1,0\n", {"ignore": ["b"]}, "must have a column 'b'"),
        ("a,y\n1,0\n", {"ignore": ["y"]}, "a column must have one use, found two for 'y'"),
        ("a,y\n1,0\n", {"group": "y"}, "a column must have one use, found two for 'y'"),
        ("a,y\n1,0\n2,1\n", {"ignore": ["a"]}, "must have an input column besides 'y', 'a', found none"),
        ("a,y\n", {}, "must have rows below its header"),
        ("", {}, "must not be empty"),
        ('a,y\n1,0\n"2,1\n', {}, "must be CSV"),
        ("a,y\n1,0\n2,1\n", {"kind": "text"}, "kind must be"),
        ("a,y\n1,0\n2,1\n", {"missing": "zero"}, "missing 'error' or 'mean'"),
        ("a,y\n" + "\n".join(f"n{row},{row % 2}" for row in range(1001)), {}, "at most 1000 categories .* found 1001"),
    ],
)
def test_wrong_tables(tmp_path, content, options, said):
    complain(said, read_table, write_table(tmp_path, content), target="y", **options)


def test_quoted_line_ends_count(tmp_path):
    file = write_table(tmp_path, 'a,y\n"one\ntwo",0\nx,\n')
    complain("line 4, column 'y': must not be missing", read_table, file, target="y")
    complain("must be a file, found nothing", read_table, tmp_path / "no.csv", target="y")
