"""Damaged and hostile adapter files: an answer or a `ModelError`, whatever the bytes are."""

import json
import multiprocessing
import random
import resource
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from adapter_files import adapter, kohya, raw_file
from fuzzing import CASES
from safetensors.torch import save

from wan.adapter_check import check_adapter
from wan.adapter_stream import MOST_HEADER, READ_SIZE
from wan.headers import ModelError

SEEDS = max(300, CASES // 10)  # of each of the ten ways to damage a file
MEMORY = 1 << 30  # bytes of address space beyond what the libraries take
TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NAME = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"

# What may stand in a header where a number, a text or a list is expected.
HOSTILE: tuple[object, ...] = (
    *(-1, 0, 1, 3, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 1.5, 1e308, True, None),
    *("", "F32", "F4", "\x00", "\ud800", "x" * 5000, [], [-1], [0, 0], [2**62, 2**62], [[]], {}),
)


def small_file(style: str = "comfy") -> bytes:
    linears = ["self_attn.q", "ffn.0"]
    if style == "comfy":
        return save(adapter(alpha=2.0, blocks=[0], linears=linears, rank=2), {"format": "pt"})
    return save(kohya(2.0, blocks=[0], linears=linears, rank=1), {"sshs_model_hash": "0"})


ORIGINALS = [small_file("comfy"), small_file("kohya")]


def split(file: bytes) -> tuple[bytes, bytes]:
    """(header, data) of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return file[8:end], file[end:]


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def flip_bits(draw: random.Random, file: bytes) -> bytes:
    content = bytearray(file)
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def flip_header_bits(draw: random.Random, file: bytes) -> bytes:
    header, data = split(file)
    return joined(flip_bits(draw, header), data)


def cut(draw: random.Random, file: bytes) -> bytes:
    return file[: draw.randrange(len(file))]


def insert(draw: random.Random, file: bytes) -> bytes:
    place = draw.randrange(len(file) if draw.random() < 0.5 else 800)
    return file[:place] + draw.randbytes(draw.randint(1, 20)) + file[place:]


def change_length(draw: random.Random, file: bytes) -> bytes:
    length = draw.choice([0, 1, 7, len(file) - 8, len(file), 2**24, 2**31, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + file[8:]


def change_digits(draw: random.Random, file: bytes) -> bytes:
    header, data = split(file)
    places = [i for i, byte in enumerate(header) if chr(byte).isdigit()]
    content = bytearray(header)
    for place in draw.sample(places, draw.randint(1, 4)):
        content[place] = ord(draw.choice('0123456789-.eE[]{}," '))
    return joined(bytes(content), data)


def change_entries(draw: random.Random, file: bytes) -> bytes:
    header, data = split(file)
    entries = json.loads(header)
    name = draw.choice(sorted(entries))
    match draw.randrange(4):
        case 0:
            entries[name] = draw.choice(HOSTILE)
        case 1:
            field = draw.choice(["dtype", "shape", "data_offsets", "format"])
            entries[name][field] = draw.choice(HOSTILE)
        case 2:
            fields = [field for field, value in entries[name].items() if isinstance(value, list)]
            if fields and entries[name][fields[-1]]:
                entries[name][fields[-1]][-1] = draw.choice(HOSTILE)
        case _:
            entries[draw.choice(["", "\x1b", name + ".", "blocks.999.ffn.0.alpha"])] = entries.pop(
                name
            )
    return joined(json.dumps(entries).encode(), data)


def repeat_entries(draw: random.Random, file: bytes) -> bytes:
    header, data = split(file)
    pairs = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in json.loads(header).items()]
    pairs += draw.choices(pairs, k=draw.randint(1, 3))
    return joined(f"{{{', '.join(pairs)}}}".encode(), data)


def change_names(draw: random.Random, file: bytes) -> bytes:
    header, data = split(file)
    words = [b"lora_A", b"lora_B", b"alpha", b"blocks", b"0", b"diffusion_model", b"weight", b"ffn"]
    others = [
        b"lokr_w1",
        b"dora_scale",
        b"diff",
        b"",
        b"9" * 40,
        b"transformer_2",
        b"\xc3\xa9",
        b".",
    ]
    return joined(header.replace(draw.choice(words), draw.choice(others)), data)


def fill_data(draw: random.Random, file: bytes) -> bytes:
    header, data = split(file)
    pattern = draw.choice([b"\x00", b"\xff", b"\x80\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"])
    return joined(header, (pattern * len(data))[: len(data)])


Damage = Callable[[random.Random, bytes], bytes]
DAMAGES: list[Damage] = [
    *(flip_bits, flip_header_bits, cut, insert, change_length, change_digits),
    *(change_entries, repeat_entries, change_names, fill_data),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_give_an_answer_or_a_model_error(tmp_path: Path, damage: Damage) -> None:
    path = tmp_path / "fuzzed.safetensors"
    reports: set[str] = set()
    for seed in range(SEEDS):
        draw = random.Random(seed)
        path.write_bytes(damage(draw, draw.choice(ORIGINALS)))
        try:
            reports.add(str(check_adapter(path).findings))
        except ModelError as error:
            message = str(error)
            assert str(path) in message
            assert len(message) < 500
            assert message.isprintable()
            reports.add(message)
    assert len(reports) > 1 or damage is change_length


def deep(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


HEADERS: dict[str, tuple[object, bytes, str]] = {
    "overlap": ({"a": TENSOR, "b": TENSOR | {"data_offsets": [4, 12]}}, bytes(12), "overlap"),
    "the same place twice": ({"a": TENSOR, "b": TENSOR}, bytes(8), "overlap"),
    "gap": ({"a": TENSOR, "b": TENSOR | {"data_offsets": [9, 17]}}, bytes(17), "leave a gap"),
    "not from the start": ({"a": TENSOR | {"data_offsets": [8, 16]}}, bytes(16), "leave a gap"),
    "more data": ({"a": TENSOR}, bytes(9), "1 bytes after the last tensor"),
    "less data": ({"a": TENSOR}, bytes(7), "cut short: it has 7 of 8 bytes"),
    "backwards": ({"a": TENSOR | {"data_offsets": [8, 0]}}, bytes(8), "do not agree"),
    "negative offsets": ({"a": TENSOR | {"data_offsets": [-8, 0]}}, bytes(8), "whole numbers"),
    "negative shape": ({"a": TENSOR | {"shape": [-2]}}, bytes(8), "whole numbers"),
    "two negatives": ({"a": TENSOR | {"shape": [-1, -2]}}, bytes(8), "whole numbers"),
    "a fraction": ({"a": TENSOR | {"shape": [2.0]}}, bytes(8), "whole numbers"),
    "true": ({"a": TENSOR | {"shape": [2, True]}}, bytes(8), "whole numbers"),
    "a huge shape": ({"a": TENSOR | {"shape": [2**62, 2**62]}}, bytes(8), "do not agree"),
    "many dimensions": ({"a": TENSOR | {"shape": [1] * 50 + [2]}}, bytes(8), "whole numbers"),
    "wrong dtype": ({"a": TENSOR | {"dtype": "F4"}}, bytes(8), "of the dtype 'F4'"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "without dtype"),
    "dtype of another size": ({"a": TENSOR | {"dtype": "F16"}}, bytes(8), "do not agree"),
    "twice": (b'{"a": {}, "a": {}}', b"", "the name 'a' comes twice"),
    "twice inside": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', b"", "comes twice"),
    "NaN": (b'{"a": {"shape": [NaN]}}', b"", "NaN is no number"),
    "infinity": (b'{"a": {"shape": [-Infinity]}}', b"", "-Infinity is no number"),
    "deep": (deep(10_000), b"", "nested without end"),
    "deep lists": (b'{"a":' + b"[" * 100_000, b"", "nested without end"),
    "a long number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "cannot be read"),
    "no JSON": (b"{not json}", b"", "cannot be read"),
    "no UTF-8": (b'{"\xff": 1}', b"", "cannot be read"),
    "many entries": (
        {f"a{i}": TENSOR | {"shape": [0], "data_offsets": [0, 0]} for i in range(20_001)},
        b"",
        "a header of 20,002 entries",
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "metadata that are not all text"),
    "metadata in a list": ({"__metadata__": []}, b"", "metadata that are not all text"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_refused_for_what_they_are(tmp_path: Path, case: str) -> None:
    header, data, expected = HEADERS[case]
    with pytest.raises(ModelError) as error:
        check_adapter(raw_file(tmp_path / "x.safetensors", header, data))
    assert expected in str(error.value)


def zip_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", "x")


def pickle_of_torch(path: Path) -> None:
    torch.save(adapter(blocks=[0]), path)


def huge_header(path: Path) -> None:
    path.write_bytes((MOST_HEADER + 1).to_bytes(8, "little") + b"{}" + bytes(100))


def gguf_of_nothing(path: Path) -> None:
    path.write_bytes(b"GGUF" + b"\xff" * 100)


OTHER_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "zip": (zip_archive, "is a pickle"),
    "torch": (pickle_of_torch, "is a pickle"),
    "huge header": (huge_header, "a header of 8,388,609 bytes"),
    "GGUF": (gguf_of_nothing, "is not a safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "8 bytes": (lambda path: path.write_bytes(bytes(8)), "is not a safetensors file"),
    "web page": (lambda path: path.write_bytes(b"<!DOCTYPE html><html>"), "is a web page"),
    "LFS pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "cut in its header": (lambda path: path.write_bytes(ORIGINALS[0][:100]), "cut short"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_files_that_are_no_adapter_are_called_what_they_are(tmp_path: Path, case: str) -> None:
    make, expected = OTHER_FILES[case]
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(ModelError, match=expected):
        check_adapter(path)


def check_each(paths: list[Path], answers: Connection) -> None:
    """Sends what each is and by how many KiB this process grew; it may take MEMORY at most."""
    torch.set_num_threads(1)  # the threads of the parent do not live on in a fork
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for path in paths:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            contents = check_adapter(path).contents
            answer = f"{len(contents.modules)} {len(contents.misshapen)}"
        except ModelError:
            answer = "refused"
        answers.send((answer, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def stretched(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A valid file of zeros, which takes no room on disk: BF16 tensors of these shapes."""
    entries, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    raw_file(path, entries)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + place)
    return path


