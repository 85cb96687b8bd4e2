"""`FusedAdamW`: torch's Optimizer contract around one launch a device, or the CPU reference."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import norm as norming
from . import plan as planning
from . import reference
from . import state as stating
from . import storage as storing
from . import telemetry as measuring
from .checks import check_memory, check_plain, param_name
from .entries import Entry, Grads, flat, make_entries, refuse_shared_memory
from .hypers import DECOUPLED, Hypers, check_group
from .kernels import table as t
from .launch import Asked, Launcher, is_capturing
from .layouts import overlaps_itself
from .look import Members, Seen
from .norm import check_clipping
from .plan import Plan
from .shards import LocalGrads, as_param, is_flattened, local, local_grads, local_state
from .storage import StateDtype
from .telemetry import Measures, Telemetry
from .unfused import run_differentiable, run_reference

if TYPE_CHECKING:
    from .release import GradientRelease

Backend = Literal["auto", "triton", "reference"]
_OPTIONS = ("backend", "max_grad_norm", "skip_nonfinite", "grad_norm_group", "group_metrics")
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
            ``GradScaler``, as does FSDP1; otherwise it is done in the kernel. Nothing else depends
            on them: every step can be captured in a CUDA graph, after one that was not.
        differentiable: let autograd see the step, which torch's functional AdamW then carries out.
        decoupled_weight_decay: False adds the decay to the gradient, as :class:`torch.optim.Adam`
            does. It belongs to the group as constructed: loading a checkpoint keeps it.
        backend: ``"auto"`` runs Triton on CUDA, ROCm and XPU tensors and the reference on others;
            ``"triton"`` and ``"reference"`` force one. Like the options from `max_grad_norm` on,
            but for those of groups, it is an attribute, too, which the next step follows, and no
            part of the ``state_dict``.
        max_grad_norm: clip the gradients, of all groups and devices together, to this L2 norm, as
            :func:`torch.nn.utils.clip_grad_norm_` does, but in the update: they stay as they are.
            With ``GradScaler`` it is the norm of the unscaled gradients. DTensors count over
            their mesh.
        skip_nonfinite: leave params, moments and steps as they are, on all devices and ranks, in a
            step whose gradients hold NaN or infinity; :meth:`metrics` counts such steps.
        master_weights: keep what rounding to bfloat16 takes off a param, in 16 bits of its state,
            so that bfloat16 params follow the course of float32 ones to the bit; float16 params
            get a float32 copy. Params changed from outside are followed. A group option, as the
            next three are; all but the seed stay as constructed when a checkpoint is loaded.
        stochastic_rounding: round bfloat16 params, unless they have masters, and bfloat16 second
            moments up or down at random, so that small updates are not lost on average.
        state_dtype: how moments are stored: None in the dtype of what is updated (float32 where
            there is a master, else the param's, as torch does); ``torch.float32``,
            ``torch.bfloat16`` (in groups by name, as ``"bfloat16"``) or ``"int8"`` (blockwise, 1.02
            bytes each); a pair for ``exp_avg`` and ``exp_avg_sq``. ``"int8"`` is for row-major
            params whose rows, ``[1:]``, are whole blocks of 64, and plain vectors of 65,536
            elements or more; others, as norms and biases, keep float32.
        seed: of the random bits of stochastic rounding and of 8-bit second moments. They depend on
            it, the step, the param's position and the element's in the whole param alone, so
            replicas and shards agree (FSDP1's and ZeRO-1's on an equal number of ranks). Loaded
            with a checkpoint.
        grad_norm_group: process group whose ranks hold parts that tensors do not tell of: plain
            ones (FSDP1's flat params, ZeRO-1), or a pipeline's stages, also of DTensors. Without
            one each rank would clip by the norm of its own part. All its ranks have to step, even
            one that holds nothing.
        group_metrics: have each step measure its updates for :meth:`metrics`, in the same launches:
            16 bytes of memory for each 1,024 elements, written once a step. In steps without it
            nothing is measured or written.

    Raises:
        ValueError: a hyper-parameter out of its range.
        TypeError, RuntimeError: from :meth:`step`, for tensors that it cannot update; nothing has
            been changed then.

    Source: Loshchilov and Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_.
    """

    _release: GradientRelease | None = None  # belongs to no copy: deepcopy and pickle leave it out
    _in_step = False

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
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        state_dtype: StateDtype | tuple[StateDtype, StateDtype] = None,
        seed: int = 0,
        backend: Backend = "auto",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        grad_norm_group: Any = None,
        group_metrics: bool = False,
    ) -> None:
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
        stored = {
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "state_dtype": state_dtype,
            "seed": seed,
        }
        if stored != storing.OPTIONS:  # else groups are torch's, and so are flattened checkpoints
            defaults.update(stored)
        check_group(defaults, min_lr=0.0)
        defaults["betas"] = _scalar_betas(betas)
        if "state_dtype" in defaults:
            defaults["state_dtype"] = storing.named(state_dtype)
        check_clipping(max_grad_norm, skip_nonfinite)
        _check_backend(backend)
        self.backend: Backend = backend
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.grad_norm_group = grad_norm_group
        self.group_metrics = group_metrics
        super().__init__(params, defaults)
        self._forget()

    def _forget(self) -> None:
        """Drop what is derived from params, groups and state."""
        self._plan: Plan | None = None
        self._hypers = Hypers()
        # Graphs read and write the memory of their captured steps for as long as they live.
        self._captured: list[object] = [
            *self.__dict__.get("_captured", ()),
            *(c for x in self.__dict__.get("_launchers", {}).values() for c in x.captured),
        ]
        self._launchers: dict[torch.device, Launcher] = {}
        self._telemetry: Telemetry | None = None
        # by device; a load goes on counting
        self._metrics: dict[torch.device, Tensor] = self.__dict__.get("_metrics", {})
        if self._release is not None:
            self._release.forget_norm()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's GradScaler, which asks in each step, is to leave unscaling to step().

        FSDP1's scaler tells the other ranks of an overflow where it unscales, and nowhere else.
        """
        if self.defaults["fused"] is False:
            return False
        if any(group["differentiable"] for group in self.param_groups):
            return False
        in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        return not (in_group and any(map(is_flattened, flat(self.param_groups))))

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of `step`, with its hooks, and what is left to do when it raises.

        GradScaler takes its scale back behind a step that ends well, and multiplies it into one
        that is still there: the next step would unscale twice. A `grad_scale` of the user's goes
        too, as it does behind a step that ends well.
        """
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(hooked)
        def step(self: FusedAdamW, *args: Any, **kwargs: Any) -> Any:
            if self._in_step:  # a subclass's, which may try again
                return hooked(self, *args, **kwargs)
            self._in_step = True
            try:
                return hooked(self, *args, **kwargs)
            except BaseException:
                for name in ("grad_scale", "found_inf"):
                    self.__dict__.pop(name, None)
                raise
            finally:
                self._in_step = False

        return step

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _OPTIONS}}

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedAdamW:
        """As copy.deepcopy makes it, but for the process group, which is shared."""
        memo[id(self.grad_norm_group)] = self.grad_norm_group
        memo[id(self)] = made = self.__class__.__new__(self.__class__)
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what load_state_dict, deepcopy or pickle brings; nothing of it is aliased."""
        defaults = state.get("defaults") or self.defaults
        own_groups = self.__dict__.get("param_groups")  # there when a checkpoint is loaded
        for number, group in enumerate(state["param_groups"]):
            if own_groups is not None:
                for key in (DECOUPLED, "differentiable"):
                    group[key] = own_groups[number][key]
                if "seed" in own_groups[number]:  # for a checkpoint that knows of none
                    group.setdefault("seed", own_groups[number]["seed"])
                for key in ("master_weights", "stochastic_rounding", "state_dtype"):
                    group.pop(key, None)
                    if key in own_groups[number]:
                        group[key] = own_groups[number][key]
            for key, value in defaults.items():
                group.setdefault(key, value)
            group["betas"] = _scalar_betas(group["betas"])
            if "state_dtype" in group:
                group["state_dtype"] = storing.named(group["state_dtype"])
            check_group(group)
        kept = stating.own_state(state["state"], state["param_groups"], step_dtype())
        super().__setstate__({**state, "state": kept})
        self._forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of any AdamW, converted to the formats of this optimizer.

        Args:
            state_dict: from :meth:`state_dict` here or of :class:`torch.optim.AdamW`. Nothing of it
                is aliased. Load the model first: masters are compared with its weights.

        Raises:
            ValueError, RuntimeError, TypeError: a checkpoint that does not fit; the optimizer is
                then as it was.
        """
        hook = self.register_load_state_dict_pre_hook(lambda _, given: stating.as_loaded(given))
        try:  # behind the user's own hooks, which see tensors
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; its hyper-parameters are checked as the constructor's are.

        Raises:
            ValueError: a hyper-parameter out of its range; the optimizer is then as it was.
            TypeError: a tensor subclass that keeps its memory elsewhere and is no DTensor.
        """
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group}, min_lr=0.0)
            if isinstance(param_group.get("params"), Iterable) and not isinstance(
                param_group["params"], (Tensor, set)
            ):
                param_group["params"] = list(param_group["params"])
                for position, p in enumerate(param_group["params"]):
                    if isinstance(x := p[1] if isinstance(p, tuple) else p, Tensor):
                        check_plain(f"parameter {position} of the new group", x)
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        added["betas"] = _scalar_betas(added["betas"])
        if "state_dtype" in added:
            added["state_dtype"] = storing.named(added["state_dtype"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.

        Raises:
            TypeError, RuntimeError, ValueError: tensors or hyper-parameters that cannot be used;
                parameters, state and steps are then as they were, but those of groups with
                ``differentiable=True``, which torch checks as it goes.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is not None:
            self._release.finish()
            return loss
        self._update()
        return loss

    # as torch.optim does it: torch.compiler.disable would import the compiler along, 2 s
    @torch._disable_dynamo  # type: ignore[attr-defined]  # private, but the one that torch.optim uses
    def _update(self) -> None:
        """One step, in its order; up to `_prepare` nothing that a user sees has changed.

        An idle GPU waits for all that comes before the launches, and after a backward pass little
        of it is in a cache: each Python call there takes 1 to 2 us, so they are few.
        """
        differentiable = [group for group in self.param_groups if group["differentiable"]]
        with torch.set_grad_enabled(False):  # no_grad is six calls more
            asked = self._asked(bool(differentiable))
            clips = asked.clipping.wanted
            members = self._members()
            here = local_grads(members.params, self._name_at)
            plan, seen = self._current_plan(members, here, clips or asked.measured)
            measures = self._measures(plan, asked) if clips or asked.measured else {}
            tables = self._prepare(plan, asked, measures)
            for group in differentiable:  # torch checks as it goes: no other group has changed yet
                with torch.set_grad_enabled(self.defaults["differentiable"]):
                    run_differentiable(group, self.state, step_dtype())
            copied = [(e, grad) for e in plan.copied if (grad := seen.grads[e.place]) is not None]
            if copied:
                _copy_in(copied)
            memories = {
                device: self._launchers[device].upload(
                    table, plan.copied, self._kept(device, plan, seen)
                )
                for device, table in tables.items()
            }
            norms: Mapping[torch.device, Tensor] = {}
            if clips:
                own = self._own_sums(plan, seen.grads, tables, memories)
                norms = self._sums(plan, own, asked.found_inf)
            if norms and not plan.by_device:  # only others update
                for device, total in norms.items():
                    metrics = self._metrics[device]
                    norming.note(total, asked.grad_scale, asked.found_inf, asked.clipping, metrics)
                    if is_capturing(device):
                        self._captured.append((asked, metrics))
            for device, entries in plan.by_device.items():
                norm = (norms[device], self._metrics[device]) if norms else None
                measured = measures.get(device)
                if device in tables:
                    launcher = self._launchers[device]
                    launcher.launch(tables[device], memories[device], asked, norm, measured)
                else:
                    groups, state = self.param_groups, self.state
                    run_reference(entries, seen.grads, groups, state, asked, norm, measured)
            if copied:
                _copy_out(copied, asked)
            if here is not None and asked.grad_scale is not None:
                for place, moved in here.moved.items():
                    seen.params[place].grad = moved  # unscaled, as the others are now
            if tables or plan.entries.sharded:
                # autograd has not seen the kernel write, nor DTensors: a stale graph shall raise
                written = planning.written_by(plan, seen)
                if asked.grad_scale is not None:
                    written = written + [g for g in seen.grads if g is not None]
                torch.autograd.graph.increment_version(written)

    def _asked(self, differentiable: bool) -> Asked:
        """What this step has to do besides the update, and with which hyper-parameters, checked."""
        given = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        grad_scale, found_inf = [local(x) if isinstance(x, Tensor) else None for x in given]
        if differentiable and not (grad_scale is None and found_inf is None):
            raise RuntimeError(
                "A group with differentiable=True cannot unscale or skip by itself: construct the "
                "optimizer with fused=False, so that GradScaler does it."
            )
        clipping = check_clipping(self.max_grad_norm, self.skip_nonfinite)
        if differentiable and clipping.wanted:
            raise RuntimeError(
                "A group with differentiable=True cannot be clipped or skipped by the optimizer: "
                "use torch.nn.utils.clip_grad_norm_, with max_grad_norm=None and "
                "skip_nonfinite=False."
            )
        if differentiable and self.group_metrics:
            raise RuntimeError(
                "A group with differentiable=True is updated by torch, which measures nothing: "
                "set group_metrics=False."
            )
        _check_backend(self.backend)
        self._hypers.check(self.param_groups, clipping.max_norm)
        # what one rank has found is in the norm of all; one without gradients has a scale alone
        if grad_scale is not None or found_inf is not None:
            clipping = clipping._replace(skip_nonfinite=clipping.wanted)
        return Asked(grad_scale, found_inf, clipping, self.group_metrics)

    def _name_at(self, place: int) -> str:
        """What messages call the param at a place in the list of all params."""
        for number, group in enumerate(self.param_groups):
            if place < len(group["params"]):
                return param_name(group, number, place)
            place -= len(group["params"])
        raise IndexError(place)

    def _measures(self, plan: Plan, asked: Asked) -> Mapping[torch.device, Measures]:
        """Where the step notes what it finds and does."""
        if asked.clipping.wanted:
            self._make_metrics(self._everywhere(plan))
        if not asked.measured:
            return {}
        self._telemetry = measuring.follow(self._telemetry, plan)
        return self._telemetry.measures

    def _prepare(
        self, plan: Plan, asked: Asked, measures: Mapping[torch.device, Measures]
    ) -> dict[torch.device, t.Table]:
        """Tables with this step's hyper-parameters; all kernels are compiled."""
        return {
            device: self._launchers[device].prepare(
                table,
                self._hypers.rows(self.param_groups, device, asked.clipping.max_norm),
                asked,
                len(plan.meshes) == 1,
                rows=measures[device].rows if measures else None,
            )
            for device, table in plan.tables.items()
        }

    def _members(self) -> Members:
        """The members of the groups, whose options `_asked` has checked."""
        groups = self.param_groups
        return Members(flat(groups), [len(g["params"]) for g in groups], self._hypers.stored)

    def _current_plan(
        self, members: Members, here: LocalGrads | None, with_norm: bool
    ) -> tuple[Plan, Seen]:
        """The plan of this step, and its tensors; every check comes before any change."""
        groups, plan = self.param_groups, self._plan
        norm_over = with_norm, self.grad_norm_group
        grads_here = None if here is None else here.grads
        held: Mapping[int, Entry] = {}
        if plan is not None and plan.norm_over == norm_over and plan.backend == self.backend:
            found = planning.look_again(plan, members, self.state, grads_here)
            if found is not None:
                new, seen = found
                followed = planning.follow(plan, new, seen.grads)
                if followed is not None:
                    self._plan = followed
                    return followed, seen
                held = planning.held_entries(plan, seen.grads)
        grads = grads_here or [p.grad for p in members.params]
        meshes, numbers = norming.numbered(members.params, *norm_over)
        before = None if plan is None else plan.entries
        entries = make_entries(groups, grads, self.state, before, held, numbers)
        checked = [e for e in entries.all if e.place not in held]
        devices = {e.local.device for e in entries.all}
        on_kernel = {device for device in devices if self._has_kernel(device)}
        for device in on_kernel - self._launchers.keys():
            self._launchers[device] = Launcher(device)
        refuse_shared_memory(entries.all, on_kernel, self.state)
        if stating.lacks_state(checked, self.state) and any(map(is_capturing, devices)):
            raise RuntimeError(
                "FusedAdamW.step() cannot be captured in a CUDA graph before its state exists. Run "
                "at least one step() outside the capture, with gradients for the same parameters."
            )
        stating.init_state(checked, self.state, step_dtype())
        self._plan, seen = planning.make_plan(
            members,
            entries,
            self.state,
            on_kernel,
            grads_here,
            meshes,
            norming.copies_of(members.params) if with_norm else (),
            norm_over,
            self.backend,
            before=plan,
            held=held,
        )
        return self._plan, seen

    def _has_kernel(self, device: torch.device) -> bool:
        if self.backend == "auto":
            return device.type in _KERNEL_DEVICES
        return self.backend == "triton"

    def _kept(self, device: torch.device, plan: Plan, seen: Seen) -> Iterator[Tensor]:
        """What the launches of a device use and the next steps', too, whatever stream they are on.

        Only looked at where the stream or the plan is new.
        """
        for e in plan.copied:
            yield from (x for x in (e.dense, e.grad_copy) if x is not None and x.device == device)
        yield from self._hypers.alive(device)
        if self._telemetry is not None:
            yield from self._telemetry.measures.get(device, ())
        yield from (x for x in seen.states if x.device == device)

    def _sums(
        self, plan: Plan, own: dict[norming.Ranks, list[Tensor]], found_inf: Tensor | None
    ) -> dict[torch.device, Tensor]:
        """Sums of squares of all gradients, as each device of the plan needs them."""
        group = plan.norm_over[1]
        return norming.add_up(own, self._everywhere(plan), group, found_inf, plan.copies)

    def _everywhere(self, plan: Plan) -> list[torch.device]:
        """Devices that take part in a norm: one, if this rank has nothing to update, for others."""
        known = list(plan.by_device) or list(self._metrics)[:1]
        if known:
            return known
        devices = (local(p).device for p in flat(self.param_groups))
        somewhere = (device for device in devices if device.type != "meta")
        return [next(somewhere, None) or norming.device_of(plan.norm_over[1])]

    def _own_sums(
        self,
        plan: Plan,
        grads: Grads,
        tables: Mapping[torch.device, t.Table],
        memories: Mapping[torch.device, t.Memory],
    ) -> dict[norming.Ranks, list[Tensor]]:
        """Sums of squares on this rank, one a device, by the set of ranks that adds them up."""
        by_kernel = {
            device: self._launchers[device].sum_squares(table, memories[device], len(plan.meshes))
            for device, table in tables.items()
        }
        parts: dict[norming.Ranks, list[Tensor]] = {}
        for ranks, mesh in plan.meshes.items():
            own = parts[ranks] = []
            for device, entries in plan.by_device.items():
                if device in by_kernel:
                    own.append(by_kernel[device][mesh])
                else:
                    here = [grads[e.place] for e in entries if e.mesh == mesh]
                    own.append(reference.sum_squares(g for g in here if g is not None))
        return parts

    def _make_metrics(self, devices: Collection[torch.device]) -> None:
        """Metrics for these devices; where params have moved, the count of skips goes along."""
        before = dict(self._metrics)
        for device in devices:
            if device not in before:
                if is_capturing(device):
                    raise RuntimeError(
                        "FusedAdamW.step() with max_grad_norm or skip_nonfinite cannot be captured "
                        "in a CUDA graph yet: its metrics have no memory. Run one step() with the "
                        "same options outside the capture."
                    )
                self._metrics[device] = torch.zeros(t.METRICS, dtype=torch.float64, device=device)
                for kept in list(before.values())[:1]:  # all devices have the same
                    self._metrics[device].copy_(kept, non_blocking=device.type != "cpu")
        if devices:
            for device in before.keys() - set(devices):
                del self._metrics[device]

    def metrics(self) -> dict[str, Tensor]:
        """What the last steps with ``max_grad_norm``, ``skip_nonfinite``, ``group_metrics`` found.

        Returns 0-dim float64 tensors on the device of the params that the last such step updated,
        copies: ``grad_norm``, before clipping and unscaled; ``clip_factor``, by which gradients
        were multiplied; ``skipped_steps``, all since construction, for overflows that GradScaler
        found, too, unless it then skipped by itself (``fused=False``, FSDP1). Nothing waits for the
        device but who reads them. Zeros before the first such step. A rank with nothing to update
        knows what those know that it shares the norm with.

        With ``group_metrics`` also float64 ``[n_groups]``, for each of ``param_groups`` as they are
        now, of its params that had a gradient in the last step that was not skipped:

        * ``update_rms``: root mean square of what was to be added to the params, decay included;
        * ``param_rms``: that of the params, after the step;
        * ``lost_updates``: share, in [0, 1], of the updates other than zero that rounding undid:
          the param is what it was.

        A param with a master counts as its master: what the master keeps is not lost. Stochastic
        rounding undoes most of the small updates, and makes the others as much larger: their mean
        is right whatever the share.

        They are those of whole params: DTensors are added up over their mesh, replicas counted
        once, and all over ``grad_norm_group``, so that every rank has to call this, and those of
        the group need as many param groups. Complex elements count as two. Zeros for a group
        without such params, after a load, and where a skipped step was the first of some param. On
        GPUs float32 squares are added: numbers below 1e-22 count as 0, above 1e19 as infinity.
        """
        kept = next(iter(self._metrics.values()), None)
        values = torch.zeros(t.METRICS, dtype=torch.float64) if kept is None else kept.clone()
        found = {
            "grad_norm": values[t.NORM],
            "clip_factor": values[t.CLIP_FACTOR],
            "skipped_steps": values[t.SKIPPED],
        }
        if self.group_metrics:
            params = flat(self.param_groups)
            given = self.grad_norm_group
            device = local(params[0]).device if params else norming.device_of(given)
            found |= measuring.read(self._telemetry, self.param_groups, device, given)
        return found

    @torch.no_grad()
    def resync_master_weights(self) -> None:
        """Make every master exactly what its param shows.

        A weight changed from outside is followed without it, but only to half a unit of its last
        bfloat16 place: its old remainder still counts. Call it after ``model.load_state_dict`` or
        any other change of weights by hand. Nothing waits for the device.
        """
        for place, p in enumerate(flat(self.param_groups)):
            state = self.state.get(p, {})
            if not state.keys().isdisjoint((storing.REMAINDER, storing.MASTER)):
                check_memory(self._name_at(place), {"memory": local(p), **local_state(state)})
            if storing.REMAINDER in state:
                state[storing.REMAINDER].zero_()
            if storing.MASTER in state:
                state[storing.MASTER].copy_(p)

    def memory(self) -> dict[str, int]:
        """Bytes on this rank by what they hold and in which dtype, such as ``exp_avg_q uint8``.

        Params, gradients and states as they are now (before the first step there are no states),
        and ``tables``: what the launches keep on the device.
        """
        sizes: Counter[str] = Counter()
        for p in flat(self.param_groups):
            held = {"param": p, "grad": p.grad, **self.state.get(p, {})}
            for what, x in held.items():
                if isinstance(x, Tensor):
                    x = local(x)
                    sizes[f"{what} {str(x.dtype).removeprefix('torch.')}"] += x.nbytes
        sizes["tables"] = sum(launcher.nbytes for launcher in self._launchers.values())
        if self._release is not None:
            sizes["tables"] += self._release.nbytes
        return dict(sizes)

    def __repr__(self) -> str:
        """As torch shows groups, and how params are stored where that is not torch's way."""
        groups = self.param_groups
        if not any(map(storing.options_of, groups)):
            return super().__repr__()
        counts = Counter(
            storing.describe(storing.storage_of(group, p), p)
            for group in groups
            for p in group["params"]
        )
        lines = [f"    {what}: {count} parameters" for what, count in counts.items()]
        return "\n".join([super().__repr__().removesuffix(")") + "Stored", *lines, ")"])


