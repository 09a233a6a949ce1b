"""Sizes: least crop, no upscaling, the model's multiples; and how shapes are merged."""

from collections import Counter

import pytest

from data.items import DataError, MediaInfo
from data.shapes import Bucket, choose_size, cropped_share, merge_buckets

AREA = 480 * 832


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((480, 832), (480, 832)),  # the target itself
        ((960, 1664), (480, 832)),  # the target's aspect ratio, larger
        ((240, 416), (240, 416)),  # and smaller
        ((1080, 1920), (480, 832)),  # 16:9: 2.5 % cropped rather than 17 % fewer pixels
        ((1920, 1080), (832, 480)),
        ((1000, 1000), (624, 624)),
        ((300, 400), (288, 384)),  # smaller than the area: no upscaling
        ((101, 57), (96, 48)),  # odd, and small
        ((320, 1920), (256, 1536)),
        ((16, 16), (16, 16)),
    ],
)
def test_size_of(source: tuple[int, int], expected: tuple[int, int]) -> None:
    assert choose_size(*source, AREA, 16) == expected


@pytest.mark.parametrize("multiple", [16, 32])
def test_size_fits_the_model_and_the_source_at_any_shape(multiple: int) -> None:
    for height in range(multiple, 1400, 97):
        for width in range(multiple, 1400, 89):
            h, w = choose_size(height, width, AREA, multiple)
            assert h % multiple == 0
            assert w % multiple == 0
            assert 0 < h <= height
            assert 0 < w <= width
            assert h * w <= AREA


def test_crop_is_small_where_the_area_allows_it() -> None:
    for width in range(480, 1921, 37):
        h, w = choose_size(1080, width, AREA, 16)
        kept = min(h * width, w * 1080) / max(h * width, w * 1080)
        assert kept > 0.94, (width, h, w)


@pytest.mark.parametrize(
    ("source", "bucket", "share"),
    [
        ((480, 832), (480, 832), 0),
        ((960, 1664), (480, 832), 0),
        ((480, 832), (240, 208), 0.5),
        ((100, 100), (16, 32), 0.5),
        ((240, 416), (480, 832), 0),
    ],
)
def test_cropped_share(source: tuple[int, int], bucket: tuple[int, int], share: float) -> None:
    assert cropped_share(MediaInfo(1, 0, *source), Bucket(1, *bucket)) == pytest.approx(share)


def test_source_below_one_multiple_is_refused() -> None:
    with pytest.raises(DataError, match=r"is 15x64 .* least that fits the model is 16x16"):
        choose_size(15, 64, AREA, 16)


def merged(groups: dict[tuple[Bucket, int, int], int], most: int, upscale: bool = False) -> Counter:
    """The buckets that are left, with their clips."""
    count: Counter = Counter()
    for key, bucket in merge_buckets(groups, most, upscale).items():
        count[bucket] += groups[key]
    return count


def test_the_bucket_that_loses_least_is_dissolved() -> None:
    groups = {
        (Bucket(17, 64, 64), 128, 128): 9,
        (Bucket(17, 64, 48), 128, 96): 1,
        (Bucket(17, 32, 96), 64, 192): 1,
    }
    assert merged(groups, 3) == {bucket: n for (bucket, _, _), n in groups.items()}
    assert merged(groups, 2) == {Bucket(17, 64, 64): 10, Bucket(17, 32, 96): 1}
    assert merged(groups, 1) == {Bucket(17, 64, 64): 11}


def test_nothing_is_enlarged_or_lengthened_unless_asked() -> None:
    groups = {
        (Bucket(17, 64, 64), 128, 128): 1,
        (Bucket(17, 48, 48), 50, 50): 1,
        (Bucket(5, 64, 64), 128, 128): 9,
    }
    # The large one moves down, the small one and the short one cannot move up.
    assert merged(groups, 2) == {Bucket(17, 48, 48): 2, Bucket(5, 64, 64): 9}
    assert merged(groups, 1) == {Bucket(17, 48, 48): 2, Bucket(5, 64, 64): 9}
    enlarged = {(Bucket(17, 64, 64), 50, 50): 1, (Bucket(5, 64, 64), 128, 128): 9}
    assert merged(enlarged, 1, upscale=True) == {Bucket(5, 64, 64): 10}


def test_video_becomes_a_still_only_if_nothing_else_is_left() -> None:
    groups = {
        (Bucket(5, 32, 128), 32, 128): 1,
        (Bucket(5, 128, 32), 128, 128): 9,
        (Bucket(1, 32, 128), 32, 128): 99,
    }
    assert merged(groups, 2)[Bucket(1, 32, 128)] == 99
    assert merged(groups, 1) == {Bucket(1, 32, 128): 109}


def test_images_do_not_become_videos() -> None:
    groups = {(Bucket(5, 64, 64), 64, 64): 1, (Bucket(1, 64, 48), 64, 64): 1}
    assert merged(groups, 1) == {Bucket(1, 64, 48): 2}
