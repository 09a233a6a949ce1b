"""Fetching as a user does it: what an address stands for, what arrives, and what is said of it."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_files import our_file
from file_server import FileServer, Reply, file_server
from safetensors.torch import save

from tools import lora, lora_fetch
from tools.adapter_sources import CIVITAI, HUGGING_FACE, find_adapter, safe_name
from tools.public_web import Patience
from wan.headers import ModelError

HIGH, LOW = "fox_high_noise.safetensors", "fox_low_noise.safetensors"
COMMIT = "c" * 40
LIMIT = 10_000_000


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of two adapters, by name."""
    folder = tmp_path_factory.mktemp("made")
    files = [our_file(folder, "high", seed=1), our_file(folder, "low", seed=2)]
    return {file.name: file.read_bytes() for file in files}


def patience(server: FileServer) -> Patience:
    return Patience(attempts=2, pause=0, local=frozenset({server.origin}))


def fetch(server: FileServer, source: str, folder: Path) -> list[str]:
    """The names of what was fetched."""
    sites = [replace(site, origin=server.origin) for site in (CIVITAI, HUGGING_FACE)]
    files = lora_fetch.fetch(source, folder, LIMIT, patience(server), *sites)
    return [file.name for file in files]


def refusal(server: FileServer, source: str, folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        fetch(server, source, folder)
    assert not [*folder.glob("**/*")]
    return str(caught.value)


def repository(server: FileServer, files: dict[str, bytes], **changes: object) -> None:
    """owner/fox on the Hub, with these files."""
    rows = []
    for path, body in files.items():
        large = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}
        rows.append({"rfilename": path, "size": len(body), "lfs": large | changes})
        server.serve(f"/owner/fox/resolve/{COMMIT}/{path}", Reply(body))
    answer = json.dumps({"sha": COMMIT, "siblings": rows}).encode()
    for revision in ("main", "refs%2Fpr%2F1", "v1"):
        server.serve(f"/api/models/owner/fox/revision/{revision}", Reply(answer))


def version(server: FileServer, number: int, name: str, files: dict[str, bytes]) -> dict:
    """A version of model 7 on CivitAI, with these files."""
    rows = []
    for place, (title, body) in enumerate(files.items()):
        url = server.serve(f"/api/download/models/{number}-{place}", Reply(body))
        hashes = {"SHA256": hashlib.sha256(body).hexdigest().upper(), "AutoV2": "AB"}
        row = {"id": 10 * number + place, "name": title, "type": "Model", "primary": place == 0}
        rows.append(row | {"sizeKB": len(body) / 1024, "hashes": hashes, "downloadUrl": url})
    return {"id": number, "name": name, "baseModel": "Wan Video 2.2 T2V-A14B", "files": rows}


def model(server: FileServer, *versions: dict, **changes: object) -> None:
    answer = {"id": 7, "type": "LORA", "modelVersions": versions} | changes
    server.serve("/api/v1/models/7", Reply(json.dumps(answer).encode()))
    for one in versions:
        path = f"/api/v1/model-versions/{one['id']}"
        server.serve(path, Reply(json.dumps(one | {"modelId": 7}).encode()))


@pytest.mark.parametrize(
    "source",
    [
        "owner/fox",
        "hf://owner/fox",
        f"hf://owner/fox/{HIGH}",
        f"hf://owner/fox@v1/{LOW}",
        "https://huggingface.co/owner/fox/",
        f"https://huggingface.co/owner/fox/blob/main/{HIGH}",
        f"https://hf.co/owner/fox/resolve/refs%2Fpr%2F1/{HIGH}?download=true",
        f"https://huggingface.co/owner/fox/resolve/refs/pr/1/{HIGH}",
        "https://huggingface.co/owner/fox/tree/main",
    ],
)
def test_both_files_of_a_repository_come(
    server: FileServer, tmp_path: Path, pair: dict[str, bytes], source: str
) -> None:
    repository(server, pair)
    assert sorted(fetch(server, source, tmp_path)) == [HIGH, LOW]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == pair


