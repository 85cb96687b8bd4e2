"""What a training may do, in any order: after each step ours is what torch.optim.AdamW is.

And masters are what float32 weights are. The other files try these things one by one; here walks
of a seeded random generator look for two that do not get on. (hypothesis would draw nearly the same
few things in nearly all of its trainings.) A walk that fails prints what it did.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import changes
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from twins import F64, OPTIONS, assert_same, beside_torch, go_on_alike, params_of

from fused_adamw import FusedAdamW, formats, look
from fused_adamw.storage import MASTER, REMAINDER

each = pytest.mark.parametrize

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "new": lambda p: torch.randn_like(p, requires_grad=False),
    "other_layout": lambda p: torch.randn(p.shape[::-1], dtype=p.dtype, device=p.device).t(),
    "gaps": lambda p: torch.randn(*p.shape, 2, dtype=p.dtype, device=p.device)[..., 0],
    "expanded": lambda p: torch.randn((), dtype=p.dtype, device=p.device).expand(p.shape),
}
# without those that want more than a state of the param, or leave a state that no param has, of
# which torch makes no state_dict
ALONE = ("param_removed", "param_moved_to_another_group", "param_object_replaced")
CHANGES = {name: change for name, change in changes.CHANGES.items() if name not in ALONE}
LENGTH = 30  # of a walk


class Walk:
    """Two optimizers that are treated alike: `mine` is tested, `its` is known to be right."""

    mine: Any
    its: Any

    def __init__(self, device: torch.device, backend: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.device, self.backend, self.random = device, backend, random.Random(seed)

    def pick(self, *options: Any) -> Any:
        picked = self.random.choice(options)
        print(" ", picked)
        return picked

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(params_of(self.mine), params_of(self.its), strict=True))

    def pair(self) -> tuple[Tensor, Tensor]:
        pairs = self.pairs()
        return pairs[self.pick(*range(len(pairs)))]

    def idle(self) -> list[bool]:
        """Which params get no gradient."""
        share = self.pick(0.0, 0.0, 0.3)
        return [self.random.random() < share for _ in self.pairs()]

    def go(self, *actions: Callable[[], None], steps: int) -> None:
        for _ in range(steps):
            action = self.random.choice(actions)
            print(action.__name__)
            action()

    def step_scaled(self, optimizer: Any, scale: float, overflow: bool) -> None:
        """As GradScaler has it done."""
        optimizer.grad_scale = torch.tensor(scale, device=self.device)
        optimizer.found_inf = torch.tensor(float(overflow), device=self.device)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    def other_backend(self) -> None:
        """Of those that are tested on the kernel."""
        if self.backend == "triton":
            backend = "reference" if self.mine.backend == "triton" else "triton"
            for optimizer in (self.mine, self.its):
                if isinstance(optimizer, FusedAdamW):
                    optimizer.backend = backend

    def copied(self) -> None:
        pair = self.mine, self.its
        copies = self.pick("deepcopy", "pickle") == "deepcopy"
        self.mine, self.its = copy.deepcopy(pair) if copies else pickle.loads(pickle.dumps(pair))

    def new_lr(self) -> None:
        number = self.pick(*range(len(self.mine.param_groups)))
        lr = self.pick(0.0, 0.01, 0.1)
        if self.pick("number", "tensor") == "tensor":
            lr = torch.tensor(lr, dtype=F64)
        for optimizer in (self.mine, self.its):
            optimizer.param_groups[number]["lr"] = lr


class BesideTorch(Walk):
    """A training by ours, and the same by torch's for-loop."""

    def __init__(self, device: torch.device, backend: str, seed: int) -> None:
        super().__init__(device, backend, seed)
        self.options = {"amsgrad": self.pick(False, True), "maximize": self.pick(False, True)}
        self.mine, self.its = beside_torch(device, backend, **self.options)

    def give(self) -> None:
        """New gradients, from now on in another layout or in the old ones' memory."""
        gradient, in_place = self.pick(*GRADIENTS), self.pick(False, False, True)
        for (p, twin), idle in zip(self.pairs(), self.idle(), strict=True):
            grad = None if idle else GRADIENTS[gradient](p)
            twin.grad = None if grad is None else grad.clone()
            if grad is not None and in_place and p.grad is not None and 0 not in p.grad.stride():
                p.grad.copy_(grad)
            else:
                p.grad = grad

    def step(self) -> None:
        if self.pick("new", "new", "new", "as they are") == "new":
            self.give()
        self.mine.max_grad_norm = self.pick(None, 0.5)
        self.mine.step()
        given = [(twin, twin.grad) for _, twin in self.pairs()]
        if self.mine.max_grad_norm is not None:
            for twin, grad in given:
                twin.grad = None if grad is None else grad.clone()
            torch.nn.utils.clip_grad_norm_(params_of(self.its), self.mine.max_grad_norm)
        self.its.step()
        for twin, grad in given:
            twin.grad = grad
        self.check()

    def scaled_step(self) -> None:
        self.give()
        scale, overflow = self.pick(1.0, 1024.0), self.pick(False, True)
        for p, twin in self.pairs():
            p.grad = None if twin.grad is None else twin.grad * scale
        self.mine.max_grad_norm = None
        self.step_scaled(self.mine, scale, overflow)
        if not overflow:
            self.its.step()
        for p, twin in self.pairs() if overflow else ():
            if twin.grad is not None:
                assert torch.equal(p.grad, twin.grad * scale), "skipped, so not unscaled"
                p.grad.copy_(twin.grad)
            if not self.its.state.get(twin):
                assert not any(map(torch.count_nonzero, self.mine.state.pop(p, {}).values()))
        self.check()

    def check(self) -> None:
        for p, twin in self.pairs():
            assert (p.grad is None) == (twin.grad is None)
            assert p.grad is None or torch.equal(p.grad, twin.grad)
        assert_same(self.mine, self.its)

    def change(self, name: str) -> None:
        for optimizer, p in zip((self.mine, self.its), self.pair(), strict=True):
            if optimizer.state.get(p):
                CHANGES[name](optimizer, p)

    def change_and_step(self) -> None:
        """At once, so that nothing else makes the plan stale."""
        self.change(self.pick(*CHANGES))
        self.step()

    def zero_grad(self) -> None:
        expanded = any(p.grad is not None and 0 in p.grad.stride() for p, _ in self.pairs())
        set_to_none = expanded or self.pick(False, True)  # an expanded one cannot be written
        for optimizer in (self.mine, self.its):
            optimizer.zero_grad(set_to_none=set_to_none)

    def loaded(self) -> None:
        way = self.pick("ours into a new one", "torch's into a new one", "ours into torch's")
        if way == "ours into torch's":
            # as from a file: torch goes on counting in the counters that it is given
            self.its.load_state_dict(copy.deepcopy(self.mine.state_dict()))
            return
        source = self.mine if way == "ours into a new one" else self.its
        groups = [{"params": group["params"]} for group in self.mine.param_groups]
        self.mine = FusedAdamW(groups, backend=self.backend, **self.options, **OPTIONS)
        self.mine.load_state_dict(source.state_dict())


