"""bench/report.py writes what was measured, and takes nothing else for a GPU's result."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blocks
import pytest
import report
import step
import summary
import timing
import torch

Numbers = dict[str, Any]
README = "# A\n\n<!-- results: written -->\nold\n<!-- /results -->\n\nrest\n"


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """What bench/step.py writes of a CPU."""
    out = tmp_path_factory.mktemp("step")
    ceilings = {"4R3W fp32": [4.1, 4.0, 4.0, 2.0, 3.0], "copy fp32": [4.5]}
    options = ["--cases", "tiny", "tiny-mixed", "--rounds", "2", "--out", str(out)]
    options += ["--commit", "1a2b3c4", "--providers", "fused_adamw", "torch-fused"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(step, "measure_ceilings", lambda _, into, __: into.update(ceilings))
        assert step.main([*options, "fused_adamw+clip", "torch-fused+clip"]) == 0
    numbers: Numbers = json.loads((out / "step.json").read_text())
    return numbers


@pytest.fixture
def on_gpu(on_cpu: Numbers, tmp_path: Path) -> Numbers:
    """The same, as a GPU would leave it: made-up times, so that each is found again."""
    numbers = copy.deepcopy(on_cpu)
    numbers["machine"].update(device="NVIDIA Made-Up", driver="999.1", CUDA="13.9")
    lines = []
    for line in numbers["lines"]:
        ours = line["provider"].startswith("fused_adamw")
        line["gpu"] = [1e3, 1.25e3, 2e3] if ours else [4e3] * 3
        if "+clip" in line["provider"]:
            line["gpu"] = [3 * x if ours else 6 * x for x in line["gpu"]]
        if line["provider"].endswith(timing.AGAIN):
            line["gpu"] = [1e3, 1.3e3, 2e3]  # 4 % from the other
        line["wall"] = [2 * x if ours else x for x in line["gpu"]]
        line["host"] = [20.0, 22.0, 24.0] if ours else [330.0, 333.0, 339.0]
        line["launches"], line["syncs"] = (2, 0) if ours else (17, 0)
        line["bytes_moved"] = int(3e9)
        known = {key: line[key] for key in timing.Line.__dataclass_fields__}
        lines.append(timing.Line(**known))
    path = tmp_path / "made-up.json"
    ceilings = numbers["ceilings_by_round"]
    summary.write(path, numbers["command"], numbers["machine"], ceilings, lines, {})
    written: Numbers = json.loads(path.read_text())
    return written


def write(folder: Path, numbers: object) -> Path:
    path = folder / "step.json"
    path.write_text(json.dumps(numbers))
    return path


def cells(text: str, case: str) -> list[str]:
    """A row of the table."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {case} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_table_of_a_gpu(on_gpu: Numbers, tmp_path: Path) -> None:
    text = report.render(report.load(write(tmp_path, on_gpu)))
    assert "NVIDIA Made-Up" in text
    for fact in "driver 999.1", "CUDA 13.9", f"torch {torch.__version__}", "commit `1a2b3c4`":
        assert fact in text
    assert f"Triton {on_gpu['machine']['triton']}" in text
    assert "`python bench/step.py --cases tiny tiny-mixed --rounds 2 --out" in text
    # 4 ms to 1, 1.25 and 2 ms: the median ratio is 3.2; 3e9 bytes in 1.25 ms are 2.4 TB/s of 4
    columns = ["torch fused µs", "ours µs", "x", "x from idle", "TB/s", "% of ceiling"]
    assert cells(text, "case")[3:9] == columns
    wanted = ["6", "19,562", "4,000", "1,250", "3.20", "1.60", "2.40", "60.0", "2 / 17"]
    assert cells(text, "tiny")[1:] == [*wanted, "22.0 / 333"]
    assert cells(text, "tiny-mixed, clipped")[3:6] == ["24,000", "3,750", "6.40"]
    assert cells(text, "geometric mean of 2")[5:7] == ["**3.20**", "**1.60**"]
    assert cells(text, "geometric mean of 2, clipped")[5] == "**6.40**"
    assert "differs by 3.8% (median), 3.8% (largest)" in text
    assert "The ceiling is 4.00 TB/s" in text  # the faster half's median
    assert "2 of its 5 rounds were more than 5 % slower" in text
    assert "that torch sees in our steps: 0." in text
    assert "CPU" not in text


