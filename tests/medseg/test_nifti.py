from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from cohobate.core.errors import InputError
from cohobate.medseg.data.nifti import (
    FOLDERS,
    case_name,
    channels,
    class_names_in,
    find_cases,
    read_image,
    read_label,
    write_label,
)


@pytest.mark.parametrize("layout", FOLDERS)
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_layouts_are_found(tmp_path, make_cases, layout, asked):
    make_cases(tmp_path, 3, folders=FOLDERS[layout])
    cases = find_cases(tmp_path, "auto" if asked == "auto" else layout)
    assert [case.name for case in cases] == ["case_000", "case_001", "case_002"]
    assert all(case.image.name == case.label.name for case in cases)


def test_the_data_set_may_be_one_folder_down(tmp_path, make_cases):
    make_cases(tmp_path / "Task04_Hippocampus", 2, folders=FOLDERS["msd"])
    assert len(find_cases(tmp_path)) == 2


def test_dot_files_are_ignored(tmp_path, make_cases):
    make_cases(tmp_path, 2)
    (tmp_path / "images" / "._case_000.nii.gz").write_bytes(b"\0" * 20)
    assert len(find_cases(tmp_path)) == 2


def test_pairs_by_name_not_by_position(tmp_path, make_nifti):
    array = np.zeros((4, 4, 4), np.uint8)
    for name in ("a_1", "a_10", "a_2"):
        make_nifti(tmp_path / "images" / f"{name}_image.nii.gz", array)
        make_nifti(tmp_path / "labels" / f"{name}_label.nii", array)
    for case in find_cases(tmp_path):
        assert case_name(case.image) == case_name(case.label) == case.name


def test_faults_of_a_folder_are_named(tmp_path, make_cases):
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"expected the folders imagesTr/ \+ labelsTr/ or"):
        find_cases(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"labels: no such folder"):
        find_cases(tmp_path)
    (tmp_path / "labels").mkdir()
    with pytest.raises(InputError, match=r"images: no NIfTI files"):
        find_cases(tmp_path)
    make_cases(tmp_path, 2)
    (tmp_path / "labels" / "case_001.nii.gz").rename(tmp_path / "labels" / "case_009.nii.gz")
    with pytest.raises(InputError, match=r"images/case_001.nii.gz: no label of the same name"):
        find_cases(tmp_path)
    (tmp_path / "images" / "case_001.nii.gz").unlink()
    with pytest.raises(InputError, match=r"labels/case_009.nii.gz: no image of the same name"):
        find_cases(tmp_path)
    (tmp_path / "labels" / "case_009.nii.gz").rename(tmp_path / "labels" / "case_000_seg.nii.gz")
    with pytest.raises(InputError, match=r"the same case as case_000"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((5, 6, 7), (1, 5, 6, 7)), ((8, 9, 7, 4), (4, 8, 9, 7)), ((8, 9, 7, 1, 3), (3, 8, 9, 7))],
)
def test_channels_become_the_first_axis(tmp_path, make_nifti, shape, expected):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path = make_nifti(tmp_path / "a.nii.gz", array)
    volume = read_image(path)
    assert volume.array.shape == expected
    assert channels(path) == expected[0]
    assert volume.array[-1, 2, 3, 4] == array[(2, 3, 4, *(-1,) * (len(shape) - 3))]


def test_channel_first_files_stay_as_they_are(tmp_path, make_nifti):
    array = np.random.default_rng(0).normal(size=(4, 8, 9, 7)).astype(np.float32)
    np.testing.assert_array_equal(read_image(make_nifti(tmp_path / "a.nii", array)).array, array)


def test_affine_is_kept(tmp_path, make_nifti):
    affine = np.array([[0, -1.5, 0, 9], [2, 0, 0, -3], [0, 0, 0.5, 4], [0, 0, 0, 1.0]])
    path = make_nifti(tmp_path / "a.nii.gz", np.zeros((3, 4, 5), np.float32), affine)
    np.testing.assert_allclose(read_image(path).affine, affine)