def test_memory_stays_bounded_whatever_a_file_declares(tmp_path: Path) -> None:
    stem, other = NAME.removesuffix(".lora_A.weight"), NAME.replace("blocks.0", "blocks.1")
    many = 1 << 26  # values
    files = {
        "0 1": {NAME: [4, many // 4]},  # one factor of 128 MiB
        "0 0": {f"{stem}.diff": [many], other: [16, 5120]},  # a difference of 128 MiB
        "1 0": {NAME: [1 << 23, 1], f"{stem}.lora_B.weight": [1, 1 << 23]},  # a rank of 8 million
    }
    paths = [
        stretched(tmp_path / f"{i}.safetensors", shapes) for i, shapes in enumerate(files.values())
    ]
    paths.append(raw_file(tmp_path / "deep.safetensors", deep(1_000_000)))
    fork = multiprocessing.get_context("fork")  # a new process would import for seconds
    received, sent = fork.Pipe(duplex=False)
    process = fork.Process(target=check_each, args=(paths, sent))
    process.start()
    sent.close()  # else a process that died would be waited for
    answers = [received.recv() for _ in paths]
    process.join()
    assert [answer for answer, _ in answers] == [*files, "refused"]
    assert max(grown for _, grown in answers) < 5 * READ_SIZE // 1024
