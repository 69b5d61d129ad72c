"""The compiled kernel that is shipped: of these sources, free of spills, and what a compiler at hand says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hess_plugin_cuda.csrc import build, compilers

FACTS = build.SHIPPED.with_suffix(".json")
GOOD = """ptxas info    : Compiling entry function '{}' for 'sm_90a'
ptxas info    : Function properties for {}
    {} bytes stack frame, {} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""


@pytest.fixture(scope="module")
def compiled() -> build.Compiled:
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    return build.compile_kernels(compiler)


def log(stack: int = 0, spills: int = 0) -> str:
    return "".join(GOOD.format(name, name, stack, spills) for name in build.KERNELS)


def test_the_shipped_file_is_of_these_sources() -> None:
    facts = json.loads(FACTS.read_text())
    assert facts["sources"] == build.sources_digest(), "build it anew: python -m hess_plugin_cuda.csrc.build"
    assert facts["compiler"] == build.SHIPPING_COMPILER
    assert (facts["threads"], facts["shared_bytes"]) == (build.THREADS, build.SHARED_BYTES)
    assert all(used["spills"] == used["stack"] == 0 for used in facts["kernels"].values())
    image = build.SHIPPED.read_bytes()
    assert image[:4] == b"\x7fELF" and all(name.encode() in image for name in build.KERNELS)


def test_the_sources_compile_without_spills_or_warnings(compiled: build.Compiled) -> None:
    build.check_log(compiled)
    disassembler = build.find_disassembler()
    if disassembler is not None:
        build.check_instructions(compiled, disassembler)


def test_a_fresh_build_gives_the_shipped_bytes(compiled: build.Compiled) -> None:
    if compiled.compiler != build.SHIPPING_COMPILER:
        pytest.skip(f"the compiler here is {compiled.compiler}, the shipped file is made by {build.SHIPPING_COMPILER}")
    assert compiled.image == build.SHIPPED.read_bytes()
    assert json.loads(FACTS.read_text()) == build.facts_about(compiled)


def test_a_check_fails_where_the_shipped_file_differs(
    compiled: build.Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / build.SHIPPED.name
    monkeypatch.setattr(build, "SHIPPED", copy)
    monkeypatch.setattr(build, "build", lambda compiler: compiled)
    monkeypatch.setattr(build, "SHIPPING_COMPILER", compiled.compiler)
    assert build.main([]) == 0 and build.main(["--check"]) == 0
    image = bytearray(copy.read_bytes())
    image[-1] ^= 1
    copy.write_bytes(bytes(image))
    assert build.main(["--check"]) == 1 and "differs" in capsys.readouterr().out


def test_a_compiler_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("libnvrtc.so.12", "nvcc"):
        assert build.main(["--check", "--compiler", str(tmp_path / name)]) == 1
        assert "cannot be used" in capsys.readouterr().err


def test_bad_logs_fail_the_build() -> None:
    build.check_log(build.Compiled(b"", log(), "nvcc 13.0"))
    bad = {
        log(spills=8): "spills",
        log(stack=40): "spills",
        "ptxas info : (C7512) Potential Performance Loss: wgmma\n" + log(): "serialised",
        "ptxas info : (C7508) setmaxnreg ignored\n" + log(): "ignored",
        "softmax.cuh(3): warning #177-D: unused\n" + log(): "warns",
        "": "says nothing",
    }
    for text, words in bad.items():
        with pytest.raises(build.BuildError, match=words):
            build.check_log(build.Compiled(b"", text, "nvcc 13.0"))


def test_a_kernel_without_matrix_instructions_fails_the_build(compiled: build.Compiled, tmp_path: Path) -> None:
    fake = tmp_path / "nvdisasm"
    fake.write_text("#!/bin/sh\necho 'HMMA.16816.F32 R0, R1, R2, R0 ;'\n")
    fake.chmod(0o755)
    with pytest.raises(build.BuildError, match=r"have 0 HGMMA.64x128x16, not 16"):
        build.check_instructions(compiled, fake)


def test_broken_sources_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: build.Compiled) -> None:
    for name, text in compilers.sources().items():
        (tmp_path / name).write_text(text.replace("kTileQueries = 128", "kTileQueries = 128 +"))
    monkeypatch.setattr(compilers, "SOURCES", tmp_path)
    with pytest.raises(build.BuildError, match=r"(?s)refuses the sources.*work_items\.h"):
        build.compile_kernels(build.find_compiler())