@pytest.mark.parametrize(
    "source",
    [
        "https://civitai.com/models/7?modelVersionId=71",
        "https://civitai.com/models/7/blue-fox?modelVersionId=71",
        "https://civitai.com/api/download/models/71?type=Model&format=SafeTensor",
        "urn:air:wanvideo-22-t2v-a14b:lora:civitai:7@71",
        "air:wan22:lora:civitai:7@72",
        "urn:air:wan22:lora:civitai:7@71+710.safetensor",
        "https://civitai.red/models/7",
    ],
)
def test_the_other_experts_version_comes_too(
    server: FileServer, tmp_path: Path, pair: dict[str, bytes], source: str
) -> None:
    high = version(server, 71, "v1 HIGH", {HIGH: pair[HIGH]})
    model(server, high, version(server, 72, "v1 LOW", {LOW: pair[LOW]}))
    assert sorted(fetch(server, source, tmp_path)) == [HIGH, LOW]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == pair


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"v1": [HIGH, LOW], "v0": ["old.safetensors"]}, [HIGH, LOW]),
        ({"v1": ["FoxHighNoise.safetensors"], "v2": ["FoxLowNoise.safetensors"]}, "Fox%sNoise"),
        ({"Low": ["fox.safetensors"], "High": ["fox.safetensors"]}, "%s_fox"),
        ({"v1": ["fox_highnoise.safetensors", "fox_lownoise.safetensors"]}, "fox_%snoise"),
        ({"v1": [HIGH], "v2": [HIGH], "v3": [LOW], "v4": [LOW]}, [HIGH]),
        ({"v1": ["highland.safetensors"], "v2": ["lowland.safetensors"]}, ["highland.safetensors"]),
        ({"v1": [HIGH, "fp32.safetensors", LOW], "v2": [LOW]}, [HIGH, LOW]),
        ({"v1": [HIGH, "fp32.safetensors", "data.zip"], "v2": ["x.safetensors"]}, [HIGH]),
    ],
)
def test_what_belongs_together_on_civitai(
    server: FileServer, versions: dict[str, list[str]], expected: list[str] | str
) -> None:
    rows = [
        version(server, number, name, dict.fromkeys(files, b"x"))
        for number, (name, files) in enumerate(versions.items(), start=71)
    ]
    model(server, *rows)
    site = replace(CIVITAI, origin=server.origin)
    source = "https://civitai.com/models/7?modelVersionId=71"
    found = find_adapter(source, patience(server), site, HUGGING_FACE)
    if isinstance(expected, str):
        spellings = ("high", "low") if "_%s" in expected else ("High", "Low")
        expected = [f"{expected % expert}.safetensors" for expert in spellings]
    assert sorted(file.name for file in found.files) == expected


def test_folders_tell_a_pair_on_hugging_face(server: FileServer, tmp_path: Path) -> None:
    paths = [f"fox_{expert}_noise_lora/epoch-9.safetensors" for expert in ("high", "low")]
    others = [path.replace("9", "8") for path in paths]
    repository(server, dict.fromkeys([*paths, *others, "README.md"], b"x"))
    site = replace(HUGGING_FACE, origin=server.origin)
    found = find_adapter(f"owner/fox/{paths[1]}", patience(server), CIVITAI, site)
    assert sorted(file.name for file in found.files) == [p.replace("/", "_") for p in paths]
    told = refusal(server, "owner/fox", tmp_path)
    assert "names 4 files" in told
    assert f"hf://owner/fox/{paths[0]}" in told
    assert "did you mean fox_high_noise_lora/epoch-9" in refusal(
        server, "owner/fox/fox_high_noise_lora/epoch-7.safetensors", tmp_path
    )


