"""What users install: wheel, sdist and editable install; and what they get without Triton."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MODULES = {f"fused_adamw/{path.name}" for path in (REPOSITORY / "fused_adamw").glob("*.py")}
MODULES |= {f"fused_adamw/kernels/{path.name}" for path in (REPOSITORY / "kernels").glob("*.py")}
PIP = ("-m", "pip", "--no-input", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")


def run(
    *arguments: str | Path, path: Path | None = None, cwd: Path, interpret: bool = False
) -> str:
    """Python with only `path` added to what is installed; its output, or an error that shows it."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, with its link, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("source") / "repository"
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(REPOSITORY / name, folder)
    for name in ("fused_adamw", "kernels", "tests", "bench"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "results", "out")
        shutil.copytree(REPOSITORY / name, folder / name, symlinks=True, ignore=ignore)
    assert (folder / "fused_adamw" / "kernels").is_symlink()
    return folder


def build(kind: str, source: Path, out: Path) -> Path:
    """An archive, through the build backend's own hook (PEP 517), as pip and build call it."""
    code = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
    run("-c", code, out, cwd=source)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", *OFFLINE, "--target", target, wheel, cwd=target)
    return target


LOOK = """
    import importlib.metadata, importlib.resources, importlib.util, sys
    import fused_adamw, fused_adamw.kernels.table
    assert fused_adamw.__file__.startswith(sys.argv[1]), fused_adamw.__file__
    assert fused_adamw.kernels.table.BLOCK
    assert importlib.util.find_spec("kernels") is None, "Hugging Face's name"
    assert importlib.resources.files(fused_adamw).joinpath("py.typed").is_file()
    assert importlib.metadata.version("fused-adamw") == fused_adamw.__version__
    assert fused_adamw.__all__ == [
        "FusedAdamW",
        "convert_to_bf16_",
        "convert_to_fp32_",
        "release_gradients",
    ]
    print("ok")
"""


def look_at(target: Path, where: Path, cwd: Path) -> None:
    """Import it in a fresh process and check what there is."""
    assert run("-c", textwrap.dedent(LOOK), where, path=target, cwd=cwd) == "ok\n"


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(contents(wheel))
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == MODULES | {
        "fused_adamw/py.typed",
        "fused_adamw/kernels/launch_parameters.json",
    }
    assert wheel.name.endswith("-py3-none-any.whl")
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_wheel_works(installed: Path, tmp_path: Path) -> None:
    look_at(installed, installed, tmp_path)


def test_sdist_gives_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    # built by pip from the archive alone: nothing of the repository is near
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_sdist_has_its_files_once_as_files(sdist: Path) -> None:
    # a link would not unpack everywhere
    with tarfile.open(sdist) as archive:
        members = {m.name.split("/", 1)[-1]: m for m in archive.getmembers() if not m.isdir()}
    assert set(members) >= MODULES | {"fused_adamw/py.typed", "LICENSE", "README.md"}
    assert all(m.isfile() for m in members.values())
    assert not [name for name in members if name.startswith("kernels/")]


def test_editable_install_works(source: Path, tmp_path: Path) -> None:
    # as pip does it: the wheel that the backend builds for it (PEP 660), installed where .pth files
    # are read. The repository's root must not get on the path, where `kernels` is importable.
    (tmp_path / "wheel").mkdir()
    editable = build("editable", source, tmp_path / "wheel")
    target = tmp_path / "site"
    run(*PIP, "install", *OFFLINE, "--target", target, editable, cwd=tmp_path)
    start = "import site, sys; site.addsitedir(sys.argv[2]); "
    start += "assert not any(p.startswith(sys.argv[1]) for p in sys.path), sys.path\n"
    code = start + textwrap.dedent(LOOK)
    assert run("-c", code, source, target, path=target, cwd=tmp_path) == "ok\n"


# --- without Triton, or with the wrong one -----------------------------------------------------

MODEL = """
    import sys, types
    {absent}
    import torch
    import torch._dynamo  # torch.optim imports it, and it looks at triton more closely than we do
    from fused_adamw import FusedAdamW
    {fake}
    p = torch.nn.Parameter(torch.ones(10))
    p.grad = torch.ones(10)
    """

REFUSED = """
    optimizer = FusedAdamW([p], lr=0.1, backend="triton")
    before = repr(optimizer.state_dict())
    try:
        optimizer.step()
    except RuntimeError as error:
        print(error)
    else:
        raise AssertionError("backend='triton' has updated something")
    assert p.equal(torch.ones(10)) and p.grad.equal(torch.ones(10))
    assert repr(optimizer.state_dict()) == before and not optimizer.state

    optimizer.backend = "reference"  # the cure that is always there
    optimizer.step()
    assert not p.equal(torch.ones(10)) and optimizer.state[p]["step"] == 1
"""

ABSENT = 'sys.modules["triton"] = None  # import triton raises'
# torch._dynamo, which comes with the package, looks into the real one: faked after the import
FAKE = (
    'sys.modules["triton"] = types.SimpleNamespace(__version__="{}")'  # has nothing to compile with
)


def script(body: str, absent: str = "", fake: str = "") -> str:
    return textwrap.dedent(MODEL.format(absent=absent, fake=fake)) + textwrap.dedent(body)


def test_without_triton_cpu_tensors_are_optimised(installed: Path, tmp_path: Path) -> None:
    body = """
    FusedAdamW([p], lr=0.1).step()  # m/sqrt(v) is 1 in the first step; weight decay is 0.01
    assert torch.allclose(p, torch.full((10,), 1 - 0.1 * 0.01 - 0.1)), p
    print(*sorted(m.split(".")[-1] for m in sys.modules if m.startswith("fused_adamw.kernels")))
    """
    seen = run("-c", script(body, absent=ABSENT), path=installed, cwd=tmp_path)
    assert seen == "front kernels launch_parameters table\n"


@pytest.mark.parametrize(
    ("triton", "interpret", "words"),
    [
        pytest.param({"absent": ABSENT}, True, ["not installed", "triton>=3.6"], id="absent"),
        pytest.param({"fake": FAKE.format("3.2.0")}, True, ["3.2.0", "Upgrade"], id="3.2.0"),
        pytest.param({"fake": FAKE.format("3.5.1+git1b04")}, True, ["Upgrade"], id="3.5.1+git"),
        pytest.param({}, False, ["TRITON_INTERPRET=1", "backend='auto'"], id="not-interpreted"),
    ],
)
def test_triton_that_cannot_run_is_refused_with_the_cure(
    triton: dict[str, str], interpret: bool, words: list[str], installed: Path, tmp_path: Path
) -> None:
    # before anything has changed
    code = script(REFUSED, **triton)
    message = run("-c", code, path=installed, cwd=tmp_path, interpret=interpret)
    for word in words:
        assert word in message, message
    assert message.startswith(("FusedAdamW ", "backend='triton'"))


def test_triton_3_10_is_newer_than_3_6(installed: Path, tmp_path: Path) -> None:
    # a comparison of strings would refuse it
    body = """
    import triton
    triton.__version__ = "3.10.0"
    FusedAdamW([p], backend="triton").step()
    assert not p.equal(torch.ones(10))
    """
    run("-c", script(body), path=installed, cwd=tmp_path, interpret=True)