def test_formats_have_a_table_of_their_own(on_gpu: Numbers, tmp_path: Path) -> None:
    """Beside torch's fused AdamW on the same weights, and on the same model in float32."""
    assert "storage format" not in report.render(report.load(write(tmp_path, on_gpu)))
    template = next(x for x in on_gpu["lines"] if x["provider"] == "fused_adamw")
    made = {"numel": 1000, "state_bytes": 4030, "gpu": [5e2, 5e2, 5e2], "tbs": 3.0}
    made["times_rival"] = {"gpu": 1.5, "wall": 1.5}
    row = {**template, **made, "case": "tiny-bf16", "provider": "fused_adamw+master+int8"}
    on_gpu["lines"].append(row)
    text = report.render(report.load(write(tmp_path, on_gpu)))
    # torch's fused AdamW on "tiny": 4,000 us
    wanted = ["4.03", "500", "3.00", "75.0", "1.50", "8.00"]
    assert cells(text, "tiny-bf16, master + int8")[1:] == wanted
    on_gpu["lines"].append({**row, "case": "tiny", "provider": "fused_adamw+int8"})
    assert cells(report.render(report.load(write(tmp_path, on_gpu))), "tiny, int8")[-1] == "-"


def test_what_failed_is_not_hidden(on_gpu: Numbers, tmp_path: Path) -> None:
    line = next(x for x in on_gpu["lines"] if x["provider"] == "fused_adamw")
    line["problem"], line["times_rival"] = "RuntimeError: no such luck", {"gpu": None, "wall": None}
    text = report.render(report.load(write(tmp_path, on_gpu)))
    assert cells(text, "tiny")[3:] == ["4,000", "-", "-", "-", "-", "-", "2 / 17", "- / 333"]
    assert "Not timed: tiny, fused_adamw: RuntimeError: no such luck." in text


@pytest.mark.parametrize("provider", ["torch-fused+clip", "fused_adamw+clip"])
def test_a_time_that_the_gpu_waited_in_is_left_out(
    on_gpu: Numbers, tmp_path: Path, provider: str
) -> None:
    fields = timing.Line.__dataclass_fields__
    lines = [timing.Line(**{key: x[key] for key in fields}) for x in on_gpu["lines"]]
    (line,) = (x for x in lines if (x.case, x.provider) == ("tiny-mixed", provider))
    line.waited, line.gpu = True, []
    lines.append(dataclasses.replace(line, provider="fused_adamw+int8"))
    facts = on_gpu["command"], on_gpu["machine"], on_gpu["ceilings_by_round"]
    summary.write(tmp_path / "step.json", *facts, lines, {})
    text = report.render(report.load(tmp_path / "step.json"))
    row = cells(text, "tiny-mixed, clipped")
    ours = provider.startswith("fused_adamw")
    assert row[3:7] == (["24,000", "-", "-", "3.20"] if ours else ["-", "3,750", "-", "3.20"])
    assert (row[7:9] == ["-", "-"]) == ours
    assert cells(text, "tiny-mixed, int8")[2:] == ["-"] * 5
    mean = cells(text, "geometric mean of 2, clipped (x: of 1)")
    assert mean[5] == "**6.40**"
    assert mean[6] == cells(text, "tiny, clipped")[6].join(["**"] * 2)  # alike in both
    assert f"the host within it: tiny-mixed, {provider}; tiny-mixed, fused_adamw+int8." in text


def test_changes_since_the_commit_are_told(on_gpu: Numbers, tmp_path: Path) -> None:
    on_gpu["machine"]["commit"] = "1a2b3c4+"
    assert "commit `1a2b3c4` with changes" in report.render(report.load(write(tmp_path, on_gpu)))


def test_a_cpu_is_called_a_cpu(on_cpu: Numbers, tmp_path: Path) -> None:
    text = report.render(report.load(write(tmp_path, on_cpu), cpu=True))
    assert text.startswith("**Times of a CPU, which say nothing of a GPU.**")
    assert cells(text, "tiny")[9:] == ["- / -", "- / -"]


def no_commit(numbers: Numbers) -> None:
    numbers["machine"]["commit"] = "unknown"


def no_ceiling(numbers: Numbers) -> None:
    del numbers["ceilings_by_round"]["4R3W fp32"]


def one_side(numbers: Numbers) -> None:
    numbers["lines"] = [x for x in numbers["lines"] if x["provider"] != "torch-fused"]


def partly_cpu(numbers: Numbers) -> None:
    numbers["lines"][-1]["gpu"] = []