def test_it_says_what_came_and_fetches_nothing_twice(
    server: FileServer, tmp_path: Path, pair: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    repository(server, pair)
    fetch(server, "owner/fox", tmp_path)
    told = capsys.readouterr().out
    assert "high expert, rank 4" in told
    assert "low expert, rank 4" in told
    assert hashlib.sha256(pair[LOW]).hexdigest() in told
    assert "error" not in told
    asked = len(server.asked)
    fetch(server, "owner/fox", tmp_path)
    assert len(server.asked) == asked + 1  # the list alone
    assert f"{HIGH} is there already" in capsys.readouterr().out
    (tmp_path / LOW).write_bytes(b"mine")
    (tmp_path / HIGH).unlink()
    with pytest.raises(ModelError, match="not overwritten"):
        fetch(server, "owner/fox", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [LOW]


def test_two_files_that_are_no_pair_are_told(
    server: FileServer, tmp_path: Path, pair: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    repository(server, {HIGH: pair[HIGH], LOW: pair[HIGH]})
    fetch(server, "owner/fox", tmp_path)
    assert "it is one adapter twice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"not weights at all", "not a safetensors file"),
        (b"GGUF" + b"\0" * 60, "expected an adapter"),
        (save({"model.diffusion_model.blocks.0.weight": torch.ones(2)}), "no adapter for Wan"),
        (save({"lora_te_text_model.lora_up.weight": torch.ones(2, 2)}), "no adapter for Wan"),
        (save({"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 2)})[:-3], "cut short"),
    ],
)
def test_what_is_no_adapter_is_removed(
    server: FileServer, tmp_path: Path, body: bytes, told: str
) -> None:
    repository(server, {"fox.safetensors": body})
    message = refusal(server, "owner/fox", tmp_path)
    assert told in message
    assert ".part" not in message


def test_a_wrong_hash_on_the_hub_is_found(
    server: FileServer, tmp_path: Path, pair: dict[str, bytes]
) -> None:
    repository(server, {HIGH: pair[HIGH]}, sha256="0" * 64)
    assert "Hugging Face tells 0000000000000000…" in refusal(server, "owner/fox", tmp_path)


def test_a_file_that_is_told_to_be_large_is_not_begun(server: FileServer, tmp_path: Path) -> None:
    repository(server, {HIGH: b"x"}, size=LIMIT + 1)
    assert "--max-gb" in refusal(server, "owner/fox", tmp_path)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../etc/fox.safetensors", "fox.safetensors"),
        ("..\\..\\fox.safetensors", "fox.safetensors"),
        ("/etc/fox.safetensors", "fox.safetensors"),
        (".fox.safetensors", "fox.safetensors"),
        ("-rf fox.safetensors", "rf fox.safetensors"),
        ("a\x00b\n\x1b[31mc\u202e.safetensors", "ab[31mc.safetensors"),
        ("fox: v1?.SafeTensors", "fox_ v1_.safetensors"),
        ("ф" * 300 + ".safetensors", "ф" * 94 + ".safetensors"),
    ],
)
def test_a_name_is_made_fit_for_this_disk(name: str, expected: str) -> None:
    assert safe_name(name) == expected


@pytest.mark.parametrize(
    "name", ["fox.pt", "fox.ckpt", "fox.ZIP", "a/fox.bin", "fox.safetensors.pt", "fox.gguf"]
)
def test_what_may_run_code_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"it is refused\. Ask for the \.safetensors"):
        safe_name(name)


@pytest.mark.parametrize("name", ["", "fox", "fox.txt", ".safetensors", "...", "a/.safetensors"])
def test_what_is_no_safetensors_file_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        safe_name(name)


def test_a_hostile_name_stays_in_the_folder(
    server: FileServer, tmp_path: Path, pair: dict[str, bytes]
) -> None:
    model(server, version(server, 71, "../v1", {"../../evil.safetensors": pair[HIGH]}))
    assert fetch(server, "https://civitai.com/models/7", tmp_path / "to") == ["evil.safetensors"]
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")] == ["to/evil.safetensors"]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("https://example.com/fox.safetensors", "names no adapter"),
        ("https://huggingface.co.evil.example/owner/fox", "names no adapter"),
        ("https://huggingface.co/datasets/owner/fox", "names no adapter"),
        ("https://civitai.com/images/7", "names no adapter"),
        ("https://[bad", "no address"),
        ("ftp://civitai.com/models/7", "names no adapter"),
        ("file:///etc/passwd", "names no adapter"),
        ("../fox", "names no adapter"),
        ("fox.safetensors", "names no adapter"),
        ("urn:air:sdxl:lora:civitai:7@71", "only a lora for Wan"),
        ("urn:air:wan22:checkpoint:civitai:7@71", "only a lora for Wan"),
        ("urn:air:wan22:lora:huggingface:7@71", "only those of civitai"),
        ("https://civitai.com/models/7?modelVersionId=71&token=s3cret", "holds a token"),
        ("https://me:s3cret@huggingface.co/owner/fox", "holds a token"),
        ("hf://owner/fox/fox.ckpt", "may run code"),
    ],
)
def test_other_sources_are_refused_before_anybody_is_asked(
    server: FileServer, tmp_path: Path, source: str, told: str
) -> None:
    message = refusal(server, source, tmp_path)
    assert told in message
    assert "s3cret" not in message
    assert not server.asked


