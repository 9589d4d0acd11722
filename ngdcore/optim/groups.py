"""What an optimizer is made of, checked: network, Fisher, numbers and param groups."""

import math
from collections import Counter
from typing import Any

from torch import Tensor, nn

from ..signals import trained_layers


def number(name: str, value: Any, positive: bool = False) -> float:
    """A finite number of at least (or above) 0, as a float."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not (0 <= found < math.inf) or (positive and found == 0):
        raise ValueError(
            f"{name}={value} must be {'' if positive else '0 or '}positive and finite"
        )
    return found


def check_parts(net, fisher, metric) -> None:
    """Network, Fisher and metric are what the constructor's places are for."""
    call = (
        "NaturalGradient(net, fisher), as in NaturalGradient(net, ngd.fisher.Exact())"
    )
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"net must be the network itself (an nn.Module), not {type(net).__name__}"
            f" (its parameters?): {call}"
        )
    if isinstance(fisher, type) or not hasattr(fisher, "solve"):
        given = f"the class {fisher.__name__}" if isinstance(fisher, type) else fisher
        raise TypeError(f"fisher must be an instance of a Fisher, not {given}: {call}")
    if not (metric is None or metric == "softmax" or callable(metric)):
        raise ValueError(
            f"metric={metric!r} is unknown; use None, 'softmax' or a function from"
            " outputs (N, C) to R (N, k, C)"
        )


def param_groups(net: nn.Module, groups) -> list[dict[str, Any]]:
    """Param groups for torch that hold every trained parameter once."""
    trained = {
        f"{name}.{key}": p
        for layer, name in trained_layers(net).items()
        for key, p in layer.named_parameters()
        if p.requires_grad
    }
    if groups is None:
        return [{"params": list(trained.values())}]
    made = []
    for group in groups:
        unknown = set(group) - {"params", "lr", "weight_decay"}
        if unknown or "params" not in group:
            raise ValueError(
                f"groups hold params, lr and weight_decay, not {sorted(group)}"
                " (damping is one number for all layers)"
            )
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        rates = {k: number(k, v) for k, v in group.items() if k != "params"}
        made.append({"params": [p for p in params if p.requires_grad], **rates})
    _check_cover(trained, [p for group in made for p in group["params"]])
    return [group for group in made if group["params"]]


def _check_cover(trained: dict[str, Tensor], held: list[Tensor]) -> None:
    """The groups hold each trained parameter once, and no other."""
    times = Counter(id(p) for p in held)
    wrong = [
        f"{name} {times[id(p)]} times"
        for name, p in trained.items()
        if times[id(p)] != 1
    ]
    foreign = len(times) - sum(id(p) in times for p in trained.values())
    if wrong or foreign:
        raise ValueError(
            "groups must hold every trained parameter of net once, not"
            f" {', '.join(wrong) or f'{foreign} of another network'}"
        )
