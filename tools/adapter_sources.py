"""Where an adapter lies, from what a user has in hand: an address, an AIR or a repository's name.

    https://civitai.com/models/123?modelVersionId=456
    https://civitai.com/api/download/models/456
    urn:air:wanvideo-22-t2v-a14b:lora:civitai:123@456
    hf://owner/name/folder/fox_high_noise.safetensors
    https://huggingface.co/owner/name/blob/main/fox_high_noise.safetensors
    owner/name

If the other expert's file is at the same place both are given. Both sites tell a file's SHA256.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tools.download import RemoteFile
from tools.public_web import Patience, Site, read_json
from wan.headers import PICKLES, ModelError

CIVITAI = Site(
    "CivitAI", "https://civitai.com", "CIVITAI_TOKEN", "https://civitai.com/user/account"
)
HUGGING_FACE = Site(
    "Hugging Face",
    "https://huggingface.co",
    "HF_TOKEN",
    "https://huggingface.co/settings/tokens",
)
CIVITAI_HOSTS = ("civitai.com", "www.civitai.com", "civitai.green", "civitai.red")
HUGGING_FACE_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
SECRETS = {"token", "api_key", "apikey", "access_token"}  # in an address
AIR = re.compile(
    r"(?:urn:)?(?:air:)?(?P<ecosystem>[\w.-]+):(?P<kind>\w+):(?P<source>[\w-]+):(?P<model>\d+)"
    r"(?:@(?P<version>\d+))?(?:\+(?P<file>\d+))?(?:\.\w+)?",
    re.ASCII,
)
HF_NAME = r"(?P<repository>\w[\w.-]*/\w[\w.-]*)"
HF_PATH = re.compile(rf"{HF_NAME}(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+))?", re.ASCII)
HF_PAGE = re.compile(
    rf"/{HF_NAME}(?:/(?:blob|resolve|raw|tree)/(?P<revision>refs/pr/\d+|[^/]+)(?:/(?P<path>.+))?)?/?",
    re.ASCII,
)
FORMS = (
    "write a CivitAI address (https://civitai.com/models/123?modelVersionId=456), an AIR "
    "(urn:air:wanvideo-22-t2v-a14b:lora:civitai:123@456), or a file on Hugging Face "
    "(hf://owner/name/file.safetensors, or owner/name if it holds one adapter)"
)
KINDS = ("LORA", "LoCon", "DoRA")  # CivitAI's types of models that are adapters
WEIGHTS = ("Model", "Pruned Model")  # its types of files; others are data and configs
SUFFIX = ".safetensors"
REFUSED = (*PICKLES, ".pth", ".pkl", ".zip", ".7z", ".rar", ".gguf")
LONGEST_NAME = 200  # bytes
SHOWN = 12  # files in a message


@dataclass(frozen=True)
class Found:
    """What a source stands for: one file, or both of a pair."""

    site: Site
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class _Listed:
    """A file in a site's list; its folder is a version on CivitAI."""

    label: str  # how a user names it
    folder: str
    remote: RemoteFile  # its name still as on the site


def find_adapter(source: str, patience: Patience, civitai: Site, hugging_face: Site) -> Found:
    """What to fetch; `ModelError` if the source is of no known form or does not tell which file."""
    try:
        parts = urlsplit(source)
    except ValueError:
        raise ModelError(f"this is no address: {FORMS}") from None
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if SECRETS & {name.lower() for name in query} or parts.username is not None:
        raise ModelError(
            "the address holds a token, which ends up in the history of the shell: take it out, "
            f"and set {civitai.token_variable} or {hugging_face.token_variable} instead"
        )
    host = (parts.hostname or "") if parts.scheme in ("http", "https") else None
    if host in CIVITAI_HOSTS:
        page = re.fullmatch(r"/models/(\d+)(?:/.*)?", parts.path)
        direct = re.fullmatch(r"/api/download/models/(\d+)", parts.path)
        if page or direct:
            model = page[1] if page else ""
            version = direct[1] if direct else query.get("modelVersionId", "")
            return _on_civitai(model, version, query.get("fileId", ""), civitai, patience)
    elif host in HUGGING_FACE_HOSTS:
        if found := HF_PAGE.fullmatch(parts.path):
            return _on_hugging_face(found, hugging_face, patience)
    elif host is None:
        if air := AIR.fullmatch(source):
            return _by_air(air, civitai, patience)
        if found := HF_PATH.fullmatch(source.removeprefix("hf://")):
            return _on_hugging_face(found, hugging_face, patience)
    raise ModelError(f"this names no adapter that can be fetched: {FORMS}")


