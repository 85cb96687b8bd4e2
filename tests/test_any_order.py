"""What a training may do, in any order: after each step ours is what torch.optim.AdamW is.

And masters are what float32 weights are. The other files try these things one by one; hypothesis
looks for two that do not get on.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import changes
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from torch.nn import Parameter
from twins import F64, OPTIONS, assert_same, beside_torch, params_of

from fused_adamw import FusedAdamW, formats, plan
from fused_adamw.storage import MASTER, REMAINDER

each = pytest.mark.parametrize

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "new": lambda p: torch.randn_like(p, requires_grad=False),
    "other_layout": lambda p: torch.randn(p.shape[::-1], dtype=p.dtype, device=p.device).t(),
    "gaps": lambda p: torch.randn(*p.shape, 2, dtype=p.dtype, device=p.device)[..., 0],
    "expanded": lambda p: torch.randn((), dtype=p.dtype, device=p.device).expand(p.shape),
}
CHANGES = [  # those that need nothing but a state of the param, and leave torch's state_dict whole
    changes.at_other_memory,
    changes.other_shape,
    changes.other_layout,
    changes.same_memory_transposed,
    changes.state_replaced,
    changes.state_swapped_through_data,
    changes.states_swapped,
    changes.state_written_in_place,
    changes.step_replaced,
    changes.all_state_cleared,
    changes.one_state_deleted,
    changes.add_group,
    changes.loaded,
    changes.param_appended,
    changes.params_reversed,
    changes.options_changed,
]
NUMBER = st.integers(0, 11)  # of a param or a group, counted around


class Training(RuleBasedStateMachine):
    """A training by ours, and the same by torch's for-loop."""

    device: torch.device
    backend: str

    @initialize(amsgrad=st.booleans(), maximize=st.booleans())
    def start(self, amsgrad: bool, maximize: bool) -> None:
        torch.manual_seed(0)
        self.options = {"amsgrad": amsgrad, "maximize": maximize}
        self.has_plan = False
        self.ours, self.theirs = beside_torch(self.device, self.backend, **self.options)

    def params(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(params_of(self.ours), params_of(self.theirs), strict=True))

    @rule(
        gradient=st.sampled_from(list(GRADIENTS)),
        in_place=st.booleans(),
        idle=st.sets(NUMBER, max_size=3),
        scale=st.sampled_from([None, 1.0, 1024.0]),
        max_norm=st.sampled_from([None, 0.5]),
        overflow=st.booleans(),
    )
    def step(
        self,
        gradient: str,
        in_place: bool,
        idle: set[int],
        scale: float | None,
        max_norm: float | None,
        overflow: bool,
    ) -> None:
        for i, (p, twin) in enumerate(self.params()):
            if i in idle:
                p.grad = twin.grad = None
                continue
            grad = GRADIENTS["new" if scale else gradient](p)
            twin.grad = grad.clone()
            if scale:
                grad *= scale
            if in_place and p.grad is not None and not _is_expanded(p.grad):
                p.grad.copy_(grad)
            else:
                p.grad = grad
        self._step(scale, max_norm, overflow and scale is not None)

    @rule(max_norm=st.sampled_from([None, 0.5]))
    def step_with_the_gradients_that_are_there(self, max_norm: float | None) -> None:
        self._step(None, max_norm, False)

    def _step(self, scale: float | None, max_norm: float | None, overflow: bool) -> None:
        if scale:  # as GradScaler does
            self.ours.grad_scale = torch.tensor(scale, device=self.device)
            self.ours.found_inf = torch.tensor(float(overflow), device=self.device)
        self.ours.max_grad_norm = max_norm
        self.ours.step()
        if scale:
            del self.ours.grad_scale, self.ours.found_inf
        if overflow:  # torch's fused kernel skips a step whose state it has made
            for group in self.theirs.param_groups:
                self.theirs._init_group(group, *([] for _ in range(6)))
        else:
            given = [(twin, twin.grad) for _, twin in self.params()]
            if max_norm is not None:
                for twin, grad in given:
                    twin.grad = None if grad is None else grad.clone()
                torch.nn.utils.clip_grad_norm_(params_of(self.theirs), max_norm)
            self.theirs.step()
            for twin, grad in given:
                twin.grad = grad
        for p, twin in self.params():
            if overflow and twin.grad is not None:  # what overflowed is left as it was
                p.grad = twin.grad.clone()
            assert (p.grad is None) == (twin.grad is None)
            assert p.grad is None or torch.equal(p.grad, twin.grad)
        assert_same(self.ours, self.theirs)
        self.has_plan = True

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        none = set_to_none or any(
            _is_expanded(p.grad) for p, _ in self.params() if p.grad is not None
        )
        for optimizer in (self.ours, self.theirs):
            optimizer.zero_grad(set_to_none=none)

    @precondition(lambda self: self.has_plan)  # one thing alone makes it stale
    @rule(change=st.sampled_from(CHANGES), number=NUMBER)
    def change(self, change: Callable[[Any, Tensor], None], number: int) -> None:
        self.has_plan = False
        pairs = self.params()
        p, twin = pairs[number % len(pairs)]
        for optimizer, x in ((self.ours, p), (self.theirs, twin)):
            if optimizer.state.get(x):
                change(optimizer, x)

    @rule(number=NUMBER, lr=st.sampled_from([0.0, 0.01, 0.1]), in_tensor=st.booleans())
    def schedule(self, number: int, lr: float, in_tensor: bool) -> None:
        for optimizer in (self.ours, self.theirs):
            group = optimizer.param_groups[number % len(optimizer.param_groups)]
            group["lr"] = torch.tensor(lr, dtype=F64) if in_tensor else lr
            group["weight_decay"] = lr

    @rule()
    def deepcopy(self) -> None:
        self.has_plan = False
        self.ours, self.theirs = copy.deepcopy(self.ours), copy.deepcopy(self.theirs)

    @rule()
    def pickle(self) -> None:
        self.has_plan = False
        self.ours, self.theirs = pickle.loads(pickle.dumps((self.ours, self.theirs)))

    @rule(way=st.sampled_from(["ours", "from_torch", "to_torch"]))
    def checkpoint(self, way: str) -> None:
        self.has_plan = False
        if way == "to_torch":
            # as from a file: torch goes on counting in the counters that it is given
            self.theirs.load_state_dict(copy.deepcopy(self.ours.state_dict()))
            return
        source = self.ours if way == "ours" else self.theirs
        groups = [{"params": group["params"]} for group in self.ours.param_groups]
        self.ours = FusedAdamW(groups, backend=self.backend, **self.options, **OPTIONS)
        self.ours.load_state_dict(source.state_dict())

    @rule()
    def other_backend(self) -> None:
        if self.backend == "triton":
            self.ours.backend = "reference" if self.ours.backend == "triton" else "triton"


