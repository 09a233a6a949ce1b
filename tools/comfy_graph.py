"""ComfyUI's graphs: nodes and links, and the two JSON formats in which ComfyUI takes them.

The editor's format has places and fields by position, and is what one drops into the window; the
server's has names only, and is what one sends to `/prompt`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tools.comfy_check import Signature, Value, read_signatures

EDITOR_FORMAT = 0.4
WIDTH, LINE = 340, 26  # pixels of a node
TEXT_HEIGHT = 130

Link = tuple[int, int]  # the id of a node, and which of its outputs


@dataclass(frozen=True)
class Node:
    """A node of a graph. Its id is its place in the list of all, from 1; links come from before."""

    type: str
    title: str
    position: tuple[int, int]
    links: Mapping[str, Link] = field(default_factory=dict)
    widgets: Mapping[str, Value] = field(default_factory=dict)  # by name, all of them
    models: Sequence[Mapping[str, str]] = ()  # where the editor offers to download its file


def editor_format(nodes: Sequence[Node]) -> str:
    """The text of a file to drop into ComfyUI's window."""
    signatures = read_signatures()
    links = [
        [source, output, target, slot, signatures[nodes[source - 1].type].outputs[output][1]]
        for target, node in enumerate(nodes, start=1)
        for slot, name in enumerate(signatures[node.type].links)
        if name in node.links
        for source, output in [node.links[name]]
    ]
    numbered = [[number, *link] for number, link in enumerate(links, start=1)]
    return _text(
        {
            "last_node_id": len(nodes),
            "last_link_id": len(numbered),
            "nodes": [
                _editor_node(number, node, signatures[node.type], numbered)
                for number, node in enumerate(nodes, start=1)
            ],
            "links": numbered,
            "groups": [],
            "config": {},
            "extra": {},
            "version": EDITOR_FORMAT,
        }
    )


def _editor_node(
    number: int, node: Node, signature: Signature, links: Sequence[Sequence[Value]]
) -> dict[str, object]:
    into = {link[4]: link[0] for link in links if link[3] == number}
    sockets = max(len(signature.links), len(signature.outputs))
    text = TEXT_HEIGHT if "text" in signature.widgets else 0
    return {
        "id": number,
        "type": node.type,
        "title": node.title,
        "pos": list(node.position),
        "size": [WIDTH, LINE * (1 + sockets + len(signature.widgets)) + text],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [
            {"name": name, "type": given, "link": into.get(slot)}
            for slot, (name, given) in enumerate(signature.links.items())
        ],
        "outputs": [
            {
                "name": name,
                "type": given,
                "slot_index": slot,
                "links": [link[0] for link in links if list(link[1:3]) == [number, slot]],
            }
            for slot, (name, given) in enumerate(signature.outputs)
        ],
        "properties": {"Node name for S&R": node.type}
        | ({"models": [dict(model) for model in node.models]} if node.models else {}),
        "widgets_values": [node.widgets[name] for name in signature.widgets],
    }


def server_format(nodes: Sequence[Node]) -> str:
    """The text of a file for ComfyUI's `/prompt`, as its "Export (API)" writes it."""
    signatures = read_signatures()
    return _text(
        {
            str(number): {
                "inputs": {
                    name: node.widgets[name]
                    for name, widget in signatures[node.type].widgets.items()
                    if not widget.frontend
                }
                | {name: [str(source), output] for name, (source, output) in node.links.items()},
                "class_type": node.type,
                "_meta": {"title": node.title},
            }
            for number, node in enumerate(nodes, start=1)
        }
    )


def _text(graph: dict[str, object]) -> str:
    return json.dumps(graph, indent=2, ensure_ascii=False) + "\n"