def safe_name(name: str) -> str:
    """A file name for this disk from one of a site; `ModelError` if it is no safetensors file."""
    last = re.split(r"[/\\]", name)[-1]
    plain = "".join(letter for letter in last if letter.isprintable())
    plain = re.sub(r'[<>:"|?*]', "_", plain).strip().lstrip(".-~ ")
    if plain.lower().endswith(REFUSED):
        raise ModelError(
            f"{plain} may run code when it is read, or hide what it holds: it is refused. Ask for "
            f"the {SUFFIX} file of the same adapter"
        )
    stem = plain[: -len(SUFFIX)].strip()
    if not plain.lower().endswith(SUFFIX) or not stem:
        raise ModelError(f"{plain or 'a file without a name'} is no {SUFFIX} file: it is refused")
    room = LONGEST_NAME - len(SUFFIX)
    return stem.encode(errors="ignore")[:room].decode(errors="ignore") + SUFFIX


# CivitAI


def _by_air(air: re.Match[str], site: Site, patience: Patience) -> Found:
    if not air["ecosystem"].lower().startswith("wan") or air["kind"].lower() != "lora":
        raise ModelError(
            f"this AIR is of a {air['kind']} for {air['ecosystem']}; only a lora for Wan is fetched"
        )
    if air["source"].lower() != "civitai":
        raise ModelError(f"this AIR is of {air['source']}; only those of civitai are known")
    return _on_civitai(air["model"], air["version"] or "", air["file"] or "", site, patience)


def _on_civitai(model: str, version: str, file: str, site: Site, patience: Patience) -> Found:
    """The main file of a version, or one by its number; "" for what is not given."""
    api = f"{site.origin}/api/v1"
    with _understood(site):
        if not model:
            answer = _table(read_json(f"{api}/model-versions/{version}", site, patience))
            model = _number(answer["modelId"])
        page = _table(read_json(f"{api}/models/{model}", site, patience))
        if page["type"] not in KINDS:
            raise ModelError(f"model {model} of CivitAI is no LoRA: it is refused")
        versions = {_number(one["id"]): one for one in _tables(page["modelVersions"])}
        every = {number: _files_of(one) for number, one in versions.items()}
    if version and version not in every:
        known = ", ".join(every)
        raise ModelError(f"model {model} of CivitAI has no version {version}; it has {known}")
    asked = [version] if version else [*every]
    ours = [[*every[number].values()] for number in asked]
    wanted = [(_safe(files) or files)[0] for files in ours if files]  # what each is downloaded as
    if file:
        wanted = [every[number][file] for number in asked if file in every[number]]
    base = str(versions[version].get("baseModel")) if version else "Other"
    if not base.startswith("Wan") and base != "Other":
        raise ModelError(f"version {version} on CivitAI is for {base[:40]!r}, not for Wan")
    listed = [one for files in every.values() for one in files.values()]
    return Found(site, _named(_chosen(wanted, _safe(listed), by_name=True)))


def _files_of(version: Mapping[str, object]) -> dict[str, _Listed]:
    """Files of weights by their number, the main one first."""
    files: dict[str, _Listed] = {}
    rows = [row for row in _tables(version["files"]) if row["type"] in WEIGHTS]
    for row in sorted(rows, key=lambda row: not row.get("primary")):
        sha256 = _table(row.get("hashes") or {}).get("SHA256")
        size = int(float(cast(float, row["sizeKB"])) * 1024)
        remote = RemoteFile(str(row["downloadUrl"]), str(row["name"]), size, _hash(sha256))
        folder = str(version["name"])
        label = f"{folder}: {remote.name} (modelVersionId={_number(version['id'])})"
        files[_number(row["id"])] = _Listed(label, folder, remote)
    return files


def _safe(files: Sequence[_Listed]) -> list[_Listed]:
    return [one for one in files if one.remote.name.lower().endswith(SUFFIX)]


# Hugging Face


