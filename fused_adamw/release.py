"""Gradient release: params are updated while backward runs, bucket by bucket, and gradients freed.

The first backward cuts params, in the order in which their gradients arrive, into buckets. From
then on a bucket is updated when its last gradient is there; `optimizer.step()` updates what is
left, and ends the iteration. There is one state and one set of hyper-parameters, the optimizer's.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import norm as norming
from .checks import param_name
from .entries import Entries, flat
from .kernels import table as t
from .launch import is_capturing, stream_of, used_here
from .look import states_of
from .optimizer import _OPTIONS, FusedAdamW
from .plan import Plan
from .shards import is_flattened, is_sharded, local

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    Sums = Mapping[torch.device, Tensor]


def release_gradients(
    optimizer: FusedAdamW,
    bucket_bytes: int = 64 << 20,  # 32M bf16 params, whose update takes far longer than its launch
    *,
    clip_by_last_norm: bool = False,
    local_gradients: bool = False,
) -> GradientRelease:
    """Update parameters while backward runs, and free their gradients there.

    Parameters are put into buckets of about `bucket_bytes` of gradients on this rank, in the order
    in which the first backward reaches them. When all gradients of a bucket are there, it is
    updated in one launch, and its gradients are None. ``optimizer.step()`` stays where it was: it
    updates buckets that lack a gradient (idle experts), and ends the iteration for schedulers and
    for us. The bits are those of ``backward(); step()``.

    Each parameter gets one gradient between two calls of ``optimizer.step()``. FSDP2 may
    accumulate with ``set_requires_gradient_sync(False)``, since nothing arrives there before the
    last backward. What looks at gradients between backward and step finds none.

    Args:
        optimizer: it holds the release, until :meth:`GradientRelease.remove`. Copies of it
            (deepcopy, pickle) are without.
        bucket_bytes: a bucket is full when its gradients have so many. 1 updates each parameter
            alone.
        clip_by_last_norm: with ``max_grad_norm``, multiply the gradients of this step by what the
            norm of the **last** step would have called for, and those of the first step by 1. A
            sudden large gradient gets through, and the step after it is clipped instead. It is no
            ``clip_grad_norm_``, which needs all gradients before the first update.
        local_gradients: torch.distributed runs, but nothing reduces the gradients of plain
            parameters after autograd has accumulated them, as DDP does.

    Raises:
        TypeError: another optimizer, or what wraps one.
        ValueError: bucket_bytes below 1.
        RuntimeError: what cannot be combined with it, here or in a later backward or ``step()``:
            ``max_grad_norm`` (without `clip_by_last_norm`), ``skip_nonfinite``, ``GradScaler``,
            ``differentiable``, DDP, FSDP1, offloaded gradients, capture in a CUDA graph; and a
            parameter's second gradient before ``step()``.
    """
    if not isinstance(optimizer, FusedAdamW):
        raise TypeError(
            f"release_gradients() wants a FusedAdamW, not a {type(optimizer).__name__}; where it "
            "is wrapped, pass the inner optimizer."
        )
    if bucket_bytes < 1:
        raise ValueError(f"Invalid bucket_bytes: {bucket_bytes} (want at least 1)")
    if optimizer._release is not None:
        raise RuntimeError("The gradients of this optimizer are released already: remove() first.")
    release = GradientRelease(optimizer, bucket_bytes, clip_by_last_norm, local_gradients)
    optimizer._release = release
    return release


class GradientRelease:
    """What :func:`release_gradients` returns; as a context manager it is removed at the end."""

    def __init__(
        self,
        optimizer: FusedAdamW,
        bucket_bytes: int,
        clip_by_last_norm: bool,
        local_gradients: bool,
    ) -> None:
        self._optimizer = optimizer
        self._bucket_bytes = bucket_bytes
        self._clip_by_last_norm, self._local_gradients = clip_by_last_norm, local_gradients
        # autograd runs the hooks of each device in a thread of its own
        self._lock = threading.Lock()
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._layout: list[tuple[list[Tensor], list[bool]]] = []  # of groups: params, frozen or not
        self._places: dict[Tensor, tuple[int, int]] = {}  # number of the group, position in it
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[Tensor, _Bucket] = {}
        self._filling: dict[torch.device, _Bucket] = {}
        self._seen: set[Tensor] = set()  # params that got a gradient in this iteration
        self._done: set[Tensor] = set()  # and those that were updated
        self._former: list[Tensor] = []  # params of this iteration's groups before they changed
        self._own_sums: dict[norming.Ranks, list[Tensor]] = {}  # squares updated in this iteration
        self._last_sums: Sums = {}
        self._look_at_groups()

    def remove(self) -> None:
        """Remove the hooks: ``optimizer.step()`` updates everything, as before."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        if self._optimizer._release is self:
            self._optimizer._release = None

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def forget_norm(self) -> None:
        """Clip the next step by 1: what was measured is of weights that are gone."""
        self._own_sums, self._last_sums = {}, {}

    @property
    def buckets(self) -> list[list[Tensor]]:
        """The parameters of each bucket, as gradients arrived; empty before the first backward."""
        return [list(bucket.params) for bucket in self._buckets]

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as FusedAdamW._update
    def finish(self) -> None:
        """Update what is left, and end the iteration: ``optimizer.step()`` calls it."""
        with self._lock:
            self._look_at_groups()
            left = [p for p in self._places if p.grad is not None]
            late = [p for p in left if p in self._done]
            if late:
                raise RuntimeError(
                    f"{self._name(late[0])} was updated during backward and has a gradient again "
                    f"({len(late)} such parameters): a step would update it twice. Assign no "
                    "gradients between backward() and step(); zero_grad() and then step() goes on "
                    "without these."
                )
            for p in left:
                if p not in self._bucket_of:
                    self._put(p)
            for bucket in self._buckets:
                if any(p.grad is not None for p in bucket.params):
                    self._update(bucket)
            for bucket in self._buckets:
                self._keep_states(bucket)
            self._last_sums = {} if self._optimizer.max_grad_norm is None else self._add_up()
            self._former, self._own_sums = [], {}
            self._filling.clear()
            self._seen.clear()
            self._done.clear()
            for bucket in self._buckets:
                bucket.arrived = 0
                bucket.streams.clear()

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as FusedAdamW._update
    def _arrived(self, p: Tensor) -> None:
        """A param's gradient is there, final on this rank."""
        with self._lock:
            if not self._seen:
                self._look_at_groups(p)
            if p not in self._places or p.grad is None:
                return  # no longer the optimizer's, or taken by another hook
            if p in self._seen:
                raise RuntimeError(
                    f"{self._name(p)} got a second gradient since the last optimizer.step(), but "
                    "released gradients are used at once. Call step() after each backward(), and "
                    "remove() the release to accumulate (FSDP2 can: set_requires_gradient_sync). "
                    "A parameter used in several checkpoints wants use_reentrant=False. After a "
                    "backward() that raised, zero_grad() and then step() end its iteration; what "
                    "it has updated stays so."
                )
            self._seen.add(p)
            if is_sharded(p) and is_sharded(p.grad) and p.grad.placements != p.placements:
                # A collective: here, in the order in which all ranks meet it. A bucket may be
                # complete on one rank and wait for an idle expert on another.
                p.grad = p.grad.redistribute(placements=p.placements)
            bucket = self._bucket_of.get(p) or self._put(p)
            bucket.arrived += 1
            device = local(p).device
            if device.type != "cpu":
                stream = torch.accelerator.current_stream(device)
                if stream not in bucket.streams:
                    bucket.streams.append(stream)
            full = bucket is not self._filling.get(device)
            if full and bucket.arrived == len(bucket.params):
                self._update(bucket)

    def _put(self, p: Tensor) -> _Bucket:
        """Into the bucket that is being filled."""
        device = local(p).device
        if device not in self._filling:
            self._filling[device] = _Bucket()
            self._buckets.append(self._filling[device])
        bucket = self._bucket_of[p] = self._filling[device]
        bucket.params.append(p)
        assert p.grad is not None
        grad = local(p.grad)
        bucket.bytes += grad.numel() * grad.element_size()
        if bucket.bytes >= self._bucket_bytes:
            del self._filling[device]
        return bucket

    def _update(self, bucket: _Bucket) -> None:
        """Update a bucket, as far as it has gradients, and free them."""
        device = local(bucket.params[0]).device
        if is_capturing(device):
            raise RuntimeError(
                "Released gradients cannot be captured in a CUDA graph: remove() the release "
                "before the capture."
            )
        if device.type != "cpu":
            # FSDP2 calls hooks on its communication streams
            stream = torch.accelerator.current_stream(device)
            for other in bucket.streams:
                if other != stream:
                    stream.wait_stream(other)
            # gradients may come from the memory of yet another stream
            used_here(local(p.grad) for p in bucket.params if p.grad is not None)
            used_here(self._last_sums.values())  # made by the last step(), and gone in the next
        if bucket.part is None:
            bucket.part = _Part(self._optimizer, [self._places[p] for p in bucket.params])
        own = bucket.part.update(self._optimizer, self._last_sums)
        for ranks, sums in own.items():
            self._own_sums.setdefault(ranks, []).extend(sums)
        self._done.update(p for p in bucket.params if p.grad is not None)
        for p in bucket.params:
            p.grad = None

    def _keep_states(self, bucket: _Bucket) -> None:
        """States were made where the bucket was first updated, on a communication stream perhaps.

        Who saves or replaces them does it on the stream of `step()`.
        """
        plan = None if bucket.part is None else bucket.part._plan
        stream = stream_of(local(bucket.params[0]).device)
        if plan is None or stream is None:
            return
        if bucket.kept is None or bucket.kept[0] != stream or bucket.kept[1] is not plan.entries:
            used_here(states_of(plan.entries, self._optimizer.state))
            bucket.kept = stream, plan.entries

    def _look_at_groups(self, arriving: Tensor | None = None) -> None:
        """Refuse what cannot be combined; follow groups that have changed."""
        groups = self._optimizer.param_groups
        self._refuse(groups)
        layout = [(list(g["params"]), [p.requires_grad for p in g["params"]]) for g in groups]
        if len(layout) == len(self._layout) and all(map(_same, layout, self._layout)):
            return
        if self._seen:
            self._former += self._places
        self._layout = layout
        self._places = {
            p: (number, position)
            for number, (params, _) in enumerate(layout)
            for position, p in enumerate(params)
        }
        self._buckets, self._bucket_of, self._filling = [], {}, {}
        for p in [p for p in self._hooks if p not in self._places and p is not arriving]:
            self._hooks.pop(p).remove()  # not the one whose hooks are being run
        weak = weakref.ref(self)  # params do not keep their optimizer alive

        def arrived(p: Tensor) -> None:
            release = weak()
            if release is not None:
                release._arrived(p)

        for p in self._places:
            if p.requires_grad and p not in self._hooks:
                hook = p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]  # torch's
                self._hooks[p] = hook

    def _refuse(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise RuntimeError for what cannot be right while gradients are released."""
        why = None
        if self._optimizer.skip_nonfinite:
            why = (
                "skip_nonfinite=True: when NaN or infinity is found, some parameters have been "
                "updated already. Set optimizer.skip_nonfinite = False"
            )
        elif self._optimizer.group_metrics:
            why = (
                "group_metrics=True: each bucket would measure for itself. Set "
                "optimizer.group_metrics = False"
            )
        elif self._optimizer.max_grad_norm is not None and not self._clip_by_last_norm:
            why = (
                "max_grad_norm: the norm is known when backward is over, and parameters are "
                "updated before. Set optimizer.max_grad_norm = None, or pass "
                "clip_by_last_norm=True, which clips each step by the norm of the one before it"
            )
        elif any(
            getattr(self._optimizer, key, None) is not None for key in ("grad_scale", "found_inf")
        ):
            why = (
                "GradScaler: its gradients are scaled, and whether to skip is known when backward "
                "is over. Those of this backward were used as they came. Train in bfloat16, "
                "without a scaler"
            )
        elif any(group["differentiable"] for group in groups):
            why = "differentiable=True. Use torch's own step for such groups"
        if why is None:
            why = self._not_final(flat(groups))
        if why is not None:
            raise RuntimeError(
                f"Gradients are released during backward, which excludes {why}, or remove() the "
                "release."
            )

    def _not_final(self, params: Sequence[Tensor]) -> str | None:
        """Why gradients may not be what they will be when backward is over."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        if any(is_sharded(p) and p.device_mesh.device_type != local(p).device.type for p in params):
            return (
                "FSDP2's CPUOffloadPolicy: gradients may still be on their way to the CPU. Keep "
                "parameters on the mesh's devices"
            )
        if any(map(is_flattened, params)):
            return (
                "FSDP1: when the hooks run, its gradients are not reduced, nor its parameters what "
                "it goes on with. Use fully_shard (FSDP2)"
            )
        if not self._local_gradients and not all(map(is_sharded, params)):
            return (
                "plain parameters in a process group, be it of one rank: DDP reduces their "
                "gradients after the hooks have run, so that ranks would drift apart. Use "
                "fully_shard (FSDP2), or pass local_gradients=True if nothing reduces them"
            )
        return None

    @property
    def nbytes(self) -> int:
        """Device memory of the buckets' tables."""
        parts = [bucket.part for bucket in self._buckets if bucket.part is not None]
        return sum(x.nbytes for part in parts for x in part._launchers.values())

    def _add_up(self) -> Sums:
        """Of this iteration's buckets the squares that clip the next; on all ranks, as `_sums`."""
        params = flat(self._optimizer.param_groups)
        group = self._optimizer.grad_norm_group
        # in an order that all ranks share, whichever buckets each has updated
        all_params = [*self._former, *params]
        meshes, _ = norming.numbered(all_params, True, group)
        parts = {ranks: self._own_sums.get(ranks, []) for ranks in meshes}
        devices = list(dict.fromkeys(local(p).device for p in params))
        used_here(x for sums in parts.values() for x in sums)
        # cloned: they may lie where the next step writes its own before it reads these
        added = norming.add_up(parts, devices, group, None, norming.copies_of(all_params))
        sums = {d: x.clone() for d, x in added.items()}
        self._optimizer._make_metrics(devices)
        for device, total in sums.items():
            self._optimizer._metrics[device][t.NORM] = total.sum().sqrt()
        return sums

    def _name(self, p: Tensor) -> str:
        number, position = self._places[p]
        return param_name(self._optimizer.param_groups[number], number, position)


def _same(one: tuple[list[Tensor], list[bool]], other: tuple[list[Tensor], list[bool]]) -> bool:
    return one[1] == other[1] and all(map(is_, one[0], other[0]))


@dataclasses.dataclass(eq=False)
class _Bucket:
    """Params of one device that are updated together."""

    params: list[Tensor] = dataclasses.field(default_factory=list)
    bytes: int = 0  # of their gradients, as they came first
    part: _Part | None = None  # made when it is updated first
    arrived: int = 0  # gradients of this iteration
    streams: list[torch.Stream] = dataclasses.field(default_factory=list)  # where they arrived
    kept: tuple[torch.Stream, Entries] | None = None  # whose states this stream has as its own


class _Part(FusedAdamW):
    """Some params of an optimizer: a plan and launches of their own, and nothing else."""

    def __init__(self, whole: FusedAdamW, places: Sequence[tuple[int, int]]) -> None:
        groups: dict[int, list[tuple[str, Tensor]]] = {}
        for number, position in sorted(places):
            group = whole.param_groups[number]
            named = (param_name(group, number, position), group["params"][position])
            groups.setdefault(number, []).append(named)
        super().__init__([{"params": params} for params in groups.values()])
        before = [0, *accumulate(len(group["params"]) for group in whole.param_groups)]
        positions: dict[int, list[int]] = {}
        for number, position in sorted(places):
            positions.setdefault(number, []).append(before[number] + position)
        for group, own in zip(self.param_groups, positions.values(), strict=True):
            group["positions"] = own  # the random bits of a step over all params
        self._numbers = list(groups)
        self._own: dict[norming.Ranks, list[Tensor]] = {}
        self._last_sums: Sums = {}

    def update(
        self, whole: FusedAdamW, last_sums: Sums
    ) -> Mapping[norming.Ranks, Sequence[Tensor]]:
        """Update params that have gradients, with what the whole optimizer says now.

        Returns the sums of squares of these gradients, if it was to clip.
        """
        for key in ("state", "_metrics", *_OPTIONS):
            setattr(self, key, getattr(whole, key))
        for group, number in zip(self.param_groups, self._numbers, strict=True):
            whole_group = whole.param_groups[number].items()
            group.update((k, v) for k, v in whole_group if k not in ("params", "param_names"))
        self._own, self._last_sums = {}, last_sums
        self._update()
        return self._own

    def _make_metrics(self, devices: Collection[torch.device]) -> None:
        """One dict for all parts: other devices' stay."""
        super()._make_metrics([*self._metrics, *devices])

    def _sums(
        self, plan: Plan, own: dict[norming.Ranks, list[Tensor]], found_inf: Tensor | None
    ) -> dict[torch.device, Tensor]:
        """Those of the last step, and this one's kept for the next."""
        self._own = own
        return {
            device: self._last_sums[device]
            if device in self._last_sums
            else torch.zeros(1, dtype=torch.float64, device=device)
            for device in plan.by_device
        }