def _check_backend(backend: object) -> None:
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"Invalid backend: {backend!r} (want 'auto', 'triton' or 'reference')")


def _scalar_betas(betas: Sequence[float | Tensor]) -> tuple[float | Tensor, ...]:
    # 0-dim, as torch keeps them
    return tuple(b.squeeze() if isinstance(b, Tensor) and b.dim() else b for b in betas)


def step_dtype() -> torch.dtype:
    """Dtype of new step counters, as torch chooses it."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _copy_in(copied: Iterable[tuple[Entry, Tensor]]) -> None:
    """Fill the stand-ins of params with gaps, and of gradients laid out otherwise."""
    for e, grad in copied:
        if e.dense is not None:
            e.dense.copy_(e.local)
        if e.grad_copy is not None:
            e.grad_copy.copy_(grad)


def _copy_out(copied: Iterable[tuple[Entry, Tensor]], asked: Asked) -> None:
    """Bring back what the step has written to stand-ins."""
    for e, grad in copied:
        if e.dense is not None:
            e.local.copy_(e.dense)
        if e.grad_copy is not None and asked.grad_scale is not None:
            _put_grad(e.param, grad, e.grad_copy)


def _put_grad(param: Tensor, grad: Tensor, unscaled: Tensor) -> None:
    """Leave the unscaled gradient where the user's is; an expanded one gets memory of its own."""
    if not overlaps_itself(grad):
        grad.copy_(unscaled)
    elif grad.dtype == param.dtype:
        param.grad = as_param(unscaled.clone(), param)