def _on_hugging_face(found: re.Match[str], site: Site, patience: Patience) -> Found:
    """A file of a repository, or the only one in it or in its folder."""
    repository, path = found["repository"], unquote(found["path"] or "").strip("/")
    if path.lower().endswith(REFUSED):
        safe_name(path)
    revision = quote(unquote(found["revision"] or "main"), safe="")
    url = f"{site.origin}/api/models/{repository}/revision/{revision}?blobs=true"
    with _understood(site):
        answer = _table(read_json(url, site, patience))
        commit = quote(str(answer["sha"]), safe="")
        root = f"{site.origin}/{repository}/resolve/{commit}"
        rows = {str(row["rfilename"]): row for row in _tables(answer["siblings"])}
        listed = {
            name: _of_row(name, row, root, repository)
            for name, row in rows.items()
            if name.lower().endswith(SUFFIX)
        }
    wanted = [one for name, one in listed.items() if f"{name}/".startswith(f"{path}/".lstrip("/"))]
    if not wanted:
        near = difflib.get_close_matches(path, listed, n=3, cutoff=0.3)
        guess = f"; did you mean {printable(' or '.join(near))}?" if near else ""
        pickled = any(name.lower().endswith(REFUSED) for name in rows)
        only = ", only files that may run code when they are read" if pickled and not path else ""
        raise ModelError(f"{repository} has no {path or f'{SUFFIX} file'}{only}{guess}")
    return Found(site, _named(_chosen(wanted, [*listed.values()], by_name=False)))


def _of_row(path: str, row: Mapping[str, object], root: str, repository: str) -> _Listed:
    folder, _, name = path.rpartition("/")
    large = _table(row.get("lfs") or {})
    size = cast(int, large.get("size", row.get("size")))
    url = f"{root}/{quote(path)}"
    remote = RemoteFile(url, name, size and int(size), _hash(large.get("sha256")))
    return _Listed(f"hf://{repository}/{path}", folder, remote)


# Both


def _chosen(
    wanted: Sequence[_Listed], listed: Sequence[_Listed], by_name: bool
) -> tuple[_Listed, ...]:
    """The file that is wanted and its partner."""
    partner = _partner(wanted[0], listed, by_name) if wanted else None
    if partner and {*wanted} <= {wanted[0], partner}:
        return (wanted[0], partner)
    if len(wanted) == 1:
        return (wanted[0],)
    if not wanted and not listed:
        raise ModelError("there is no file of weights at this address")
    labels = "".join(f"\n  {printable(one.label)}" for one in (wanted or listed)[:SHOWN])
    more = "\n  …" if len(wanted or listed) > SHOWN else ""
    raise ModelError(f"this names {len(wanted) or 'no'} files; name one of{labels}{more}")


def _partner(file: _Listed, listed: Sequence[_Listed], by_name: bool) -> _Listed | None:
    """The only file that is called the same but for high and low, in its folder and its name.

    With `by_name` its name alone may tell, whatever its folder is called.
    """
    for parts in ((True, True), (False, True))[: 1 + by_name]:
        own = _without_expert(file, parts)
        others = [
            one
            for one in listed
            if _without_expert(one, parts) == own and _words(one, parts) != _words(file, parts)
        ]
        if len(others) == 1:
            return others[0]
    return None


def _words(file: _Listed, parts: tuple[bool, bool]) -> str:
    text = "/".join(
        word for word, use in zip((file.folder, file.remote.name), parts, strict=True) if use
    )
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()


def _without_expert(file: _Listed, parts: tuple[bool, bool]) -> str:
    return re.sub(r"(?<![a-z])(high|low)(?=noise|[^a-z]|$)", "*", _words(file, parts))


def _named(files: Sequence[_Listed]) -> tuple[RemoteFile, ...]:
    """The files under names for this disk; those of one name get their folder's before it."""
    names = [safe_name(one.remote.name) for one in files]
    if len({name.lower() for name in names}) < len(names):
        joined = [re.sub(r"[/\\]", "_", f"{one.folder}_{one.remote.name}") for one in files]
        names = [safe_name(name) for name in joined]
    return tuple(replace(one.remote, name=name) for one, name in zip(files, names, strict=True))


def printable(text: str) -> str:
    """A stranger's text for the terminal."""
    return "".join(letter if letter.isprintable() else "·" for letter in text)


def _hash(found: object) -> str | None:
    if found is None or re.fullmatch(r"[0-9a-f]{64}", str(found).lower()):
        return None if found is None else str(found).lower()
    raise ValueError("no SHA256")


def _number(found: object) -> str:
    """An identifier, which is a number, as text."""
    return str(int(cast(int, found)))


def _table(found: object) -> Mapping[str, object]:
    if not isinstance(found, dict):
        raise TypeError("no table")
    return found


def _tables(found: object) -> list[Mapping[str, object]]:
    if not isinstance(found, list):
        raise TypeError("no list")
    return [_table(one) for one in found]


@contextmanager
def _understood(site: Site) -> Iterator[None]:
    """Say so if a site's answer is not of the form that its interface promises."""
    try:
        yield
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ModelError(
            f"{site.name} answered in a form that is not known here: try later, or download the "
            "file in a browser"
        ) from None
