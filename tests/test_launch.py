"""What a step uploads, and the memory of captured steps; capture is played on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from captures import Recording, refused_until_a_step
from torch.utils._python_dispatch import TorchDispatchMode
from twins import give_grads, make_params

from fused_adamw import FusedAdamW, launch
from fused_adamw.kernels import table as t
from fused_adamw.kernels.front import Front, Launched


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of words of each upload, as they happen."""
    sizes: list[int] = []
    write_words = t.write_words

    def counted(table: t.Table, host: torch.Tensor) -> None:
        sizes.append(len(host))
        write_words(table, host)

    monkeypatch.setattr(t, "write_words", counted)
    return sizes


def model(device: torch.device, count: int = 3) -> list[torch.nn.Parameter]:
    """A few parameters with gradients, smaller than a block so that the interpreter is quick."""
    params = [torch.nn.Parameter(torch.randn(5 + i, device=device)) for i in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def test_uploads_only_what_moved(device: torch.device, uploads: list[int]) -> None:
    params = model(device)
    adamw = FusedAdamW(params, backend="triton")
    adamw.step()
    gap = -(t.GROUP_WORDS + 3) % t.SECTOR
    everything = t.GROUP_WORDS + 3 + gap + 3 * t.TENSOR_WORDS + 3  # one chunk a tensor
    assert uploads == [everything]
    adamw.step()
    assert uploads == [everything]  # nothing moved: no copy
    adamw.param_groups[0]["lr"] = 0.5
    adamw.step()
    assert uploads == [everything]  # it goes with the launch
    adamw.param_groups[0]["weight_decay"] = 0.5
    adamw.step()
    assert uploads[1:] == [t.GROUP_WORDS]
    for p in params:
        p.grad = torch.randn_like(p)  # the old one is alive while the new one is made: it moves
    adamw.step()
    assert uploads[2:] == [t.GROUP_WORDS + 3]
    params[1].grad = None  # idle: a column, no rebuild
    adamw.step()
    assert uploads[3:] == [t.GROUP_WORDS + 3]
    adamw.add_param_group({"params": model(device, 1)})
    adamw.step()
    assert uploads[4] > everything


@pytest.mark.parametrize("count", [1, 2, t.RATES, t.RATES + 1])
@pytest.mark.parametrize("tensor", [False, True])
def test_the_lr_of_each_group_counts(
    device: torch.device, uploads: list[int], count: int, tensor: bool
) -> None:
    """With the launch or, of more groups, in the table; the first may have it on the device."""
    params = [torch.nn.Parameter(p.double()) for p in model(device, count)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    lrs = [0.3, 1e-3, 0.05, 7.0, 1e-30]
    given: list[Any] = [*lrs[:count]]
    if tensor:
        given[0] = torch.tensor(lrs[0], dtype=torch.float64, device=device)
    optimizers = [
        make([{"params": [p], "lr": lr} for p, lr in zip(own, rates, strict=True)])
        for make, own, rates in (
            (functools.partial(FusedAdamW, backend="triton"), params, given),
            (functools.partial(torch.optim.AdamW, foreach=False), twins, lrs[:count]),
        )
    ]
    for step in range(3):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].mul_(0.7)
                else:
                    group["lr"] *= 0.7
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.ones_like(p) if step == 0 else p.grad
            twin.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-12, atol=0)
    assert uploads[1:] == ([] if count <= t.RATES else [count * t.GROUP_WORDS] * 2)


def test_a_device_scalar_is_never_uploaded_again(device: torch.device, uploads: list[int]) -> None:
    lr = torch.tensor(1e-3, device=device)
    adamw = FusedAdamW(model(device), lr=lr, backend="triton")
    adamw.step()
    lr.fill_(0.5)
    adamw.step()
    assert len(uploads) == 1


