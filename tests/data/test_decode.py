"""One way of decoding: orientation, transparency, bit depths, inks, large and thin pictures; by hand where possible."""

import io
import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from residrop.common.errors import DataError
from residrop.data import Files, Loader, decode, fit, load
from residrop.data.decode import DecodingError, open_rgb, shrink_and_crop, suffixes
from residrop.data.read import read_images

ORIENTATION = 0x0112
# what a camera did to the upright array, by the value that it wrote
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def noise(*shape, kind=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, shape, dtype=kind)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(pixels, orientation, kind="PNG"):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](pixels)))
    return encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def decoded(data):
    return np.asarray(open_rgb(data)[0])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_come_out_upright(orientation, kind):
    pixels = noise(6, 9, 3)
    assert np.array_equal(decoded(turned(pixels, orientation, kind)), pixels)


def test_damaged_or_impossible_orientation_leaves_the_picture():
    pixels = noise(6, 9, 3)
    for exif in (
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0",
    ):
        assert np.array_equal(decoded(encoded(Image.fromarray(pixels), exif=exif)), pixels)
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    assert np.array_equal(decoded(encoded(Image.fromarray(pixels), exif=exif)), pixels)


def test_what_is_transparent_shows_white():
    colours, alpha = noise(5, 7, 3), noise(5, 7)
    alpha[0], alpha[1] = 0, 255
    rgba = Image.fromarray(np.dstack([colours, alpha]))
    share = alpha[..., None] / 255
    found = decoded(encoded(rgba))
    assert np.abs(found - (share * colours + (1 - share) * 255)).max() <= 1.0
    assert (found[0] == 255).all()
    assert np.array_equal(found[1], colours[1])
    grey, is_grey = open_rgb(encoded(Image.fromarray(np.dstack([colours[..., 0], alpha]), "LA")))
    assert is_grey
    assert np.abs(np.asarray(grey)[..., 0] - (share[..., 0] * colours[..., 0] + (1 - share[..., 0]) * 255)).max() <= 1.0


def test_a_colour_or_value_that_stands_for_nothing_shows_white():
    pixels = np.full((4, 4, 3), 40, np.uint8)
    pixels[1, 2] = 10, 20, 30
    for image, key in (
        (Image.fromarray(pixels), (10, 20, 30)),
        (Image.fromarray(pixels[..., 0]), 10),
        (Image.fromarray(pixels[..., 0]).convert("P"), 10),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), 2570),
    ):
        found = decoded(encoded(image, transparency=key))
        assert (found[1, 2] == 255).all()
        assert (found[0, 0] == 40).all()


def test_of_16_bits_the_upper_8_are_taken():
    values = noise(6, 7, kind=np.uint16)
    image, grey = open_rgb(encoded(Image.fromarray(values)))
    assert grey
    assert all(np.array_equal(np.asarray(image)[..., channel], values >> 8) for channel in range(3))
    assert np.array_equal(decoded(rgb16_png(noise(6, 7, 3, kind=np.uint16))), noise(6, 7, 3, kind=np.uint16) >> 8)