class Masters(RuleBasedStateMachine):
    """A training of 16-bit weights with masters, and of float32 ones, which they follow exactly."""

    device: torch.device
    backend: str

    @initialize(dtype=st.sampled_from([torch.bfloat16, torch.float16]), amsgrad=st.booleans())
    def start(self, dtype: torch.dtype, amsgrad: bool) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.options = {"amsgrad": amsgrad, "backend": self.backend, **OPTIONS}
        weights = [self._values((3, 65)), self._values((9,)), self._values(()).t()]
        self.low = FusedAdamW(list(map(Parameter, weights)), master_weights=True, **self.options)
        self.full = FusedAdamW([Parameter(x.float()) for x in weights], **self.options)

    def _values(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def params(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(params_of(self.low), params_of(self.full), strict=True))

    def both(self) -> tuple[FusedAdamW, FusedAdamW]:
        return self.low, self.full

    @rule(
        idle=st.sets(NUMBER, max_size=3),
        in_place=st.booleans(),
        scale=st.sampled_from([None, 1.0, 4.0]),
        max_norm=st.sampled_from([None, 0.5]),
        overflow=st.booleans(),
    )
    def step(
        self,
        idle: set[int],
        in_place: bool,
        scale: float | None,
        max_norm: float | None,
        overflow: bool,
    ) -> None:
        for i, (p, twin) in enumerate(self.params()):
            grad = self._values(p.shape) * (scale or 1)
            for x in (p, twin):
                if i in idle:
                    x.grad = None
                elif in_place and x.grad is not None:
                    x.grad.copy_(grad)
                else:
                    x.grad = grad.to(x.dtype)
        for optimizer in self.both():
            if scale:
                optimizer.grad_scale = torch.tensor(scale, device=self.device)
                optimizer.found_inf = torch.tensor(float(overflow), device=self.device)
            optimizer.max_grad_norm = max_norm
            optimizer.step()
            if scale:
                del optimizer.grad_scale, optimizer.found_inf
        for p, twin in self.params():
            bf16 = self.dtype == torch.bfloat16  # with masters rounded at the half away from 0
            assert torch.equal(p, formats.encode_remainder(twin)[0] if bf16 else twin.half())
            mine, its = self.low.state.get(p, {}), self.full.state.get(twin, {})
            assert mine.keys() - {MASTER, REMAINDER} == its.keys()
            assert all(torch.equal(mine[key], its[key]) for key in its)
            if REMAINDER in mine:
                master = formats.decode_remainder(p, mine[REMAINDER].view(torch.int16))
                assert torch.equal(master, twin)
            elif mine:
                assert torch.equal(mine[MASTER], twin)

    @rule(number=NUMBER, state_too=st.booleans(), objects=st.booleans())
    def move(self, number: int, state_too: bool, objects: bool) -> None:
        """To other memory, where nothing is another value."""
        pairs = self.params()
        for optimizer, p in zip(self.both(), pairs[number % len(pairs)], strict=True):
            p.data = p.data.clone()
            for key, x in optimizer.state.get(p, {}).items() if state_too else ():
                if objects:
                    optimizer.state[p][key] = x.clone()
                else:
                    x.data = x.data.clone()

    @rule(number=NUMBER)
    def write_weights(self, number: int) -> None:
        pairs = self.params()
        p, _ = pairs[number % len(pairs)]
        with torch.no_grad():
            p.copy_(self._values(p.shape))
            self.low.resync_master_weights()
            for p, twin in pairs:
                twin.copy_(p)

    @rule(shape=st.sampled_from([(), (7,), (2, 64)]))
    def add_group(self, shape: tuple[int, ...]) -> None:
        weights = self._values(shape)
        self.low.add_param_group({"params": [Parameter(weights)]})
        self.full.add_param_group({"params": [Parameter(weights.float())]})

    @rule(number=NUMBER, lr=st.sampled_from([0.0, 0.01, 0.1]))
    def schedule(self, number: int, lr: float) -> None:
        for optimizer in self.both():
            optimizer.param_groups[number % len(optimizer.param_groups)]["lr"] = lr

    @rule()
    def deepcopy(self) -> None:
        self.low, self.full = copy.deepcopy(self.low), copy.deepcopy(self.full)

    @rule()
    def checkpoint(self) -> None:
        """Into new optimizers of the same params, the weights as they are."""
        resumed = []
        for optimizer, masters in zip(self.both(), (True, False), strict=True):
            groups = [{"params": group["params"]} for group in optimizer.param_groups]
            resumed.append(FusedAdamW(groups, master_weights=masters, **self.options))
            resumed[-1].load_state_dict(optimizer.state_dict())
        self.low, self.full = resumed

    @rule()
    def other_backend(self) -> None:
        if self.backend == "triton":
            for optimizer in self.both():
                optimizer.backend = "reference" if optimizer.backend == "triton" else "triton"


def _is_expanded(x: Tensor) -> bool:
    """Whether writing in place is an error."""
    return 0 in x.stride()


@each("training", [Training, Masters])
def test_any_order(
    device: torch.device,
    backend: str,
    training: type[RuleBasedStateMachine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "IN_CACHE", 2)  # so that there are parts of a look
    machine = type("Machine", (training,), {"device": device, "backend": backend})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100 if backend == "reference" else 30,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # shrinking takes minutes in the interpreter
            suppress_health_check=list(HealthCheck),
        ),
    )
