"""A test that runs out of GPU memory says what was planned beside what is there, and is never a skip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pytest_vlmgpu.watching.meter import Allocator
from pytest_vlmgpu.watching.out_of_memory import GpuFacts, describe, find, headline
from vlm_doctor.machine import GpuProcess
from vlm_doctor.placement import LedgerLine, Limits, Plan, Stage
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Workload

if TYPE_CHECKING:
    from vlm_doctor.placement import LedgerKind


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.06 GiB of which 310.44 MiB is free."
)
SIZES: dict[LedgerKind, int] = {
    "driver": 512 * MIB, "others": 0, "context": 700 * MIB, "workspace": 10 * MIB, "weights": 13 * GIB,
    "kv_cache": GIB, "activations": GIB // 2, "fragmentation": GIB // 4, "headroom": GIB // 2, "left": GIB,
}  # fmt: skip
STAGE = Stage(
    gpu=3,
    uuid="GPU-a",
    name="NVIDIA L4",
    keys=("model",),
    ledger=tuple(LedgerLine(kind=kind, label=kind, size_bytes=size, source="made up") for kind, size in SIZES.items()),
    total_bytes=sum(SIZES.values()),
)
PLAN = Plan(
    model="org/a",
    machine="1 x L4",
    fits=True,
    workload=Workload(),
    dtype="bfloat16",
    prompt_tokens=1088,
    image_tokens=576,
    device_map={"": 0},
    max_memory={},
    cuda_visible_devices="GPU-a",
    stages=(STAGE,),
    limits=Limits(prompt_tokens=9000, new_tokens=3000, batch=4, images=3, image_edge=1344),
)


def facts(*, peak: int = 20 * GIB, reserved: int = 20 * GIB, others: int = 0) -> GpuFacts:
    allocator = Allocator(
        allocated=18 * GIB, peak=peak, reserved=reserved, free=300 * MIB, total=22 * GIB, segments=40, split=MIB, retries=2
    )
    process = GpuProcess(pid=77, kind="compute", used_bytes=others, user="ann", command="python train.py")
    return GpuFacts(0, STAGE, allocator, 13 * GIB, (process,) if others else ())


def caught(error: BaseException, cause: BaseException | None = None, context: BaseException | None = None) -> BaseException:
    error.__cause__, error.__context__ = cause, context
    return error


OOM = OutOfMemoryError(SAID)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OOM, (OOM, True)),
        (caught(ValueError("x"), cause=OOM), (OOM, True)),
        (caught(ValueError("x"), context=OOM), (OOM, False)),
        (caught(ValueError("x"), cause=caught(KeyError("y"), context=OOM)), (OOM, False)),
        (ValueError("out of memory of the words"), None),
        (RuntimeError("CUDA error: device-side assert triggered"), None),
    ],
)
def test_it_is_found_however_it_is_wrapped(error: BaseException, expected: object) -> None:
    assert find(error) == expected


def test_it_is_found_in_an_exception_group() -> None:
    error = ValueError("two workers failed")
    error.exceptions = (KeyError("k"), OOM)  # type: ignore[attr-defined]

    assert find(error) == (OOM, True)


def test_libraries_of_cuda_say_it_in_their_own_words() -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    assert find(error) == (error, True)


def test_a_chain_that_bites_its_tail_ends() -> None:
    error = ValueError("x")
    error.__context__ = KeyError("y")
    error.__context__.__context__ = error

    assert find(error) is None


def test_planned_stands_beside_found() -> None:
    text = describe(PLAN, [facts()])

    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:9] == [
        "GPU 3 (NVIDIA L4), cuda:0 planned found",
        "other processes 0 MiB 0 MiB",
        "driver, CUDA context, libraries 1.2 GiB 1.7 GiB",
        "weights 13.0 GiB 13.0 GiB",
        "KV cache, activations, workspace 1.5 GiB 5.0 GiB",
        "gaps in the allocator's segments 256 MiB 2.0 GiB",
        "headroom and what is left: free 1.5 GiB 300 MiB",
        "in all 17.4 GiB 22.0 GiB",
        "torch: 18.0 GiB in tensors now, 20.0 GiB at most; 20.0 GiB in 40 segments, 1 MiB of it in blocks that nobody "
        "uses; 2 retries",
    ]
    assert "override the fixture vlm_workload" in text
    assert "calls of up to 1088 prompt tokens (1 image), 256 new tokens, batch 1:" in text
    assert "prompts of 9000 tokens, a batch of 4, 3 images in a prompt, images of 1344 pixels" in text


def test_a_plan_for_forward_passes_speaks_of_no_new_tokens() -> None:
    forward = msgspec.structs.replace(PLAN, workload=Workload(logits="forward"))
    assert "calls of up to 1088 prompt tokens (1 image), batch 1:" in describe(forward, [facts()])


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (facts(others=3 * GIB), "other processes hold 3.0 GiB more than when the model was placed."),
        (facts(), "its tensors took more than was planned for; plan for calls of this size with the fixture vlm_workload."),
        (facts(peak=14 * GIB, reserved=21 * GIB), "memory is there, but in pieces too small."),
        (facts(peak=14 * GIB, reserved=19 * GIB), "see what was planned beside what is there."),
    ],
)
def test_the_sentence_names_the_cause(found: GpuFacts, cause: str) -> None:
    assert headline(OOM, PLAN, [found]) == (
        f"VLM752: out of GPU memory on cuda:0 in the test, when it asked for 2.00 GiB more: {cause}"
    )


def test_other_processes_are_named() -> None:
    assert "pid 77 (ann, python train.py): 3.0 GiB" in describe(PLAN, [facts(others=3 * GIB)])


def test_gaps_have_a_setting() -> None:
    assert "expandable_segments:True" in describe(PLAN, [facts(peak=14 * GIB, reserved=21 * GIB)])
    assert "expandable_segments:True" not in describe(PLAN, [facts(peak=14 * GIB, reserved=19 * GIB)])


def test_without_any_figures_there_is_still_advice() -> None:
    assert "make the call smaller" in describe(None, [])
    assert headline(RuntimeError("CUDA error: out of memory"), None, []) == (
        "VLM752: out of GPU memory in the test: the model was not placed by a plan, so nothing was compared."
    )


SUITE = f"""
import pytest
pytestmark = pytest.mark.vlm("org/a")
class OutOfMemoryError(RuntimeError): pass
def call():
    raise OutOfMemoryError({SAID!r})