def named_a_gpu(numbers: Numbers) -> None:
    del numbers["machine"]["CUDA"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(no_commit, "does not say which commit", id="no-commit"),
        pytest.param(no_ceiling, "is not a step.json", id="no-ceiling"),
        pytest.param(one_side, "lacks times of fused_adamw or of torch-fused", id="one-side"),
        pytest.param(partly_cpu, "comes from a CPU", id="partly-cpu"),
        pytest.param(named_a_gpu, "comes from a CPU", id="named-a-gpu"),
    ],
)
def test_refused(
    on_gpu: Numbers, tmp_path: Path, spoil: Callable[[Numbers], None], words: str
) -> None:
    spoil(on_gpu)
    with pytest.raises(ValueError, match=words):
        report.load(write(tmp_path, on_gpu))


def test_the_command(
    on_gpu: Numbers, on_cpu: Numbers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rewrites what is between the comments; with an error it leaves the file as it was."""
    readme = tmp_path / "README.md"
    readme.write_text(README)
    options = ["--readme", str(readme)]
    cpu = write(tmp_path, on_cpu)
    missing = tmp_path / "missing.json"
    for path, words in (cpu, "comes from a CPU"), (missing, "No such file"), (readme, "not a step"):
        assert report.main([str(path), *options]) == 1
        assert words in capsys.readouterr().err
        assert readme.read_text() == README
    assert report.main([str(cpu), "--cpu", *options]) == 0
    assert "Times of a CPU" in readme.read_text()
    assert report.main([str(write(tmp_path, on_gpu)), *options]) == 0
    text = readme.read_text()
    assert text.startswith("# A\n\n<!-- results: written -->\n**NVIDIA Made-Up**")
    assert text.endswith("\n<!-- /results -->\n\nrest\n")
    assert "old" not in text
    assert "CPU" not in text


@pytest.mark.parametrize("arguments", [["step.json"], ["--readme", "out.md"]])
def test_runs_go_where_they_are_told(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert "name runs and --readme, or neither" in capsys.readouterr().err


def test_each_file_has_its_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_gpu: Numbers,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """README that of the fastest memory, whatever the folders' names, and a line of each other."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert report.main([]) == 0
    assert "\n**No GPU has run this yet.** " in readme.read_text()
    ceilings = on_gpu["ceilings_by_round"][report.CEILING]
    for name, times in ("a", 1.0), ("b", 2.0), ("c", 1.5):
        folder = tmp_path / "bench" / "results" / name
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(README)
        on_gpu["machine"]["device"] = f"NVIDIA {name}"
        on_gpu["ceilings_by_round"][report.CEILING] = [times * x for x in ceilings]
        write(folder, on_gpu)
    assert report.main([]) == 0
    for name in "abc":
        text = (tmp_path / "bench" / "results" / name / "README.md").read_text()
        assert f"**NVIDIA {name}**" in text
        assert "Also measured" not in text
    text = readme.read_text()
    assert "No GPU has run" not in text
    assert text.count("**NVIDIA") == text.count("**NVIDIA b**") == 1
    others = [line for line in text.splitlines() if line.startswith("Also measured: ")]
    assert others == [
        f"Also measured: [NVIDIA {name}](bench/results/{name}/README.md), commit `1a2b3c4`, "
        "geometric means 3.20 times as fast (1.60 from idle); 6.40 times as fast, clipped (3.20 "
        "from idle)."
        for name in "ca"
    ]
    # a new card's folder: nothing is written by halves
    (tmp_path / "bench" / "results" / "d").mkdir()
    on_gpu["ceilings_by_round"][report.CEILING] = [3 * x for x in ceilings]
    write(tmp_path / "bench" / "results" / "d", on_gpu)
    capsys.readouterr()
    assert report.main([]) == 1
    assert "d/README.md: want '<!-- results: ... -->'" in capsys.readouterr().err
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("# A\n", id="none"),
        pytest.param("<!-- /x -->\n<!-- x: a -->\n", id="order"),
        pytest.param("<!-- x: a -->\n<!-- /x -->\n" * 2, id="twice"),
        pytest.param("<!-- y: a -->\n<!-- /x -->\n", id="another"),
    ],
)
def test_comments_that_are_not_there(text: str) -> None:
    with pytest.raises(ValueError, match="once, to write between them"):
        blocks.replace(text, "x", "new")


def test_readme_says_what_was_measured() -> None:
    """Or `python bench/report.py` was forgotten, or someone wrote into the table."""
    files = report.blocks_by_file()
    assert {path.parent for path in files} > {path.parent for path in report.results()}
    for path, block in files.items():
        text = path.read_text()
        assert blocks.replace(text, "results", block) == text, path