def test_what_a_site_has_not_is_told(server: FileServer, tmp_path: Path) -> None:
    row = version(server, 71, "v1", {"fox.pt": b"x"})
    model(server, row)
    assert "may run code" in refusal(server, "https://civitai.com/models/7", tmp_path)
    model(server, row, type="Checkpoint")
    assert "is no LoRA" in refusal(server, "https://civitai.com/models/7", tmp_path)
    model(server, row | {"baseModel": "SDXL 1.0"})
    page = "https://civitai.com/models/7?modelVersionId="
    assert "'SDXL 1.0', not for Wan" in refusal(server, f"{page}71", tmp_path)
    assert "no version 99; it has 71" in refusal(server, f"{page}99", tmp_path)
    model(server, version(server, 71, "a", {HIGH: b""}), version(server, 72, "b", {HIGH: b""}))
    assert "(modelVersionId=72)" in refusal(server, "https://civitai.com/models/7", tmp_path)
    model(server)
    assert "no file of weights" in refusal(server, "https://civitai.com/models/7", tmp_path)
    repository(server, {"pytorch_lora_weights.bin": b"x", "README.md": b"x"})
    assert "only files that may run code" in refusal(server, "owner/fox", tmp_path)
    assert "no such file (404)" in refusal(server, "owner/other", tmp_path)


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {},
        {"type": "LORA", "modelVersions": {}},
        {"type": "LORA", "modelVersions": [1]},
        {"type": "LORA", "modelVersions": [{"id": "x\n", "files": []}]},
        {"type": "LORA", "modelVersions": [{"id": 71, "name": "v", "files": [{"type": "Model"}]}]},
    ],
)
def test_an_answer_of_another_form_is_told(
    server: FileServer, tmp_path: Path, answer: object
) -> None:
    server.serve("/api/v1/models/7", Reply(json.dumps(answer).encode()))
    told = refusal(server, "https://civitai.com/models/7?modelVersionId=71", tmp_path)
    assert "in a form that is not known here" in told


def test_tokens_go_to_the_list_and_the_file(
    server: FileServer, tmp_path: Path, pair: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("CIVITAI_TOKEN", "civ_secret")
    repository(server, {HIGH: pair[HIGH]})
    fetch(server, "owner/fox", tmp_path)
    assert {headers.get("authorization") for _, headers in server.asked} == {"Bearer hf_secret"}
    assert not [path for path, _ in server.asked if "secret" in path]


def test_the_program_knows_it_and_has_no_way_to_plain_http(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lora", "fetch", f"{server.origin}/owner/fox"])
    with pytest.raises(SystemExit, match="2"):
        lora.main()
    assert "error: this names no adapter that can be fetched" in capsys.readouterr().err
    assert not server.asked
    monkeypatch.setattr(sys, "argv", ["lora", "fetch", "owner/fox", "--max-gb", "-1"])
    with pytest.raises(SystemExit, match="2"):
        lora.main()
    assert "'-1' is no number above 0" in capsys.readouterr().err
