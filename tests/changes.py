"""What may be done to an optimizer and its tensors between steps, each as f(optimizer, param)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from twins import F64


def at_other_memory(o: Any, p: Tensor) -> None:
    p.data = p.data.clone()


def other_dtype(o: Any, p: Tensor) -> None:
    p.data = p.data.to(torch.float32)
    for key in ("exp_avg", "exp_avg_sq"):
        o.state[p][key] = o.state[p][key].to(torch.float32)


def other_shape(o: Any, p: Tensor) -> None:
    p.grad = None
    p.data = torch.ones(2, 7, dtype=p.dtype, device=p.device)
    o.state.pop(p)


def other_layout(o: Any, p: Tensor) -> None:
    p.grad = None
    p.data = p.data.contiguous() if not p.is_contiguous() else p.data


def same_memory_transposed(o: Any, p: Tensor) -> None:
    """The address stays, and the numel; the shape and what the elements mean do not."""
    p.grad = None
    p.data = p.data.t()
    for key in o.state[p].keys() - {"step"}:
        o.state[p][key] = o.state[p][key].t()


def state_replaced(o: Any, p: Tensor) -> None:
    """As RL trainers do, which move states to the CPU and back."""
    for key, value in o.state[p].items():
        o.state[p][key] = value.clone() * 0.5 if key != "step" else value.clone()


def state_swapped_through_data(o: Any, p: Tensor) -> None:
    """The objects stay, their memory does not."""
    for key, value in o.state[p].items():
        value.data = value.data * 0.5 if key != "step" else torch.full_like(value, 5)


def states_swapped(o: Any, p: Tensor) -> None:
    """The same objects under each other's keys; one is for a square root, so without a sign."""
    state = o.state[p]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"].abs_()


def state_written_in_place(o: Any, p: Tensor) -> None:
    o.state[p]["exp_avg"].mul_(0.5)
    o.state[p]["step"].fill_(7)


def step_replaced(o: Any, p: Tensor) -> None:
    o.state[p]["step"] = torch.tensor(5.0)


def all_state_cleared(o: Any, p: Tensor) -> None:
    o.state.clear()


def one_state_deleted(o: Any, p: Tensor) -> None:
    del o.state[p]


def add_group(o: Any, p: Tensor) -> None:
    torch.manual_seed(7)
    o.add_param_group({"params": [Parameter(torch.randn(3, dtype=F64, device=p.device))], "lr": 1})


def loaded(o: Any, p: Tensor) -> None:
    saved = copy.deepcopy(o.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    for state in saved["state"].values():
        state["exp_avg"] *= 2
    o.load_state_dict(saved)


def param_appended(o: Any, p: Tensor) -> None:
    torch.manual_seed(7)
    new = Parameter(torch.randn(4, dtype=F64, device=p.device))
    o.param_groups[0]["params"].insert(1, new)


def param_removed(o: Any, p: Tensor) -> None:
    del o.param_groups[0]["params"][1]


def params_reversed(o: Any, p: Tensor) -> None:
    o.param_groups[0]["params"].reverse()


def param_moved_to_another_group(o: Any, p: Tensor) -> None:
    other = o.param_groups[0]["params"].pop(1)
    o.add_param_group({"params": [other], "lr": 0.5, "weight_decay": 0.0})


def param_object_replaced(o: Any, p: Tensor) -> None:
    """Another Parameter over the same memory: torch's state belongs to the object, so it is new."""
    params = o.param_groups[0]["params"]
    params[next(i for i, x in enumerate(params) if x is p)] = Parameter(p.data)


def options_changed(o: Any, p: Tensor) -> None:
    o.param_groups[0].update(lr=0.2, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.3, maximize=True)


CHANGES = {  # all but that of the dtype: what is equal to 1e-12 before is so after
    f.__name__: f
    for f in (
        at_other_memory,
        other_shape,
        other_layout,
        same_memory_transposed,
        state_replaced,
        state_swapped_through_data,
        states_swapped,
        state_written_in_place,
        step_replaced,
        all_state_cleared,
        one_state_deleted,
        add_group,
        loaded,
        param_appended,
        param_removed,
        params_reversed,
        param_moved_to_another_group,
        param_object_replaced,
        options_changed,
    )
}