class Masters(Walk):
    """A training of 16-bit weights with masters, and of float32 ones, which they follow exactly."""

    def __init__(self, device: torch.device, backend: str, seed: int) -> None:
        super().__init__(device, backend, seed)
        self.dtype = self.pick(torch.bfloat16, torch.float16)
        self.options = {"amsgrad": self.pick(False, True), "backend": backend, **OPTIONS}
        weights = [self.values((65, 3)).t(), self.values((9,)), self.values(())]
        self.mine = FusedAdamW(list(map(Parameter, weights)), master_weights=True, **self.options)
        self.its = FusedAdamW([Parameter(x.float()) for x in weights], **self.options)

    def values(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def step(self) -> None:
        scale, overflow = self.pick(None, 1.0, 4.0), self.pick(False, True)
        in_place, max_norm = self.pick(False, True), self.pick(None, 0.5)
        for pair, idle in zip(self.pairs(), self.idle(), strict=True):
            grad = self.values(pair[0].shape) * (scale or 1)
            for p in pair:
                if idle:
                    p.grad = None
                elif in_place and p.grad is not None:
                    p.grad.copy_(grad)
                else:
                    p.grad = grad.to(p.dtype)
        for optimizer in (self.mine, self.its):
            optimizer.max_grad_norm = max_norm
            if scale is None:
                optimizer.step()
            else:
                self.step_scaled(optimizer, scale, overflow)
        for p, twin in self.pairs():
            bf16 = self.dtype == torch.bfloat16  # with masters rounded at the half away from 0
            assert torch.equal(p, formats.encode_remainder(twin)[0] if bf16 else twin.half())
            mine, its = self.mine.state.get(p, {}), self.its.state.get(twin, {})
            assert mine.keys() - {MASTER, REMAINDER} == its.keys()
            assert all(torch.equal(mine[key], its[key]) for key in its)
            if REMAINDER in mine:
                remainder = mine[REMAINDER].view(torch.int16)
                assert torch.equal(formats.decode_remainder(p, remainder), twin)
            elif mine:
                assert torch.equal(mine[MASTER], twin)

    def move(self) -> None:
        """To other memory, where nothing is another value."""
        what = self.pick("param", "states by other objects", "states of the same objects")
        for optimizer, p in zip((self.mine, self.its), self.pair(), strict=True):
            if what == "param":
                changes.at_other_memory(optimizer, p)
            for key, x in optimizer.state.get(p, {}).items() if what != "param" else ():
                if what == "states by other objects":
                    optimizer.state[p][key] = x.clone()
                else:
                    x.data = x.data.clone()

    @torch.no_grad()
    def write_weights(self) -> None:
        p, _ = self.pair()
        p.copy_(self.values(p.shape))
        self.mine.resync_master_weights()
        for p, twin in self.pairs():
            twin.copy_(p)

    def add_group(self) -> None:
        weights = self.values(self.pick((), (7,), (2, 64)))
        self.mine.add_param_group({"params": [Parameter(weights)]})
        self.its.add_param_group({"params": [Parameter(weights.float())]})

    def loaded(self) -> None:
        """Into new optimizers of the same params, the weights as they are."""
        resumed = []
        for optimizer, masters in ((self.mine, True), (self.its, False)):
            groups = [{"params": group["params"]} for group in optimizer.param_groups]
            resumed.append(FusedAdamW(groups, master_weights=masters, **self.options))
            resumed[-1].load_state_dict(optimizer.state_dict())
        self.mine, self.its = resumed


@pytest.fixture(autouse=True)
def _parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "IN_CACHE", 2)  # so that a look has parts


@each("first", CHANGES)
def test_beside_torch(device: torch.device, backend: str, first: str) -> None:
    walk = BesideTorch(device, backend, seed=list(CHANGES).index(first))
    go_on_alike(walk.mine, walk.its)  # so that there are a plan, and states to be changed
    walk.change(first)
    go_on_alike(walk.mine, walk.its)
    actions = (walk.change_and_step, walk.zero_grad, walk.loaded, walk.copied, walk.new_lr)
    walk.go(walk.step, walk.scaled_step, walk.other_backend, *actions, steps=LENGTH)


@each("seed", range(8))
def test_masters(device: torch.device, backend: str, seed: int) -> None:
    walk = Masters(device, backend, seed)
    actions = (walk.add_group, walk.loaded, walk.copied, walk.new_lr, walk.other_backend)
    walk.go(walk.step, walk.step, walk.step, walk.move, walk.write_weights, *actions, steps=LENGTH)
    walk.step()
