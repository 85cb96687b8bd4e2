"""`FusedAdamW`: torch's Optimizer contract around one launch a device, or the CPU reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

from . import plan as planning
from . import reference
from . import state as states
from .checks import check_hypers
from .launch import GroupRows, Launcher, group_rows, is_capturing
from .layouts import overlaps_itself
from .plan import Entry, Plan

Grads: TypeAlias = list[Tensor | None]

Backend = Literal["auto", "triton", "reference"]
_DECOUPLED = "decoupled_weight_decay"
_KERNEL_DEVICES = ("cuda", "xpu")  # ROCm's devices are called cuda, too


class FusedAdamW(Optimizer):
    r"""AdamW with the contract of :class:`torch.optim.AdamW`, in one launch for all parameters.

    Replacing the name is enough: arguments, ``state_dict``, hooks, schedulers and ``GradScaler``
    work as there. On GPU tensors a step is two Triton launches and at most one asynchronous copy,
    whatever the number of tensors, groups and dtypes; it never waits for the device. On CPU tensors
    it runs :mod:`fused_adamw.reference`, in plain torch.

    Args:
        params: parameters, named parameters, or dicts that define groups. float64, float32,
            bfloat16, float16 and complex, in any layout without overlapping elements.
        lr: learning rate, a float or a tensor of one element. A tensor on the device is read
            there, so that a captured graph follows it.
        betas: coefficients of the running averages of the gradient and its square, in [0, 1);
            floats, or tensors of one element.
        eps: added to the denominator.
        weight_decay: decoupled weight decay coefficient.
        amsgrad: use the maximum of all second moments so far.
        maximize: maximize the objective.
        foreach, fused, capturable: accepted as torch has them. ``fused=False`` leaves unscaling to
            ``GradScaler``; otherwise it is done in the kernel. Nothing else depends on them: every
            step can be captured in a CUDA graph, after one that was not.
        differentiable: let autograd see the step, which torch's functional AdamW then carries out.
        decoupled_weight_decay: False adds the decay to the gradient, as :class:`torch.optim.Adam`
            does. It belongs to the group as constructed: loading a checkpoint keeps it.
        backend: ``"auto"`` runs Triton on CUDA, ROCm and XPU tensors and the reference on others;
            ``"triton"`` and ``"reference"`` force one. No part of the ``state_dict``.

    Raises:
        ValueError: a hyper-parameter out of its range.
        TypeError, RuntimeError: from :meth:`step`, for tensors that it cannot update; nothing has
            been changed then.

    Source: Loshchilov and Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        backend: Backend = "auto",
    ) -> None:
        if backend not in ("auto", "triton", "reference"):
            raise ValueError(f"Invalid backend: {backend!r} (want 'auto', 'triton' or 'reference')")
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        check_hypers(defaults, min_lr=0.0)
        defaults["betas"] = _scalar_betas(betas)
        self.backend: Backend = backend
        super().__init__(params, defaults)
        self._forget()

    def _forget(self) -> None:
        """Drop what is derived from params, groups and state."""
        self._plan: Plan | None = None
        self._hypers: list[tuple[Any, ...]] = []  # as checked last, where all are numbers
        self._rows: dict[torch.device, GroupRows] = {}  # made of them
        # Graphs read and write the memory of their captured steps for as long as they live.
        self._captured = [
            c for x in self.__dict__.get("_launchers", {}).values() for c in x.captured
        ]
        self._launchers: dict[torch.device, Launcher] = {}
        # torch's GradScaler then leaves unscaling and skipping to step()
        self._step_supports_amp_scaling = (
            self.defaults["fused"] is not False and not self.defaults["differentiable"]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what load_state_dict, deepcopy or pickle brings; nothing of it is aliased."""
        defaults = state.get("defaults") or self.defaults
        own_groups = self.__dict__.get("param_groups")  # there when a checkpoint is loaded
        for number, group in enumerate(state["param_groups"]):
            for key, value in defaults.items():
                group.setdefault(key, value)
            if own_groups is not None:
                group[_DECOUPLED] = own_groups[number][_DECOUPLED]
            group["betas"] = _scalar_betas(group["betas"])
            check_hypers(group)
        kept = states.own_state(state["state"], state["param_groups"], _step_dtype())
        super().__setstate__({**state, "state": kept})
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; its hyper-parameters are checked as the constructor's are.

        Raises:
            ValueError: a hyper-parameter out of its range; the optimizer is then as it was.
        """
        if isinstance(param_group, dict):
            check_hypers({**self.defaults, **param_group}, min_lr=0.0)
        super().add_param_group(param_group)
        self.param_groups[-1]["betas"] = _scalar_betas(self.param_groups[-1]["betas"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.

        Raises:
            TypeError, RuntimeError, ValueError: tensors or hyper-parameters that cannot be used;
                parameters, state and steps are then as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._update()
        return loss

    # as torch.optim does it: torch.compiler.disable would import the compiler along, 2 s
    @torch._disable_dynamo  # type: ignore[attr-defined]  # private, but the one that torch.optim uses
    def _update(self) -> None:
        grads: Grads = [p.grad for p in planning.flat(self.param_groups)]
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        self._check_changed_hypers()
        plan, written = self._current_plan(grads)
        with torch.no_grad():
            for e in plan.copied:
                if (grad := grads[e.place]) is not None:
                    _copy_if(e.dense, e.param)
                    _copy_if(e.grad_copy, grad)
            for device, entries in plan.by_device.items():
                if device in plan.tables:
                    rows = self._group_rows(device)
                    launcher = self._launchers[device]
                    launcher.launch(plan.tables[device], rows, grad_scale, found_inf)
                else:
                    self._run_reference(entries, grads, grad_scale, found_inf)
            for e in plan.copied:
                if (grad := grads[e.place]) is not None:
                    if e.dense is not None:
                        e.param.copy_(e.dense)
                    if e.grad_copy is not None and grad_scale is not None:
                        _put_grad(e, grad)
            if plan.tables:
                # autograd has not seen the kernel write: a stale graph shall raise
                unscaled = [g for g in grads if g is not None] if grad_scale is not None else []
                torch.autograd.graph.increment_version(written + unscaled)
        for group in self.param_groups:
            if group["differentiable"]:
                self._run_differentiable(group)

    def _current_plan(self, grads: Grads) -> tuple[Plan, list[Tensor]]:
        """The plan of this step and what it writes; all checks come before any change."""
        groups, plan = self.param_groups, self._plan
        if plan is not None:
            new = planning.look(groups, grads, plan.entries, self.state)
            if new is not None and plan.keeps_params(new):
                if plan.keeps_grads(new):
                    return plan, new.written
                moved = planning.move_grads(plan, new, grads)
                if moved is not None:
                    self._plan = moved
                    return moved, new.written
        entries = planning.make_entries(groups, grads, self.state, plan)
        devices = {e.param.device for e in entries.all}
        on_kernel = {device for device in devices if self._has_kernel(device)}
        for device in on_kernel - self._launchers.keys():
            self._launchers[device] = Launcher(device)
        planning.refuse_shared_memory(entries.all, on_kernel, self.state)
        if states.lacks_state(entries.all, self.state) and any(map(is_capturing, devices)):
            raise RuntimeError(
                "FusedAdamW.step() cannot be captured in a CUDA graph before its state exists. Run "
                "at least one step() outside the capture, with gradients for the same parameters."
            )
        states.init_state(entries.all, self.state, _step_dtype())
        self._plan, written = planning.make_plan(groups, grads, entries, self.state, on_kernel)
        return self._plan, written

    def _has_kernel(self, device: torch.device) -> bool:
        if self.backend == "auto":
            return device.type in _KERNEL_DEVICES
        return self.backend == "triton"

    def _check_changed_hypers(self) -> None:
        """Check hyper-parameters that are not as they were, and forget the rows made of them."""
        values = [
            (g["lr"], g["betas"], g["eps"], g["weight_decay"], g["maximize"], g[_DECOUPLED])
            for g in self.param_groups
        ]
        if any(isinstance(x, Tensor) for v in values for x in (v[0], *v[1])):
            values = []  # they change in place, and comparing them would wait for the device
        if not values or values != self._hypers:
            for group in self.param_groups:
                check_hypers(group)
            self._hypers, self._rows = values, {}

    def _group_rows(self, device: torch.device) -> GroupRows:
        rows = self._rows.get(device)
        if rows is None:
            rows = self._rows[device] = group_rows(self.param_groups, device)
        return rows

    def _run_reference(
        self,
        entries: Sequence[Entry],
        grads: Grads,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if found_inf is not None and float(found_inf) != 0:
            return
        scale = 1.0 if grad_scale is None else float(grad_scale)
        known: dict[tuple[int, float], reference.Scalars] = {}
        for e in entries:
            grad = grads[e.place] if e.grad_copy is None else e.grad_copy
            if grads[e.place] is None or grad is None:
                continue
            state = self.state[e.param]
            step = float(state["step"].add_(1))
            if (e.group, step) not in known:
                known[e.group, step] = reference.schedule(self.param_groups[e.group], step, scale)
            reference.adamw(
                e.param if e.dense is None else e.dense,
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                state["max_exp_avg_sq"] if len(e.moments) > 2 else None,
                known[e.group, step],
                store_grad=grad_scale is not None,
            )

    def _run_differentiable(self, group: dict[str, Any]) -> None:
        """torch's own functional AdamW, operation by operation, so that autograd sees each."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=_step_dtype(), device=p.device)
            names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        states = [self.state[p] for p in params]
        function = adamw if group["decoupled_weight_decay"] else adam
        function(
            params,
            [p.grad for p in params],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
            [s["step"] for s in states],
            foreach=False,
            differentiable=True,
            fused=False,
            has_complex=any(p.is_complex() for p in params),
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def _scalar_betas(betas: Sequence[float | Tensor]) -> tuple[float | Tensor, ...]:
    # 0-dim, as torch keeps them
    return tuple(b.squeeze() if isinstance(b, Tensor) and b.dim() else b for b in betas)


def _step_dtype() -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _copy_if(target: Tensor | None, source: Tensor) -> None:
    if target is not None:
        target.copy_(source)


def _put_grad(e: Entry, grad: Tensor) -> None:
    """Leave the unscaled gradient where the user's is; an expanded one gets memory of its own."""
    if overlaps_itself(grad):
        e.param.grad = e.grad_copy.clone() if e.grad_copy is not None else grad
    elif e.grad_copy is not None:
        grad.copy_(e.grad_copy)
