"""Whether two adapter files are the two experts of one training, and which is which.

Source: `spec/lora_formats.md` sections 3, 6.2 and 6.6 (18).
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

from wan.adapter_check import Check, Finding
from wan.adapter_stream import short
from wan.lora_metadata import OURS
from wan.variants import TRAIN_TIMESTEPS

PAIR_ID = f"{OURS}pair_id"
RANGE = "modelspec.timestep_range"


def pairs_among(checks: Sequence[Check]) -> list[tuple[Check, Check]]:
    """Which of these files belong together: by their pair id, or as the only two, one of each."""
    pairs = [
        (one, other)
        for one, other in combinations(checks, 2)
        if _told(one, PAIR_ID) and _told(one, PAIR_ID) == _told(other, PAIR_ID)
    ]
    if pairs or len(checks) != 2:
        return pairs
    one, other = checks
    told = ({one.expert, other.expert}, {one.expert_by_name, other.expert_by_name})
    return [(one, other)] if {"high", "low"} in told else []


def pair_findings(one: Check, other: Check) -> list[Finding]:
    """What is wrong with two files as a pair; nothing if they are one."""
    return [
        Finding("error", text)
        for text in (*_identity_faults(one, other), *_content_faults(one, other))
    ]


def _identity_faults(one: Check, other: Check) -> Iterator[str]:
    ids = _told(one, PAIR_ID), _told(other, PAIR_ID)
    if all(ids) and ids[0] != ids[1]:
        yield f"they are of two trainings: pair {ids[0][:20]!r} and {ids[1][:20]!r}"
    experts = {one.expert, other.expert}
    if one.expert and one.expert == other.expert:
        yield f"both are the {one.expert} noise expert's"
    elif experts != {"high", "low"}:
        yield f"not one for each expert: found {one.expert or '?'} and {other.expert or '?'}"
    named = (one.expert_by_name, other.expert_by_name)
    if {*named} == experts == {"high", "low"} and named != (one.expert, other.expert):
        yield "their names are swapped: each is called what the other is by its metadata"
    variants = _told(one, f"{OURS}variant"), _told(other, f"{OURS}variant")
    if all(variants) and variants[0] != variants[1]:
        yield f"they are of two models: {variants[0][:20]!r} and {variants[1][:20]!r}"
    ranges = sorted((_told(one, RANGE), _told(other, RANGE)), key=_start)
    if all(ranges) and not _is_complementary(*ranges):
        found = " and ".join(map(short, ranges))
        yield f"their timesteps do not make up 0 to {TRAIN_TIMESTEPS}: {found}"


def _content_faults(one: Check, other: Check) -> Iterator[str]:
    first, second = one.contents, other.contents
    if first.data_sha256 == second.data_sha256:
        yield "both hold the same data: it is one adapter twice"
    if first.styles.keys() != second.styles.keys():
        yield f"their layouts differ: {', '.join(first.styles)} and {', '.join(second.styles)}"
    if first.modules.keys() != second.modules.keys():
        only = first.modules.keys() ^ second.modules.keys()
        yield f"{len(only)} modules are in one of them only, such as {min(only)}"
    ranks = [sorted({m.rank for m in contents.modules.values()}) for contents in (first, second)]
    if ranks[0] != ranks[1]:
        yield f"their ranks differ: {ranks[0]} and {ranks[1]}"


def _told(check: Check, key: str) -> str:
    return check.contents.metadata.get(key, "")


def _numbers(timesteps: str) -> tuple[float, float] | None:
    """(low, high) of "875,1000"; None if it is not of that form."""
    try:
        low, high = (float(number) for number in timesteps.split(","))
    except ValueError:
        return None
    return low, high


def _start(timesteps: str) -> float:
    numbers = _numbers(timesteps)
    return numbers[0] if numbers else 0.0


def _is_complementary(lower: str, upper: str) -> bool:
    low, high = _numbers(lower), _numbers(upper)
    if low is None or high is None:
        return False
    return low[0] == 0 and low[1] == high[0] and high[1] == TRAIN_TIMESTEPS
