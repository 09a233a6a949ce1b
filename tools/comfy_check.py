"""What ComfyUI would refuse or misread in a workflow, by the signatures of its nodes.

They stand in `comfy_nodes.json`, with the version of ComfyUI and the commits that they are of.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NODES_FILE = Path(__file__).parent / "comfy_nodes.json"

Value = str | int | float

KINDS = {"INT": int, "FLOAT": (int, float), "STRING": str, "FILE": str}


@dataclass(frozen=True)
class Widget:
    """A field of a node: one of `options`, or a value of a type (FILE: a name that users have)."""

    type: str = ""
    options: tuple[Value, ...] = ()
    min: float = 0
    max: float = 0
    step: int | None = None  # of an INT: the editor rounds to min + n step
    frontend: bool = False  # a field of the editor alone, which the server does not know

    def problem(self, value: object) -> str | None:
        """Why the node cannot take `value`."""
        if self.options:
            return None if value in self.options else f"is {value!r}, none of {self.options}"
        if not isinstance(value, KINDS[self.type]) or isinstance(value, bool):
            return f"is {value!r}, no {self.type}"
        if isinstance(value, str):
            return "is empty" if self.type == "FILE" and not value else None
        assert isinstance(value, (int, float))
        if not self.min <= value <= self.max:
            return f"is {value}, beyond {self.min} to {self.max}"
        if self.step and (value - self.min) % self.step:
            return f"is {value}, not {self.min} + {self.step}n"
        return None


@dataclass(frozen=True)
class Signature:
    """What a type of node takes and gives; the order is that of the editor."""

    links: dict[str, str]  # name and type of what comes from another node
    widgets: dict[str, Widget]
    outputs: tuple[tuple[str, str], ...]  # names and types
    optional: frozenset[str]  # links that may stay open


def read_signatures() -> dict[str, Signature]:
    """The types of nodes that `comfy_nodes.json` describes."""
    types = json.loads(NODES_FILE.read_text(encoding="utf-8"))["nodes"]
    return {
        name: Signature(
            links=facts["links"],
            widgets={
                widget: Widget(**{**given, "options": tuple(given.get("options", ()))})
                for widget, given in facts["widgets"].items()
            },
            outputs=tuple((output, given) for output, given in facts["outputs"]),
            optional=frozenset(facts.get("optional", ())),
        )
        for name, facts in types.items()
    }


def problems(workflow: str) -> list[str]:
    """All that is wrong with the text of a workflow file of the graph editor; empty if nothing."""
    graph, signatures = json.loads(workflow), read_signatures()
    ids = [node["id"] for node in graph["nodes"]]
    link_ids = [link[0] for link in graph["links"]]
    found = [f"two nodes have the id {i}" for i in sorted({i for i in ids if ids.count(i) > 1})]
    found += [
        f"two links have the id {i}" for i in sorted({i for i in link_ids if link_ids.count(i) > 1})
    ]
    if graph["last_node_id"] < max(ids) or graph["last_link_id"] < max(link_ids):
        found.append("last_node_id or last_link_id is below an id in use")
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in graph["nodes"]:
        name = f"node {node['id']} ({node['type']})"
        if node["type"] in signatures:
            signature = signatures[node["type"]]
            wrong = [*_sockets(node, signature), *_widgets(node, signature)]
            found += [f"{name}: {problem}" for problem in [*wrong, *_ends(node, graph["links"])]]
        else:
            found.append(f"{name}: ComfyUI has no such node")
    return found + [
        f"link {link[0]}: {why}" for link in graph["links"] for why in _link(link, nodes)
    ]


def _sockets(node: dict[str, Any], signature: Signature) -> Iterator[str]:
    """Names and types of what a node takes and gives, and what of it must not stay open."""
    inputs = [(given["name"], given["type"]) for given in node["inputs"]]
    if inputs != list(signature.links.items()):
        yield f"its inputs are {inputs}, expected {list(signature.links.items())}"
    outputs = [(given["name"], given["type"]) for given in node["outputs"]]
    if outputs != list(signature.outputs):
        yield f"its outputs are {outputs}, expected {list(signature.outputs)}"
    for given in node["inputs"]:
        if given["link"] is None and given["name"] not in signature.optional:
            yield f"its input {given['name']} is not connected"


def _widgets(node: dict[str, Any], signature: Signature) -> Iterator[str]:
    values = node["widgets_values"]
    if len(values) != len(signature.widgets):
        yield f"it has {len(values)} values for the {len(signature.widgets)} fields"
        return
    for (name, widget), value in zip(signature.widgets.items(), values, strict=True):
        if problem := widget.problem(value):
            yield f"its {name} {problem}"


def _ends(node: dict[str, Any], links: list[list[Any]]) -> Iterator[str]:
    """What a node says of its links must be what the list of links says of the node."""
    into = {link[4]: link[0] for link in links if link[3] == node["id"]}
    for slot, given in enumerate(node["inputs"]):
        if given["link"] != into.get(slot):
            yield f"its input {given['name']} names link {given['link']}, not {into.get(slot)}"
    for slot, given in enumerate(node["outputs"]):
        out = [link[0] for link in links if link[1:3] == [node["id"], slot]]
        if given["links"] != out:
            yield f"its output {given['name']} names the links {given['links']}, not {out}"


def _link(link: list[Any], nodes: dict[int, dict[str, Any]]) -> Iterator[str]:
    """A link goes from an output to an input of its own type, and forward in the order of work."""
    _, source, out, target, into, given = link
    if source not in nodes or target not in nodes:
        yield f"it hangs in the air: there is no node {source if source not in nodes else target}"
        return
    for node, slots, slot in ((source, "outputs", out), (target, "inputs", into)):
        sockets = nodes[node][slots]
        if slot >= len(sockets):
            yield f"node {node} has no {slots[:-1]} {slot}"
        elif sockets[slot]["type"] != given:
            yield f"it carries {given}, but {sockets[slot]['name']} is {sockets[slot]['type']}"
    if nodes[source]["order"] >= nodes[target]["order"]:
        yield f"node {target} comes before node {source}, which it needs"