def test_bare(vlm):
    call()
def test_wrapped(vlm):
    try: call()
    except RuntimeError as error: raise ValueError("the request failed") from error
def test_other(vlm):
    try: call()
    except RuntimeError: pytest.fail("the server died")
@pytest.fixture
def answers(vlm):
    call()
def test_fixture(answers): pass
@pytest.mark.xfail
def test_expected(vlm):
    call()
@pytest.mark.xfail(raises=ValueError)
def test_unexpected(vlm):
    call()
def test_skips(vlm):
    pytest.skip("later")
"""


def test_the_report_has_the_ledger_and_the_projects_own_lines(suite: Any) -> None:
    result = suite.run("--junitxml=out.xml", test_x=SUITE)

    result.assert_outcomes(failed=4, errors=1, xfailed=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*_ test_bare _*",
            ">       call()",
            "E   VLM752: out of GPU memory on cuda:0 in the test, when it asked for 2.00 GiB more: see what was planned *",
            "*vlmgpu: planned and found*",
            "GPU 0 (NVIDIA L4), cuda:0 * planned * found",
            "  weights * 4.0 GiB * -",
            "what to do:",
            "what torch said: CUDA out of memory. Tried to allocate 2.00 GiB*",
            "*_ test_wrapped _*",
            "*OutOfMemoryError: CUDA out of memory*",
            "The above exception was the direct cause of the following exception:",
            "E   VLM752: out of GPU memory on cuda:0 *",
            "*_ test_other _*",
            "E       Failed: the server died",
            "*vlmgpu: planned and found*",
            "VLM752: out of GPU memory on cuda:0 *",
        ]
    )
    result.stdout.fnmatch_lines(["FAILED test_x.py::test_bare - VLM752: out of GPU memory on cuda:0*"])
    assert 'message="VLM752: out of GPU memory' in (suite.folder / "out.xml").read_text()


def test_the_whole_traceback_is_there_on_demand(suite: Any) -> None:
    quiet = suite.run("-k", "bare", test_x=SUITE).stdout.str()
    loud = suite.run("-k", "bare", "-v", test_x=SUITE).stdout.str()

    assert "the whole traceback" not in quiet
    assert "the whole traceback" in loud


@pytest.mark.parametrize("style", ["long", "short", "line", "native", "no"])
def test_every_style_of_traceback_names_the_code(suite: Any, style: str) -> None:
    result = suite.run("-k", "bare or wrapped", f"--tb={style}", test_x=SUITE)

    result.assert_outcomes(failed=2)
    assert "VLM752" in result.stdout.str()
    assert "INTERNALERROR" not in result.stdout.str()


def test_it_reaches_the_controller_of_xdist(suite: Any) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")

    result = suite.run("-n1", "-k", "bare", test_x=SUITE)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E   VLM752: *", "*vlmgpu: planned and found*", "  weights * 4.0 GiB*"])


def test_nothing_of_a_failed_test_stays_in_memory(suite: Any) -> None:
    result = suite.run(
        test_x="""
        import gc, pytest, weakref
        pytestmark = pytest.mark.vlm("org/a")
        class OutOfMemoryError(RuntimeError): pass
        class Tensor: pass
        KEPT = []
        def test_fails(vlm):
            big = Tensor()
            KEPT.append(weakref.ref(big))
            def inner():
                same = big
                raise OutOfMemoryError("CUDA out of memory.")
            try: inner()
            except RuntimeError as error: raise ValueError("wrapped") from error
        def test_next(vlm):
            gc.collect()
            assert KEPT[0]() is None
        """
    )

    result.assert_outcomes(failed=1, passed=1)


def test_a_test_that_is_run_again_begins_anew(suite: Any) -> None:
    suite.configure(
        """
from _pytest.runner import runtestprotocol
def pytest_runtest_protocol(item, nextitem):
    for attempt in range(2):
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            if attempt: item.ihook.pytest_runtest_logreport(report=report)
        item._initrequest()
    return True
"""
    )

    result = suite.run(
        test_x="""
        import pytest
        TRIES = []
        @pytest.mark.vlm("org/a")
        def test_x(vlm):
            TRIES.append(1)
            if len(TRIES) == 1: raise MemoryError("CUDA out of memory")
        """
    )

    result.assert_outcomes(passed=1)