class Operations(TorchDispatchMode):
    """torch's operations on tensors: on a GPU most are launches, and the rest costs the host.

    One that reads a tensor from the host is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":  # torch's Optimizer.step marks its start and end
            self.seen.append(str(func))
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a step has read a tensor from the host")
        return func(*args, **(kwargs or {}))


def test_operations_see_a_host_read() -> None:
    """So that the tests below can fail."""
    with Operations(), pytest.raises(AssertionError, match="has read a tensor"):
        float(torch.ones(()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"skip_nonfinite": True, "group_metrics": True},
        {"max_grad_norm": 1.0, "state_dtype": "int8", "amsgrad": True},
    ],
    ids=str,
)
def test_a_step_is_its_launches_and_nothing_else(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Two, three with a norm; when nothing has moved, torch has nothing to do besides."""
    adamw = FusedAdamW(model(device), backend="triton", **options)
    adamw.step()
    kernels, launched = launch.load_kernels(device), []
    for module, name in (
        (kernels.norm, "sum_squares"),
        (kernels.schedule, "schedule"),
        (kernels.adamw, "adamw"),
    ):  # the interpreter runs a kernel through torch: count it, and leave it out
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: launched.append(name))
    with Operations() as operations:
        adamw.step()
    assert operations.seen == []
    with_norm = not {"max_grad_norm", "skip_nonfinite"}.isdisjoint(options)
    assert launched == [*["sum_squares"] * with_norm, "schedule", "adamw"]


