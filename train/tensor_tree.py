"""The state of any optimizer as JSON and named tensors, and back, without pickle.

A state is dictionaries, lists, tuples, numbers, strings, booleans, None and tensors, in any depth.
"""

import torch
from torch import Tensor

KEYS = (str, int)


def flatten(tree: object, name: str, tensors: dict[str, Tensor]) -> object:
    """`tree` as JSON can hold it; its tensors are put into `tensors`, on the CPU, as `name`.….

    `TypeError` for anything that cannot be written without pickle.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):
        if wrong := [key for key in tree if type(key) not in KEYS]:
            raise TypeError(f"{name} has the key {wrong[0]!r}, which is no text or whole number")
        return {
            "dict": [[key, flatten(value, f"{name}.{key}", tensors)] for key, value in tree.items()]
        }
    if isinstance(tree, (list, tuple)):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [flatten(v, f"{name}.{i}", tensors) for i, v in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{name} is {type(tree).__name__}, which cannot be saved without pickle")


def unflatten(written: object, tensors: dict[str, Tensor]) -> object:
    """What `flatten` was given; `KeyError` if a tensor is missing."""
    if not isinstance(written, dict):
        return written
    ((kind, value),) = written.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in value}
    items = [unflatten(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


def load_optimizer(optimizer: torch.optim.Optimizer, state: object) -> None:
    """Put a state back to the bit; `ValueError` if it is of other parameters.

    PyTorch casts what it loads to the dtype of the parameters: what was saved in another one, such
    as 8 bits, gets it back.
    """
    assert isinstance(state, dict)
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [index for group in state["param_groups"] for index in group["params"]]
    for index, parameter in zip(saved, parameters, strict=True):
        loaded = optimizer.state[parameter] if index in state["state"] else {}
        for name, value in state["state"].get(index, {}).items():
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)
