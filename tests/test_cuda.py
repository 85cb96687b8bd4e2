"""What only a GPU can show: no synchronisation, no allocation, graphs, size, streams, accuracy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from truth import TrueAdamW, assert_as_true_as_torch

from fused_adamw import FusedAdamW, release_gradients
from fused_adamw import plan as planning
from fused_adamw.kernels import nvidia
from fused_adamw.kernels.launch_parameters import architecture

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # torch's own word on the mode that we test with, and on the capture that we break off
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),
]

SHAPES = [(1,), (7,), (1023,), (1025,), (64, 33), (3, 5, 7), (5000,), ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Within the test, what waits for the GPU raises, once `torch.cuda.synchronize` was called."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(dtypes: list[torch.dtype] = DTYPES) -> list[torch.nn.Parameter]:
    """Parameters of all shapes and dtypes, with gradients."""
    params = [
        torch.nn.Parameter(torch.randn(shape, device="cuda").to(dtype))
        for dtype in dtypes
        for shape in SHAPES
    ]
    new_grads(params)
    return params


def new_grads(params: list[torch.nn.Parameter]) -> None:
    """Fresh gradients, in fresh memory."""
    for p in params:
        p.grad = torch.randn_like(p)


def clones(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The same values in other memory."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, copy in zip(params, copies, strict=True):
        copy.grad = None if p.grad is None else p.grad.clone()
    return copies


def assert_equal_bits(a: list[torch.nn.Parameter], b: list[torch.nn.Parameter]) -> None:
    """Name the first parameter that differs."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"param {i} {tuple(x.shape)} {x.dtype}: {(x - y).abs().max()}"


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
@pytest.mark.parametrize("measured", [False, True], ids=["plain", "group-metrics"])
def test_never_waits_for_the_device(tensor_lr: bool, measured: bool) -> None:
    lr = torch.tensor(1e-3, device="cuda") if tensor_lr else 1e-3
    params = make()
    half = len(params) // 2
    adamw = FusedAdamW(
        [{"params": params[:half]}, {"params": params[half:], "amsgrad": True}],
        lr=lr,
        group_metrics=measured,
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(adamw, 0.9)
    adamw.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for i in range(5):
        new_grads(params)
        params[i].grad = None
        adamw.step()
        adamw.metrics()
        scheduler.step()


@pytest.mark.usefixtures("no_sync")
def test_whole_training_never_waits_for_the_device() -> None:
    """Scaler, norm, clip, skip, schedule, metrics, over an overflow."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    net.cuda()
    adamw = FusedAdamW(net.parameters(), max_grad_norm=0.01, skip_nonfinite=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(adamw, 0.9)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    good = torch.randn(32, 64, device="cuda")
    bad = torch.full_like(good, torch.inf)

    def train(x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cuda", torch.float16):
            loss = net(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(adamw)
        scaler.update()
        scheduler.step()
        adamw.zero_grad()
        return adamw.metrics()

    train(good)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    seen = [train(bad if i == 2 else good) for i in range(5)]
    torch.cuda.set_sync_debug_mode("default")
    assert [float(x["skipped_steps"]) for x in seen] == [0, 0, 1, 1, 1]
    assert all(0 < float(x["clip_factor"]) < 1 for x in (*seen[:2], *seen[3:]))
    assert scaler.get_scale() == 2.0


@pytest.mark.usefixtures("no_sync")
def test_skip_without_the_host_knowing() -> None:
    params = make([torch.float32])
    adamw = FusedAdamW(params)
    adamw.step()
    before = clones(params)
    adamw.grad_scale = torch.tensor(2.0, device="cuda")  # type: ignore[attr-defined]
    adamw.found_inf = torch.tensor(1.0, device="cuda")  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    adamw.step()
    torch.cuda.set_sync_debug_mode("default")
    assert_equal_bits(params, before)
    assert all(float(adamw.state[p]["step"]) == 1 for p in params)


@pytest.mark.parametrize("measured", [False, True], ids=["plain", "group-metrics"])
def test_allocates_nothing_after_the_first_step(measured: bool) -> None:
    params = make()
    adamw = FusedAdamW(params, group_metrics=measured)
    adamw.step()
    torch.cuda.synchronize()
    count = torch.cuda.memory_stats()["allocation.all.allocated"]
    for i in range(5):
        adamw.param_groups[0]["lr"] = 10.0**-i
        adamw.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == count


@pytest.mark.parametrize("measured", [False, True], ids=["plain", "group-metrics"])
@pytest.mark.parametrize("groups", [1, 40])
def test_at_most_three_launches_and_one_copy(groups: int, measured: bool) -> None:
    params = make()
    chunks = [params[i::groups] for i in range(groups)]
    adamw = FusedAdamW([{"params": chunk} for chunk in chunks if chunk], group_metrics=measured)
    adamw.step()
    new_grads(params)
    adamw.param_groups[0]["lr"] = 0.5
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        adamw.step()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [e for e in on_gpu if e.name.startswith("Memcpy")]
    kernels = [e for e in on_gpu if not e.name.startswith(("Memcpy", "Memset", "Optimizer"))]
    assert len(copies) <= 1, [e.name for e in copies]
    assert 1 <= len(kernels) <= 3, [e.name for e in kernels]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
def test_as_true_as_torchs_fused_kernel(dtype: torch.dtype, amsgrad: bool) -> None:
    params = [torch.nn.Parameter(torch.randn(100_003, device="cuda").to(dtype))]
    theirs = clones(params)
    exact = TrueAdamW(params[0], amsgrad=amsgrad)
    ours = FusedAdamW(params, amsgrad=amsgrad)
    torchs = torch.optim.AdamW(theirs, amsgrad=amsgrad, fused=True)
    for _ in range(1 if dtype in (torch.bfloat16, torch.float16) else 10):
        new_grads(params)
        assert params[0].grad is not None
        theirs[0].grad = params[0].grad.clone()
        exact.step(params[0].grad)
        ours.step()
        torchs.step()
    mine, its = ours.state[params[0]], torchs.state[theirs[0]]
    assert_as_true_as_torch(
        [params[0], mine["exp_avg"], mine["exp_avg_sq"]],
        [theirs[0], its["exp_avg"], its["exp_avg_sq"]],
        [exact.p, exact.m, exact.v],
    )


def test_the_schedule_and_the_table_are_seen_by_all_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of many waves, in steps with nothing between, though the update begins beside the schedule.

    Each step has other gradients, in memory of their own, another lr and other bias corrections.
    """
    sizes = [2**20] * 16 + [70_001] * 200 + [1000] * 100
    values = [torch.randn(n, device="cuda").to(DTYPES[i % 2]) for i, n in enumerate(sizes)]
    grads = [[torch.randn_like(x) for x in values] for _ in range(3)]
    default, results = planning.launch_parameters, []
    for overlap in (True, False):
        own = default(architecture(torch.device("cuda")))._replace(overlap=overlap)
        monkeypatch.setattr(planning, "launch_parameters", lambda _, own=own: own)
        params = [torch.nn.Parameter(x.clone()) for x in values]
        optimizer = FusedAdamW(params, lr=0.1)
        torch.cuda.synchronize()
        for step in range(30):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            for p, grad in zip(params, grads[step % 3], strict=True):
                p.grad = grad
            optimizer.step()
        states = [optimizer.state[p][key] for p in params for key in ("exp_avg", "exp_avg_sq")]
        results.append([*params, *states])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_thousand_replays_of_a_graph_equal_eager_steps() -> None:
    params = make()
    twin = clones(params)
    lr, twin_lr = (torch.tensor(1e-3, device="cuda") for _ in range(2))
    captured, eager = FusedAdamW(params, lr=lr), FusedAdamW(twin, lr=twin_lr)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    eager.step()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for i in range(1000):
        lr.fill_(1e-3 / (i + 1))
        twin_lr.fill_(1e-3 / (i + 1))
        graph.replay()
        eager.step()
        if i == 500:  # an eager step of the captured optimizer between replays disturbs neither
            new_grads_kept = [p.grad for p in params]
            captured.step()
            eager.step()
            assert all(p.grad is g for p, g in zip(params, new_grads_kept, strict=True))
    assert_equal_bits(params, twin)
    assert {float(captured.state[p]["step"]) for p in params} == {1002.0}


def test_metrics_of_a_replay_equal_those_of_an_eager_step() -> None:
    params = make()
    twin = clones(params)
    captured, eager = (
        FusedAdamW([{"params": x[::2]}, {"params": x[1::2]}], group_metrics=True)
        for x in (params, twin)
    )
    captured.step()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for i in range(5):
        for p, q in zip(params, twin, strict=True):
            assert p.grad is not None
            assert q.grad is not None
            q.grad.copy_(p.grad.normal_())
        graph.replay()
        eager.step()
        if i == 2:  # an eager step of the captured optimizer writes to the same memory
            captured.step()
            eager.step()
        ours, expected = captured.metrics(), eager.metrics()
        assert (ours["update_rms"] > 0).all()
        assert all(torch.equal(ours[name], x) for name, x in expected.items())


def test_capture_as_torchs_recipe_has_it() -> None:
    # gradients are set to None before the capture, so that each is new in it
    params = make([torch.float32, torch.bfloat16])
    twin = clones(params)
    ours, eager = FusedAdamW(params), FusedAdamW(twin)
    static = [torch.randn_like(p) for p in params]

    def backward() -> None:
        for p, x in zip(params, static, strict=True):
            p.grad = x * p.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backward()
        ours.step()
    torch.cuda.current_stream().wait_stream(side)
    for p, x in zip(twin, static, strict=True):
        p.grad = x * p.detach()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    ours.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        backward()
        ours.step()
    for _ in range(20):
        for x in static:
            x.normal_()
        graph.replay()
        for p, x in zip(twin, static, strict=True):
            p.grad = x * p.detach()
        eager.step()
    assert_equal_bits(params, twin)


@pytest.mark.parametrize(("scaled", "replays"), [(False, 10_000), (True, 2_000)], ids=str)
def test_a_graph_of_the_whole_training_step_equals_eager(scaled: bool, replays: int) -> None:
    """Forward, backward, scaler, clip, skip, a changing lr: bit for bit, over NaNs, too.

    No matrix product: cuBLAS may choose other kernels in a capture, and so other bits.
    """

    class Run:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.params = [torch.nn.Parameter(torch.randn(64, device="cuda")) for _ in range(2)]
            self.lr = torch.tensor(0.01, device="cuda")
            self.x = torch.randn(16, 64, device="cuda")
            self.optimizer = FusedAdamW(
                self.params, self.lr, max_grad_norm=0.5, skip_nonfinite=True
            )
            # as many steps to grow after as there are good ones between two overflows
            self.scaler = torch.amp.GradScaler("cuda", 8.0, growth_interval=7, enabled=scaled)

        def step(self) -> None:
            self.optimizer.zero_grad()
            loss = ((self.x * self.params[0]).tanh() * self.params[1]).sum(1).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    captured, eager = Run(), Run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    eager.step()
    captured.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    batches = torch.randn(8, 16, 64, device="cuda")
    batches[5, 3, 2] = torch.inf
    for i in range(replays):
        for run in (captured, eager):
            run.x.copy_(batches[i % 8])
            run.lr.fill_(0.01 / (1 + i % 10))
        graph.replay()
        eager.step()
    assert_equal_bits(captured.params, eager.params)
    for key, x in captured.optimizer.metrics().items():
        assert torch.equal(x, eager.optimizer.metrics()[key]), key
    assert float(eager.optimizer.metrics()["skipped_steps"]) == replays // 8
    assert captured.scaler.get_scale() == eager.scaler.get_scale()


class Elementwise(torch.nn.Module):
    """No matrix product: cuBLAS may choose other kernels in a capture, and so other bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (
            torch.nn.Parameter(torch.randn(64, device="cuda")) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 64] -> [n]."""
        return ((x * self.first).tanh() * self.second).sum(1)


# the graph keeps nodes of the side stream that it was warmed up on; torch tells, and waits for it
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_beside_make_graphed_callables() -> None:
    """Forward and backward replayed, whose gradients lie where the graph has them; step() eager."""
    nets = Elementwise(), Elementwise()
    torch.cuda.make_graphed_callables(nets[0], (torch.randn(16, 64, device="cuda"),))
    optimizers = [
        FusedAdamW(net.parameters(), max_grad_norm=0.5, skip_nonfinite=True) for net in nets
    ]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
    for step in range(20):
        torch.manual_seed(step)
        x = torch.randn(16, 64, device="cuda")
        x[3, 2] = torch.inf if step == 5 else 1.0
        for net, optimizer, schedule in zip(nets, optimizers, schedules, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            schedule.step()
        assert_equal_bits(list(nets[0].parameters()), list(nets[1].parameters()))
    assert optimizers[0].metrics()["skipped_steps"] == 1


def test_clipping_wants_a_step_with_it_before_the_capture() -> None:
    params = make([torch.float32])
    adamw = FusedAdamW(params)
    adamw.step()
    before = clones(params)
    adamw.max_grad_norm = 1.0
    with (
        pytest.raises(RuntimeError, match="metrics have no memory"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        adamw.step()
    assert_equal_bits(params, before)


def test_a_graph_outlives_the_plan_it_was_captured_with() -> None:
    # a gradient of another layout is copied in the graph; a new plan must not free that copy
    p, late = (torch.nn.Parameter(torch.randn(64, 33, device="cuda")) for _ in range(2))
    (twin,) = clones([p])
    ours, eager = FusedAdamW([p, late]), FusedAdamW([twin])
    p.grad = torch.randn(33, 64, device="cuda").t()
    twin.grad = p.grad
    ours.step()
    eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    late.grad = torch.randn_like(late)
    ours.step()
    eager.step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    noise = [torch.full((64, 33), float("nan"), device="cuda") for _ in range(64)]
    for _ in range(5):
        graph.replay()
        eager.step()
    assert_equal_bits([p], [twin])
    assert all(x.isnan().all() for x in noise)


def test_capture_without_a_step_before_it_says_so() -> None:
    params = make([torch.float32])
    adamw = FusedAdamW(params)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="before its state exists"),
        torch.cuda.graph(graph),
    ):
        adamw.step()
    assert not adamw.state


def test_more_than_2_to_the_31_elements_in_one_tensor() -> None:
    # 2^31 + 8: the offset of the last vector does not fit into 32 bits. 17 GiB of bf16.
    numel = 2**31 + 8
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB")
    p = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    adamw = FusedAdamW([p], lr=0.5, weight_decay=0.0)
    adamw.step()
    assert p.detach().min().item() == p.detach().max().item() == -0.5
    assert adamw.state[p]["exp_avg"].min().item() > 0


def test_two_streams() -> None:
    params = make([torch.float32, torch.bfloat16])
    twin = clones(params)
    ours, expected = FusedAdamW(params), FusedAdamW(twin)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for i in range(20):
        stream = streams[i % 2]
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_stream(streams[1 - i % 2])
        with torch.cuda.stream(stream):
            new_grads(params)
            for p, q in zip(params, twin, strict=True):
                assert p.grad is not None
                q.grad = p.grad.clone()
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
        expected.step()
    assert_equal_bits(params, twin)


@pytest.mark.usefixtures("no_sync")
def test_released_gradients_free_their_memory_without_a_wait() -> None:
    nets = [
        torch.nn.Sequential(
            *[torch.nn.Linear(1024, 1024, bias=False, device="cuda") for _ in range(8)]
        )
        for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    released, plain = (FusedAdamW(net.parameters()) for net in nets)
    layer = 4 * 1024 * 1024
    release_gradients(released, layer)
    x = torch.randn(4, 1024, device="cuda")
    peaks = []
    for net, optimizer in zip(nets, (released, plain), strict=True):
        for step in range(4):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            loss.backward()
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < 3 * layer
    assert peaks[1] > 7 * layer  # 8, less what the end of backward() frees
    assert_equal_bits(list(nets[0].parameters()), list(nets[1].parameters()))


def test_released_gradients_that_arrive_on_two_streams() -> None:
    # FSDP2 runs hooks itself, on its communication streams
    p, q = params = [torch.nn.Parameter(torch.randn(1000, device="cuda")) for _ in range(2)]
    twin = clones(params)
    released, plain = FusedAdamW(params), FusedAdamW(twin)
    release = release_gradients(released, 2 * 4000)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(4):
        for x, other, stream in zip((p, q), twin, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10**7 if x is p else 0)
                x.grad = torch.randn_like(x)
                other.grad = x.grad.clone()
                for hook in x._post_accumulate_grad_hooks.values():  # type: ignore[attr-defined]
                    hook(x)
                assert (x.grad is None) == (x is q)
        assert p.grad is None
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        released.step()
        plain.step()
    assert len(release.buckets) == 1
    assert_equal_bits(params, twin)


def test_grad_scaler_with_overflows_follows_torchs_fused() -> None:
    params = make([torch.float32])
    twin = clones(params)
    ours, theirs = FusedAdamW(params), torch.optim.AdamW(twin, fused=True)
    scalers = [torch.amp.GradScaler("cuda", init_scale=4.0, growth_interval=2) for _ in range(2)]
    for i in range(12):
        for p, q in zip(params, twin, strict=True):
            p.grad = torch.randn_like(p) * scalers[0].get_scale()
            if i % 5 == 3:
                p.grad.view(-1)[-1] = float("inf")
            q.grad = p.grad.clone()
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            scaler.scale(torch.zeros((), device="cuda"))  # as a loss would initialise it
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for p, q in zip(params, twin, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)  # powers of two: exact
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)
            assert float(ours.state[p]["step"]) == float(theirs.state[q]["step"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_in_one_optimizer() -> None:
    params = [torch.nn.Parameter(torch.randn(1000, device=f"cuda:{i}")) for i in range(2)]
    twin = clones(params)
    new_grads(params)
    for p, q in zip(params, twin, strict=True):
        assert p.grad is not None
        q.grad = p.grad.clone()
    FusedAdamW(params).step()
    torch.optim.AdamW(twin, fused=True).step()
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_what_one_device_finds_skips_the_step_on_both(scaled: bool) -> None:
    params = [torch.nn.Parameter(torch.ones(1000, device=f"cuda:{i}")) for i in range(2)]
    adamw = FusedAdamW(params, max_grad_norm=1.0, skip_nonfinite=not scaled)
    scaler = torch.amp.GradScaler("cuda", 4.0, enabled=scaled)
    for overflow in (False, True):
        before = clones(params)
        new_grads(params)
        if overflow:
            params[1].grad[-1] = torch.inf  # type: ignore[index]
        scaler.scale(torch.zeros((), device="cuda:0"))
        scaler.step(adamw)
        scaler.update()
        unchanged = [torch.equal(p, q) for p, q in zip(params, before, strict=True)]
        assert unchanged == [overflow] * 2
    assert float(adamw.metrics()["skipped_steps"]) == 1


@pytest.mark.skipif(torch.version.hip is not None, reason="NVIDIA's")
def test_the_driver_says_its_version() -> None:
    """Else the update would wait for the schedule's end, and no one would notice."""
    assert nvidia.driver_version() >= 12000