def rgb16_png(pixels):
    """A PNG of 16 bits a channel, which Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I"), (np.uint16, "I;16")])
def test_values_without_a_known_range_are_refused(kind, mode):
    data = encoded(Image.fromarray(np.full((4, 4), 7, kind)), "TIFF")
    with pytest.raises(DecodingError, match=f"^pixel mode {mode} is not 8-bit grey or colour; convert it to 8 bits$"):
        open_rgb(data)


def test_inks_become_colours():
    inks = np.full((16, 16, 4), (30, 200, 90, 50), np.uint8)
    expected = [(255 - ink) * (255 - 50) / 255 for ink in (30, 200, 90)]
    tiff = decoded(encoded(Image.fromarray(inks, "CMYK"), "TIFF"))
    assert np.abs(tiff - expected).max() <= 1
    jpeg = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    start = jpeg.index(b"\xff\xee")  # Adobe's segment, whose presence says that inks are stored inverted
    assert jpeg[start + 4 : start + 9] == b"Adobe"
    assert np.abs(decoded(jpeg) - expected).max() <= 4
    bare = jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4]) :]
    with pytest.raises(DecodingError, match=r"CMYK without Adobe's mark, .*; convert it to RGB"):
        open_rgb(bare)


def test_folder_parquet_and_predict_decode_alike(tmp_path, write_shard):
    pixels = noise(8, 8, 4)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    phone = encoded(Image.fromarray(np.ascontiguousarray(np.rot90(pixels))), exif=exif)
    upright = encoded(Image.fromarray(np.asarray(open_rgb(phone)[0])))
    assert not np.array_equal(decoded(upright), pixels[..., :3])
    for part in ("train", "test"):
        write_shard(tmp_path / "shards" / f"{part}-0.parquet", [phone, upright], [0, 1], ["a", "b"])
        for name, data in (("a", phone), ("b", upright)):
            (tmp_path / "files" / part / name).mkdir(parents=True)
            (tmp_path / "files" / part / name / "1.png").write_bytes(data)
    predicted = read_images([tmp_path / "files" / "test" / name / "1.png" for name in "ab"], 8, 3)
    for source in (f"parquet:{tmp_path}/shards", f"folder:{tmp_path}/files?size=8"):
        splits = load(source)
        for part in (splits.train, splits.test):
            assert np.array_equal(part.pixels, predicted)
    assert np.array_equal(predicted[0], predicted[1])
    streamed = list(decode_streamed(tmp_path / "files"))
    assert np.array_equal(streamed[0], streamed[1])


def decode_streamed(folder):
    paths = tuple(folder / "test" / name / "1.png" for name in "ab")
    files = Files(paths, torch.tensor([0, 1]), 8)
    ((x, _),) = Loader(files, batch_size=2, normalization=fit(files, "imagenet"), workers=0).eval_batches()
    return x


# Sizes


@pytest.mark.parametrize(("width", "height"), [(1, 20000), (20000, 1), (3, 9000), (9000, 7)])
@pytest.mark.parametrize(("size", "shorter"), [(8, 0), (8, 10), (3, 0)])
def test_thin_pictures_give_the_pixels_of_the_whole_resized_one(monkeypatch, width, height, size, shorter):
    image = Image.fromarray(noise(height, width, 3))
    whole = np.asarray(shrink_and_crop(image, size, shorter)).astype(int)
    monkeypatch.setattr(decode, "_LARGE", 0)
    part = np.asarray(shrink_and_crop(image, size, shorter)).astype(int)
    assert part.shape == whole.shape == (size, size, 3)
    assert np.abs(part - whole).max() <= 1
    assert (part != whole).mean() <= 0.05


@pytest.mark.parametrize("shape", [(20000, 1, 3), (1, 20000, 3)])
def test_memory_of_thin_pictures_is_small(tmp_path, monkeypatch, shape):
    Image.fromarray(noise(*shape)).save(tmp_path / "thin.png")
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **kw: made.append(resize(*args, **kw)) or made[-1])
    assert read_images([tmp_path / "thin.png"], 224, 3).shape == (1, 3, 224, 224)
    assert all(image.width * image.height <= 224 * 224 for image in made)  # not 224 x 4,480,000


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Image files that Pillow warns of as large, one of them only after it is opened, and one with damaged tags."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "set" / part / name).mkdir(parents=True)
            Image.new("RGB", (60, 60)).save(tmp_path / "set" / part / name / "1.png")
    icon = bytearray(encoded(Image.new("RGB", (60, 60)), "ICO", sizes=[(60, 60)]))
    icon[6:8] = 8, 8  # says so of itself
    (tmp_path / "set" / "train" / "a" / "2.ico").write_bytes(icon)
    tiff = encoded(Image.new("RGB", (60, 60)), "TIFF", description="x" * 100)
    at = tiff.index((270).to_bytes(2, "little"))
    (tmp_path / "set" / "train" / "b" / "2.tif").write_bytes(tiff[: at + 4] + b"\xff\xff\0\0" + tiff[at + 8 :])
    return tmp_path / "set"


@pytest.mark.filterwarnings("error")
def test_pillow_does_not_warn_a_user(large, monkeypatch):
    paths = sorted((large / "train").rglob("*.*"))
    with warnings.catch_warnings(record=True) as raw:
        warnings.simplefilter("always")
        for path in paths:
            open_rgb(path)
    assert len(raw) >= 5  # but not below
    assert len(load(f"folder:{large}?size=8").train) == 4
    assert read_images(paths, 8, 3).shape == (4, 3, 8, 8)
    files = Files(tuple(paths), torch.zeros(4, dtype=torch.int64), 8)
    assert len(list(Loader(files, batch_size=2, normalization=fit(files, "imagenet"), workers=0).eval_batches())) == 2


def test_too_large_pictures_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodingError, match=r"cannot be decoded \(Image size \(3600 pixels\) exceeds limit of 2000"):
        open_rgb(encoded(Image.new("L", (60, 60))))


# What is opened


def test_pipes_sockets_and_devices_are_never_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as open_socket:
        monkeypatch.chdir(tmp_path)  # the names of sockets are short
        open_socket.bind("socket.png")
        for name in ("pipe.png", "socket.png"):
            with pytest.raises(DecodingError, match=r"^is no regular file$"):
                open_rgb(tmp_path / name)
            with pytest.raises(DataError, match=r"\.png is no file"):
                read_images([tmp_path / name], 8, 3)


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(DecodingError, match=r"^is a file of 1024.0 GiB, more than any image"):
        open_rgb(tmp_path / "1.png")


def test_formats_that_start_programs_or_hold_no_pixels_are_not_read():
    assert {".jfif", ".avif", ".webp", ".jpg", ".png", ".tif"} <= suffixes()
    assert not {".eps", ".wmf", ".pdf", ".mpg", ".h5"} & suffixes()
    with pytest.raises(DecodingError, match="not an image"):
        open_rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
