"""Class folders of images, against Pillow and what the test itself drew."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mnist_lightning.data import folders
from mnist_lightning.data.folders import (
    count_shared,
    decode,
    list_images,
    read_folder,
    split_stratified,
)
from mnist_lightning.data.photos import read_image


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mnist_lightning"


def picture(seed: int, mode: str = "RGB", width: int = 20, height: int = 16) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height)).convert(mode)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of five pictures each, in several formats."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir(parents=True)
        for n, ending in enumerate(("png", "jpg", "JPG", "bmp", "webp")):
            picture(10 * number + n).save(folder / name / f"{n}.{ending}")
    return folder


def test_labels_are_the_folders_by_name(photos: Path) -> None:
    listing = list_images(photos)
    assert listing.classes == ["cat", "dog", "owl"]
    assert listing.labels == [0] * 5 + [1] * 5 + [2] * 5
    assert [Path(file).parent.name for file in listing.files[::5]] == listing.classes
    assert set(listing.parts) == {""}


def test_a_split_folder_keeps_its_parts(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("b", "a"):
            (tmp_path / part / name).mkdir(parents=True)
            picture(0).save(tmp_path / part / name / "0.png")
    (tmp_path / "train" / "notes.txt").write_text("no image")
    listing = list_images(tmp_path)
    assert listing.classes == ["a", "b"]
    assert listing.parts == ["train", "train", "test", "test"]


@pytest.mark.parametrize(("size", "channels"), [(16, 3), (16, 1), (8, 3), (32, 1)])
def test_an_image_is_fitted_as_pillow_fits_it(photos: Path, size: int, channels: int) -> None:
    file = photos / "cat" / "0.png"
    mode = "RGB" if channels == 3 else "L"
    image = ImageOps.fit(Image.open(file).convert(mode), (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    expected = pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]
    assert np.array_equal(decode(file, size, channels), expected)


def test_an_image_of_the_right_size_stays_as_it_is(tmp_path: Path) -> None:
    image = picture(3, width=16)
    image.save(tmp_path / "x.png")
    assert np.array_equal(decode(tmp_path / "x.png", 16, 3), np.asarray(image).transpose(2, 0, 1))


def test_a_large_jpeg_is_as_if_decoded_whole(tmp_path: Path) -> None:
    """The decoder scales it down first, which is faster; the picture is the same to the eye."""
    image = picture(1, width=800, height=640)
    image.save(tmp_path / "x.jpg", quality=95)
    whole = ImageOps.fit(Image.open(tmp_path / "x.jpg"), (32, 32), Image.Resampling.BILINEAR)
    fast = decode(tmp_path / "x.jpg", 32, 3).transpose(1, 2, 0).astype(int)
    assert abs(fast - np.asarray(whole).astype(int)).mean() < 2


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_every_kind_of_file(tmp_path: Path, mode: str) -> None:
    gray = Image.fromarray(np.full((16, 16), 200, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((16, 16), 200 * 257, np.uint16))
    else:
        colour = gray.convert("RGB")
        image = colour.quantize(8) if mode == "P" else colour.convert(mode, dither=0)
    ending = "tif" if mode in ("CMYK", "I;16") else "png"
    image.save(tmp_path / f"x.{ending}")
    for channels in (1, 3):
        pixels = decode(tmp_path / f"x.{ending}", 16, channels)
        assert pixels.shape == (channels, 16, 16)
        assert abs(pixels.astype(int) - (255 if mode == "1" else 200)).max() <= 3


def test_transparent_is_paper_and_the_cameras_turn_is_undone(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decode(tmp_path / "clear.png", 4, 1) == 255).all()
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 255  # the right half is light
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    Image.fromarray(half).save(tmp_path / "turned.png", exif=exif)
    turned = decode(tmp_path / "turned.png", 8, 1)[0]
    assert (turned[4:] == 255).all()
    assert (turned[:4] == 0).all()


def test_gray_files_have_one_channel_and_colour_files_three(photos: Path, tmp_path: Path) -> None:
    assert read_folder(photos, 8).images.shape == (15, 3, 8, 8)
    assert read_folder(photos, 8, channels=1).images.shape == (15, 1, 8, 8)
    for name in ("a", "b"):
        (tmp_path / "gray" / name).mkdir(parents=True)
        picture(0, "L").save(tmp_path / "gray" / name / "0.png")
    assert read_folder(tmp_path / "gray", 8).images.shape == (2, 1, 8, 8)


def test_the_second_start_opens_no_image(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_folder(photos, 8)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "decode", lambda *_: pytest.fail("decoded"))
        second = read_folder(photos, 8)
    assert torch.equal(first.images, second.images)
    assert first[1:] == second[1:]
    assert read_folder(photos, 9).images.shape[-1] == 9  # another size, another array
    # a file that changes, or a damaged array, is read again
    picture(99).save(photos / "cat" / "0.png")
    third = read_folder(photos, 8)
    kept = third.images.clone()  # not a view of the file that is damaged below
    assert not torch.equal(third.images[0], first.images[0])
    assert torch.equal(third.images[1:], first.images[1:])
    assert third.checksum != first.checksum
    for file in cache.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert torch.equal(read_folder(photos, 8).images, kept)
    assert not list(cache.glob(".*"))


def test_images_can_be_changed_without_changing_the_cache(photos: Path) -> None:
    before = read_folder(photos, 8).images.clone()
    read_folder(photos, 8).images.zero_()
    assert torch.equal(read_folder(photos, 8).images, before)


def test_a_cache_that_cannot_be_written_is_done_without(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_folder(photos, 8).images
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert torch.equal(read_folder(photos, 8).images, expected)


def spoil_text(folder: Path) -> None:
    (folder / "cat" / "9.png").write_text("no image")


def spoil_cut(folder: Path) -> None:
    content = (folder / "cat" / "1.jpg").read_bytes()
    (folder / "cat" / "9.jpg").write_bytes(content[: len(content) // 2])


def spoil_bomb(folder: Path) -> None:
    Image.new("1", (8000, 7000)).save(folder / "cat" / "9.png")  # a few kilobytes


def spoil_pipe(folder: Path) -> None:
    (folder / "cat" / "9.png").symlink_to(folder / "nowhere")


@pytest.mark.parametrize("spoil", [spoil_text, spoil_cut, spoil_bomb])
def test_a_file_that_is_no_image_is_left_out_and_named(
    photos: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(photos)
    pictures = read_folder(photos, 8)
    assert len(pictures.images) == len(pictures.listing.labels) == 15
    (warning,) = pictures.warnings
    assert warning.startswith("1 files are left out")
    assert "9." in warning


def test_a_link_to_nothing_is_left_out(photos: Path) -> None:
    spoil_pipe(photos)
    assert len(read_folder(photos, 8).images) == 15


def test_a_class_without_a_readable_image_is_named(photos: Path) -> None:
    for file in (photos / "dog").iterdir():
        file.write_text("")
    pictures = read_folder(photos, 8)
    assert set(pictures.listing.labels) == {0, 2}
    assert any("no readable image of dog" in warning for warning in pictures.warnings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "is no folder"),
        (lambda d: d.mkdir(), "holds no class"),
        (lambda d: (d / "cat").mkdir(parents=True), "holds no class"),
        (
            lambda d: [(d / "cat").mkdir(parents=True), picture(0).save(d / "cat" / "0.png")],
            "holds one class",
        ),
    ],
    ids=["nothing", "empty", "empty class", "one class"],
)
def test_a_folder_that_cannot_be(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "d")


def test_fifty_thousand_classes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MOST_CLASSES", 20)
    for number in range(21):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "0.png").touch()
    with pytest.raises(ValueError, match="holds 21 folders; at most 20 classes"):
        list_images(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(photos: Path) -> None:
    (photos / "dog").chmod(stat.S_IWUSR)
    try:
        with pytest.raises(ValueError, match="dog cannot be read"):
            list_images(photos)
    finally:
        (photos / "dog").chmod(stat.S_IRWXU)


def test_a_stratified_split_takes_the_same_share_of_each_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 5 + [3] * 2 + [4])
    cut = split_stratified(labels, 0.2, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[cut], minlength=5).tolist() == [20, 10, 1, 1, 0]
    again = split_stratified(labels, 0.2, torch.Generator().manual_seed(0))
    other = split_stratified(labels, 0.2, torch.Generator().manual_seed(1))
    assert torch.equal(cut, again)
    assert not torch.equal(cut, other)


def test_the_same_picture_in_two_parts_is_counted() -> None:
    digests = [bytes([number]) for number in range(10)]
    digests[7], digests[9] = digests[1], digests[2]
    assert count_shared(digests, torch.arange(5), torch.arange(5, 10)) == 2
    assert count_shared(digests, torch.arange(5, 10), torch.arange(5)) == 2
    assert count_shared(digests, torch.tensor([0]), torch.arange(5, 10)) == 0


def test_other_formats_are_no_images(tmp_path: Path) -> None:
    """Whatever a file is called: to read EPS, Pillow would start another program."""
    file = tmp_path / "a.png"
    picture(0).save(file, "EPS")
    assert decode(file, 8, 3) is None
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(file)