def test_label_values_are_mapped_and_checked(tmp_path, make_nifti):
    values = np.array([0, 205, 421, 850], np.int16).reshape(2, 2, 1)
    path = make_nifti(tmp_path / "l.nii.gz", values)
    mapped = read_label(path, 8, {0: 0, 205: 1, 421: 0, 850: 7}).array
    np.testing.assert_array_equal(mapped[0].ravel(), [0, 1, 0, 7])
    assert mapped.dtype == np.uint8
    with pytest.raises(InputError, match=r"l.nii.gz: value 421 is not in the label map"):
        read_label(path, 8, {0: 0, 205: 1, 850: 7})
    with pytest.raises(InputError, match=r"l.nii.gz: value 850 is not one of the 8 classes 0 to 7"):
        read_label(path, 8)


@pytest.mark.parametrize(
    ("values", "fault"), [([0, 1.5], "value 1.5 is not a whole number"), ([-1, 0], "value -1 is")]
)
def test_labels_that_are_no_class_ids(tmp_path, make_nifti, values, fault):
    path = make_nifti(tmp_path / "l.nii", np.array(values, np.float32).reshape(2, 1, 1))
    with pytest.raises(InputError, match=fault):
        read_label(path, 3)


@pytest.mark.parametrize("content", [b"", b"no image at all" * 40])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_unreadable_files_are_named(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: not a readable NIfTI file"):
        read_image(path)


def test_a_truncated_file_is_named(tmp_path, make_nifti):
    array = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    path = make_nifti(tmp_path / "a.nii.gz", array)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"a.nii.gz: damaged NIfTI file"):
        read_image(path)


def test_other_faults_of_an_image(tmp_path, make_nifti):
    with pytest.raises(InputError, match=r"a.nii: no such file"):
        read_image(tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"a.png: not a NIfTI file"):
        read_image(tmp_path / "a.png")
    flat = make_nifti(tmp_path / "flat.nii", np.zeros((3, 3), np.float32))
    with pytest.raises(InputError, match=r"flat.nii: expected a 3-D or 4-D image"):
        read_image(flat)
    nan = make_nifti(tmp_path / "nan.nii", np.full((3, 3, 3), np.nan, np.float32))
    with pytest.raises(InputError, match=r"nan.nii: holds values that are not finite"):
        read_image(nan)


def test_class_names_come_from_the_decathlons_file(tmp_path):
    assert class_names_in(tmp_path) is None
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"0": "background", "1": "front", "2": "back"}}))
    assert class_names_in(tmp_path) == ["background", "front", "back"]
    path.write_text(json.dumps({"labels": {"0": "background", "2": "back"}}))
    with pytest.raises(InputError, match=r"dataset.json: no table of labels"):
        class_names_in(tmp_path)


def test_a_written_label_has_the_sources_grid(tmp_path, make_nifti):
    affine = np.array([[0, -1.5, 0, 9], [2, 0, 0, -3], [0, 0, 0.5, 4], [0, 0, 0, 1.0]])
    source = make_nifti(tmp_path / "a.nii.gz", np.zeros((3, 4, 5), np.float32), affine)
    label = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    written = tmp_path / "out" / "a_seg.nii.gz"
    write_label(written, label, like=source)
    image = nib.load(written)
    np.testing.assert_allclose(image.affine, affine)
    np.testing.assert_array_equal(np.asarray(image.dataobj), label)
    assert image.get_data_dtype() == np.uint8
    assert image.header["sform_code"] == nib.load(source).header["sform_code"]
    first = written.read_bytes()
    write_label(written, label, like=source)
    assert written.read_bytes() == first  # no time stamp: the same result is the same file
    assert gzip.decompress(first)


def test_nothing_half_written(tmp_path: Path, make_nifti, monkeypatch):
    source = make_nifti(tmp_path / "a.nii.gz", np.zeros((3, 4, 5), np.float32))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        write_label(tmp_path / "out.nii.gz", np.zeros((3, 4, 5)), like=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz"]