def test_an_unchanged_step_takes_few_calls(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle GPU waits for them. As many for 1 tensor as for 1,000."""
    monkeypatch.setattr(Front, "launch", lambda *_: None)
    counts = []
    for tensors in (1, 1000):
        params = [torch.nn.Parameter(torch.zeros(2, device=device)) for _ in range(tensors)]
        for p in params:
            p.grad = torch.ones_like(p)
        adamw = FusedAdamW(params, backend="triton")
        adamw.step()
        adamw.step()
        calls: list[str] = []

        def note(frame: FrameType, event: str, _: object, calls: list[str] = calls) -> None:
            if event == "call" and frame.f_globals["__name__"].startswith("fused_adamw"):
                calls.append(frame.f_code.co_name)

        sys.setprofile(note)
        try:
            adamw.step()
        finally:
            sys.setprofile(None)
        counts.append(len(calls))
    assert 30 < counts[0] <= 60, counts
    assert counts[0] == counts[1], counts


@pytest.mark.parametrize("scaled", [False, True], ids=["", "grad_scaler"])
def test_a_step_reads_nothing_from_the_device(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    """From the first step on, with gradients that move and go and options that change."""
    kernels = launch.load_kernels(device)
    for module, name in ((kernels.schedule, "schedule"), (kernels.adamw, "adamw")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    adamw: Any = FusedAdamW(make_params(device), amsgrad=True, backend="triton")
    if scaled:
        adamw.grad_scale = torch.tensor(2.0, device=device)
        adamw.found_inf = torch.tensor(0.0, device=device)
    for step in range(4):
        give_grads(adamw, absent=step)
        adamw.param_groups[0]["lr"] = 0.1 * step
        with Operations() as operations:
            adamw.step()
        # Words are written through NumPy, whose view of a tensor begins with detach(). State is
        # made in step 0, and in step 1 for the param that was absent.
        first = {"zeros_like.default", "lift_fresh.default", "unbind.int"} if step < 2 else set()
        known = {"empty.memory_format", "detach.default", "slice.Tensor", "copy_.default"}
        if device.type == "cuda":  # step counters are copied there, and words from pinned memory
            first |= {"_to_copy.default"} if step < 2 else set()
            known |= {"_pin_memory.default", "is_pinned.default", "record_stream.default"}
        assert {name.removeprefix("aten.") for name in operations.seen} <= known | first


def test_captured_step_has_memory_of_its_own(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = model(device)
    adamw = FusedAdamW(params, backend="triton")
    adamw.step()
    launcher = adamw._launchers[device]
    with Recording(monkeypatch):
        adamw.step()
    (memory, host, *_), eager = launcher.captured[0], launcher._memory
    assert eager is not None
    assert memory.words.data_ptr() != eager.words.data_ptr()
    assert memory.scalars.data_ptr() != eager.scalars.data_ptr()
    recorded, source = memory.words.clone(), host.clone()
    assert torch.equal(recorded.cpu(), source)
    for p in params:
        p.grad = torch.randn_like(p)
    adamw.param_groups[0]["lr"] = 0.5
    adamw.step()
    adamw.load_state_dict(adamw.state_dict())
    adamw.step()
    assert torch.equal(memory.words, recorded)
    assert torch.equal(host, source)
    adamw.load_state_dict(adamw.state_dict())
    # alive as long as the optimizer, however often it loads: its table, and what else it was given
    assert len(adamw._captured) == 2


def test_captured_step_keeps_its_scalars_alive(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    lr = torch.tensor(1, device=device)  # no float: the kernel reads a copy
    adamw = FusedAdamW(model(device), lr=lr, backend="triton")
    adamw.step()
    with Recording(monkeypatch):
        adamw.step()
    copied = weakref.ref(adamw._hypers.alive(device)[0])
    adamw.step()
    assert copied() is not None


def test_a_capture_wants_a_norm_of_as_many_meshes_before_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel is another for one than for several."""
    adamw: Any = FusedAdamW(model(device), max_grad_norm=1.0, backend="triton")
    adamw.step()
    launcher, asked = adamw._launchers[device], adamw._asked(False)
    arguments = adamw._plan.tables[device], launcher._group_rows, asked
    with Recording(monkeypatch):
        launcher.prepare(*arguments, True)
        with pytest.raises(RuntimeError, match="with the same options outside the capture"):
            launcher.prepare(*arguments, False)


def test_captured_norm_has_sums_of_its_own(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    adamw = FusedAdamW(model(device), max_grad_norm=1.0, backend="triton")
    adamw.step()
    with Recording(monkeypatch):
        adamw.step()
    launcher: Any = adamw._launchers[device]
    (_, _, (sums, _), _) = launcher.captured[1]
    assert sums.data_ptr() != launcher._sums[0].data_ptr()


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])], ids=["current", "another"])
def test_a_capture_is_asked_for_on_the_device(
    index: int, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    @contextlib.contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        seen.append(device.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch.is_capturing(torch.device("cuda", index))
    assert seen == entered


def test_captured_step_keeps_its_copies_alive(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay writes and reads the gradient's copy, though the plan has long another one."""
    p = torch.nn.Parameter(torch.randn(2, 3, 4, device=device))
    adamw = FusedAdamW([p], backend="triton")
    p.grad = torch.randn(4, 3, 2, device=device).permute(2, 1, 0)  # of another layout: copied
    adamw.step()
    with Recording(monkeypatch):
        adamw.step()
    assert adamw._plan is not None
    copy = weakref.ref(adamw._plan.copied[0].grad_copy)
    p.grad = torch.randn(3, 2, 4, device=device).permute(1, 0, 2)  # a new plan, with its own copies
    adamw.step()
    assert adamw._plan.copied[0].grad_copy is not copy()
    assert copy() is not None


def test_each_capture_wants_a_step_before_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = model(device)
    adamw = FusedAdamW(params, backend="triton")
    with Recording(monkeypatch), pytest.raises(RuntimeError, match="before its state exists"):
        adamw.step()
    assert not adamw.state
    adamw.step()
    with Recording(monkeypatch):
        adamw.step()
    assert [float(adamw.state[p]["step"]) for p in params] == [2, 2, 2]
    refused_until_a_step(adamw, params, monkeypatch, "Run one step")
    assert [float(adamw.state[p]["step"]) for p in params] == [4, 4, 4]
    assert len(adamw._launchers[device].captured) == 2 * 2


def test_clipping_wants_a_step_with_it_before_the_capture(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = model(device)
    adamw = FusedAdamW(params, backend="triton")
    adamw.step()
    adamw.max_grad_norm = 1.0
    refused_until_a_step(adamw, params, monkeypatch, "metrics have no memory")
    assert [float(adamw.state[p]["step"]) for p in params] == [3, 3, 3]


@pytest.mark.parametrize(
    "change", ["grad_scale", "found_inf", "skip_nonfinite", "max_grad_norm", "eps"]
)
def test_kernels_are_not_compiled_in_a_capture(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A step in which everything is reserved, but for other kernels than the earlier ones had."""
    params = model(device)
    adamw: Any = FusedAdamW(params, backend="triton", max_grad_norm=1.0)
    adamw.step()
    new = {
        "grad_scale": torch.ones((), device=device),
        "found_inf": torch.zeros((), device=device),
        "skip_nonfinite": True,
        "max_grad_norm": None,
    }
    if change == "eps":  # whose reciprocal is infinite
        adamw.param_groups[0]["eps"] = 1e-40
    else:
        setattr(adamw, change, new[change])
    refused_until_a_step(adamw, params, monkeypatch, "with the same options")
    assert [float(adamw.state[p]["step"]) for p in params] == [3, 3, 3]


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_the_device_is_made_current_where_it_is_not(
    index: int, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class FakeModule:
        @staticmethod
        def current_device() -> int:
            return 0

        @staticmethod
        @contextlib.contextmanager
        def device(device: torch.device) -> Iterator[None]:
            seen.append(device.index)
            yield

    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeModule)
    with launch.current(torch.device("cuda", index)):
        assert seen == entered
    with launch.current(torch.device("cpu")):
        assert seen == entered


def test_memory_is_kept_for_each_stream_that_uses_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that outlives a step is told of a second stream, once; plans and states free it later."""
    current = ["first"]
    seen: list[tuple[int, str]] = []
    monkeypatch.setattr(launch, "stream_of", lambda device: current[0])
    monkeypatch.setattr(launch.Launcher, "_current_stream", lambda self: current[0])
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda self, stream: seen.append((self.untyped_storage().data_ptr(), stream)),
    )
    params = [*model(device), torch.nn.Parameter(torch.randn(6, 8, device=device)[:, ::2])]
    params[-1].grad = torch.randn(4, 6, device=device).t()
    options: dict[str, Any] = {"max_grad_norm": 1.0, "group_metrics": True, "backend": "triton"}
    adamw = FusedAdamW(params, lr=torch.tensor(1e-3, device=device), **options)
    adamw.step()
    seen.clear()
    adamw.step()
    assert seen == []
    current[0] = "second"
    adamw.step()
    assert {stream for _, stream in seen} == {"second"}
    launcher, plan = adamw._launchers[device], adamw._plan
    assert plan is not None
    assert adamw._telemetry is not None
    (copied,) = plan.copied
    wanted = [
        *(launcher._memory or ()),
        *launcher._sums[:1],
        *(x for s in adamw.state.values() for x in s.values()),
        *adamw._telemetry.measures[device],
        *adamw._hypers.alive(device),
        copied.dense,
        copied.grad_copy,
    ]
    told = {address for address, _ in seen}
    assert all(x.untyped_storage().data_ptr() in told for x in wanted if x is not None)
    seen.clear()
    adamw.step()
    assert seen == []


def test_going_again_passes_what_a_launch_would(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are not launched: what their handles are given is compared, and when."""
    passed: list[list[object]] = []
    went: list[bool] = []

    streams: list[int | None] = []
    current = [7]

    def handle(*given: object, stream: int | None = None) -> None:
        passed.append([x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given])
        streams.append(stream)

    def by_handle(
        self: Front, kernel: Any, key: object, programs: int, arguments: Any, call: Any
    ) -> Launched:
        handle(*arguments, key, programs)  # for constants: what stands for all of them
        return Launched(handle, arguments, (key, programs))

    launch_again = launch.Launcher._launch_again

    def both(self: launch.Launcher, table: t.Table, memory: t.Memory, rates: Any) -> bool:
        passed.clear()
        went.append(launch_again(self, table, memory, rates))
        if went[-1]:
            expected = passed.copy()
            passed.clear()
            assert streams[-2:] == current * 2
            self.kernels.schedule.schedule(self._front, table, memory, None, None, rates=rates)
            self.kernels.adamw.adamw(self._front, table, memory, False)
            assert passed == expected
        return went[-1]

    monkeypatch.setattr(Front, "launch", by_handle)
    monkeypatch.setattr(launch.Launcher, "_launch_again", both)
    monkeypatch.setattr(launch.Launcher, "_current_stream", lambda self: current[0])
    monkeypatch.setattr(launch, "used_here", lambda tensors: None)
    params = model(device)
    adamw: Any = FusedAdamW(params, backend="triton")
    group = adamw.param_groups[0]

    def goes_again() -> bool | None:
        """None: not even asked."""
        went.clear()
        current[0] += 1
        adamw.step()
        return went[0] if went else None

    assert goes_again() is None
    for key, value, again in (
        ("lr", 0.5, True),
        ("weight_decay", 0.5, True),  # one column is uploaded
        ("eps", 1e-40, False),  # another kernel
        ("eps", 1e-9, False),
        ("betas", (0.4, 0.9), False),
        ("betas", (0.9, 0.4), True),
        ("lr", torch.tensor(0.1, device=device), True),  # read there
        ("lr", 0.1, True),
        ("betas", (0.9, 0.99), False),
    ):
        group[key] = value
        assert goes_again() is again, key
        assert goes_again() is True
    for p in params:
        p.grad = torch.randn_like(p)  # moves
    assert goes_again() is True
    params[1].grad = None
    assert goes_again() is True
    for name, value in ("max_grad_norm", 1.0), ("skip_nonfinite", True), ("group_metrics", True):
        before = getattr(adamw, name)
        setattr(adamw, name, value)
        assert goes_again() is None
        setattr(adamw, name, before)
        assert goes_again() is False  # another plan
    adamw.grad_scale = adamw.found_inf = torch.zeros((), device=device)
    assert goes_again() is None
    adamw.grad_scale = adamw.found_inf = None
    assert goes_again() is True
    launcher, rates = adamw._launchers[device], t.pack_rates([0.1])
    memory, table = launcher._memory, launcher._whole
    assert not launch_again(launcher, table, memory._replace(), rates)  # as of a captured step
    monkeypatch.setattr(launch, "_HERE", contextlib.nullcontext())
    assert not launch_again(launcher, table, memory, rates)  # the current device is another
    assert goes_again() is True
    params[0].data = params[0].data.clone()
    assert goes_again() is False
    for _ in range(t.RATES):
        adamw.add_param_group({"params": model(device, 1)})
        assert goes_again() is None  # other memory
        assert goes_again() is True
    adamw.load_state_dict(adamw.state_dict())
    assert goes_again() is None


def test_memory_fits_only_its_own_size(device: torch.device) -> None:
    adamw = FusedAdamW(model(device), backend="triton")
    adamw.step()
    plan = adamw._plan
    assert plan is not None
    table = dataclasses.replace(plan.tables[device], groups=t.frozen(t.np.zeros(9, t.np.int64)))
    memory = t.allocate(table, device)
    assert memory.fits(table)
    assert not memory.fits(dataclasses.replace(table, n_tensors=4))
    wide = t.Signature(*[torch.float64] * 4, amsgrad=False)
    assert not memory.fits(dataclasses.replace(table, signatures=(wide,)))


@pytest.mark.parametrize("failing", ["prepare", "compile_for"])
def test_a_launch_that_cannot_be_prepared_counts_no_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    params = model(device)
    adamw = FusedAdamW(params, backend="triton")

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of resources")

    if failing == "prepare":
        monkeypatch.setattr(launch.Launcher, "prepare", fails)
    else:
        kernels = launch.load_kernels(device)
        monkeypatch.setattr(kernels.adamw, "compile_for", fails)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="out of resources"):
        adamw.step()
    assert all(map(torch.equal, params, before))
    assert [float(adamw.state[p]["step"]) for p in params] == [0, 0, 0]
    monkeypatch.undo()
    adamw.step()
    assert [float(adamw.state[p]["step"]) for p in params] == [1, 1, 1]
